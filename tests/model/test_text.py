"""The text encoder against Wan's equations written out, its loading, and the file of embeddings."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mla_study.commands.text import Text, TextEncode, TextList
from mla_study.errors import UserError
from mla_study.model import text as text_module
from mla_study.model.embeddings import embeddings, save_embeddings
from mla_study.model.text import clean_prompt, load_text_encoder, needs_ftfy, original_text_name

transformers = pytest.importorskip("transformers")

HEADS, HEAD, WIDTH, FFN, LAYERS, VOCABULARY = 3, 5, 14, 22, 2, 61
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁ball", -1.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((c, -3.0) for c in LETTERS)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    # What the file says of padding and length must not show.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def original_state(seed: int) -> dict[str, torch.Tensor]:
    """Random weights of a tiny encoder under the names of Wan's file."""
    torch.manual_seed(seed)
    inner = HEADS * HEAD
    state = {"token_embedding.weight": torch.randn(VOCABULARY, WIDTH)}
    for index in range(LAYERS):
        block = {
            "norm1.weight": 1 + 0.1 * torch.randn(WIDTH),
            **{f"attn.{p}.weight": 0.4 * torch.randn(inner, WIDTH) for p in "qkv"},
            "attn.o.weight": 0.3 * torch.randn(WIDTH, inner),
            "norm2.weight": 1 + 0.1 * torch.randn(WIDTH),
            "ffn.gate.0.weight": 0.3 * torch.randn(FFN, WIDTH),
            "ffn.fc1.weight": 0.3 * torch.randn(FFN, WIDTH),
            "ffn.fc2.weight": 0.3 * torch.randn(WIDTH, FFN),
            "pos_embedding.embedding.weight": torch.randn(32, HEADS),
        }
        state |= {f"blocks.{index}.{name}": tensor for name, tensor in block.items()}
    return state | {"norm.weight": 1 + 0.1 * torch.randn(WIDTH)}


def bucket(distance: int) -> int:
    """Bidirectional T5 bucket of (key - query): 8 exact, then logarithmic up to 128."""
    side, away = (16 if distance > 0 else 0), abs(distance)
    if away < 8:
        return side + away
    return side + min(15, 8 + int(math.log(away / 8) / math.log(16) * 8))


def oracle(state: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """UMT5's encoder on one prompt without padding, in float64."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]

    x = w["token_embedding.weight"][ids]
    buckets = torch.tensor([[bucket(j - i) for j in range(len(ids))] for i in range(len(ids))])
    for index in range(LAYERS):
        p = f"blocks.{index}."
        y = norm(x, p + "norm1.weight")
        q, k, v = (
            (y @ w[f"{p}attn.{name}.weight"].T).unflatten(1, (HEADS, HEAD)).transpose(0, 1)
            for name in "qkv"
        )
        bias = w[p + "pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        mixed = (q @ k.transpose(1, 2) + bias).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).flatten(1) @ w[p + "attn.o.weight"].T
        y = norm(x, p + "norm2.weight")
        gate = F.gelu(y @ w[p + "ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ w[p + "ffn.fc1.weight"].T)) @ w[p + "ffn.fc2.weight"].T
    return norm(x, "norm.weight")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return original_state(3)


@pytest.fixture
def wan(state: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A Wan folder in the original layout with the tiny encoder."""
    folder = tmp_path / "wan"
    write_tokenizer(folder / "google/umt5-xxl/tokenizer.json")
    torch.save(state, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


def token_ids(prompt: str) -> list[int]:
    known = {"▁": 3, **{c: 5 + i for i, c in enumerate(LETTERS)}}
    pieces = ("▁" + prompt.replace(" ", "▁")) if prompt else ""
    ids: list[int] = []
    while pieces:
        if pieces.startswith("▁ball"):
            ids, pieces = [*ids, 4], pieces[5:]
        else:
            ids, pieces = [*ids, known[pieces[0]]], pieces[1:]
    return [*ids, 1]


def test_embeddings_are_wans(wan: Path, state: dict[str, torch.Tensor]) -> None:
    encoder = load_text_encoder(wan, torch.float32)
    prompts = ["a  red\tball", "", "x", "a long prompt " * 14]
    out = encoder.encode_prompts(prompts)
    assert out.shape == (4, 512, WIDTH)
    for row, prompt in zip(out, prompts, strict=True):
        expected = oracle(state, token_ids(" ".join(prompt.split())))
        count = len(expected)
        torch.testing.assert_close(row[:count].double(), expected, atol=2e-5, rtol=0)
        assert not row[count:].any()
    alone = encoder.encode_prompts(prompts[:1])
    torch.testing.assert_close(alone[0], out[0], atol=1e-5, rtol=0)
    assert encoder.notes == []


def test_diffusers_layout_gives_the_same(wan: Path, tmp_path: Path) -> None:
    first = load_text_encoder(wan, torch.float32)
    folder = tmp_path / "pipeline"
    first.model.save_pretrained(folder / "text_encoder", max_shard_size="8KB")
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    write_tokenizer(folder / "tokenizer/tokenizer.json")
    second = load_text_encoder(folder, torch.float32)
    assert second.identity == first.identity
    assert torch.equal(second.encode_prompts(["a ball"]), first.encode_prompts(["a ball"]))
    assert load_text_encoder(folder).model.dtype == torch.bfloat16


def test_original_names_go_one_to_one(state: dict[str, torch.Tensor]) -> None:
    config = transformers.UMT5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=HEAD,
        d_ff=FFN,
        num_layers=LAYERS,
        num_heads=HEADS,
    )
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    made = sorted(original_text_name(name) for name, _ in model.named_parameters())
    assert made == sorted(state)


def test_long_prompts_are_cut_and_told(wan: Path, state: dict[str, torch.Tensor]) -> None:
    encoder = load_text_encoder(wan, torch.float32, text_len=6)
    out = encoder.encode_prompts(["abcdefghij"])
    expected = oracle(state, [*token_ids("abcdefghij")[:5], 1])
    torch.testing.assert_close(out[0].double(), expected, atol=2e-5, rtol=0)
    assert "12 tokens" in encoder.notes[0]


def test_prompts_are_cleaned_as_wan_cleans_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_ftfy", lambda: None)
    assert clean_prompt("  a &amp;lt;b&gt;\n\tc\u3000d ") == "a <b> c d"
    assert needs_ftfy("it’s") and not needs_ftfy("it's\na ball")
    fake = types.SimpleNamespace(fix_text=lambda t: t.replace("’", "'"), __version__="0")
    monkeypatch.setattr(text_module, "_ftfy", lambda: fake)
    assert clean_prompt("it’s ") == "it's" and not needs_ftfy("it’s")


def test_what_is_absent_is_told(wan: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match=r"enc-bf16\.pth \(11\.4 GB.*Wan2\.1-T2V-1\.3B-Diffusers"):
        load_text_encoder(empty)
    tokenizer = wan / "google/umt5-xxl/tokenizer.json"
    tokenizer.write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        load_text_encoder(wan)
    tokenizer.unlink()
    for place in (wan, wan / "models_t5_umt5-xxl-enc-bf16.pth"):
        with pytest.raises(UserError, match=r"no Wan tokenizer: put google/umt5-xxl"):
            load_text_encoder(place)
    torch.save({"blocks.0.attn.q.weight": torch.zeros(2, 2)}, wan / "weights.pth")
    write_tokenizer(tokenizer)
    with pytest.raises(UserError, match="no text encoder of Wan"):
        load_text_encoder(wan / "weights.pth")


def test_the_command_keeps_adds_and_lists(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_text("\ufeffa red ball\n\n  a blue  ball \na red ball\n", encoding="utf-8")
    out = tmp_path / "new" / "prompts.safetensors"
    assert TextEncode(listed, wan, out, batch=1).run() == 0
    with pytest.raises(UserError, match=r"no embedding of the prompt 'a red bal'.*'a red ball'"):
        embeddings(out)["a red bal"]
    assert TextEncode(None, wan, out, prompt=("", "a red ball")).run() == 0
    found = embeddings(out)
    assert found.prompts == ["a red ball", "a blue  ball", ""] and "a blue ball" in found
    expected = load_text_encoder(wan).encode_prompts(["a blue ball", ""])
    torch.testing.assert_close(
        found.batch(["a blue ball", ""]), expected.float(), atol=0.02, rtol=0
    )
    assert found["a red ball"].shape == (512, WIDTH) and found.facts["dtype"] == "bfloat16"
    before = out.read_bytes()
    assert TextEncode(listed, wan, out).run() == 0
    assert out.read_bytes() == before
    with pytest.raises(UserError, match="was made otherwise"):
        TextEncode(None, wan, out, prompt=("new",), dtype="float32").run()
    capsys.readouterr()
    assert Text(TextList(out)).run() == 0
    assert "  a red ball\n" in capsys.readouterr().out


def test_damaged_and_foreign_files_are_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    place = tmp_path / "e.safetensors"
    save_embeddings(place, ["a", "b"], [torch.ones(2, 3), torch.ones(4, 3)], {"text_len": "8"})
    assert embeddings(place).batch(["b", "a"]).sum((1, 2)).tolist() == [12, 6]
    raw = bytearray(place.read_bytes())
    raw[-1] ^= 1
    place.write_bytes(raw)
    damaged = embeddings(place)
    with pytest.raises(UserError, match="SHA-256 differs"):
        damaged.batch(["a", "b"])
    save_file({"x": torch.zeros(1)}, place)
    with pytest.raises(UserError, match="holds no embeddings"):
        embeddings(place)
    with pytest.raises(UserError, match="cannot be written"):
        TextEncode(None, tmp_path, tmp_path, prompt=("a",)).run()
    with pytest.raises(UserError, match="no prompt"):
        TextEncode(None, tmp_path, place).run()


def test_nothing_heavy_is_imported_by_the_commands() -> None:
    modules = "mla_study.commands.text, mla_study.commands.vae"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
