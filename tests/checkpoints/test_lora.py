"""Adapter files of the field: their own products, and merged into a base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.making import Arrays, Maker, save, summary
from mla_study.checkpoints.lora import LoraCheckpoint
from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.operators.find import find_operators
from mla_study.checkpoints.reader import Checkpoint, OpenSpec
from mla_study.errors import UserError

M, N, R = 9, 7, 3
ROLES = ("q", "k", "v", "o")


class Case:
    """One adapter file with its factors by role, layers 0 and 1."""

    def __init__(self, seed: int) -> None:
        self.make = Maker(seed)
        self.factors = {
            (i, role): (self.make(M, R), self.make(R, N)) for i in range(2) for role in ROLES
        }

    def arrays(self, stem: str, down: str, up: str, names: dict[str, str] | None = None) -> Arrays:
        stored: Arrays = {}
        for (i, role), (b, a) in self.factors.items():
            full = stem.format(i=i, role=(names or {}).get(role, role))
            stored[full + down] = a
            stored[full + up] = b
        return stored

    def product(self, i: int, role: str) -> np.ndarray:
        b, a = self.factors[i, role]
        return b.astype(np.float64) @ a


HF = {role: f"{role}_proj" for role in ROLES}
DIFFUSERS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
FLAT = DIFFUSERS | {"o": "to_out_0"}
FORMS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "peft": ("base_model.model.model.layers.{i}.self_attn.{role}", ".lora_A.weight",
             ".lora_B.weight", HF),
    "peft, named": ("base_model.model.model.layers.{i}.self_attn.{role}",
                    ".lora_A.default.weight", ".lora_B.default.weight", HF),
    "diffusers": ("transformer.blocks.{i}.attn1.{role}", ".lora_A.weight", ".lora_B.weight",
                  DIFFUSERS),
    "diffusers, older": ("unet.down.{i}.attn1.{role}", ".lora.down.weight", ".lora.up.weight",
                         DIFFUSERS),
    "diffusers, oldest": ("unet.down.{i}.attn1.processor.{role}", "_lora.down.weight",
                          "_lora.up.weight", DIFFUSERS | {"o": "to_out"}),
    "kohya": ("lora_unet_blocks_{i}_self_attn_{role}", ".lora_down.weight", ".lora_up.weight", {}),
    "kohya, diffusers' names": ("lora_unet_blocks_{i}_attn1_{role}", ".lora_down.weight",
                                ".lora_up.weight", FLAT),
    "original Wan": ("diffusion_model.blocks.{i}.self_attn.{role}", ".lora_A.weight",
                     ".lora_B.weight", {}),
    "original Wan, down and up": ("diffusion_model.blocks.{i}.self_attn.{role}",
                                  ".lora_down.weight", ".lora_up.weight", {}),
}  # fmt: skip
BASES = {
    "peft": ("model.layers.{i}.self_attn.{role}.weight", HF),
    "diffusers": ("blocks.{i}.attn1.{role}.weight", DIFFUSERS),
    "unet": ("down.{i}.attn1.{role}.weight", DIFFUSERS),
    "Wan": ("model.blocks.{i}.self_attn.{role}.weight", {}),
}


def based(case: Case, folder: Path, form: str) -> tuple[str, dict[tuple[int, str], np.ndarray]]:
    name, roles = BASES[form]
    dense = {key: case.make(M, N) for key in case.factors}
    arrays = {name.format(i=i, role=roles.get(r, r)): w for (i, r), w in dense.items()}
    return save(folder, arrays, {"num_layers": 2}), dense


def opened(path: str, base: str | None = None) -> Checkpoint:
    return open_checkpoint(OpenSpec(path, base=base))


@pytest.mark.parametrize("form", FORMS)
def test_own_product(form: str, tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    checkpoint = opened(save(tmp_path, case.arrays(*FORMS[form])))
    assert isinstance(checkpoint, LoraCheckpoint)
    found = find_operators(checkpoint)
    assert summary(found) == [(0, "self", "q k v o"), (1, "self", "q k v o")]
    assert "8 adapter pairs: the products by themselves are probed" in checkpoint.notes[0]
    assert "the products' scale is 1" in " ".join(checkpoint.notes)
    for attention in found.attentions:
        for role, part in attention.parts.items():
            want = case.product(attention.layer, role)
            np.testing.assert_allclose(checkpoint.read(part.tensor), want, rtol=1e-12)
            np.testing.assert_allclose(checkpoint.read(part.tensor, 2, 5), want[2:5], rtol=1e-12)
            factors = checkpoint.factors(part.tensor)
            assert factors is not None
            np.testing.assert_allclose(factors[0] @ factors[1], want, rtol=1e-12)
            assert (part.m, part.n) == (M, N)


@pytest.mark.parametrize(
    ("form", "base"),
    [
        ("peft", "peft"),
        ("peft, named", "peft"),
        ("diffusers", "diffusers"),
        ("diffusers", "Wan"),
        ("diffusers, older", "unet"),
        ("diffusers, oldest", "unet"),
        ("kohya", "Wan"),
        ("kohya", "diffusers"),
        ("kohya, diffusers' names", "diffusers"),
        ("kohya, diffusers' names", "Wan"),
        ("original Wan", "Wan"),
        ("original Wan", "diffusers"),
        ("original Wan, down and up", "Wan"),
    ],
)
def test_merged(form: str, base: str, tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    path = save(tmp_path / "lora", case.arrays(*FORMS[form]))
    dense_path, dense = based(case, tmp_path / "base", base)
    checkpoint = opened(path, dense_path)
    found = find_operators(checkpoint)
    assert summary(found) == [(0, "self", "q k v o"), (1, "self", "q k v o")]
    assert found.expected_layers == 2
    assert f"8 adapter pairs merged into {dense_path}" in " ".join(checkpoint.notes)
    for attention in found.attentions:
        for role, part in attention.parts.items():
            want = dense[attention.layer, role] + case.product(attention.layer, role)
            np.testing.assert_allclose(checkpoint.read(part.tensor), want, rtol=1e-12)
            np.testing.assert_allclose(checkpoint.read(part.tensor, 4), want[4:], rtol=1e-12)
            assert checkpoint.factors(part.tensor) is None
    plain = opened(dense_path)
    assert checkpoint.fingerprint != plain.fingerprint
    assert checkpoint.raw_sha256(part.tensor) != plain.raw_sha256(part.tensor)


# Scales


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 6, "r": R}, 6 / R),
        ({"lora_alpha": 6.0, "r": 99}, 6 / R),  # rank_pattern: the rank is what is stored
        ({"lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(R)),
        ({"lora_alpha": 6, "alpha_pattern": {"q_proj": 12}}, 6 / R),
        ({"lora_alpha": 6, "alpha_pattern": {"k_proj": 12}}, 12 / R),
        ({"lora_alpha": 6, "alpha_pattern": {"^model.layers.0.self_attn.k_proj$": 12}}, 6 / R),
        ({"lora_alpha": 6, "alpha_pattern": {r"self_attn\.k_proj": 12, "(": 1}}, 12 / R),
        ({"lora_alpha": 6, "alpha_pattern": ["k_proj"]}, 6 / R),
        ({"lora_alpha": "six"}, 1.0),
        ({"lora_alpha": True}, 1.0),
        ({"lora_alpha": None}, 1.0),
        ({"lora_alpha": 10**400}, 1.0),
        ({}, 1.0),
    ],
)
def test_adapter_config(config: dict[str, Any], scale: float, tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    path = save(tmp_path, case.arrays(*FORMS["peft"]), name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for place in (path, str(tmp_path)):
        checkpoint = opened(place)
        np.testing.assert_allclose(
            checkpoint.read("layers.1.self_attn.k_proj.weight"),
            scale * case.product(1, "k"),
            rtol=1e-12,
        )
    before = checkpoint.fingerprint
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 77}))
    assert opened(path).fingerprint != before


def test_alpha_of_each_pair(tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    arrays = case.arrays(*FORMS["kohya"])
    arrays |= {f"lora_unet_blocks_{i}_self_attn_{r}.alpha": np.array(i + 0.5, np.float32)
               for i in range(2) for r in ROLES}  # fmt: skip
    checkpoint = opened(save(tmp_path, arrays))
    want = 1.5 / R * case.product(1, "k")
    np.testing.assert_allclose(checkpoint.read("blocks_1_self_attn_k.weight"), want, rtol=1e-12)
    assert len(checkpoint.notes) == 1
    for bad in (np.array(np.nan, np.float32), np.ones(0, np.float32), np.ones(2, np.float32)):
        arrays["lora_unet_blocks_1_self_attn_k.alpha"] = bad
        checkpoint = opened(save(tmp_path, arrays))
        with pytest.raises(UserError, match=r"self_attn_k\.alpha' is not one finite number"):
            checkpoint.read("blocks_1_self_attn_k.weight")


def test_metadata_of_diffusers(tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    for told, scale in (
        ('{"transformer.r": 3, "transformer.lora_alpha": 12}', 12 / R),
        ("[]", 1.0),
        ("{", 1.0),
        ("[" * 100_000, 1.0),
    ):
        metadata = {"lora_adapter_metadata": told}
        path = save(tmp_path, case.arrays(*FORMS["diffusers"]), metadata=metadata)
        np.testing.assert_allclose(
            opened(path).read("transformer.blocks.0.attn1.to_k.weight"),
            scale * case.product(0, "k"),
            rtol=1e-12,
        )


# Other shapes


def test_convolutions(tmp_path: Path, seed: int) -> None:
    make = Maker(seed)
    down, up, base = make(R, N, 1, 1), make(M, R, 1, 1), make(M, N, 1, 1)
    arrays = {"unet.mid.attn_1.k.lora_A.weight": down, "unet.mid.attn_1.k.lora_B.weight": up}
    checkpoint = opened(save(tmp_path / "a", arrays))
    product = up[..., 0, 0].astype(np.float64) @ down[..., 0, 0]
    name = "unet.mid.attn_1.k.weight"
    assert checkpoint.tensors[name].shape == (M, N)
    np.testing.assert_allclose(checkpoint.read(name), product, rtol=1e-12)
    dense = save(tmp_path / "b", {"mid.attn_1.k.weight": base})
    merged = opened(save(tmp_path / "a", arrays), dense).read("mid.attn_1.k.weight", 1, 4)
    np.testing.assert_allclose(merged, base[1:4] + product[1:4, :, None, None], rtol=1e-12)


def test_conv1d_of_gpt2(tmp_path: Path, seed: int) -> None:
    """peft transposes the product where the base stores [inputs, outputs]."""
    make = Maker(seed)
    down, up, base = make(R, N), make(3 * N, R), make(N, 3 * N)
    stem = "base_model.model.transformer.h.0.attn.c_attn"
    path = save(tmp_path / "a", {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})
    (tmp_path / "a" / "adapter_config.json").write_text('{"fan_in_fan_out": true, "lora_alpha": 6}')
    for root in ("", "transformer."):
        dense = save(tmp_path / "b", {f"{root}h.0.attn.c_attn.weight": base})
        merged = opened(path, dense)
        want = base + 6 / R * (up.astype(np.float64) @ down).T
        name = f"{root}h.0.attn.c_attn.weight"
        np.testing.assert_allclose(merged.read(name), want, rtol=1e-12)
        np.testing.assert_allclose(merged.read(name, 2, 5), want[2:5], rtol=1e-12)
        assert find_operators(merged).attentions[0].parts["k"].transposed
    alone = find_operators(opened(path)).attentions[0]
    assert (alone.parts["k"].m, alone.parts["k"].n) == (N, N)


def test_full_differences(tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    arrays = case.arrays(*FORMS["original Wan"])
    arrays["diffusion_model.blocks.0.self_attn.norm_k.diff"] = case.make(M)
    arrays["diffusion_model.blocks.0.self_attn.k.diff_b"] = case.make(M)
    arrays["diffusion_model.head.modulation.diff"] = case.make(1, 2, M)
    path = save(tmp_path / "lora", arrays)
    base, _ = based(case, tmp_path / "base", "Wan")
    file = tmp_path / "base" / "more.safetensors"
    gain = case.make(M)
    save(tmp_path / "base", {"blocks.0.self_attn.norm_k.weight": gain,
                             "blocks.0.self_attn.k.bias": gain,
                             "blocks.0.self_attn.k.weight": case.make(M, N)}
         | {n: opened(base).read(n) for n in opened(base).tensors
            if n != "blocks.0.self_attn.k.weight"}, name=file.name)  # fmt: skip
    merged = opened(path, str(file))
    for name, diff in (("norm_k.weight", "norm_k.diff"), ("k.bias", "k.diff_b")):
        np.testing.assert_allclose(
            merged.read(f"blocks.0.self_attn.{name}"),
            gain.astype(np.float64) + arrays[f"diffusion_model.blocks.0.self_attn.{diff}"],
            rtol=1e-12,
        )
    notes = " ".join(merged.notes)
    assert "8 adapter pairs and 2 full differences merged" in notes
    assert "1 tensor outside the adapter pairs (head.modulation.diff" in notes
    assert "3 tensors outside" in " ".join(opened(path).notes)


def test_text_encoders_beside_the_network(tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    arrays = case.arrays(*FORMS["kohya"])
    for part in ("te1", "te2"):
        stem = f"lora_{part}_text_model_encoder_layers_0_self_attn"
        for role in "kv":
            arrays[f"{stem}_{role}_proj.lora_down.weight"] = case.make(R, 5)
            arrays[f"{stem}_{role}_proj.lora_up.weight"] = case.make(5, R)
    path = save(tmp_path / "lora", arrays)
    alone = find_operators(opened(path))
    assert len(alone.attentions) == 4  # the two encoders do not hide each other
    assert len({a.layer for a in alone.attentions}) == 4
    base, _ = based(case, tmp_path / "base", "Wan")
    notes = " ".join(opened(path, base).notes)
    assert "2 adapter pairs of 'te1', another model's, left out" in notes
    assert "8 adapter pairs merged" in notes


# What is refused


def refused(path: str, base: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        opened(path, base)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert str(Path(path).parent) in sentence or (base is not None and base in sentence)
    return sentence


def test_wrong_base(tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    path = save(tmp_path / "lora", case.arrays(*FORMS["peft"]))
    other, _ = based(case, tmp_path / "a", "Wan")
    sentence = refused(path, other)
    assert "the adapter of 'layers.0.self_attn.q_proj' has shape [9, 7], but the base" in sentence
    assert "no tensor of that name: give the base that it was trained on" in sentence
    smaller = {f"layers.{i}.self_attn.{r}_proj.weight": case.make(M - 1, N)
               for i in range(2) for r in ROLES}  # fmt: skip
    assert "has [8, 7] there" in refused(path, save(tmp_path / "b", smaller))
    assert "is an adapter itself" in refused(path, path)
    with pytest.raises(UserError, match="holds no LoRA tensors to merge: leave out --base"):
        opened(other, other)


def test_damaged(tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    whole = case.arrays(*FORMS["peft"])
    k = "base_model.model.model.layers.1.self_attn.k_proj"
    half = {n: a for n, a in whole.items() if n != f"{k}.lora_A.weight"}
    sentence = refused(save(tmp_path, half))
    assert "the adapter of 'layers.1.self_attn.k_proj' has no 'down' half: get" in sentence
    for shape in ((R + 1, N), (R,), (), (0, N), (R, 0), (R, N, 2)):
        bad = whole | {f"{k}.lora_A.weight": case.make(*shape)}
        if shape == (R, N, 2):  # a convolution of another width
            assert opened(save(tmp_path, bad))
            continue
        assert "which do not multiply: get an undamaged file" in refused(save(tmp_path, bad))
    bad = whole | {f"{k}.lora_B.weight": case.make(M, R, 3)}
    assert "which do not multiply" in refused(save(tmp_path, bad))
    two = whole | {n.replace("lora_A", "lora_A.b").replace("lora_B", "lora_B.b"): a
                   for n, a in whole.items()}  # fmt: skip
    assert "holds two adapters of 'layers.0.self_attn.q_proj'" in refused(save(tmp_path, two))
    (tmp_path / "adapter_config.json").write_text("[]")
    assert "adapter_config.json holds no JSON object" in refused(save(tmp_path, whole))


def test_two_names_for_one_weight(tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    arrays = case.arrays(*FORMS["original Wan"]) | case.arrays(*FORMS["diffusers"])
    path = save(tmp_path / "lora", arrays)
    base, _ = based(case, tmp_path / "base", "Wan")
    assert "both mean 'blocks.0.self_attn.q.weight': keep one" in refused(path, base)


def test_other_kinds_of_adapter(tmp_path: Path, seed: int) -> None:
    case = Case(seed)
    arrays = case.arrays(*FORMS["kohya"])
    base, _ = based(case, tmp_path / "base", "Wan")
    dora = arrays | {"lora_unet_blocks_0_self_attn_k.dora_scale": case.make(M, 1)}
    path = save(tmp_path / "a", dora)
    assert "DoRA magnitudes ('lora_unet_blocks_0_self_attn_k.dora_scale')" in refused(path, base)
    assert "1 DoRA magnitude (" in " ".join(opened(path).notes)
    peft = case.arrays(*FORMS["peft"])
    peft["base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector.weight"] = (
        case.make(M)
    )
    assert "DoRA magnitude" in " ".join(opened(save(tmp_path / "a", peft)).notes)
    for name in ("hada_w1_a", "lokr_w1", "lokr_w2_a", "oft_blocks", "hada_w2_b"):
        other = {f"lora_unet_blocks_0_self_attn_k.{name}": case.make(M, R)}
        assert "another kind than LoRA" in refused(save(tmp_path / "b", other))
    middle = {"lora_unet_conv.lora_down.weight": case.make(R, N, 1, 1),
              "lora_unet_conv.lora_up.weight": case.make(M, R, 1, 1),
              "lora_unet_conv.lora_mid.weight": case.make(R, R, 3, 3)}  # fmt: skip
    assert "three factors" in refused(save(tmp_path / "c", middle))
    notes = " ".join(opened(save(tmp_path / "d", arrays | middle)).notes)
    assert "8 adapter pairs" in notes
    assert "3 tensors outside the adapter pairs (lora_unet_conv" in notes


def test_adapter_in_a_pt_file(tmp_path: Path, seed: int) -> None:
    torch = pytest.importorskip("torch")
    case = Case(seed)
    arrays = case.arrays(*FORMS["peft"])
    torch.save({n: torch.from_numpy(a) for n, a in arrays.items()}, tmp_path / "adapter_model.bin")
    checkpoint = opened(str(tmp_path))
    np.testing.assert_allclose(
        checkpoint.read("layers.0.self_attn.v_proj.weight"), case.product(0, "v"), rtol=1e-12
    )
