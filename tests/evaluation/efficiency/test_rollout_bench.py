"""The benchmark's bookkeeping: rows, ratios, what runs out of memory, what is not there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from mla_study.commands.bench_rollout import Gpu, RolloutBench, Step
from mla_study.config import WindowConfig
from mla_study.errors import UserError
from mla_study.evaluation.efficiency import attribution, rollout_bench, runs
from mla_study.evaluation.efficiency.ceilings import Ceilings
from mla_study.evaluation.efficiency.rollout_bench import (
    Field,
    clip_chunks,
    line,
    measure,
    speed,
    table,
    transient,
)
from mla_study.evaluation.efficiency.variants import (
    Running,
    Scale,
    Variant,
    Weights,
    quarter,
    small,
)
from mla_study.evaluation.timing import Spread, Times
from mla_study.kernels.latent_attention.cost import Shape
from mla_study.rollout.accelerate import Acceleration
from mla_study.study.runs import read_result

WINDOW = WindowConfig(1, 3, 3)
DENSE, LATENT = Variant(WINDOW), Variant(WINDOW, latent=True, form="reconstruct")
FP8 = replace(DENSE, how=Acceleration(fp8=True))
_TOP, _COPY = Spread(1e11, 1e11, 1e11), Spread(1e10, 1e10, 1e10)
TOPS = Ceilings(_TOP, _TOP, _COPY)


@pytest.fixture(scope="module")
def scale() -> Scale:
    return small(quarter())


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_bench, "ceilings", lambda device, dtype: TOPS)


def test_measures_and_says_what_it_cannot(scale: Scale) -> None:
    found, times, _ = measure([DENSE, LATENT, FP8], scale, ("step", "chunk"), 2, 1)
    rows = found.set_index(["kind", "variant"])
    assert len(found) == 6 and set(times) == {"step", "chunk"}
    assert rows.loc[("chunk", FP8.name), "status"].startswith("refused: fp8")
    assert pd.isna(rows.loc[("chunk", FP8.name), "fps"])
    row = rows.loc[("chunk", LATENT.name)]
    assert row["status"] == "ok" and row["keys"] == 7 * 6
    assert row["fps"] == pytest.approx(12 / row["seconds"])
    assert row["latent_fps"] == pytest.approx(3 / row["seconds"])
    assert row["rate"] == pytest.approx(row["flops"] / row["seconds"])
    assert row["limit_fps"] == pytest.approx(12 * 1e11 / row["flops"])
    assert row["peak"] == row["weights"] + row["cache"] + row["transient"] > 0
    assert 0 < row["first_s"] < row["clip_s"]
    assert row["flops"] == pytest.approx(5 * rows.loc[("step", LATENT.name), "flops"])
    texts = [line(r) for r in found.to_dict("records")]  # type: ignore[arg-type]
    assert any("FPS of at most" in text and "81 frames" in text for text in texts)
    assert any(text.endswith("leave out --fp8") for text in texts)


def test_running_out_of_memory_is_a_row(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Running.chunk

    def hungry(self: Running) -> None:
        if self.variant.latent:
            raise torch.OutOfMemoryError("CUDA out of memory")
        plain(self)

    monkeypatch.setattr(Running, "chunk", hungry)
    made = Field.of([DENSE, LATENT], scale)
    found = table([DENSE, LATENT], made, {"chunk": made.times("chunk", 1)}, TOPS)
    assert list(found["status"]) == ["ok", "OOM"]


def test_running_out_while_building_is_a_row(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(variant: Variant, *given: object) -> str | None:
        if variant.latent:
            raise MemoryError
        return None

    monkeypatch.setattr(rollout_bench, "refusal", greedy)
    assert Field.of([DENSE, LATENT], scale).refused == {LATENT.name: "OOM"}

    def broken(variant: Variant, *given: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(rollout_bench, "refusal", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        Field.of([DENSE], scale)


def test_a_clip_is_seven_chunks(scale: Scale) -> None:
    assert clip_chunks(Running(DENSE, scale, Weights(scale))) == 7


def test_batches_count_all_their_frames(scale: Scale) -> None:
    four = replace(DENSE, batch=4)
    told = speed(four, scale, "chunk", Spread(2.0, 2.0, 2.0), TOPS)
    assert told["fps"] == 24 and told["latent_fps"] == 6


def test_a_pass_needs_more_than_its_output(scale: Scale) -> None:
    running = Running(LATENT, scale, Weights(scale))
    assert transient(running) > running.step().nbytes


def test_factors_are_ratios_of_turns(scale: Scale) -> None:
    wanted = attribution.factors(scale, "1 + 6 + chunk")
    variants = attribution.variants_of(wanted)
    assert variants[0].window.key_frames == 21 and len(set(variants)) == len(variants)
    seconds = {v.name: (2.0, 6.0, 4.0) if not i else (1.0, 2.0, 2.0)
               for i, v in enumerate(variants)}  # fmt: skip
    seconds[variants[0].name + " (again)"] = (2.0, 6.0, 4.0)
    missing = variants[3].name
    del seconds[missing]
    times = Times(seconds, {missing: "OOM"})
    found = attribution.rows_of(wanted, scale, {"chunk": times, "step": times}, TOPS)
    rows = found.set_index(["kind", "factor"])
    assert rows.loc[("chunk", "window"), "value"] == 2.0
    assert rows.loc[("chunk", "window"), "high"] == 2.5
    assert rows.loc[("chunk", "no clean pass, dense"), "predicted"] == pytest.approx(1.25, abs=0.01)
    # a step does not know of the clean pass
    assert ("step", "no clean pass, dense") not in rows.index
    assert ("chunk", "layout, absorbed") not in rows.index
    assert rows.loc[("chunk", "noise (A/A)"), "value"] == 1.0
    assert "FLOPs at 1.3B 1.578x" in attribution.line(found.iloc[0].to_dict())  # type: ignore[arg-type]


def test_predictions_at_full_size_take_the_form_of_fewer_flops() -> None:
    here = quarter()
    held = {f.name: f for f in attribution.factors(here, "1 + 6 + chunk")}
    assert attribution._at_full(held["layout, auto"], here) == pytest.approx(1.030, abs=5e-4)
    assert attribution._at_full(held["layout, absorbed"], here) == pytest.approx(0.778, abs=5e-4)


def test_a_gpu_has_more_changes(scale: Scale) -> None:
    there = {f.name for f in attribution.factors(replace(scale, device="cuda"), "1 + 6 + chunk")}
    assert {"graph", "compile + graph", "fp8 + graph + no clean pass"} <= there


def test_the_commands_write_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Here:
        data = tmp_path

        @classmethod
        def find(cls) -> type[Here]:
            return cls

    monkeypatch.setattr(runs, "Project", Here)
    assert Step("small", "within", 1).run() == 0
    result = read_result(tmp_path / "bench_step_small_within")
    assert set(result.tables) == {"table", "factors", "repeats"}
    assert "VAE and text encoder not counted" in result.run["notes"]
    assert result.run["observed"]["hardware"]
    assert "step" in capsys.readouterr().out
    assert RolloutBench("small", "within", 1, 0, write=False).run() == 0
    assert not (tmp_path / "bench_rollout_small_within").exists()


def test_what_needs_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees none here"):
        Gpu().run()
    with pytest.raises(UserError, match="give --scale quarter"):
        Step("full").run()
    with pytest.raises(UserError, match="there is no piece 'nothing'"):
        Gpu(("nothing",)).run()
    with pytest.raises(UserError, match="at least 1"):
        Step("small", repeats=0).run()


def test_pieces_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Here:
        data = tmp_path

        @classmethod
        def find(cls) -> type[Here]:
            return cls

    ran: list[str] = []

    def fake(command: Sequence[str]) -> tuple[int, str]:
        ran.append(command[4])
        return (1, "") if command[4] == "memory" else (0, "a row\n")

    monkeypatch.setattr(runs, "Project", Here)
    monkeypatch.setattr(runs, "streamed", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runs.bench_gpu(("attention", "memory", "batch")) == 1
    assert ran == ["attention", "memory", "batch"]
    assert runs.bench_gpu(("attention", "batch")) == 0 and len(ran) == 3
    assert runs.bench_gpu(("attention",), again=True) == 0 and len(ran) == 4
    assert runs.bench_gpu(("memory",), minutes=-1) == 0 and len(ran) == 4
    assert "the same command goes on" in capsys.readouterr().err


def test_output_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = runs.streamed([sys.executable, "-c", "print('row'); raise SystemExit(3)"])
    assert (code, text) == (3, "row\n") and capsys.readouterr().out == "row\n"


def test_goals_stand_beside_the_best_variant() -> None:
    base = {"kind": "chunk", "status": "ok", "keys": 15600, "batch": 1, "limit_fps": 77.0,
            "storage": "bf16", "dtype": "bf16"}  # fmt: skip
    rows = [
        base | {"variant": "a", "how": "eager", "clean_pass": True, "fps": 30.0},
        base | {"variant": "b", "how": "graph", "clean_pass": True, "fps": 60.0},
        base | {"variant": "c", "how": "graph", "clean_pass": False, "fps": 70.0},
        base | {"variant": "d", "how": "graph + fp8", "clean_pass": False, "fps": 90.0},
        base | {"variant": "e", "how": "graph", "clean_pass": True, "fps": 99.0, "keys": 10920},
    ]
    exact, fast = runs.goals(pd.DataFrame(rows))
    assert (exact.value, exact.met) == (60.0, True) and exact.setting.startswith("b, limit 77")
    assert (fast.value, fast.met) == (90.0, False)


def test_a_form_beside_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(8, 24, heads=2, d_c=16, d_rope=8, d_head=32, dtype="fp32")
    row = runs.kernel_goal(shape, torch.device("cpu"), 2, "absorbed", "MATH")
    assert row.value > 0 and row.goal == runs.KERNEL_GOAL and "24 keys" in row.setting
    monkeypatch.setattr(runs, "check", lambda *given: "its error 1 exceeds 0")
    with pytest.raises(UserError, match="absorbed gets no number: its error"):
        runs.kernel_goal(shape, torch.device("cpu"), 2, "absorbed", "MATH")
