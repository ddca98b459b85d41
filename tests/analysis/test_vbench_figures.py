"""Tables and figures of VBench scores, from the quoted values alone and with made-up results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType

import made_up_vbench as made_up
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from analysis import (
    fig_drift_vbench,
    fig_vbench_radar,
    table2_long_horizon,
    table2_user_study,
    table3_quality,
    table5_vbench,
    vbench_rows,
)
from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import DIMENSIONS, OVERALL_6, SUBSTITUTES
from mla_study.study import plots, tables
from mla_study.study.notebooks import Project, discover

ROOT = Path(__file__).resolve().parents[2]
Drawn = Callable[..., Figure]
QUOTED = (table2_long_horizon, table2_user_study, table3_quality, table5_vbench, fig_vbench_radar)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up.checkout(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up.study(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Draw a module's figure of a root into ``tmp_path``, as SVG alone, which is quick."""

    def save(figure: Figure, stem: Path | str) -> dict[str, Path]:
        return plots.save_figure(figure, stem, ["svg"])

    def draw(module: ModuleType, root: Path, **given: str) -> Figure:
        monkeypatch.setattr(module, "ROOT", root)
        for place in (tables, module):
            monkeypatch.setattr(place, "save_figure", save, raising=False)
        figure = module.draw(str(tmp_path), **given)
        assert (tmp_path / f"{module.ID}.svg").stat().st_size > 5000
        return figure

    return draw


def said(figure: Figure) -> str:
    """All text of a figure."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def board() -> pd.DataFrame:
    return pd.read_csv(ROOT / table5_vbench.DATA[2])


def five_and_board() -> pd.DataFrame:
    return table5_vbench.quoted(*(pd.read_csv(ROOT / name) for name in table5_vbench.DATA))


def test_each_has_a_notebook_that_the_driver_finds() -> None:
    found = {figure.id: figure for figure in discover(Project(ROOT))}
    for module in (*QUOTED, fig_drift_vbench):
        figure = found[module.ID]
        assert figure.title == module.TITLE
        assert figure.provenance == module.PROVENANCE
        parameter = "ratings" if module is table2_user_study else "runs"
        assert figure.values({})[parameter] == ""


@pytest.mark.parametrize("module", QUOTED, ids=lambda module: module.ID)
def test_quoted_values_alone_make_a_figure(module: ModuleType, drawn: Drawn, alone: Path) -> None:
    text = said(drawn(module, alone))
    assert "paper-quoted · full · run " in text
    if module is not table2_user_study:
        assert "of ours is scored" in text


def test_drift_is_not_drawn_without_results(drawn: Drawn, alone: Path) -> None:
    with pytest.raises(UserError, match="mla-study vbench run"):
        drawn(fig_drift_vbench, alone)


def test_table2_ranks_rest_on_dynamic_degree() -> None:
    frame = table2_long_horizon.quoted(pd.read_csv(ROOT / table2_long_horizon.DATA[0]))
    assert (frame["mean"] - frame["overall"]).abs().max() < 0.00101
    mine = frame[frame["model"] == "VideoMLA"].set_index("horizon_s")
    assert mine["rank"].to_dict() == {30: 2, 60: 1}
    assert mine["rank_without_dynamic_degree"].to_dict() == {30: 6, 60: 3}
    others = [f"rank_without_{name}" for name in OVERALL_6 if name != "dynamic_degree"]
    assert set(mine[others].to_numpy().ravel()) == {1, 2}
    text = " ".join(table2_long_horizon.sentences(frame))
    assert "2nd at 30 s, 6th without dynamic degree and 1st or 2nd without any other" in text
    assert "1st at 60 s, 3rd without dynamic degree" in text
    assert "0.001 in all 20 rows" in text


def test_table2_sets_measured_rows_below(drawn: Drawn, study: Path, tmp_path: Path) -> None:
    text = said(drawn(table2_long_horizon, study))
    assert "paper-quoted + measured" in text
    table = pd.read_csv(tmp_path / "table2_long_horizon.csv")
    assert table["model"].tolist()[20:] == [  # stand-ins make no row here
        "dense (10 videos)", "latent (10 videos)",
    ]  # fmt: skip
    row = table.iloc[20]
    np.testing.assert_allclose(row["mean"], 0.85)
    np.testing.assert_allclose([row["low"], row["high"]], [0.83, 0.87])
    paper = table[:20][table["horizon_s"][:20] == 30]
    assert row["rank"] == 1 + (paper["mean"] > 0.85).sum()
    rest = [name for name in OVERALL_6 if name != "aesthetic_quality"]
    better = paper[rest].mean(axis=1) > row[rest].mean()
    assert row["rank_without_aesthetic_quality"] == 1 + better.sum()
    every = pd.read_csv(tmp_path / "table2_long_horizon_measured.csv")
    held = every[every["scorer"].str.contains("stand-in")]
    assert set(held["validity"]) == {"substitute"} and len(held) == 4 * len(SUBSTITUTES)
    assert not every["scorer"].str.contains("Total|Quality").any()
    lines = (tmp_path / "table2_long_horizon.md").read_text().splitlines()
    assert sum(line.startswith("| *") for line in lines) == 20  # only quoted rows are in italics


def test_only_full_results_of_the_long_mode_are_ranked() -> None:
    paper = pd.read_csv(ROOT / table2_long_horizon.DATA[0])
    values = dict.fromkeys(OVERALL_6, 0.9)
    usual = {"mode": "long", "horizon_s": 61.0, "validity": "full"}
    for change, rank in (({}, 1), ({"validity": "partial"}, None), ({"mode": "custom"}, None),
                         ({"horizon_s": 20.0}, None)):  # fmt: skip
        rows = pd.DataFrame(made_up.with_composites("m", values, **(usual | change)))
        (row,) = table2_long_horizon.measured(
            rows.assign(result="r", name="m"), paper
        ).to_dict("records")  # fmt: skip
        assert (None if pd.isna(row["rank"]) else row["rank"]) == rank
        told = [change.get("mode"), "10 videos", change.get("validity")]
        assert row["model"] == f"m ({', '.join(str(word) for word in told if word)})"


def test_user_study_overall_is_the_mean_of_three() -> None:
    frame = table2_user_study.quoted(pd.read_csv(ROOT / table2_user_study.DATA[0]))
    assert (frame["off"].abs() <= 0.01).all() and len(frame) == 9
    assert frame[frame["flag"] != ""]["model"].tolist() == ["Infinity-RoPE"]
    text = table2_user_study.sentence(frame)
    assert "9 of 9" in text and "Infinity-RoPE's is 0.007 off" in text


HEAD = ",".join(table2_user_study.FORMAT)


def test_ratings_are_averaged_and_resampled_by_rater(
    drawn: Drawn, alone: Path, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = [f"r{i},dense,p{j},{rng.integers(1, 6)},{rng.integers(1, 6)},{rng.integers(1, 6)}"
            for i in range(7) for j in range(3)]  # fmt: skip
    file = tmp_path / "ratings.csv"
    file.write_text("\n".join([HEAD, *rows, "r0,latent,p0,3,4,5"]) + "\n")
    frame = table2_user_study.read_ratings(file)
    dense, latent = table2_user_study.rated(frame).to_dict("records")
    mine = frame[frame["model"] == "dense"]
    asked = list(table2_user_study.ASKED)
    np.testing.assert_allclose(dense["mean"], mine[asked].to_numpy().mean())
    assert (dense["raters"], dense["ratings"]) == (7, 21)
    # everyone rated as much: the interval is that of the mean over raters
    means = mine.assign(mean=mine[asked].mean(axis=1)).groupby("rater")["mean"].mean().to_numpy()
    drawn_means = rng.choice(means, size=(20000, 7)).mean(axis=1)
    want = np.percentile(drawn_means, [2.5, 97.5])
    np.testing.assert_allclose([dense["mean_low"], dense["mean_high"]], want, atol=0.1)
    assert latent["mean"] == 4 and np.isnan(latent["mean_low"])
    drawn(table2_user_study, alone, ratings=str(file))
    told = pd.read_csv(tmp_path / "table2_user_study_ratings.csv")
    assert told["model"].tolist() == ["dense", "latent"]


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["rater,model,prompt,prompt_adherence"], "no column 'temporal_consistency'"),
        ([HEAD], "holds no rating"),
        ([HEAD, "a,m,p,1,2,6"], "line 2: dynamic_consistency is '6'.*number from 1 to 5"),
        ([HEAD, "a,m,p,1,2,3", "b,m,p,nan,2,3"], "line 3: prompt_adherence is 'nan'"),
        ([HEAD, "a,m,p,1,,3"], "line 2: temporal_consistency is ''"),
        ([HEAD, "a,,p,1,2,3"], "line 2: model is empty"),
        ([HEAD, "a,m,p,1,2,3", " a,m,p ,2,2,2"], "line 3: a rated m on 'p' on line 2"),
        ([HEAD, "", "a,m,p, again,1,2,3"], "line 3 has 7 cells, but the first line 6"),
    ],
)
def test_bad_ratings_are_told_by_line(lines: list[str], match: str, tmp_path: Path) -> None:
    file = tmp_path / "ratings.csv"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=match):
        table2_user_study.read_ratings(file)
    with pytest.raises(UserError, match="cannot be read"):
        table2_user_study.read_ratings(tmp_path / "absent.csv")


def test_table3_leaves_what_was_not_measured_empty(
    drawn: Drawn, study: Path, tmp_path: Path
) -> None:
    drawn(table3_quality, study)
    table = pd.read_csv(tmp_path / "table3_quality.csv").set_index("model")
    assert table.loc["latent", "clip_t"] == 0.31 and np.isnan(table.loc["latent", "hpsv3"])
    assert table.loc["VideoMLA", "hpsv3"] == 9.74
    (line,) = [
        text for text in (tmp_path / "table3_quality.md").read_text().splitlines()
        if text.startswith("| latent")
    ]  # fmt: skip
    assert "| 0.3100 | 0.9700 | – |" in line


def test_two_totals_and_what_changes_places() -> None:
    rows = five_and_board().set_index("model")
    default = rows.loc["split 96/32, default"]
    np.testing.assert_allclose([default["plain"], default["own"]], [83.89, 84.412])
    paper = rows[rows["group"] == table5_vbench.PAPER]
    assert (paper["plain"] - paper["total"]).abs().max() < 0.0051
    public = rows[rows["group"] == table5_vbench.BOARD]
    assert (public["own"] - public["total"]).abs().max() < 0.01
    assert (
        public["rank_plain"].idxmin() == "CogVideoX-5B" and public["rank_own"].idxmin() == "Gen-3"
    )
    turned = [
        {one, two}
        for one, two in combinations(public.index, 2)
        if (public.loc[one, "plain"] - public.loc[two, "plain"])
        * (public.loc[one, "own"] - public.loc[two, "own"]) < 0
    ]  # fmt: skip
    swaps = [s for s in table5_vbench.swaps(public.reset_index()) if 0.5 < s[0] <= 0.8]
    assert [set(swap[1:]) for swap in sorted(swaps)] and len(swaps) == len(turned) == 6
    assert all(set(swap[1:]) in turned for swap in swaps)
    for share, above, below in swaps:  # equal there, and the first leads beyond
        at = {name: (1 - share) * public.loc[name, "semantic"] + share * public.loc[name, "quality"]
              for name in (above, below)}  # fmt: skip
        np.testing.assert_allclose(at[above], at[below])
        assert public.loc[above, "quality"] > public.loc[below, "quality"]
    text = " ".join(table5_vbench.sentences(rows.reset_index(), board()))
    assert "all 30 published scores come out within 0.007" in text and "6 pairs" in text


def test_a_missing_dimension_leaves_no_total(drawn: Drawn, study: Path, tmp_path: Path) -> None:
    drawn(table5_vbench, study)
    assert (tmp_path / "table5_vbench_weighting.svg").is_file()
    row = pd.read_csv(tmp_path / "table5_vbench.csv").set_index("model").loc["latent"]
    normal = [0.53 + 0.02 * i for i in range(len(DIMENSIONS))]
    weights = [0.5 if name == "dynamic_degree" else 1.0 for name in list(DIMENSIONS)[:7]]
    quality, semantic = 100 * np.average(normal[:7], weights=weights), 100 * np.mean(normal[7:])
    np.testing.assert_allclose(row["own"], 0.8 * quality + 0.2 * semantic, rtol=1e-6)
    np.testing.assert_allclose(row["plain"], (quality + semantic) / 2, rtol=1e-6)
    values = made_up.raw()
    del values["scene"]
    rows = [*made_up.with_composites("m", values), made_up.row("m", "imaging_quality[niqe]", 5.0)]
    (found,) = table5_vbench.measured(
        pd.DataFrame(rows).assign(result="r", name="m")
    ).to_dict("records")  # fmt: skip
    assert found["dimensions"] == 15 and np.isfinite(found["quality"])
    assert np.isnan(found["semantic"]) and np.isnan(found["own"]) and np.isnan(found["plain"])


def test_only_full_measured_rows_are_ranked() -> None:
    parts = [
        pd.DataFrame(made_up.with_composites(name, made_up.raw(i), validity=validity)).assign(
            result=name, name=name
        )
        for i, (name, validity) in enumerate((("a", "full"), ("b", "full"), ("c", "partial")))
    ]
    rows = table5_vbench.measured(pd.concat(parts, ignore_index=True))
    assert rows["model"].tolist() == ["a", "b", "c (10 videos, partial)"]
    assert rows["rank_own"].tolist()[:2] == [2, 1] and pd.isna(rows["rank_own"].iloc[2])
    assert table5_vbench.measured(parts[0])["rank_own"].isna().all()  # alone


def test_labels_are_kept_apart() -> None:
    places = table5_vbench.spread([5.0, 4.9, 4.8, 1.0], 0.5)
    assert (-np.diff(places) >= 0.5 - 1e-9).all()
    np.testing.assert_allclose(places, [5.4, 4.9, 4.4, 1.0])


def test_radar_normalises_by_vbench_bounds(drawn: Drawn, study: Path) -> None:
    found = fig_vbench_radar.board(board()).loc["Kling"]
    np.testing.assert_allclose(found["motion_smoothness"], (0.994 - 0.706) / (0.9975 - 0.706))
    np.testing.assert_allclose(found["appearance_style"], (0.1962 - 0.0009) / (0.2855 - 0.0009))
    figure = drawn(fig_vbench_radar, study, named="Gen-3")
    text = said(figure)
    assert (
        "latent (measured: short, 10 videos, full; 16 of 16 dimensions)" in text
        and "Gen-3 (quoted)" in text
    )
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(
        lines["latent (measured: short, 10 videos, full; 16 of 16 dimensions)"].get_ydata()[:16],
        0.53 + 0.02 * np.arange(16),
    )
    with pytest.raises(UserError, match="no row 'Sora'"):
        drawn(fig_vbench_radar, study, named="Sora")


def test_a_few_clips_of_ones_own_are_told_as_such_beside_the_leaderboard(
    drawn: Drawn, alone: Path, tmp_path: Path
) -> None:
    values = {name: made_up.raw()[name] for name in ("temporal_flickering", "imaging_quality")}
    rows = [made_up.row("mine", *pair, mode="custom", videos=4) for pair in values.items()]
    runs = str(made_up.write(tmp_path / "few", rows))
    text = said(drawn(fig_vbench_radar, alone, runs=runs))
    assert "mine (measured: custom, 4 videos; 2 of 16 dimensions)" in text
    found = vbench_rows.wide(vbench_rows.read(runs, alone).table, list(values))
    assert vbench_rows.titled(found, "short") == ["mine (custom, 4 videos)"]
    long = found.assign(mode="long", validity="partial")
    assert vbench_rows.titled(long, "long") == ["mine (4 videos, partial)"]


def test_drift_names_stand_ins_and_lengths(drawn: Drawn, study: Path) -> None:
    figure = drawn(fig_drift_vbench, study)
    text = said(figure)
    for told in (
        "dynamic degree,\nstand-in RAFT-small", "temporal flickering (partial)",
        "stand-in NIQE, lower is better", "miniature latent, 150 s (custom, 10 videos)",
        "measured · substitute",
    ):  # fmt: skip
        assert told in text
    (panel,) = [a for a in figure.axes if a.get_title("left").startswith("motion smoothness,")]
    assert panel.get_xscale() == "log" and len(panel.lines) == 4
    (panel,) = [a for a in figure.axes if a.get_title("left") == "subject consistency"]
    np.testing.assert_allclose(panel.lines[0].get_ydata()[-1], 0.9 * 0.9)


def test_results_may_be_named_and_are_checked(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = made_up.write(tmp_path / "one", [made_up.row("m", "clip_t", 0.3)])
    two = made_up.write(tmp_path / "two", [made_up.row("m", "clip_t", 0.2),
                                           made_up.row("m", "clip_f", float("nan"))])  # fmt: skip
    null = made_up.write(
        tmp_path / "null", [made_up.row("n", "clip_t", 0.1, validity="invalid")],
        provenance="null-model", validity="invalid",
    )  # fmt: skip
    runs = f"{one}, {two},{one},{null}"
    assert list(vbench_rows.folders(runs, alone)) == ["one", "two", "null"]
    assert "two/table.parquet" in vbench_rows.inputs(runs, alone)
    ours = vbench_rows.read(runs, alone)
    assert ours.table["name"].tolist() == ["m (one)", "m (two)"]
    assert "null is left out: it is null-model, invalid" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"absent holds no run\.json"):
        vbench_rows.read(str(tmp_path / "absent"), alone)
    bare = pd.DataFrame(made_up.row("m", "clip_t", 0.3), index=[0]).drop(columns="low")
    made_up.write(tmp_path / "bare", bare.to_dict("records"))
    with pytest.raises(UserError, match="no column 'low'"):
        vbench_rows.read(str(tmp_path / "bare"), alone)


def test_identity_follows_the_rows_that_are_shown(study: Path, tmp_path: Path) -> None:
    root = shutil.copytree(study, tmp_path / "root")
    ours = vbench_rows.read("", root)
    paper = root / table2_long_horizon.DATA[0]
    shown = ours.table[ours.table["result"] == "vbench_dense_long"]
    kinds, validity, run_hash = vbench_rows.identity("table2_long_horizon", ours, shown, [paper])
    assert (kinds, validity) == (("paper-quoted", "measured"), "full")
    none = vbench_rows.identity("table2_long_horizon", ours, shown[:0], [paper])
    assert none[:2] == (("paper-quoted",), "full") and none[2] != run_hash
    every = vbench_rows.identity("table2_long_horizon", ours, ours.table, [paper])
    assert every[1] == "substitute"
    paper.write_text(paper.read_text() + "\n")
    assert vbench_rows.identity("table2_long_horizon", ours, shown, [paper])[2] != run_hash
