"""Tables of a store: they replace earlier ones as a whole, and never by fewer pieces unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from mla_study.cli import main
from mla_study.errors import UserError
from mla_study.miniature import plan as plans
from mla_study.miniature.judge import Trial
from mla_study.miniature.plan import Node, Plan, Variant, judge_node
from mla_study.miniature.publish import write_tables
from mla_study.miniature.store import DONE, LOG, VIDEOS, Store
from mla_study.study.runs import read_result
from mla_study.world.shipped import shipped

BYTES = dict[str, bytes]


def pieces(count: int) -> Plan:
    """So many students' first stage, each with a long judgement."""
    nodes: list[Node] = []
    for seed in range(1, count + 1):
        variant = Variant(seed=seed)
        about = {**variant.about, "stage": "tf", "before": 0}
        nodes.append(Node(f"{variant.name}/tf", "train", {"seed": seed}, about=about))
        nodes.append(judge_node(nodes[-1], Trial(2, 2, seed), "plain"))
    return Plan(nodes)


def finish(store: Store, plan: Plan, names: list[str] | None = None, level: float = 0.5) -> None:
    """Leave what workers leave of these nodes: losses, and videos of two windows."""
    for name in plan.nodes if names is None else names:
        folder = store.place(plan, name)
        folder.mkdir(parents=True, exist_ok=True)
        if plan.nodes[name].kind == "train":
            log = pd.DataFrame({"step": [0, 10], "name": "held_out", "value": [1.0, level]})
            log.to_parquet(folder / LOG)
        else:
            rows = [{"video": v, "window": w, "iou": level, "all_correct": True}
                    for v in (0, 1) for w in (0, 1)]  # fmt: skip
            pd.DataFrame(rows).to_parquet(folder / VIDEOS)
        (folder / DONE).write_text(json.dumps({"cpu_s": 1.0}))


def content(folder: Path) -> BYTES:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", shipped("codec"))


def test_fewer_pieces_replace_nothing_and_force_replaces_all(store: Store, tmp_path: Path) -> None:
    plan, out = pieces(2), tmp_path / "out"
    finish(store, plan)
    written = write_tables(plan, store, out, "full")
    assert written.pieces == 4 and set(written.tables) == {"scores", "drift", "curves"}
    assert [folder.name for folder in written.folders] == [
        "study_scores", "study_drift", "study_curves"]  # fmt: skip
    for name, frame in written.tables.items():
        held = read_result(out / f"study_{name}")
        assert held.validity == "full" and len(held.table) == len(frame) > 0
    before = content(out)
    partial = Store(tmp_path / "partial", shipped("codec"))
    finish(partial, plan, ["dense-s1/tf"])
    with pytest.raises(UserError) as refused:
        write_tables(plan, partial, out, "full")
    told = str(refused.value)
    assert "partial has 1 of 4 pieces" in told and f"{out} are of 4, dense-s1/tf/plain-2x" in told
    assert "--force" in told and "--out" in told and content(out) == before
    # the earlier set's scores and drift go with it: they are of other pieces
    forced = write_tables(plan, partial, out, "full", force=True)
    assert sorted(p.name for p in out.iterdir()) == ["study_curves"]
    assert forced.pieces == 1 and read_result(out / "study_curves").validity == "partial"
    # more pieces need no force
    assert write_tables(plan, store, out, "full").pieces == 4
    assert [read_result(out / f"study_{n}").validity for n in written.tables] == ["full"] * 3


def test_as_many_pieces_of_the_same_names_replace_tables(store: Store, tmp_path: Path) -> None:
    plan, out = pieces(1), tmp_path / "out"
    finish(store, plan)
    write_tables(plan, store, out, "full")
    finish(store, plan, level=0.25)
    write_tables(plan, store, out, "full")
    scores = read_result(out / "study_scores").table
    assert set(scores.loc[scores["metric"] == "iou", "value"]) == {0.25}
    # another study of fewer pieces, of other names
    other = Plan([Node("other/tf", "train", {}, about=next(iter(plan)).about)])
    finish(store, other)
    with pytest.raises(UserError, match=r"has 1 of 1 pieces, but .* are of 2 \(study_scores\)"):
        write_tables(other, store, out, "mini")
    # tables of pieces that nothing tells
    (out / "study_scores" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="their record does not tell"):
        write_tables(plan, store, out, "full")


def test_all_tables_move_or_none(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = pieces(1), tmp_path / "out"
    finish(store, plan)
    write_tables(plan, store, out, "full")
    before = content(out)
    finish(store, plan, level=0.25)
    real, moved = Path.rename, list[str]()
    failures = list[BaseException]()

    def rename(self: Path, target: Path) -> Path:
        if self.name == "study_curves" and self.parent != out and failures:
            raise failures.pop()
        moved.append(self.name)
        return real(self, target)

    for failure, raised in ((OSError(28, "No space left"), UserError),
                            (KeyboardInterrupt(), KeyboardInterrupt)):  # fmt: skip
        moved.clear()
        failures.append(failure)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            with pytest.raises(raised):
                write_tables(plan, store, out, "full")
        # two tables were in place when the third could not be moved
        assert moved.count("study_scores") == 4 and content(out) == before
        assert not list(out.glob(".*"))


def test_the_command_says_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = pieces(2)
    monkeypatch.setattr(plans, "study", lambda name, node: plan)  # pyright: ignore
    store, out = Store(tmp_path / "store", shipped("codec")), tmp_path / "out"
    command = ["study", "full", "--tables-only", "--store", str(store.folder), "--out", str(out)]

    def told(code: int, *more: str) -> str:
        assert main([*command, *more]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    assert "store has no finished piece of this study" in told(2) and not out.exists()
    finish(store, plan, ["dense-s1/tf"])
    assert "no student is judged yet" in told(0)
    finish(store, plan, [f"dense-s{seed}/{node}" for seed in (1, 2) for node in ("tf",)])
    finish(store, plan, ["dense-s1/tf/plain-2x"])
    said = told(0)
    assert "dense tf" in " ".join(said.split()) and "tables of 3 of 4 pieces" in said
    finish(store, plan, ["dense-s2/tf/plain-2x"], level=0.25)
    assert "0.375" in told(0)
    before = content(out)
    (store.place(plan, "dense-s2/tf/plain-2x") / DONE).unlink()
    error = told(2)
    assert "has 3 of 4 pieces" in error and error.count("\n") == 1 and content(out) == before
    # what is printed is of the tables that were written, not of those that stood there
    said = told(0, "--force")
    assert "0.5" in said and "0.375" not in said and "tables of 3 of 4" in said


def test_work_does_not_start_where_its_tables_would_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out, plan = Store(tmp_path / "store", shipped("codec")), tmp_path / "out", pieces(2)
    finish(store, plan)
    write_tables(plan, store, out, "full")
    monkeypatch.setattr(plans, "study", lambda name, node: pieces(1))  # pyright: ignore
    started = list[bool]()
    monkeypatch.setattr(Store, "run", lambda *_: started.append(True))  # pyright: ignore
    assert main(["study", "mini", "--store", str(store.folder), "--out", str(out)]) == 2
    assert "the mini study has 2 of 2 pieces" in capsys.readouterr().err and not started
