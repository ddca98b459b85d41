"""The long mode's arithmetic against tables written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_study.errors import UserError
from mla_study.evaluation.vbench.long.averages import (
    clips_of,
    drift,
    fuse,
    load_configs,
    long_scores,
    mapped,
    notes_of,
    side_by_side,
)

CONFIGS = load_configs()
NTSC = Fraction(30000, 1001)
SUBJECT, BACKGROUND = "subject_consistency", "background_consistency"


@pytest.mark.parametrize(
    ("frames", "fps", "seconds", "exact", "count", "size", "last"),
    [
        (480, 16, 2.0, True, 15, 32, 448),  # 30 s
        (480, 16, 2.0, False, 15, 32, 448),
        (960, 16, 10.0, True, 6, 160, 800),  # 60 s
        (1798, NTSC, 2.0, True, 31, 58, 1740),  # 60 s; upstream takes 29 a second
        (1798, NTSC, 2.0, False, 30, 60, 1738),
        (899, NTSC, 10.0, True, 4, 290, 609),  # 30 s
        (899, NTSC, 10.0, False, 3, 300, 599),
        (81, 16, 2.0, True, 3, 32, 49),  # 5.06 s
        (33, 16, 2.0, False, 2, 32, 1),
        (32, 16, 2.0, True, 1, 32, 0),
        (31, 16, 2.0, True, 1, 31, 0),
        (20, 16, 10.0, False, 1, 20, 0),
        (10, 12.5, 0.5, False, 2, 6, 4),
        (7, 0.25, 2.0, False, 7, 1, 6),
        (50, 10, 2.9, True, 3, 20, 30),  # upstream cuts seconds off as well
        (50, 10, 2.9, False, 2, 29, 21),
    ],
)
def test_where_clips_begin(
    frames: int, fps: float, seconds: float, exact: bool, count: int, size: int, last: int
) -> None:
    clips = clips_of(frames, fps, seconds, exact)
    assert len(clips) == count
    assert {stop - start for start, stop in clips} == {size}
    assert [start for start, _ in clips[:-1]] == [i * size for i in range(count - 1)]
    assert clips[-1] == (last, frames)


@given(
    frames=st.integers(1, 3000),
    fps=st.sampled_from([8, 12.5, 16, 24, NTSC, 29.97002997002997]),
    seconds=st.sampled_from([1.0, 2.0, 2.5, 10.0]),
    exact=st.booleans(),
)
def test_clips_cover_every_frame(frames: int, fps: float, seconds: float, exact: bool) -> None:
    clips = clips_of(frames, fps, seconds, exact)
    covered = np.zeros(frames, bool)
    for start, stop in clips:
        assert 0 <= start < stop <= frames
        covered[start:stop] = True
    assert covered.all()


@pytest.mark.parametrize(("fps", "seconds"), [(0.5, 2.0), (16, 0.5)])
def test_upstreams_rule_can_give_clips_of_no_frames(fps: float, seconds: float) -> None:
    with pytest.raises(UserError, match="no frames"):
        clips_of(10, fps, seconds, True)


def test_mapping_is_linear_between_points_and_flat_beyond() -> None:
    table = ((0.0, 0.0), (0.5, 0.8), (1.0, 1.0))
    found = [mapped(score, table) for score in (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)]
    assert found == [0.0, 0.0, 0.4, 0.8, 0.9, 1.0, 1.0]


@pytest.mark.parametrize(
    ("dimension", "score", "expected"),
    [
        # halfway between two published points, by hand
        (SUBJECT, 0.785, (0.977155875644753 + 0.978418810979857) / 2),
        (SUBJECT, 0.005, 0.655812085783768 / 2),
        (BACKGROUND, 0.01, 0.873691544930448),
        (BACKGROUND, 0.995, (0.985895411744772 + 1.0) / 2),
    ],
)
def test_published_tables(dimension: str, score: float, expected: float) -> None:
    assert mapped(score, CONFIGS.tables[dimension]) == pytest.approx(expected, abs=1e-14)


def test_fusion_and_its_two_exceptions() -> None:
    table = ((0.0, 0.0), (0.5, 0.8), (1.0, 1.0))
    assert fuse(0.9, 0.5, (0.5, 0.5), table, False) == (pytest.approx(0.85), 0.8)
    assert fuse(0.9, 0.5, (0.7, 0.3), table, False)[0] == pytest.approx(0.87)
    assert fuse(0.9, 0.0, (0.5, 0.5), table, False) == (0.9, 0.0)  # mapped to exactly 0
    value, image = fuse(0.9, 0.5, (0.5, 0.5), table, True)
    assert value == 0.9 and np.isnan(image)


def clip_rows(
    video: str, dimension: str, values: Sequence[float], terms: Sequence[int] = (),
    part: str | None = None, seconds: float = 2.0, begin: float = 0.0, prompt: str = "a cat",
) -> list[dict[str, object]]:  # fmt: skip
    part = part or video.removesuffix(".mp4")
    return [
        {
            "video": video,
            "prompt": prompt,
            "index": 0,
            "clip": f"{part}_{i:03d}",
            "start_s": begin + i * seconds,
            "stop_s": begin + (i + 1) * seconds,
            "dimension": dimension,
            "value": value,
            "terms": terms[i] if terms else 31,
        }
        for i, value in enumerate(values)
    ]


def pair(video: str, part: str, value: float, dimension: str = SUBJECT) -> dict[str, object]:
    extractor = "dinov2" if dimension == SUBJECT else "dreamsim"
    return {
        "video": video,
        "part": part,
        "dimension": dimension,
        "value": value,
        "terms": 2,
        "extractor": extractor,
    }


NO_PAIRS = pd.DataFrame()


def test_thirty_and_sixty_seconds_by_hand() -> None:
    # 15 clips and 30 clips: upstream weighs the longer video twice
    short, long = [0.96] * 15, [0.90] * 30
    clips = pd.DataFrame(
        clip_rows("a-0.mp4", SUBJECT, short)
        + clip_rows("b-0.mp4", SUBJECT, long)
        + clip_rows("a-0.mp4", "imaging_quality", [60.0] * 15)
        + clip_rows("b-0.mp4", "imaging_quality", [75.0] * 30)
    )
    pairs = pd.DataFrame([pair("a-0.mp4", "a-0", 0.8), pair("b-0.mp4", "b-0", 0.4)])
    # published points: 0.80 -> 0.979501010595634, 0.40 -> 0.909197403281584
    a, b = (0.96 + 0.979501010595634) / 2, (0.90 + 0.909197403281584) / 2
    found = {exact: long_scores(clips, pairs, CONFIGS, exact) for exact in (True, False)}
    table = side_by_side(found).set_index("scorer")
    assert list(table.columns[:2]) == ["upstream", "corrected"]
    assert table.loc[SUBJECT, "corrected"] == pytest.approx((a + b) / 2, abs=1e-14)
    assert table.loc[SUBJECT, "upstream"] == pytest.approx((a + 2 * b) / 3, abs=1e-14)
    assert table.loc["imaging_quality", "corrected"] == pytest.approx(0.675, abs=1e-14)
    assert table.loc["imaging_quality", "upstream"] == pytest.approx(0.70, abs=1e-14)
    assert list(table["left_out"]) == [0, 0]
    ours = found[False]
    first = ours.videos.iloc[0]
    assert (first["video"], first["clips"], first["terms"]) == ("a-0.mp4", 15, 15 * 31)
    assert first[["in_clip", "clip_to_clip", "mapped", "value"]].tolist() == pytest.approx(
        [0.96, 0.8, 0.979501010595634, a]
    )
    assert ours.overall.iloc[0]["extractor"] == "dinov2"
    assert ours.overall.iloc[0][["in_clip_weight", "clip_to_clip_weight"]].tolist() == [0.5, 0.5]
    assert ours.notes == ()


def test_without_dev_flag_the_in_clip_score_stands_alone() -> None:
    clips = pd.DataFrame(clip_rows("a-0.mp4", BACKGROUND, [0.9, 0.8]))
    pairs = pd.DataFrame([{**pair("a-0.mp4", "a-0", 0.5, BACKGROUND), "extractor": "clip"}])
    for exact in (True, False):
        found = long_scores(clips, pairs, CONFIGS, exact, dev=False)
        assert found.overall.iloc[0]["value"] == pytest.approx(0.85)
        assert found.overall.iloc[0]["extractor"] == "clip"
        assert found.overall.iloc[0]["clip_to_clip_weight"] == 0.0
        assert long_scores(clips, NO_PAIRS, CONFIGS, exact, dev=False).overall.iloc[0][
            "value"
        ] == pytest.approx(0.85)
    with pytest.raises(UserError, match="by clip, but with dev_flag it is dreamsim"):
        long_scores(clips, pairs, CONFIGS, False)


def test_terms_weigh_clips_of_a_video_but_not_videos() -> None:
    clips = pd.DataFrame(
        clip_rows("a-0.mp4", "scene", [1.0, 0.0], [30, 10]) + clip_rows("b-0.mp4", "scene", [0.25])
    )
    assert long_scores(clips, NO_PAIRS, CONFIGS, False).overall.iloc[0]["value"] == 0.5
    exact = long_scores(clips, NO_PAIRS, CONFIGS, True)
    assert exact.overall.iloc[0]["value"] == pytest.approx(1.25 / 3)
    assert exact.videos["clip"].tolist() == ["a-0_000", "a-0_001", "b-0_000"]


def test_clips_that_do_not_count() -> None:
    rows = clip_rows("a-0.mp4", "color", [1.0, 0.0], [1, 0]) + clip_rows(
        "b-0.mp4", "color", [float("nan")]
    )
    for exact in (True, False):
        found = long_scores(pd.DataFrame(rows), NO_PAIRS, CONFIGS, exact)
        assert found.overall.iloc[0][["value", "clips", "videos", "left_out"]].tolist() == [
            1.0, 1, 1, 1,
        ]  # fmt: skip
        assert found.notes == ("color: b-0.mp4 left out of the mean",)


def test_one_clip_only() -> None:
    clips = pd.DataFrame(
        clip_rows("a-0.mp4", SUBJECT, [0.9]) + clip_rows("b-0.mp4", SUBJECT, [0.8, 0.8])
    )
    pairs = pd.DataFrame([pair("b-0.mp4", "b-0", 0.4)])
    b = (0.8 + 0.909197403281584) / 2
    assert long_scores(clips, pairs, CONFIGS, False).overall.iloc[0]["value"] == pytest.approx(
        (0.9 + b) / 2
    )
    exact = long_scores(clips, pairs, CONFIGS, True)
    assert exact.overall.iloc[0]["value"] == pytest.approx((0.9 + 2 * b) / 3)
    assert exact.videos.iloc[0]["mapped"] == 0.0  # as if the clips had nothing in common


def test_only_videos_of_one_clip() -> None:
    clips = pd.DataFrame(
        clip_rows("a-0.mp4", SUBJECT, [0.9], [31]) + clip_rows("b-0.mp4", SUBJECT, [0.6], [10])
    )
    assert long_scores(clips, NO_PAIRS, CONFIGS, False).overall.iloc[0]["value"] == 0.75
    exact = long_scores(clips, NO_PAIRS, CONFIGS, True)
    assert exact.overall.iloc[0]["value"] == pytest.approx((0.9 * 31 + 6) / 41)
    stopped = long_scores(clips, NO_PAIRS, CONFIGS, True, dev=False)
    assert np.isnan(stopped.overall.iloc[0]["value"])
    assert any("divides by zero" in note for note in stopped.notes)


def test_a_missing_clip_to_clip_score_leaves_the_video_out() -> None:
    clips = pd.DataFrame(
        clip_rows("a-0.mp4", SUBJECT, [0.9, 0.9]) + clip_rows("b-0.mp4", SUBJECT, [0.8, 0.8])
    )
    pairs = pd.DataFrame([pair("b-0.mp4", "b-0", 0.4)])
    for exact in (False, True):
        found = long_scores(clips, pairs, CONFIGS, exact)
        assert set(found.videos["video"]) == {"b-0.mp4"}
        assert found.notes == (
            f"{SUBJECT}: a-0.mp4 left out of the mean",
            f"{SUBJECT}: a-0 of a-0.mp4 has no clip-to-clip score",
        )


def test_names_with_an_underscore() -> None:
    clips = pd.DataFrame(clip_rows("my_clip-0.mp4", SUBJECT, [0.9, 0.9], prompt="my_clip"))
    pairs = pd.DataFrame([pair("my_clip-0.mp4", "my_clip-0", 0.4)])
    fused = (0.9 + 0.909197403281584) / 2
    assert long_scores(clips, pairs, CONFIGS, False).overall.iloc[0]["value"] == pytest.approx(
        fused
    )
    exact = long_scores(clips, pairs, CONFIGS, True).overall.iloc[0]
    assert exact["value"] == pytest.approx(0.9)  # upstream looks for 'my.mp4'
    lost = long_scores(clips, pairs, CONFIGS, True, standard=True)
    assert np.isnan(lost.overall.iloc[0]["value"]) and lost.overall.iloc[0]["left_out"] == 1
    assert any("finds no clip" in note for note in lost.notes)


def test_a_cut_in_the_middle() -> None:
    video = "a cat-0.mp4"
    rows = clip_rows(video, SUBJECT, [0.9, 0.9], part="a cat-0-Scene-0") + clip_rows(
        video, SUBJECT, [0.6], [62], part="a cat-0-Scene-1", begin=4.0
    )
    whole = clip_rows("a cat-1.mp4", SUBJECT, [0.5, 0.5])
    pairs = pd.DataFrame([pair(video, "a cat-0-Scene-0", 0.8), pair("a cat-1.mp4", "a cat-1", 0.4)])
    first, other = (0.9 + 0.979501010595634) / 2, (0.5 + 0.909197403281584) / 2
    clips = pd.DataFrame(rows + whole)
    # each scene fused by itself, then weighted by its terms: 62 and 62
    ours = long_scores(clips, pairs, CONFIGS, False).overall.iloc[0]["value"]
    assert ours == pytest.approx(((first + 0.6) / 2 + other) / 2)
    custom = long_scores(clips, pairs, CONFIGS, True).overall.iloc[0]
    assert custom["value"] == pytest.approx((2 * first + 0.6 + 2 * other) / 5)
    standard = long_scores(clips, pairs, CONFIGS, True, standard=True)
    assert standard.overall.iloc[0]["value"] == pytest.approx(other)
    assert standard.notes == (f"{SUBJECT}: a cat-0.mp4 left out of the mean",)


def test_static_filter() -> None:
    flicker = "temporal_flickering"
    rows = clip_rows("a cat-0.mp4", flicker, [0.9, 0.8, 0.7, 0.6]) + clip_rows(
        "a cat-1.mp4", flicker, [0.5, 0.4, 0.3]
    )
    for row, static in zip(rows, [True, True, False, True, True, True, True], strict=True):
        row["static"] = static
    clips = pd.DataFrame(rows)
    ours = long_scores(clips, NO_PAIRS, CONFIGS, False, static=True).overall.iloc[0]
    assert ours["value"] == pytest.approx(((0.9 + 0.8 + 0.6) / 3 + 0.4) / 2)
    # upstream keeps the first five static clips of a prompt, then groups by name
    exact = long_scores(clips, NO_PAIRS, CONFIGS, True, static=True).overall.iloc[0]
    assert exact["value"] == pytest.approx(((0.9 + 0.8 + 0.6) / 3 + 0.45) / 2)
    assert exact["clips"] == 5
    alone = long_scores(clips, NO_PAIRS, CONFIGS, True).overall.iloc[0]
    assert alone["value"] == pytest.approx(np.mean([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]))


def test_what_is_unusual_about_a_video_is_told() -> None:
    assert notes_of("a-0.mp4", 480, 16, 2.0, True) == []
    assert notes_of("my_a-0.mp4", 1798, NTSC, 2.0, False) == []
    (short,) = notes_of("a-0.mp4", 64, 16, 2.0, False)
    assert "lasts 4 s" in short
    told = notes_of("my_a-0.mp4", 31, NTSC, 2.0, True)
    assert len(told) == 4
    assert "lasts 1.03 s" in told[0] and "single clip" in told[1]
    assert "29.97" in told[2] and "last 1.935 s instead of 2 s" in told[2]
    assert "'my'" in told[3]


def test_drift_against_a_hand_computed_table() -> None:
    flicker = "temporal_flickering"
    rows = clip_rows("a.mp4", flicker, [1.0, 0.8, 0.6]) + clip_rows("b.mp4", flicker, [0.8, 0.4])
    # a last clip that was moved back to 5..7 s: a bin of its own
    rows += [{**rows[2], "start_s": 5.0, "stop_s": 7.0, "clip": "a_003", "value": 0.5}]
    rows += clip_rows("a.mp4", "imaging_quality", [50.0])
    table = drift(pd.DataFrame(rows))
    of_flicker = table[table["dimension"] == flicker]
    assert of_flicker["seconds"].tolist() == pytest.approx([1.0, 3.0, 5.0, 6.0])
    assert of_flicker["mean"].tolist() == pytest.approx([0.9, 0.6, 0.6, 0.5])
    assert of_flicker["se"].tolist()[:2] == pytest.approx([0.1, 0.2])
    assert of_flicker["low"].tolist()[:2] == pytest.approx([0.8, 0.4])
    assert of_flicker["high"].tolist()[:2] == pytest.approx([1.0, 0.8])
    assert of_flicker["videos"].tolist() == [2, 2, 1, 1]
    single = table[table["dimension"] == "imaging_quality"].iloc[0]
    assert single["mean"] == 0.5 and np.isnan(single["se"]) and np.isnan(single["low"])


def test_two_clips_of_a_video_in_one_bin_count_once() -> None:
    flicker = "temporal_flickering"
    rows = clip_rows("a.mp4", flicker, [1.0, 0.8]) + clip_rows("b.mp4", flicker, [0.5, 0.5])
    rows += [{**rows[1], "start_s": 2.5, "stop_s": 4.5, "clip": "a_002", "value": 0.4}]
    table = drift(pd.DataFrame(rows))
    assert table["mean"].tolist() == pytest.approx([0.75, (0.6 + 0.5) / 2])
    assert table["videos"].tolist() == [2, 2]


def test_a_band_narrows_with_the_number_of_videos(seed: int) -> None:
    rng = np.random.default_rng(seed)
    widths: list[float] = []
    for count in (5, 80):
        rows = [
            row
            for i in range(count)
            for row in clip_rows(f"{i}.mp4", "motion_smoothness", rng.normal(0.9, 0.02, 3).tolist())
        ]
        table = drift(pd.DataFrame(rows))
        assert (table["low"] <= table["mean"]).all() and (table["mean"] <= table["high"]).all()
        widths.append(float((table["high"] - table["low"]).mean()))
        assert drift(pd.DataFrame(rows)).equals(table)
    assert widths[1] < widths[0]
