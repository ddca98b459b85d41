"""Names, configs and the strict loader of Wan transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.wan_files import TINY, random_state, same, write_original
from mla_study.checkpoints.wan.config import parse, resolve
from mla_study.checkpoints.wan.load import Difference, WanSource, expected_shapes, load_model
from mla_study.checkpoints.wan.names import is_latent, naming_of, to_diffusers, to_original
from mla_study.config import ModelConfig, WindowConfig, wan_1_3b, wan_14b
from mla_study.errors import UserError


@pytest.fixture
def formats(fixtures: Path) -> Path:
    return fixtures / "formats"


class TestNames:
    def test_recorded_map(self, formats: Path) -> None:
        recorded = json.loads((formats / "key_map_wan_to_diffusers.json").read_text())
        assert len(recorded) == 69
        assert {name: to_diffusers(name) for name in recorded} == recorded
        assert {to_original(other): other for other in recorded.values()} == recorded

    def test_image_branch_against_diffusers(self) -> None:
        diffusers = pytest.importorskip("diffusers")
        with torch.device("meta"):
            theirs = diffusers.WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=12, num_layers=3, ffn_dim=16,
                image_dim=1280, added_kv_proj_dim=24, freq_dim=8, text_dim=8, in_channels=36,
            )  # fmt: skip
        ours = ModelConfig(
            layers=3, width=24, heads=2, ffn_width=16, freq_dim=8, text_dim=8, in_channels=36,
            model_type="i2v",
        )  # fmt: skip
        shapes = {to_diffusers(name): shape for name, shape in expected_shapes(ours).items()}
        assert shapes == {n: tuple(p.shape) for n, p in theirs.state_dict().items()}
        assert all(to_original(to_diffusers(n) or "") == n for n in expected_shapes(ours))

    @pytest.mark.parametrize(
        "name",
        ["blocks.0.norm2.weight", "blocks.0.self_attn.kv_down.weight", "norm3.weight", "nonsense"],
    )
    def test_no_counterpart(self, name: str) -> None:
        assert to_diffusers(name) is None

    def test_norms_are_swapped(self) -> None:
        assert to_diffusers("blocks.11.norm3.bias") == "blocks.11.norm2.bias"
        assert to_original("blocks.11.norm3.bias") is None

    def test_naming(self) -> None:
        assert naming_of(["proj_out.weight"]) == "diffusers"
        assert naming_of(["blocks.0.self_attn.q.weight"]) == "original"
        assert naming_of(["encoder.layer.0.attention.self.query.weight"]) is None
        assert is_latent(["blocks.0.self_attn.kv_down.weight"])


class TestConfig:
    def test_upstreams_original_config_lacks_what_tensors_tell(self, formats: Path) -> None:
        source = WanSource(formats / "original_wan")
        config = source.describe().config
        assert (config.text_dim, config.patch, config.heads) == (32, (1, 2, 2), 3)
        assert config == WanSource(formats / "diffusers").describe().config

    def test_presets_are_recognised(self) -> None:
        data = {"dim": 5120, "num_heads": 40, "num_layers": 40, "ffn_dim": 13824}
        assert parse(data, {}, "x").config == wan_14b()
        assert resolve("wan_1.3b", None, None, {}, "x").config == wan_1_3b()

    def test_window_of_a_causal_config(self) -> None:
        data = {"dim": 32, "num_heads": 2, "num_layers": 1, "ffn_dim": 8}
        found = parse({**data, "local_attn_size": 7, "sink_size": 1}, {}, "x")
        assert (found.config.window, found.window_told) == (WindowConfig(1, 3, 3), True)
        assert not parse({**data, "local_attn_size": -1}, {}, "x").window_told
        with pytest.raises(UserError, match=r"x: local_attn_size 3 is smaller"):
            parse({**data, "local_attn_size": 3, "sink_size": 1}, {}, "x")

    def test_i2v_without_image_branch(self) -> None:
        data = {
            "dim": 32, "num_heads": 2, "num_layers": 1, "ffn_dim": 8, "in_dim": 36,
            "model_type": "i2v",
        }  # fmt: skip
        found = parse(data, {"blocks.0.ffn.0.weight": (8, 32)}, "x")
        assert found.config.model_type == "t2v" and "Wan2.2" in found.notes[0]

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"num_heads": "3"}, "num_heads = '3'"),
            ({"num_heads": 5}, "does not split into 5 heads"),
            ({"num_layers": 0}, "num_layers = 0"),
            ({"num_layers": 10**9}, "1000000000 layers"),
            ({"model_type": "vace"}, "model_type 'vace'"),
            ({"qk_norm": False}, "qk_norm = False"),
            ({"patch_size": [1, 2]}, "patch has 2 entries"),
            ({"patch_size": [0, 2, 2]}, "must be positive"),
            ({"eps": "small"}, "eps is 'small'"),
        ],
    )
    def test_wrong_values(self, change: dict[str, object], said: str) -> None:
        data = {"dim": 32, "num_heads": 2, "num_layers": 1, "ffn_dim": 8, **change}
        with pytest.raises(UserError, match=said) as caught:
            parse(data, {}, "some/config.json")
        assert "some/config.json" in str(caught.value)

    def test_diffusers_variants(self) -> None:
        data = {"num_attention_heads": 2, "attention_head_dim": 8, "pos_embed_seq_len": 514}
        with pytest.raises(UserError, match="pos_embed_seq_len = 514"):
            parse(data, {}, "x")
        with pytest.raises(UserError, match="describes a WanVACETransformer3DModel"):
            parse({**data, "_class_name": "WanVACETransformer3DModel"}, {}, "x")
        with pytest.raises(UserError, match="no config of a Wan transformer"):
            parse({"hidden_size": 8}, {}, "x")

    def test_newer_schema(self) -> None:
        with pytest.raises(UserError, match="schema 99"):
            parse({"layers": 1, "width": 32, "heads": 2, "metadata": {"schema": 99}}, {}, "x")


class TestLoad:
    @pytest.mark.parametrize(
        ("path", "layout", "dtype"),
        [
            ("original_wan", "original", torch.float32),
            ("original_wan_sharded", "original", torch.float32),
            ("diffusers", "diffusers", torch.float32),
            ("diffusers_sharded/transformer", "diffusers", torch.float32),
            ("self_forcing/released_style.pt", "self-forcing", torch.float32),
            ("self_forcing/trainer_ema_fsdp_prefix_bf16.pt", "self-forcing", torch.bfloat16),
            ("self_forcing/krea_style_model_prefix_bf16.safetensors", "krea", torch.bfloat16),
        ],
    )
    def test_all_formats(self, formats: Path, path: str, layout: str, dtype: torch.dtype) -> None:
        truth = load_file(formats / "original_wan/diffusion_pytorch_model.safetensors")
        config = None if "self" not in path else str(formats / "original_wan/config.json")
        model = load_model(formats / path, config)
        assert not model.training and WanSource(formats / path).layout == layout
        factor = 1.01 if "trainer" in path else 1.0  # the running average is told by its factor
        expected = {name: (value * factor).to(dtype) for name, value in truth.items()}
        assert same(dict(model.state_dict()), expected)

    def test_running_average_on_demand(self, formats: Path) -> None:
        path, config = formats / "self_forcing/released_style.pt", str(formats / "diffusers")
        notes: list[str] = []
        live = load_model(path, config, notes=notes).head.head.bias
        mean = load_model(path, config, weights="generator_ema").head.head.bias
        assert torch.equal(mean, (live * 1.01).to(torch.bfloat16))
        assert "generator_ema" in notes[0]

    def test_incomplete_is_refused_by_name(self, formats: Path) -> None:
        path = formats / "self_forcing/incomplete_missing_block1_fp16.pt"
        with pytest.raises(UserError) as caught:
            load_model(path, str(formats / "original_wan/config.json"))
        message = str(caught.value)
        assert "27 tensors are missing (blocks.1.modulation, blocks.1.self_attn.q.weight" in message
        names = expected_shapes(replace(wan_1_3b(), layers=2))
        named = {name for name in names if name.startswith("blocks.1.")}
        assert len(named) == 27 and all(name in message for name in named)
        assert "\n" not in message

    def test_very_many_missing_are_counted(self) -> None:
        told = "; ".join(Difference(missing=[f"t{i}" for i in range(70)]).sentences())
        assert "70 tensors are missing" in told and "t59 and 10 more" in told and "t60" not in told

    def test_names_of_the_file_are_reported(self, tmp_path: Path, formats: Path) -> None:
        path = formats / "diffusers/transformer/diffusion_pytorch_model.safetensors"
        state = load_file(path)
        state["blocks.0.attn1.to_q.weight"] = torch.zeros(96, 95)
        del state["blocks.1.norm2.weight"]
        state["blocks.1.attn3.to_q.weight"] = torch.zeros(3)
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(UserError) as caught:
            load_model(tmp_path / "x.safetensors", str(formats / "diffusers"))
        message = str(caught.value)
        assert "1 tensors are missing (blocks.1.norm2.weight)" in message
        assert "1 are not the model's (blocks.1.attn3.to_q.weight)" in message
        assert "blocks.0.attn1.to_q.weight is [96, 95] where [96, 96] is due" in message

    def test_config_that_disagrees(self, tmp_path: Path, seed: int) -> None:
        folder = write_original(tmp_path / "m", TINY, random_state(TINY, seed))
        with pytest.raises(
            UserError, match=r"ffn\.0\.weight is \[28, 20\] where \[30, 20\] is due"
        ):
            load_model(folder, replace(TINY, ffn_width=30))
        with pytest.raises(UserError, match=r"tensors are missing \(blocks\.2\.modulation"):
            load_model(folder, replace(TINY, layers=3))

    def test_strict_false_leaves_out_extra(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        folder = write_original(tmp_path / "m", TINY, {**state, "head.extra": torch.ones(2)})
        with pytest.raises(UserError, match=r"not the model's \(head\.extra\)"):
            load_model(folder)
        assert same(dict(load_model(folder, strict=False).state_dict()), state)

    def test_heads_are_asked_for(self, tmp_path: Path, seed: int) -> None:
        save_file(random_state(TINY, seed), tmp_path / "x.safetensors")
        with pytest.raises(
            UserError, match="shapes do not tell the number of heads: give --config"
        ):
            load_model(tmp_path / "x.safetensors")
        with pytest.raises(UserError, match="no preset 'wan-2b'"):
            load_model(tmp_path / "x.safetensors", "wan-2b")
        with pytest.raises(UserError, match=r"config nowhere/c\.json does not exist"):
            load_model(tmp_path / "x.safetensors", "nowhere/c.json")

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_kept_or_cast(self, tmp_path: Path, seed: int, stored: torch.dtype) -> None:
        state = random_state(TINY, seed, stored)
        folder = write_original(tmp_path / "m", TINY, state)
        assert same(dict(load_model(folder).state_dict()), state)
        for name, dtype in (("bf16", torch.bfloat16), ("float64", torch.float64)):
            cast = {n: t.to(dtype) for n, t in state.items()}
            assert same(dict(load_model(folder, dtype=name).state_dict()), cast)
        with pytest.raises(UserError, match="dtype int8 is not known"):
            load_model(folder, dtype="int8")

    def test_loaded_pages_are_private(self, tmp_path: Path, seed: int) -> None:
        folder = write_original(tmp_path / "m", TINY, random_state(TINY, seed))
        before = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
        model = load_model(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert (folder / "diffusion_pytorch_model.safetensors").read_bytes() == before

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_nan_is_named(
        self, tmp_path: Path, seed: int, value: float, dtype: torch.dtype
    ) -> None:
        state = random_state(TINY, seed, dtype)
        state["blocks.1.ffn.0.weight"][-1, -1] = value
        folder = write_original(tmp_path / "m", TINY, state)
        for cast in (None, "fp32"):
            with pytest.raises(UserError, match=r"'blocks\.1\.ffn\.0\.weight' holds NaN or Inf"):
                load_model(folder, dtype=cast)

    def test_overflow_while_casting(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        state["head.head.bias"][0] = 1e5
        folder = write_original(tmp_path / "m", TINY, state)
        with pytest.raises(UserError, match=r"'head\.head\.bias' holds NaN or Inf"):
            load_model(folder, dtype="fp16")

    def test_scaled_fp8(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        name = "blocks.0.ffn.2"
        values = state[f"{name}.weight"].to(torch.float8_e4m3fn)
        stored = {
            **state,
            f"{name}.weight": values,
            f"{name}.scale_weight": torch.tensor(0.5),
            "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        }
        folder = write_original(tmp_path / "m", TINY, stored)
        notes: list[str] = []
        model = load_model(folder, notes=notes)
        expected = {**state, f"{name}.weight": values.float() * 0.5}
        assert same(
            dict(model.state_dict()), {n: t.to(torch.bfloat16) for n, t in expected.items()}
        )
        assert any("F8_E4M3" in note for note in notes)

    def test_integers_are_no_weights(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed)
        state["blocks.0.ffn.2.weight"] = state["blocks.0.ffn.2.weight"].to(torch.int8)
        with pytest.raises(UserError, match=r"is I8, which is no weight by itself"):
            load_model(write_original(tmp_path / "m", TINY, state))

    def test_other_models(self, tmp_path: Path) -> None:
        save_file({"encoder.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match="holds no Wan transformer"):
            load_model(tmp_path / "x.safetensors", "mini")


class TestLora:
    NAMES = ("blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.0.cross_attn.o")

    def adapter(self, path: Path, kind: str, seed: int) -> dict[str, torch.Tensor]:
        """Writes an adapter; returns what it adds by original name."""
        generator = torch.Generator().manual_seed(seed)
        shapes = random_state(TINY, 0)
        stored: dict[str, torch.Tensor] = {}
        added: dict[str, torch.Tensor] = {}
        for name in self.NAMES:
            rows, columns = shapes[f"{name}.weight"].shape
            down = torch.randn(3, columns, generator=generator)
            up = torch.randn(rows, 3, generator=generator)
            theirs = (to_diffusers(f"{name}.weight") or "").removesuffix(".weight")
            scale = 1.0
            if kind == "peft":
                stored[f"base_model.model.{name}.lora_A.weight"] = down
                stored[f"base_model.model.{name}.lora_B.weight"] = up
            elif kind.startswith("kohya"):
                stem = "lora_unet_" + (theirs if "diffusers" in kind else name).replace(".", "_")
                stored[f"{stem}.lora_down.weight"] = down
                stored[f"{stem}.lora_up.weight"] = up
                stored[f"{stem}.alpha"] = torch.tensor(1.5)
                scale = 0.5
            else:
                prefix = "transformer." if kind == "pipeline" else "diffusion_model."
                stored[f"{prefix}{theirs}.lora_A.weight"] = down
                stored[f"{prefix}{theirs}.lora_B.weight"] = up
            added[f"{name}.weight"] = scale * (up.double() @ down.double())
        save_file(stored, path)
        return added

    @pytest.mark.parametrize("kind", ["peft", "kohya", "kohya-diffusers", "diffusers", "pipeline"])
    def test_merged_at_load(self, tmp_path: Path, seed: int, kind: str) -> None:
        if kind == "pipeline" and find_spec("mla_study.checkpoints.lora_names") is None:
            pytest.skip("this reader of adapters does not know the pipeline's prefix")
        state = random_state(TINY, seed)
        folder = write_original(tmp_path / "m", TINY, state)
        added = self.adapter(tmp_path / "a.safetensors", kind, seed)
        path = str(tmp_path / "a.safetensors")
        merged = dict(load_model(folder, lora=[path, (path, -0.25)]).state_dict())
        for name, value in state.items():
            expected = (value.double() + 0.75 * added.get(name, torch.zeros(1))).float()
            assert torch.allclose(merged[name], expected, rtol=1e-6, atol=1e-6), name

    def test_cast_before_merging(self, tmp_path: Path, seed: int) -> None:
        state = random_state(TINY, seed, torch.bfloat16)
        folder = write_original(tmp_path / "m", TINY, state)
        added = self.adapter(tmp_path / "a.safetensors", "peft", seed)
        merged = load_model(folder, dtype="fp32", lora=[str(tmp_path / "a.safetensors")])
        name = "blocks.1.ffn.0.weight"
        expected = (state[name].double() + added[name]).float()
        assert torch.equal(merged.state_dict()[name], expected)

    def test_another_base(self, tmp_path: Path, seed: int) -> None:
        wide = replace(TINY, width=24)
        folder = write_original(tmp_path / "m", wide, random_state(wide, seed))
        self.adapter(tmp_path / "a.safetensors", "peft", seed)
        with pytest.raises(UserError, match="base"):
            load_model(folder, lora=[str(tmp_path / "a.safetensors")])

    def test_no_adapter_and_only_an_adapter(self, tmp_path: Path, seed: int) -> None:
        folder = write_original(tmp_path / "m", TINY, random_state(TINY, seed))
        self.adapter(tmp_path / "a.safetensors", "peft", seed)
        with pytest.raises(UserError, match="holds no LoRA tensors"):
            load_model(folder, lora=[str(folder)])
        with pytest.raises(UserError, match="holds an adapter, not a model"):
            load_model(tmp_path / "a.safetensors", "mini")


def test_peak_memory_is_one_copy(tmp_path: Path) -> None:
    from mla_study.evaluation.bench_load import measure_load, write_random

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc")
    config = ModelConfig(layers=3, width=768, heads=6, ffn_width=3072, text_dim=64)
    warm = write_random(tmp_path / "warm", TINY)
    big = write_random(tmp_path / "big", config)
    kept = measure_load(big, warm)
    assert kept["file"] > 50e6
    assert kept["ratio"] <= 1.1 and kept["anonymous"] < 0.05 * kept["file"]
