"""What a path means: files, indices, folders of every make, and what is wrong with some."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.safetensors_bytes import build
from mla_study.checkpoints.locate import locate
from mla_study.checkpoints.opening import open_checkpoint
from mla_study.errors import UserError

TINY = build({"a.k.weight": np.ones((2, 2), np.float32)})
WAN = "diffusion_pytorch_model"


def lay(folder: Path, *names: str, **texts: Any) -> Path:
    """Files with tiny weights, and JSON files (``config_json=...``)."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(TINY)
    for name, data in texts.items():
        text = data if isinstance(data, str) else json.dumps(data)
        (folder / name.replace("_json", ".json")).write_text(text)
    return folder


def index(folder: Path, name: str, shards: Sequence[str], **extra: Any) -> None:
    """An index over shards that hold one tensor each."""
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        (folder / shard).parent.mkdir(parents=True, exist_ok=True)
        (folder / shard).write_bytes(build({f"b.{i}.k.weight": np.full((2, 2), i, np.float32)}))
        weight_map[f"b.{i}.k.weight"] = shard
    (folder / name).write_text(json.dumps({"weight_map": weight_map} | extra))


def names(path: Path | str) -> list[str]:
    return [Path(file).name for file in locate(str(path)).files]


def refused(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        locate(str(path))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert ": " in sentence or "(" in sentence
    return sentence


def test_one_file(tmp_path: Path) -> None:
    file = lay(tmp_path, "x.safetensors", "y.pt") / "x.safetensors"
    found = locate(str(file))
    assert found.files == (str(file),)
    assert (found.config, found.config_path, found.notes) == (None, None, ())
    lay(tmp_path, config_json={"num_layers": 3}, adapter_config_json={})
    found = locate(str(file))
    assert found.config == {"num_layers": 3}
    assert found.config_path == str(tmp_path / "config.json")
    assert found.adapter_config == str(tmp_path / "adapter_config.json")
    assert "does not exist" in refused(tmp_path / "absent.safetensors")
    assert "is empty" in refused("")
    assert "check the path" in refused("x" * 5000) or "does not exist" in refused("x" * 5000)
    assert "does not exist" in refused("a\0b")


def test_original_wan(tmp_path: Path) -> None:
    extra = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth")
    one = lay(tmp_path / "1.3B", f"{WAN}.safetensors", *extra, config_json={"num_layers": 30})
    found = locate(str(one))
    assert names(one) == [f"{WAN}.safetensors"]
    assert found.config == {"num_layers": 30}
    assert "not Wan2.1_VAE.pth, models_t5" in found.notes[0]
    shards = [f"{WAN}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    many = lay(tmp_path / "14B", *extra, config_json={})
    index(many, f"{WAN}.safetensors.index.json", shards)
    found = locate(str(many))
    assert names(many) == shards
    assert found.index == str(many / f"{WAN}.safetensors.index.json")
    assert found.weight_map is not None
    assert found.weight_map["b.1.k.weight"] == str(many / shards[1])
    assert found.notes == ()
    (many / f"{WAN}.safetensors.index.json").unlink()
    assert names(many) == shards
    assert "not Wan2.1_VAE.pth" in locate(str(many)).notes[0]
    note = locate(str(many / shards[1])).notes
    assert "is one of 3 shards: name its folder or index" in note[0]
    (many / shards[1]).unlink()
    assert "holds 2 of the 3 shards" in refused(many)


def test_diffusers_pipeline(tmp_path: Path) -> None:
    folder = lay(
        tmp_path, f"transformer/{WAN}.safetensors", f"vae/{WAN}.safetensors",
        "text_encoder/model.safetensors", model_index_json={},
    )  # fmt: skip
    (folder / "transformer" / "config.json").write_text('{"num_layers": 2}')
    for path in (folder, folder / "model_index.json", f"{folder}/"):
        found = locate(str(path))
        assert found.files == (str(folder / "transformer" / f"{WAN}.safetensors"),)
        assert found.config == {"num_layers": 2}
        assert "component 'transformer', not text_encoder, vae" in found.notes[0]
    assert names(folder / "vae") == [f"{WAN}.safetensors"]
    # single-file weights beside the components, as some repositories have them
    lay(folder, "v1-5-pruned.safetensors", "v1-5-pruned-emaonly.safetensors")
    assert locate(str(folder)).files == found.files
    (folder / "model_index.json").unlink()
    assert "several weight files: name one of v1-5" in refused(folder)


def test_one_component(tmp_path: Path) -> None:
    folder = lay(tmp_path, "unet/model.safetensors")
    assert names(folder) == ["model.safetensors"]
    folder = lay(tmp_path / "b", "checkpoint-5/model.safetensors", "checkpoint-9/model.safetensors")
    assert "name one of its folders: checkpoint-5, checkpoint-9" in refused(folder)
    assert names(folder / "checkpoint-9") == ["model.safetensors"]


def test_trainer_folder(tmp_path: Path) -> None:
    folder = lay(tmp_path, "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                 "training_args.bin", config_json={})  # fmt: skip
    assert names(folder) == ["model.safetensors"]
    assert locate(str(folder)).notes == ()
    (folder / "model.safetensors").rename(folder / "step_500.safetensors")
    assert names(folder) == ["step_500.safetensors"]
    (folder / "step_500.safetensors").unlink()
    assert "holds no weight file" in refused(folder)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        ([f"{WAN}.fp16.safetensors", f"{WAN}.safetensors"], [f"{WAN}.safetensors"]),
        ([f"{WAN}.fp16.safetensors", f"{WAN}.fp16.bin"], [f"{WAN}.fp16.safetensors"]),
        ([f"{WAN}.bin", f"{WAN}.fp16.safetensors"], [f"{WAN}.bin"]),
        (["mine.pt", "mine.safetensors"], ["mine.safetensors"]),
        (["adapter_model.safetensors", "other.pt"], ["adapter_model.safetensors"]),
        (["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"],
         ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]),
        (["pytorch_model-00001-of-00001.bin", "model-00001-of-00001.safetensors"],
         ["model-00001-of-00001.safetensors"]),
        (["m-00001-of-00002.fp16.safetensors", "m-00002-of-00002.fp16.safetensors",
          "m-00001-of-00001.safetensors"], ["m-00001-of-00001.safetensors"]),
        (["x-00001-of-00002.gguf", "x-00002-of-00002.gguf", "mmproj.gguf"],
         ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]),
    ],
)  # fmt: skip
def test_preferences(files: list[str], chosen: list[str], tmp_path: Path) -> None:
    assert names(lay(tmp_path, *files)) == chosen


@pytest.mark.parametrize(
    "files",
    [
        ["a.pt", "b.pt"],
        [f"{WAN}.fp16.safetensors", f"{WAN}.bf16.safetensors"],
        ["a-Q4.gguf", "a-Q8.gguf"],
        ["a-00001-of-00001.pt", "b-00001-of-00001.pt"],
        [f"w{i}.pt" for i in range(9)],
    ],
)
def test_several_weights(files: list[str], tmp_path: Path) -> None:
    sentence = refused(lay(tmp_path, *files))
    assert "holds several weight files: name one of " in sentence
    assert all(name in sentence for name in files[:6])
    assert ("and 3 more" in sentence) == (len(files) == 9)


@pytest.mark.parametrize(
    ("indices", "chosen"),
    [
        (["model.safetensors.index.json", "pytorch_model.bin.index.json"], 0),
        ([f"{WAN}.safetensors.index.json", f"{WAN}.fp16.safetensors.index.json"], 0),
        ([f"{WAN}.safetensors.index.fp16.json", f"{WAN}.safetensors.index.json"], 1),
        ([f"{WAN}.safetensors.index.fp16.json"], 0),
        (["pytorch_model.bin.index.json"], 0),
    ],
)
def test_indices(indices: list[str], chosen: int, tmp_path: Path) -> None:
    for i, name in enumerate(indices):
        index(tmp_path, name, [f"s{i}-0000{j}-of-00002.safetensors" for j in (1, 2)])
    want = [f"s{chosen}-0000{j}-of-00002.safetensors" for j in (1, 2)]
    assert names(tmp_path) == want
    assert names(tmp_path / indices[chosen]) == want
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.read("b.1.k.weight").sum() == 4


def test_shards_in_a_subfolder(tmp_path: Path) -> None:
    index(tmp_path, "model.safetensors.index.json", ["parts/1.safetensors", "parts/2.safetensors"])
    assert names(tmp_path) == ["1.safetensors", "2.safetensors"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "holds no JSON object"),
        ({}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({"weight_map": {"a.k": 3}}, "sends tensor 'a.k' to '3', which is no file name"),
        ({"weight_map": {"a.k": ["s"]}}, "which is no file name"),
        ({"weight_map": {"a.k": None}}, "which is no file name"),
        ({"weight_map": {"a.k": ""}}, "which is no file name"),
        ({"weight_map": {"a.k": "../s.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a.k": "/etc/passwd"}}, "outside its folder"),
        ({"weight_map": {"a.k": "https://x/y"}}, "outside its folder"),
        ({"weight_map": {"a.k": "x/../../y"}}, "outside its folder"),
        ({"weight_map": {"a.k": "s.safetensors", "b": "s.safetensors"}},
         r"names the shard s.safetensors, which is missing \(2 of its tensors"),
        ({"weight_map": {"a.k": "\0"}}, "which is missing"),
        ({"weight_map": {"a.k": "\ud800"}}, "which is missing"),
        ({"weight_map": {"a.k": "folder"}}, "which is missing"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"total": ' + "9" * 5000 + "}", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
    ],
)  # fmt: skip
def test_bad_index(data: Any, says: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / "model.safetensors.index.json"
    if isinstance(data, bytes):
        file.write_bytes(data)
    else:
        file.write_text(data if isinstance(data, str) else json.dumps(data))
    for path in (file, tmp_path):
        with pytest.raises(UserError, match=says) as caught:
            locate(str(path))
        assert str(file) in str(caught.value)


def test_index_and_shards_of_different_models(tmp_path: Path) -> None:
    lay(tmp_path, "s.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a.k.weight": "s.safetensors", "a.v.weight": "s.safetensors"}})
    )
    with pytest.raises(UserError, match=r"'a\.v\.weight' lies in .*s\.safetensors, but it does"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "other_index.json").write_text("{}")
    assert "has no weight_map" in refused(tmp_path / "other_index.json")


@pytest.mark.parametrize("text", ["[]", "3", "{", "null"])
def test_bad_config(text: str, tmp_path: Path) -> None:
    lay(tmp_path, "model.safetensors", config_json=text)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        sentence = refused(path)
        assert str(tmp_path / "config.json") in sentence
        assert "replace it" in sentence


def test_params_json(tmp_path: Path) -> None:
    lay(tmp_path, "consolidated.00.pth", params_json={"n_heads": 4})
    assert locate(str(tmp_path)).config == {"n_heads": 4}


def test_empty_folders(tmp_path: Path) -> None:
    sentence = refused(tmp_path)
    assert "holds no weight file: name a folder with one of *.safetensors" in sentence
    lay(tmp_path, "readme.md", ".hidden.safetensors", ".cache/x.safetensors", config_json={})
    assert "holds no weight file" in refused(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    lay(tmp_path, "x.pt")
    assert names(tmp_path) == ["x.pt"]


def test_unreadable_folder(tmp_path: Path) -> None:
    lay(tmp_path / "shut", "x.safetensors")
    lay(tmp_path, "y.safetensors")
    (tmp_path / "shut").chmod(0)
    try:
        if os.access(tmp_path / "shut", os.R_OK):
            pytest.skip("root may list any folder")
        assert "check" in refused(tmp_path / "shut")
        assert names(tmp_path) == ["y.safetensors"]
    finally:
        (tmp_path / "shut").chmod(0o700)


def test_real_folders(fixtures: Path) -> None:
    folder = fixtures / "formats"
    plain = open_checkpoint(str(folder / "original_wan"))
    renamed = open_checkpoint(str(folder / "diffusers"))
    np.testing.assert_array_equal(
        plain.read("blocks.1.self_attn.o.weight"), renamed.read("blocks.1.attn1.to_out.0.weight")
    )
    assert renamed.config is not None
    assert renamed.config["num_layers"] == 2
    assert "several weight files" in refused(folder / "self_forcing")
