"""Saving in every layout: names, shards, atomicity, and what a layout cannot hold."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoints.wan_files import TINY, TINY_LATENT, random_state, same
from mla_study.checkpoints.wan import stage
from mla_study.checkpoints.wan.load import WanSource, load_model
from mla_study.checkpoints.wan.names import to_diffusers
from mla_study.checkpoints.wan.save import save_model
from mla_study.config import ModelConfig, mini
from mla_study.errors import UserError
from mla_study.model.transformer import WanTransformer

I2V = replace(TINY, model_type="i2v", in_channels=36)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Writes beyond this many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestLayouts:
    @pytest.mark.parametrize("config", [TINY, I2V], ids=["t2v", "i2v"])
    @pytest.mark.parametrize("layout", ["original", "diffusers", "self-forcing", "latent"])
    @pytest.mark.parametrize("dtype", [None, "bf16"])
    def test_there_and_back(
        self, tmp_path: Path, seed: int, config: ModelConfig, layout: str, dtype: str | None
    ) -> None:
        state = random_state(config, seed)
        save_model(state, tmp_path / "m", layout, dtype, config=config)  # type: ignore[arg-type]
        model = load_model(tmp_path / "m")
        kind = torch.bfloat16 if dtype else torch.float32
        assert same(dict(model.state_dict()), {n: t.to(kind) for n, t in state.items()})
        known = replace(config, name=model.config.name)
        assert model.config == known

    @pytest.mark.parametrize("config", [TINY_LATENT, mini(), mini(latent=True)])
    def test_our_own_holds_everything(self, tmp_path: Path, seed: int, config: ModelConfig) -> None:
        torch.manual_seed(seed)
        model = WanTransformer(config)
        save_model(model, tmp_path / "m", "latent", metadata={"init": "spectral", "steps": 3})
        again = load_model(tmp_path / "m")
        assert again.config == config
        assert same(dict(again.state_dict()), dict(model.state_dict()))
        metadata = WanSource(tmp_path / "m").describe().metadata
        assert metadata == {"schema": 1, "init": "spectral", "steps": 3}
        # the file alone says as much
        (tmp_path / "m/config.json").unlink()
        assert load_model(tmp_path / "m/model.safetensors").config == config

    def test_self_forcing_as_upstream_reads_it(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        save_model(state, tmp_path / "ema.pt", "self-forcing", config=TINY)
        stored = torch.load(tmp_path / "ema.pt", weights_only=True)
        assert list(stored) == ["generator"]
        assert same(stored["generator"], {f"model.{n}": t for n, t in state.items()})
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["_class_name"] == "CausalWanModel" and config["local_attn_size"] == 10

    def test_views_are_saved_alone(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        shared = torch.randn(2, 20, 20)
        state["blocks.0.self_attn.q.weight"] = shared[0]
        state["blocks.0.self_attn.k.weight"] = shared[1].T
        for layout in ("self-forcing", "original"):
            save_model(state, tmp_path / layout, layout, config=TINY)  # type: ignore[arg-type]
            assert same(dict(load_model(tmp_path / layout).state_dict()), state)
        stored = torch.load(tmp_path / "self-forcing/model.pt", weights_only=True)["generator"]
        q = stored["model.blocks.0.self_attn.q.weight"]
        assert q.untyped_storage().nbytes() == 4 * q.numel()

    @pytest.mark.parametrize("layout", ["original", "diffusers", "latent"])
    def test_shards(self, tmp_path: Path, seed: int, layout: str) -> None:
        state = random_state(TINY, seed)
        save_model(state, tmp_path / "m", layout, shard_size=9000, config=TINY)  # type: ignore[arg-type]
        stem = "model" if layout == "latent" else "diffusion_pytorch_model"
        index = json.loads((tmp_path / f"m/{stem}.safetensors.index.json").read_text())
        shards = sorted(set(index["weight_map"].values()))
        assert len(shards) > 2 and shards[0] == f"{stem}-00001-of-{len(shards):05d}.safetensors"
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
        assert names(tmp_path / "m") == sorted(
            [*shards, "config.json", f"{stem}.safetensors.index.json"]
        )
        assert same(dict(load_model(tmp_path / "m").state_dict()), state)

    def test_reference_library_reads_the_file(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        state["head.modulation"] = state["head.modulation"].half()  # narrower ones come last
        path = save_model(state, tmp_path / "m.safetensors", "diffusers", config=TINY)
        renamed = {to_diffusers(n) or "": t for n, t in state.items()}
        assert same(load_file(path), renamed)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}

    @pytest.mark.parametrize("layout", ["original", "diffusers", "self-forcing"])
    def test_what_they_cannot_hold(self, tmp_path: Path, seed: int, layout: str) -> None:
        for config, said in (
            (TINY_LATENT, "has latent self-attention"),
            (mini(), "has learned positions"),
            (replace(TINY, rope_base=100.0), "has base 100"),
        ):
            with pytest.raises(UserError, match=said):
                save_model(random_state(config, seed), tmp_path / "m", layout, config=config)  # type: ignore[arg-type]
        assert names(tmp_path) == []


class TestBadInput:
    def test_state_dict_that_does_not_fit(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        with pytest.raises(UserError, match="give config as well"):
            save_model(state, tmp_path / "m")
        state["blocks.0.norm3.bias"] = torch.zeros(19)
        del state["head.head.bias"]
        with pytest.raises(UserError, match=r"bias is missing; blocks\.0\.norm3\.bias is \[19\]"):
            save_model(state, tmp_path / "m", config=TINY)

    def test_targets(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        with pytest.raises(UserError, match=r"cannot hold layout 'original': name a \.safetensors"):
            save_model(state, tmp_path / "m.pt", "original", config=TINY)
        with pytest.raises(UserError, match=r"cannot hold layout 'self-forcing': name a \.pt"):
            save_model(state, tmp_path / "m.safetensors", "self-forcing", config=TINY)
        with pytest.raises(UserError, match="holds nothing"):
            save_model(state, tmp_path / "m", shard_size=0, config=TINY)
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="is a file, and the weights need a folder"):
            save_model(state, tmp_path / "file", config=TINY)
        with pytest.raises(UserError, match="cannot be written"):
            save_model(state, tmp_path / "file/inside", config=TINY)

    def test_weights_in_the_way(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        folder = tmp_path / "m"
        save_model(state, folder, shard_size=9000, config=TINY)
        (folder / "README.md").write_text("mine")
        before = names(folder)
        with pytest.raises(UserError, match=r"holds config\.json, .* already"):
            save_model(state, folder, config=TINY)
        assert names(folder) == before
        newer = random_state(TINY, seed + 1)
        save_model(newer, folder, "latent", config=TINY, overwrite=True)
        # no older shard or index is left for a reader to prefer
        assert names(folder) == ["README.md", "config.json", "model.safetensors"]
        assert same(dict(load_model(folder).state_dict()), newer)

    def test_config_of_another_model_beside_a_file(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        save_model(state, tmp_path / "a.pt", "self-forcing", config=TINY)
        save_model(state, tmp_path / "b.safetensors", "diffusers", config=TINY)
        other = replace(TINY, heads=1)
        with pytest.raises(UserError, match=r"config\.json describes another model"):
            save_model(state, tmp_path / "c.pt", "self-forcing", config=other)
        with pytest.raises(UserError, match=r"a\.pt exists"):
            save_model(state, tmp_path / "a.pt", "self-forcing", config=TINY)
        assert names(tmp_path) == ["a.pt", "b.safetensors", "config.json"]

    @pytest.mark.parametrize("layout", ["original", "diffusers", "self-forcing", "latent"])
    @pytest.mark.parametrize("dtype", [None, "bf16"])
    def test_disk_full_in_the_middle(
        self, tmp_path: Path, seed: int, layout: str, dtype: str | None
    ) -> None:
        state = random_state(TINY, seed)
        with file_size_limit(15_000), pytest.raises(UserError, match="cannot be written"):
            save_model(state, tmp_path / "new/m", layout, dtype, config=TINY)  # type: ignore[arg-type]
        assert names(tmp_path) == []

    @pytest.mark.parametrize("layout", ["original", "self-forcing"])
    def test_disk_full_leaves_the_older_weights(
        self, tmp_path: Path, seed: int, layout: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state = random_state(TINY, seed)
        save_model(state, tmp_path / "m", layout, config=TINY)  # type: ignore[arg-type]
        before = names(tmp_path / "m")

        def full(_descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(stage.os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device.*free some space"):
            save_model(
                random_state(TINY, seed + 1), tmp_path / "m", layout, config=TINY, overwrite=True
            )  # type: ignore[arg-type]
        assert names(tmp_path / "m") == before
        assert same(dict(load_model(tmp_path / "m").state_dict()), state)
