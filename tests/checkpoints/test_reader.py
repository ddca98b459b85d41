"""One view over any checkpoint: peeled names, sets of weights, scaled fp8, configs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.making import Maker, find, opened, save, summary
from checkpoints.safetensors_bytes import build
from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.operators.find import find_operators
from mla_study.checkpoints.reader import OpenSpec, peel, peel_all
from mla_study.errors import UserError

# Names


@pytest.mark.parametrize(
    ("stored", "short"),
    [
        ("blocks.0.k.weight", "blocks.0.k.weight"),
        ("module.blocks.0.k.weight", "blocks.0.k.weight"),
        ("model.diffusion_model.blocks.0.k", "blocks.0.k"),
        ("generator.model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.k", "blocks.0.k"),
        ("_orig_mod.module.blocks.0._checkpoint_wrapped_module.k", "blocks.0.k"),
        ("base_model.model.model.layers.0.k_proj.base_layer.weight", "layers.0.k_proj.weight"),
        ("net.blocks.0.k", "blocks.0.k"),
        ("my_model.blocks.0.k", "my_model.blocks.0.k"),
        ("blocks.model.0.k", "blocks.model.0.k"),
        ("_orig_module.k", "_orig_module.k"),
        ("..k", "k"),
        ("model.", ""),
        ("", ""),
    ],
)
def test_peel(stored: str, short: str) -> None:
    assert peel(stored) == short


def test_collisions_keep_their_stored_names() -> None:
    names = ["a.k", "model.a.k", "model.a.v", "b.q"]
    peeled, chosen = peel_all(names)
    assert peeled == {n: n for n in names}
    assert chosen is None
    for names in (["_orig_mod.a", "a"], [".a", "a"], ["model.", "module.", ""]):
        peeled, _ = peel_all(names)
        assert sorted(peeled.values()) == sorted(names)


def test_live_weights_go_before_their_average() -> None:
    names = [f"{w}.model.blocks.{i}.k" for w in ("generator_ema", "generator") for i in range(2)]
    peeled, chosen = peel_all(names)
    assert peeled == {f"blocks.{i}.k": f"generator.model.blocks.{i}.k" for i in range(2)}
    assert chosen == "generator.model"
    peeled, chosen = peel_all(names, "generator_ema")
    assert peeled["blocks.0.k"] == "generator_ema.model.blocks.0.k"
    assert chosen == "generator_ema"
    assert peel_all(names, "critic")[0]["blocks.0.k"] == "generator.model.blocks.0.k"


def test_two_sets_in_one_safetensors_file(tmp_path: Path, seed: int) -> None:
    make = Maker(seed)
    arrays = {
        f"{w}.blocks.{i}.attn.{r}.weight": make(5, 5)
        for w in ("generator_ema", "generator")
        for i in range(2)
        for r in "kv"
    }
    checkpoint, found = find(tmp_path, arrays)
    assert summary(found) == [(0, "self", "k v"), (1, "self", "k v")]
    assert "several sets of weights: 'generator' is read; --weights NAME" in checkpoint.notes[0]
    np.testing.assert_array_equal(
        checkpoint.read("blocks.1.attn.k.weight"), arrays["generator.blocks.1.attn.k.weight"]
    )
    checkpoint = opened(tmp_path, arrays, weights="generator_ema")
    np.testing.assert_array_equal(
        checkpoint.read("blocks.1.attn.k.weight"), arrays["generator_ema.blocks.1.attn.k.weight"]
    )
    assert checkpoint.notes == []
    checkpoint = opened(tmp_path, arrays, weights="critic")
    assert "'critic' is ignored" in " ".join(checkpoint.notes)


def test_released_self_forcing(fixtures: Path) -> None:
    folder = fixtures / "formats"
    if not folder.is_dir():
        pytest.skip("tests/fixtures/formats is not there")
    plain = open_checkpoint(str(folder / "original_wan"))
    name = "blocks.1.self_attn.k.weight"
    reference = plain.read(name)
    for file, weights, factor in (
        ("released_style.pt", None, 1.0),
        ("released_style.pt", "generator_ema", 1.01),
        ("trainer_ema_fsdp_prefix_bf16.pt", None, None),
        ("krea_style_model_prefix_bf16.safetensors", None, None),
    ):
        checkpoint = open_checkpoint(OpenSpec(str(folder / "self_forcing" / file), weights))
        assert set(checkpoint.tensors) == set(plain.tensors)
        if factor is not None:
            np.testing.assert_allclose(checkpoint.read(name), reference * factor, rtol=1e-2 / 2.5)
    checkpoint = open_checkpoint(
        OpenSpec(
            str(folder / "self_forcing" / "incomplete_missing_block1_fp16.pt"),
            config=str(folder / "original_wan" / "config.json"),
        )
    )
    assert find_operators(checkpoint).missing_layers == [1]


def test_base_layers_beside_their_adapters(tmp_path: Path, seed: int) -> None:
    make = Maker(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for role in "kv":
        stem = f"base_model.model.layers.0.self_attn.{role}_proj"
        shapes |= {f"{stem}.base_layer.weight": (6, 5), f"{stem}.lora_A.default.weight": (2, 5),
                   f"{stem}.lora_B.default.weight": (6, 2)}  # fmt: skip
    checkpoint, found = find(tmp_path, make.all(shapes))
    assert summary(found) == [(0, "self", "k v")]
    assert "2 adapter pairs beside their base layers are not merged" in checkpoint.notes[0]


# fp8


def fp8(values: np.ndarray, kind: str = "F8_E4M3") -> tuple[np.ndarray, Any]:
    """Codes of values as torch casts them, and the torch tensor."""
    torch = pytest.importorskip("torch")
    dtype = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[kind]
    tensor = torch.from_numpy(values).to(dtype)
    return tensor.view(torch.uint8).numpy(), tensor


def scaled(
    folder: Path, arrays: dict[str, np.ndarray], dtypes: dict[str, str], config: Any = None
) -> Any:
    return open_checkpoint(save(folder, arrays, config, dtypes=dtypes))


K = "blocks.0.attn.k"


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (37,), (37, 1)])
def test_fp8_scales(
    kind: str, suffix: str, shape: tuple[int, ...], tmp_path: Path, seed: int
) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    codes, tensor = fp8(rng.standard_normal((37, 19)).astype(np.float32), kind)
    scale = rng.uniform(0.01, 3, shape).astype(np.float32)
    arrays = {f"model.{K}.weight": codes, f"model.{K}.{suffix}": scale,
              "model.scaled_fp8": np.zeros(0, np.uint8)}  # fmt: skip
    checkpoint = scaled(tmp_path, arrays, {f"model.{K}.weight": kind, "model.scaled_fp8": kind})
    column = torch.from_numpy(scale.reshape(-1, 1) if scale.size > 1 else scale.reshape(()))
    want = (tensor.to(torch.float32) * column).numpy()
    np.testing.assert_array_equal(checkpoint.read(f"{K}.weight"), want)
    np.testing.assert_array_equal(checkpoint.read(f"{K}.weight", 5, 31), want[5:31])


@pytest.mark.parametrize("block", [None, [128, 128], [64, 32], [48, 100], ["x", 0], [0, True]])
def test_fp8_blocks(block: list[Any] | None, tmp_path: Path, seed: int) -> None:
    """DeepSeek's scales of 128 x 128 blocks, the last ones cut; other sizes from the config."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    rows, columns = 300, 205
    known = block if block in ([64, 32], [48, 100]) else [128, 128]
    codes, tensor = fp8(rng.standard_normal((rows, columns)).astype(np.float32))
    grid = -(-rows // known[0]), -(-columns // known[1])
    scale = rng.uniform(0.01, 3, grid).astype(np.float32)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    arrays = {f"{K}.weight": codes, f"{K}.weight_scale_inv": scale}
    checkpoint = scaled(tmp_path, arrays, {f"{K}.weight": "F8_E4M3"}, config)
    wide = torch.from_numpy(scale).repeat_interleave(known[0], 0).repeat_interleave(known[1], 1)
    want = (tensor.to(torch.float32) * wide[:rows, :columns]).numpy()
    np.testing.assert_array_equal(checkpoint.read(f"{K}.weight"), want)
    for start, stop in ((0, 1), (127, 129), (250, 300), (299, 300)):
        np.testing.assert_array_equal(checkpoint.read(f"{K}.weight", start, stop), want[start:stop])


def test_fp8_scales_of_powers_of_two(tmp_path: Path, seed: int) -> None:
    """DeepSeek V3.1 stores its scales in E8M0, itself a kind of fp8."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    codes, tensor = fp8(rng.standard_normal((130, 129)).astype(np.float32))
    exponents = rng.integers(120, 134, (2, 2)).astype(np.uint8)
    arrays = {f"{K}.weight": codes, f"{K}.weight_scale_inv": exponents}
    dtypes = {f"{K}.weight": "F8_E4M3", f"{K}.weight_scale_inv": "F8_E8M0"}
    checkpoint = scaled(tmp_path, arrays, dtypes)
    scale = torch.from_numpy(2.0 ** (exponents.astype(np.float32) - 127))
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :129]
    want = (tensor.to(torch.float32) * wide).numpy()
    np.testing.assert_array_equal(checkpoint.read(f"{K}.weight"), want)


def test_plain_fp8_is_read_as_it_is(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    want = {}
    for role in "kv":
        codes, tensor = fp8(rng.standard_normal((7, 5)).astype(np.float32))
        arrays[f"blocks.0.attn.{role}.weight"] = codes
        want[role] = tensor.float().numpy()
    checkpoint = scaled(tmp_path, arrays, dict.fromkeys(arrays, "F8_E4M3"))
    np.testing.assert_array_equal(checkpoint.read(f"{K}.weight"), want["k"])
    for _ in range(2):
        checkpoint.note_plain_fp8([*arrays, "absent"])
    assert len(checkpoint.notes) == 1
    assert "2 attention tensors are F8_E4M3 and the file announces no scales" in checkpoint.notes[0]


@pytest.mark.parametrize(
    ("more", "config", "says"),
    [
        ({"blocks.1.attn.k.weight_scale": (1,)}, None, f"{K}.weight_scale .*is missing"),
        ({"scaled_fp8": (1,)}, None, f"'{K}.weight' is fp8 and the file announces scales"),
        ({}, {"quantization_config": {"quant_method": "fp8"}}, "get the complete file"),
        ({}, {"quantization_config": {"format": "float-quantized"}}, "get the complete file"),
        ({f"{K}.weight_scale": (3,)}, None, r"has shape \[3\], which does not fit"),
        ({f"{K}.weight_scale": (5,)}, None, r"has shape \[5\]"),
        ({f"{K}.weight_scale": (0, 2)}, None, r"has shape \[0, 2\]"),
        ({f"{K}.weight_scale_inv": (2, 3)}, None, r"has shape \[2, 3\]"),
        ({f"{K}.weight_scale_inv": (1, 1, 7)}, None, r"has shape \[1, 1, 7\]"),
    ],
)
def test_scales_that_are_wrong(
    more: dict[str, tuple[int, ...]], config: Any, says: str, tmp_path: Path, seed: int
) -> None:
    codes, _ = fp8(np.ones((7, 5), np.float32))
    arrays = {f"{K}.weight": codes} | Maker(seed).all(more)
    checkpoint = scaled(tmp_path, arrays, {f"{K}.weight": "F8_E4M3"}, config)
    with pytest.raises(UserError, match=says):
        checkpoint.read(f"{K}.weight")


def test_scale_that_is_not_finite(tmp_path: Path) -> None:
    codes, _ = fp8(np.ones((7, 5), np.float32))
    for bad in (np.nan, np.inf):
        arrays = {f"{K}.weight": codes, f"{K}.weight_scale": np.array(bad, np.float32)}
        checkpoint = scaled(tmp_path, arrays, {f"{K}.weight": "F8_E4M3"})
        with pytest.raises(UserError, match=r"weight_scale' holds NaN or Inf"):
            checkpoint.read(f"{K}.weight")


@pytest.mark.parametrize("told", [None, [], "fp8", 3, {"quant_method": None}])
def test_odd_quantization_configs(told: Any, tmp_path: Path) -> None:
    codes, tensor = fp8(np.ones((7, 5), np.float32))
    arrays = {f"{K}.weight": codes}
    config = {"quantization_config": told}
    checkpoint = scaled(tmp_path, arrays, {f"{K}.weight": "F8_E4M3"}, config)
    np.testing.assert_array_equal(checkpoint.read(f"{K}.weight"), tensor.float().numpy())


# Files


def test_config_option_goes_before_the_config_beside(tmp_path: Path) -> None:
    arrays = {
        f"blocks.{i}.attn.{r}.weight": np.ones((4, 4), np.float32) for i in range(2) for r in "kv"
    }
    other = tmp_path / "other.json"
    other.write_text('{"num_layers": 3}')
    checkpoint = opened(tmp_path, arrays, {"num_layers": 2})
    assert checkpoint.config_path == str(tmp_path / "config.json")
    assert find_operators(checkpoint).missing_layers == []
    checkpoint = opened(tmp_path, arrays, {"num_layers": 2}, config=str(other))
    assert checkpoint.config_path == str(other)
    assert find_operators(checkpoint).missing_layers == [2]
    for text, says in (
        ("[]", "no JSON object"),
        ("{", "not valid JSON"),
        ('{"n": ' + "9" * 5000 + "}", "not valid JSON"),
        ("", "not valid JSON"),
    ):
        other.write_text(text)
        with pytest.raises(UserError, match=says):
            opened(tmp_path, arrays, config=str(other))
    with pytest.raises(UserError, match="does not exist"):
        opened(tmp_path, arrays, config=str(tmp_path / "absent.json"))


def test_identity(tmp_path: Path) -> None:
    arrays = {"a.k.weight": np.ones((4, 4), np.float32)}
    config = {"quantization_config": {"weight_block_size": [2, 2]}}
    first = opened(tmp_path, arrays, config)
    assert first.bytes_read > 0
    assert len(first.raw_sha256("a.k.weight")) == 64
    (tmp_path / "config.json").write_text(json.dumps({}))
    again = open_checkpoint(pickle.loads(pickle.dumps(first.spec)))
    assert again.fingerprint != first.fingerprint  # the values may differ
    assert again.format == "safetensors"


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for i in (1, 2):
        name = f"model-0000{i}-of-00002.safetensors"
        (tmp_path / name).write_bytes(build({"a.k": np.ones((2, 2), np.float32)}))
    with pytest.raises(UserError, match=r"'a\.k' stands in two of its files"):
        open_checkpoint(str(tmp_path))
