"""Conversion between layouts, and what ``checkpoint info`` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import tyro
from safetensors.torch import load_file, save_file

from checkpoints.wan_files import TINY, TINY_LATENT, random_state, same, write_original
from mla_study.checkpoints.wan.convert import convert, weights_sha256
from mla_study.checkpoints.wan.info import info
from mla_study.checkpoints.wan.load import WanSource, load_model
from mla_study.checkpoints.wan.save import save_model
from mla_study.commands.checkpoint import Checkpoint, parse_size
from mla_study.errors import UserError

FORMATS = {
    "original_wan": "original",
    "original_wan_sharded": "original",
    "diffusers": "diffusers",
    "diffusers_sharded": "diffusers",
    "self_forcing/released_style.pt": "self-forcing",
    "self_forcing/trainer_ema_fsdp_prefix_bf16.pt": "self-forcing",
    "self_forcing/krea_style_model_prefix_bf16.safetensors": "krea",
}


def hashes(path: Path) -> dict[str, str]:
    """sha256 of the stored bytes of each tensor, by original name."""
    source = WanSource(path)
    return {name: source.checkpoint.raw_sha256(theirs) for name, theirs in source.names.items()}


def command(*words: object) -> int:
    flags = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)
    return tyro.cli(Checkpoint, args=[str(word) for word in words], config=flags).run()


@pytest.mark.parametrize("path", FORMATS)
def test_every_format_to_every_other_and_back(tmp_path: Path, fixtures: Path, path: str) -> None:
    source = fixtures / "formats" / path
    config = str(fixtures / "formats/original_wan") if "self_forcing" in path else None
    truth, home = hashes(source), FORMATS[path].replace("krea", "original")
    assert len(truth) == 69
    size = 500_000 if "sharded" in path else None
    for layout in {"original", "diffusers", "self-forcing", "latent"} - {FORMATS[path]}:
        there, back = tmp_path / layout, tmp_path / f"{layout}-back"
        convert(source, there, layout, config=config, shard_size=size)
        assert hashes(there) == truth and WanSource(there).layout == layout
        convert(there, back, home)
        assert hashes(back) == truth
        assert WanSource(there).describe().config == WanSource(back).describe().config


@pytest.mark.parametrize(
    "path", ["original_wan", "self_forcing/krea_style_model_prefix_bf16.safetensors"]
)
@pytest.mark.parametrize("shard_size", [None, 500_000])
def test_diffusers_opens_ours(
    tmp_path: Path, fixtures: Path, path: str, shard_size: int | None
) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = str(fixtures / "formats/original_wan")
    convert(fixtures / "formats" / path, tmp_path / "m", "diffusers", config, shard_size=shard_size)
    theirs, told = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(told.values())
    truth = load_file(
        fixtures / "formats/diffusers/transformer/diffusion_pytorch_model.safetensors"
    )
    rounded = torch.bfloat16 if "bf16" in path else torch.float32
    assert same(theirs.state_dict(), {n: t.to(rounded).float() for n, t in truth.items()})


def test_config_of_the_original_layout_is_upstreams(tmp_path: Path, fixtures: Path) -> None:
    convert(fixtures / "formats/diffusers", tmp_path / "m", "original")
    theirs = json.loads((fixtures / "formats/original_wan/config.json").read_text())
    assert json.loads((tmp_path / "m/config.json").read_text()) == theirs


def test_config_of_the_diffusers_layout_is_diffusers(tmp_path: Path, fixtures: Path) -> None:
    convert(fixtures / "formats/original_wan", tmp_path / "m", "diffusers")
    theirs = json.loads((fixtures / "formats/diffusers/transformer/config.json").read_text())
    ours = json.loads((tmp_path / "m/config.json").read_text())
    assert {**ours, "_diffusers_version": ""} == {**theirs, "_diffusers_version": ""}


def test_window_is_carried_along(tmp_path: Path, seed: int) -> None:
    folder = write_original(tmp_path / "m", TINY, random_state(TINY, seed))
    text = json.loads((folder / "config.json").read_text())
    text |= {"local_attn_size": 8, "sink_size": 2, "num_frame_per_block": 3}
    (folder / "config.json").write_text(json.dumps(text))
    convert(folder, tmp_path / "own", "latent")
    convert(tmp_path / "own", tmp_path / "sf", "self-forcing")
    window = load_model(tmp_path / "sf").config.window
    assert (window.sink, window.history, window.chunk) == (2, 3, 3)
    done = convert(tmp_path / "own", tmp_path / "d", "diffusers")
    assert "the window" in done.notes[-1]


def test_incomplete_and_without_config(tmp_path: Path, fixtures: Path) -> None:
    folder = fixtures / "formats/self_forcing"
    with pytest.raises(UserError, match=r"27 tensors are missing \(blocks\.1\.modulation"):
        convert(
            folder / "incomplete_missing_block1_fp16.pt",
            tmp_path / "m",
            "original",
            str(fixtures / "formats/original_wan/config.json"),
        )
    with pytest.raises(UserError, match=r"do not tell the number of heads: give --config"):
        convert(folder / "released_style.pt", tmp_path / "m", "original")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["diffusers", "self-forcing"])
def test_nan_leaves_nothing(tmp_path: Path, seed: int, layout: str) -> None:
    state = random_state(TINY, seed, torch.bfloat16)
    state["head.head.weight"][-1, -1] = float("nan")
    folder = write_original(tmp_path / "m", TINY, state)
    with pytest.raises(UserError, match=r"'head\.head\.weight' holds NaN"):
        convert(folder, tmp_path / "out", layout)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("layout", ["diffusers", "self-forcing"])
def test_cast(tmp_path: Path, seed: int, layout: str) -> None:
    state = random_state(TINY, seed)
    folder = write_original(tmp_path / "m", TINY, state)
    convert(folder, tmp_path / "out", layout, dtype="bf16")  # type: ignore[arg-type]
    loaded = dict(load_model(tmp_path / "out").state_dict())
    assert same(loaded, {n: t.to(torch.bfloat16) for n, t in state.items()})


@pytest.mark.parametrize("layout", ["diffusers", "self-forcing"])
def test_fp8_without_scales_stays(tmp_path: Path, seed: int, layout: str) -> None:
    state = random_state(TINY, seed)
    state["blocks.0.ffn.0.weight"] = state["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
    folder = write_original(tmp_path / "m", TINY, state)
    convert(folder, tmp_path / "out", layout)  # type: ignore[arg-type]
    assert hashes(tmp_path / "out") == hashes(folder)


def test_source_hash_is_that_of_the_weights(tmp_path: Path, fixtures: Path) -> None:
    own = []
    for name in ("original_wan_sharded", "diffusers"):
        convert(fixtures / "formats" / name, tmp_path / name, "latent")
        own.append(json.loads((tmp_path / name / "config.json").read_text())["metadata"])
    assert own[0] == own[1]
    assert own[0]["source_sha256"] == weights_sha256(WanSource(tmp_path / "diffusers"))


class TestInfo:
    def test_complete(self, fixtures: Path) -> None:
        found = info(fixtures / "formats/diffusers_sharded")
        assert (found.layout, found.files, found.tensors, found.parameters) == (
            "diffusers", 3, 69, 322144,
        )  # fmt: skip
        text = found.text()
        assert "3 heads of 32" in text and "complete against the config" in text
        assert "our default, the config tells none" in text
        assert json.loads(json.dumps(found.plain()))["dtypes"] == {"F32": 322144}

    def test_incomplete(self, fixtures: Path) -> None:
        path = fixtures / "formats/self_forcing/incomplete_missing_block1_fp16.pt"
        assert "heads cannot be told from shapes" in info(path).text()
        found = info(path, str(fixtures / "formats/original_wan"))
        assert found.plain()["missing"][0] == "blocks.1.modulation"
        assert "27 tensors are missing" in found.text() and "F16" in found.text()

    def test_hole_without_config(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        del state["blocks.0.ffn.2.bias"]
        save_file(state, tmp_path / "x.safetensors")
        assert (
            "1 tensors are missing (blocks.0.ffn.2.bias)" in info(tmp_path / "x.safetensors").text()
        )

    def test_latent(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY_LATENT, seed)
        save_model(
            state, tmp_path / "m", "latent", config=TINY_LATENT, metadata={"init": "spectral"}
        )
        text = info(tmp_path / "m").text()
        assert "latent, d_c 7, d_q 9, split 4 + 6, rotary pairs 1x1x1" in text
        assert "init spectral" in text and "sink 2, history 3, chunk 1 (6 key frames)" in text
        save_file(state, tmp_path / "x.safetensors")
        bare = info(tmp_path / "x.safetensors")
        assert (bare.shapes["heads"], bare.shapes["d_nope"]) == (2, 4)
        assert "complete against its own depth" in bare.text()


class TestCommand:
    def test_info_and_convert(
        self, tmp_path: Path, fixtures: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = fixtures / "formats/self_forcing/released_style.pt"
        config = fixtures / "formats/original_wan/config.json"
        assert command("info", path, "--config", config, "--json") == 0
        assert json.loads(capsys.readouterr().out)["missing"] == []
        out = tmp_path / "out"
        words = ("convert", path, out, "--to", "diffusers", "--config", config)
        assert command(*words, "--weights", "generator_ema", "--shard-size", "500KB") == 0
        said = capsys.readouterr()
        assert said.out.startswith(f"wrote {out}: 69 tensors")
        assert (out / "diffusion_pytorch_model.safetensors.index.json").exists()
        assert load_model(out).head.head.bias.dtype == torch.bfloat16
        with pytest.raises(UserError, match="already: choose another folder, or say --overwrite"):
            command(*words)
        assert command(*words, "--overwrite") == 0
        assert load_model(out).head.head.bias.dtype == torch.float32

    @pytest.mark.parametrize(
        ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("700", 700), ("2k", 2000)]
    )
    def test_sizes(self, text: str, size: int) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "0", "five", "-1GB"])
    def test_wrong_sizes(self, text: str) -> None:
        with pytest.raises(UserError, match="is not understood"):
            parse_size(text)
