"""Whole checkpoints: what is converted, kept to the bit, measured, refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from mla_study.checkpoints.wan.load import load_model
from mla_study.checkpoints.wan.save import save_model
from mla_study.commands.latentize import Latentize, latent_config, parse_sweep
from mla_study.config import LatentConfig, ModelConfig
from mla_study.errors import UserError
from mla_study.model import latentize as module
from mla_study.model.conversion_report import DECISIONS
from mla_study.model.latentize import Options, latentize
from mla_study.model.transformer import WanTransformer, meta_model
from mla_study.probes.activations import collect_covariance, save_covariance
from mla_study.study.codehash import code_hash
from mla_study.study.runs import read_result

LATENT = LatentConfig(d_c=24, d_q=48, d_nope=24, d_rope=8, rope_pairs=(2, 1, 1))
OPTIONS = Options(LATENT, samples=1)


hashed_once = cache(code_hash)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the tokens a sample, and the code hashed once: the tests are about the rest."""
    monkeypatch.setattr("mla_study.model.conversion_inputs.TOKENS", 100)
    for place in ("codehash", "runs"):
        monkeypatch.setattr(f"mla_study.study.{place}.code_hash", hashed_once)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint with an odd depth and a head split that no axis shares."""
    torch.manual_seed(11)
    config = ModelConfig(
        name="small",
        layers=3,
        width=96,
        heads=3,
        ffn_width=64,
        freq_dim=16,
        text_dim=12,
        text_len=7,
        latent_size=(10, 12),
    )
    model = WanTransformer(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.normal_(1.0 if "norm" in name else 0.0, 0.2)
    folder = tmp_path_factory.mktemp("small") / "dense"
    save_model(model, folder, layout="latent", dtype="bf16")
    return folder


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    result = read_result(folder / "conversion")
    return result.table, result.tables["ranks"]


def test_the_fixture_checkpoint(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "formats" / "original_wan"
    said: list[str] = []
    done = latentize(source, tmp_path / "out", replace(OPTIONS, init="activation"), say=said.append)
    assert any("Gaussian noise" in note for note in said)
    model = load_model(tmp_path / "out")
    assert model.config.latent == LATENT and not (tmp_path / "out" / ".latentize").exists()
    dense = load_model(source)
    own = model.state_dict()
    shared = [name for name in own if name in dense.state_dict()]
    kept = [name for name in shared if not name.endswith("self_attn.o.bias")]
    assert len(kept) == 69 - 2 * 9
    assert all(torch.equal(own[name], dense.state_dict()[name]) for name in kept)
    x, t = torch.randn(1, 16, 3, 8, 12), torch.tensor([700.0])
    with torch.no_grad():
        flow = model(x, t, model.condition(torch.randn(1, 5, 32)))
    assert torch.isfinite(flow).all()
    table, ranks = tables(tmp_path / "out")
    assert list(table["decision"]) == [*DECISIONS] * 2
    assert (ranks["r_0.99_after"] <= 24).all() and (ranks["r_0.99_before"] > 80).all()
    assert done.run["validity"] == "substitute" and "source" in done.run["identity"]["inputs"]
    beside = json.loads((tmp_path / "out" / "config.json").read_text())["metadata"]
    assert beside["init"] == "activation" and len(beside["source_sha256"]) == 64


def test_full_rank_leaves_the_documented_decisions_alone(small: Path, tmp_path: Path) -> None:
    """At d_c = d_q = d no error comes from the cuts, but for what bf16 storage rounds."""
    latent = replace(LATENT, d_c=96, d_q=96)
    for init in ("spectral", "activation"):
        done = latentize(small, tmp_path / init, Options(latent, init=init, samples=2))
        table = pd.DataFrame(done.rows).set_index(["layer", "decision"])
        for layer in range(3):
            at = table.loc[layer]
            for column in ("logit_error", "output_error"):
                assert at.loc["q_rank", column] == pytest.approx(
                    at.loc["shared_key", column], rel=0.03, abs=0.01
                )


def test_an_interrupted_conversion_ends_with_the_same_bytes(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latentize(small, tmp_path / "whole", OPTIONS)
    original = module.Probe.steps

    def stop_at(layer: int) -> Any:
        def steps(self: Any, conversion: Any, stored: Any) -> Any:
            if conversion.layer == layer:
                raise KeyboardInterrupt
            return original(self, conversion, stored)

        return steps

    finished: list[int] = []
    for layer in (1, 2):
        monkeypatch.setattr(module.Probe, "steps", stop_at(layer))
        with pytest.raises(KeyboardInterrupt):
            latentize(small, tmp_path / "cut", OPTIONS, progress=lambda n, _: finished.append(n))
    monkeypatch.setattr(module.Probe, "steps", original)
    latentize(small, tmp_path / "cut", OPTIONS, progress=lambda n, _: finished.append(n))
    assert finished == [0, 1, 1, 2, 2, 3]
    names = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*"))
    assert names == sorted(p.relative_to(tmp_path / "cut") for p in (tmp_path / "cut").rglob("*.*"))
    for name in names:
        if name.name != "run.json":
            a, b = (tmp_path / "whole" / name).read_bytes(), (tmp_path / "cut" / name).read_bytes()
            assert a == b, name


def test_what_another_conversion_left_is_kept(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_layout", lambda *_, **__: pytest.fail("stop here"))
        with pytest.raises(pytest.fail.Exception):
            latentize(small, tmp_path / "out", OPTIONS)
    with pytest.raises(UserError, match="already"):
        latentize(small, tmp_path / "out", replace(OPTIONS, seed=1))
    shutil.rmtree(tmp_path / "out" / "conversion")
    with pytest.raises(UserError, match="3 layers of an unfinished conversion"):
        latentize(small, tmp_path / "out", replace(OPTIONS, seed=1))
    killed = tmp_path / "out" / ".out.1.tmp"
    killed.mkdir()
    seen: list[int] = []
    latentize(small, tmp_path / "out", OPTIONS, progress=lambda n, _: seen.append(n))
    assert seen == [3] and not killed.exists()
    latentize(small, tmp_path / "s", replace(OPTIONS, sweep=(8,)))
    for other in (OPTIONS, replace(OPTIONS, sweep=(12,))):
        with pytest.raises(UserError, match="holds conversion already"):
            latentize(small, tmp_path / "s", other)


def test_a_damaged_last_layer_is_told_before_the_first_is_converted(
    small: Path, tmp_path: Path
) -> None:
    state = load_file(small / "model.safetensors")
    source = tmp_path / "damaged"
    source.mkdir()
    (source / "config.json").write_text((small / "config.json").read_text())
    seen: list[int] = []
    for name in ("blocks.2.self_attn.k.weight", "blocks.2.ffn.2.bias", "head.head.bias"):
        damaged = state[name].clone()
        damaged.view(-1)[5] = np.nan
        save_file(state | {name: damaged}, source / "model.safetensors")
        with pytest.raises(UserError, match=rf"'{re.escape(name)}' holds NaN"):
            latentize(source, tmp_path / "y", OPTIONS, progress=lambda n, _: seen.append(n))
        assert not (tmp_path / "y").exists()
    assert seen == [0, 0, 0]


def test_activation_beats_spectral_beats_random_on_structure(tmp_path: Path) -> None:
    """Weights and inputs whose spectra fall off, as training leaves them."""
    torch.manual_seed(4)
    config = ModelConfig(
        name="structured", layers=2, width=96, heads=3, ffn_width=64, freq_dim=16, text_dim=12,
        text_len=4, latent_size=(12, 12),
    )  # fmt: skip
    model = WanTransformer(config)
    scale = torch.arange(1, 97) ** -0.7
    with torch.no_grad():
        model.patch_embedding.weight.mul_(4 * scale[:, None, None, None, None])
        model.patch_embedding.bias.copy_(torch.randn(96) * scale)
        for block in model.blocks:
            for name in "qkv":
                left, sigma, right = torch.linalg.svd(getattr(block.self_attn, name).weight)
                fallen = sigma * torch.arange(1, 97) ** -0.4
                getattr(block.self_attn, name).weight.copy_(left @ torch.diag(fallen) @ right)
    save_model(model, tmp_path / "dense", layout="original")
    clips = tmp_path / "clips.safetensors"
    save_file({"latents": torch.randn(2, 16, 3, 12, 12).cumsum(2)}, clips)
    done = latentize(
        tmp_path / "dense", tmp_path / "sweep", replace(OPTIONS, sweep=(12, 24, 48)), latents=clips
    )
    table = pd.DataFrame(done.rows).query("decision == 'latent_norm'")
    error = table.groupby(["init", "d_c"])["output_error"].mean()
    for d_c in (12, 24, 48):
        assert error["activation", d_c] < error["spectral", d_c] < error["random", d_c], error
    assert error["activation", 48] < error["activation", 24] < error["activation", 12]
    assert done.run["validity"] == "full"


def test_sweep_writes_one_table_and_one_plot(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(fixtures / "formats" / "original_wan")
    command = Latentize(source, tmp_path / "s", split="24/8", samples=1, sweep="d_c=8,96")
    assert command.run() == 0
    out = capsys.readouterr()
    assert "no cut" in out.out and "Gaussian noise" in out.err
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"conversion", "sweep.png", "sweep.pdf"}
    table = read_result(tmp_path / "s" / "conversion").table
    assert set(table["d_c"]) == {8, 96} and len(set(table["init"])) == 4


def test_covariances_of_a_file_replace_those_collected(small: Path, tmp_path: Path) -> None:
    """Those of the very inputs give the same weights; another model's are refused."""
    model = load_model(small, dtype="fp32")
    options = replace(OPTIONS, init="activation")
    inputs = module.noise_inputs(model.config, 1, 0)
    held = collect_covariance(
        model,
        [inputs],
        r"self_attn\.k$",
        forward=lambda m, i: m(i.x[:1], i.t[:1], m.condition(i.context[:1])),
    )
    save_covariance(tmp_path / "c.safetensors", held)
    latentize(small, tmp_path / "a", options)
    latentize(small, tmp_path / "b", options, covariance=tmp_path / "c.safetensors")
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")

    def composed(held: dict[str, torch.Tensor], up: str) -> torch.Tensor:
        stem = "blocks.1.self_attn."
        return held[f"{stem}{up}.weight"].float() @ held[f"{stem}kv_down.weight"].float()

    gap = (composed(a, "v_up") - composed(b, "v_up")).norm() / composed(a, "v_up").norm()
    assert gap < 0.02
    save_covariance(tmp_path / "d.safetensors", {"blocks.0.self_attn.k": np.eye(96)})
    with pytest.raises(UserError, match="no covariance for block 1"):
        latentize(small, tmp_path / "e", options, covariance=tmp_path / "d.safetensors")
    narrow = {f"blocks.{i}.self_attn.k": np.eye(8) for i in range(3)}
    save_covariance(tmp_path / "d.safetensors", narrow)
    with pytest.raises(UserError, match="width is 96"):
        latentize(small, tmp_path / "e", options, covariance=tmp_path / "d.safetensors")


def test_bad_input_is_told_in_a_sentence(small: Path, tmp_path: Path) -> None:
    def refused(match: str, source: Path = small, **change: Any) -> None:
        command = Latentize(str(source), tmp_path / "x", **{"d_c": 24, "split": "24/8", **change})
        with pytest.raises(UserError, match=match):
            command.run()
        assert not (tmp_path / "x").exists()

    refused("must sum to it", split="24/16")
    refused("come in pairs", split="25/7")
    refused("not understood", split="24")
    refused("hold 5 pairs", pairs="2,2,1")
    refused("exceed the pairs", split="16/16", pairs="1,7,0")
    refused("exceeds the model", d_c=97)
    refused("at least 1", d_c=0)
    refused("at least 1 is needed", samples=0)
    refused("not understood", sweep="d_q=3")
    refused("different values", sweep="d_c=3,3")
    refused("exceeds the model", sweep="d_c=3,300")
    clip = tmp_path / "clip.safetensors"
    for tensors, match in (
        ({"latents": torch.zeros(1, 4, 3, 8, 8)}, "the model takes"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "no tensor 'latents'"),
        ({"latents": torch.full((1, 16, 3, 8, 8), np.nan)}, "NaN"),
        ({"latents": torch.zeros(1, 16, 3, 8, 8), "context": torch.zeros(1, 2, 3)}, "embeddings"),
        ({"latents": torch.zeros(1, 16, 3, 8, 8), "context": torch.zeros(1, 9, 12)}, "at most 7"),
        ({"latents": torch.zeros(1, 16, 3, 1, 8)}, "smaller than a patch"),
    ):
        save_file(tensors, clip)
        refused(match, latents=clip)
    refused("cannot be read", latents=tmp_path / "absent.safetensors")
    lora = tmp_path / "lora.safetensors"
    save_file(
        {
            "blocks.0.q.lora_A.weight": torch.zeros(2, 96),
            "blocks.0.q.lora_B.weight": torch.zeros(96, 2),
        },
        lora,
    )
    refused("adapter", source=lora)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        latentize(small, tmp_path / "file", OPTIONS)
    done = tmp_path / "done"
    latentize(small, done, OPTIONS)
    with pytest.raises(UserError, match="already"):
        latentize(small, done, OPTIONS)
    refused("latent attention already", source=done)


def test_sizes_default_to_the_papers_proportions() -> None:
    assert latent_config(1536, 128, 192, None, None, None) == LatentConfig()
    assert parse_sweep("d_c = 64, 128") == (64, 128)


def test_a_layer_of_the_1_3b_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(layers=1, ffn_width=64, text_dim=16, text_len=4, latent_size=(16, 16))
    shapes = {name: value.shape for name, value in meta_model(config).state_dict().items()}
    state = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    save_model(state, tmp_path / "dense", dtype="bf16", config=config)
    done = latentize(tmp_path / "dense", tmp_path / "out", Options(LatentConfig(), samples=1))
    ranks = pd.DataFrame(done.ranks)
    assert (ranks["r_0.99_after"] > 180).all()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    cached = [saved[f"blocks.0.self_attn.{n}.weight"].shape[0] for n in ("kv_down", "k_rope")]
    assert sum(cached) == 224 and saved["blocks.0.self_attn.k_up.weight"].shape == (1152, 192)
