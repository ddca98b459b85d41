"""Folders of a hub, and indices at an address, served on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints.range_server import Site, Start
from checkpoints.safetensors_bytes import build
from mla_study.checkpoints.locate import locate
from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.operators.find import find_operators
from mla_study.checkpoints.reader import OpenSpec
from mla_study.errors import UserError

SHA = "0123456789abcdef0123456789abcdef01234567"


def shards(count: int = 3) -> dict[str, bytes]:
    """An index and its shards, a block of attention each."""
    files: dict[str, bytes] = {}
    weight_map: dict[str, str] = {}
    for i in range(count):
        arrays = {f"model.blocks.{i}.self_attn.{r}.weight": np.full((3, 3), i, np.float32)
                  for r in "qkvo"}  # fmt: skip
        name = f"model-0000{i + 1}-of-0000{count}.safetensors"
        files[name] = build(arrays)
        weight_map |= dict.fromkeys(arrays, name)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


@pytest.mark.parametrize("query", ["", "?token=a/b"])
def test_index_at_an_address(start: Start, query: str) -> None:
    site = start(files={f"/m/{name}": data for name, data in shards().items()})
    address = f"{site.url}/m/model.safetensors.index.json{query}"
    checkpoint = open_checkpoint(address)
    assert [a.layer for a in find_operators(checkpoint).attentions] == [0, 1, 2]
    assert checkpoint.read("blocks.2.self_attn.k.weight").sum() == 18
    assert all(path.endswith(query) for path, _ in site.requests)
    checkpoint.close()
    del site.files["/m/model-00002-of-00003.safetensors"]
    with pytest.raises(UserError, match="model-00002-of-00003"):
        open_checkpoint(address)


def test_file_and_config_at_an_address(start: Start) -> None:
    file = next(iter(shards().values()))
    site = start(files={"/w.safetensors": file, "/c.json": b'{"num_heads": 3, "num_layers": 2}'})
    assert locate(f"{site.url}/w.safetensors").files == (f"{site.url}/w.safetensors",)
    spec = OpenSpec(f"{site.url}/w.safetensors", config=f"{site.url}/c.json")
    found = find_operators(open_checkpoint(spec))
    assert found.missing_layers == [1]
    assert found.attentions[0].heads is not None
    site.files["/x.safetensors.index.json"] = b"{}"
    with pytest.raises(UserError, match="has no weight_map"):
        locate(f"{site.url}/x.safetensors.index.json")


Serve = Callable[[dict[str, bytes]], Site]


@pytest.fixture
def hub(start: Start, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Serve files as the repository ``org/wan`` of a hub."""
    pytest.importorskip("huggingface_hub")

    def serve(files: dict[str, bytes]) -> Site:
        info = {"id": "org/wan", "sha": SHA, "siblings": [{"rfilename": n} for n in files]}
        site = start(
            files={f"/org/wan/resolve/{SHA}/{name}": data for name, data in files.items()}
            | {"/api/models/org/wan": json.dumps(info).encode()},
            extra={"Content-Type": "application/json"},
        )
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        return site

    return serve


def test_hub_pipeline(hub: Serve, tmp_path: Path) -> None:
    files = {f"transformer/{name}": data for name, data in shards().items()}
    hub(files | {"model_index.json": b"{}", "vae/model.safetensors": b"x", "README.md": b"",
                 ".gitattributes": b"",
                 "transformer/config.json": b'{"num_layers": 4, "num_heads": 3}'})  # fmt: skip
    for address in ("hf://org/wan", "hf://org/wan/transformer", "hf://org/wan/transformer/",
                    "hf://org/wan/model_index.json",
                    "hf://org/wan/transformer/model.safetensors.index.json"):  # fmt: skip
        checkpoint = open_checkpoint(address)
        found = find_operators(checkpoint)
        assert [a.layer for a in found.attentions] == [0, 1, 2]
        assert found.missing_layers == [3]
        assert checkpoint.config_path == f"hf://org/wan@{SHA}/transformer/config.json"
        assert all(file.startswith(f"hf://org/wan@{SHA}/transformer/") for file in checkpoint.files)
        checkpoint.close()
    found = locate("hf://org/wan/transformer/model-00002-of-00003.safetensors")
    assert len(found.files) == 1
    assert found.config is not None
    assert "one of 3 shards" in found.notes[0]
    with pytest.raises(UserError, match=r"there is no absent in it: name one of transformer/"):
        locate("hf://org/wan/absent")


def test_hub_index_that_names_a_missing_shard(hub: Serve) -> None:
    files = shards()
    del files["model-00003-of-00003.safetensors"]
    site = hub(files)
    with pytest.raises(UserError, match=r"names the shard model-00003.*is missing \(4 of its"):
        locate("hf://org/wan")
    assert not any("safetensors" in p and "index" not in p for p, _ in site.requests)


def test_hub_folder_without_weights(hub: Serve) -> None:
    hub({"README.md": b"", "a/x.safetensors": b"", "b/y.safetensors": b""})
    with pytest.raises(UserError, match="name one of its folders: a, b"):
        locate("hf://org/wan")


def test_hub_adapter(hub: Serve) -> None:
    rng = np.random.default_rng(0)
    down, up = (rng.standard_normal(s).astype(np.float32) for s in ((2, 5), (5, 2)))
    arrays = {f"base_model.model.layers.0.self_attn.{r}_proj.lora_{s}.weight": a
              for r in "kv" for s, a in (("A", down), ("B", up))}  # fmt: skip
    hub({"adapter_model.safetensors": build(arrays),
         "adapter_config.json": b'{"lora_alpha": 6, "r": 2}'})  # fmt: skip
    checkpoint = open_checkpoint("hf://org/wan")
    np.testing.assert_allclose(
        checkpoint.read("layers.0.self_attn.k_proj.weight"), 3.0 * up.astype(float) @ down
    )
