"""Figures 3 to 6 and table 4: what they show, from renders, configs and the paper's table."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from miniature.test_clips import truth, write

from analysis import (
    fig3_overview,
    fig4_samples,
    fig5_comparison,
    fig6_long_horizon,
    frames,
    table4_hyperparameters,
)
from mla_study.checkpoints.wan.load import expected_shapes
from mla_study.config import mini, preset
from mla_study.errors import UserError
from mla_study.kernels.latent_attention import PORTABLE
from mla_study.miniature.clips import clip_row, even
from mla_study.rollout.stream import random_model
from mla_study.study.runs import write_result
from mla_study.training.loop import Trainer
from mla_study.training.recipe import stages
from mla_study.world.scenes import World, sample_scenes

ALL = [fig4_samples, fig5_comparison, fig6_long_horizon]


@pytest.fixture
def table(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """Renders in the shape of the study's table, which the figures then find."""
    rows = list[dict[str, object]]()
    for name in ("teacher", "dense", "activation", "random"):
        variant = name if name in ("teacher", "dense") else "latent"
        for times in (1,) if name == "teacher" else (1, 10, 100):
            about = {
                "run": name, "variant": variant, "d_c": 12, "d_rope": 8, "seed": 0,
                "init": name if variant == "latent" else "none", "condition": "plain",
                "stage": "teacher" if name == "teacher" else "dmd", "clips": times,
            }  # fmt: skip
            numbers = even(12 * times, 5)
            video = truth(seed % 2**31, 3, 12)
            for number, clip in enumerate(video):
                rows.append(clip_row(about, f"prompt {number}", 8.0, numbers, clip[:5]))
    made = pd.DataFrame(rows)
    folder = tmp_path / "study_clips"
    write_result(
        folder, {"table": made}, config={}, inputs={}, seed=None, modules=(),
        provenance="measured", validity="full",
    )  # fmt: skip
    monkeypatch.setattr(frames, "TABLE", folder)
    return made


def texts(figure: object) -> list[str]:
    from matplotlib.text import Text

    return [t.get_text() for t in figure.findobj(Text)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", ALL)
def test_the_study_is_drawn_and_named(module: object, table: pd.DataFrame, tmp_path: Path) -> None:
    figure = module.draw(str(tmp_path / "out"))  # type: ignore[attr-defined]
    said = texts(figure)
    assert any("the miniature (width 96, 4 layers, 24 px)" in text for text in said)
    assert {"prompt 0", "prompt 1", "prompt 2"} <= set(said)
    assert "time in the video (s)" in said
    pictures = [image for axis in figure.axes for image in axis.get_images()]
    rows = {fig4_samples: 1, fig5_comparison: 4, fig6_long_horizon: 2}[module]
    assert len(pictures) == 3 * rows
    # the pixels of the strip are those of the first frame
    shown = np.asarray(pictures[0].get_array())
    first = frames.frames_of(table.iloc[0].to_dict())[0]
    np.testing.assert_array_equal(shown[:96:4, :96:4], first)
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("module", ALL)
def test_a_folder_is_drawn_by_its_name(module: object, tmp_path: Path, seed: int) -> None:
    for label, length in (("long", 21), ("short", 9)):
        video = truth(seed % 2**31, 1, length)[0].repeat(2, 1).repeat(3, 2)
        write(tmp_path / "clips" / label / "a_kite.mp4", video, 8)
    figure = module.draw(str(tmp_path / "out"), videos=str(tmp_path / "clips"))  # type: ignore[attr-defined]
    said = texts(figure)
    assert any(text.endswith(": clips") for text in said)
    assert not any("miniature" in text for text in said)
    assert "a kite" in said
    # videos of different lengths share no time axis: each says its own
    if module is not fig4_samples:
        assert "time in the video (s)" not in said
        assert "long\n2.5 s" in said and "short\n1 s" in said
    assert len(module.INPUTS(str(tmp_path / "clips"))) == 2  # type: ignore[attr-defined]


def test_verdicts_stand_beside_the_rows_that_they_judge(tmp_path: Path, seed: int) -> None:
    scenes = sample_scenes(World(), 3, seed % 2**31)
    video = truth(seed % 2**31, 3, 12)
    for number, caption in enumerate(map(str, scenes.captions)):
        name = f"{caption.replace(' ', '_')}.mp4"
        write(tmp_path / "clips" / "right" / name, video[number].repeat(4, 1).repeat(4, 2), 8)
        empty = np.full((12, 24, 24, 3), 255, np.uint8)
        write(tmp_path / "clips" / "void" / name, empty, 8)
    figure = fig5_comparison.draw(str(tmp_path / "out"), videos=str(tmp_path / "clips"))
    told = [t for axis in figure.axes for t in axis.texts if t.get_position()[0] > 1]
    wanted = ["all correct", "no sprite,\nbackground wrong"] * len(set(scenes.captions))
    assert [text.get_text() for text in told] == wanted
    assert "Beside a row: the exact parser's verdict on the frames shown." in texts(figure)
    figure.canvas.draw()
    strips = [axis.get_window_extent() for axis in figure.axes if axis.get_images()]
    for text in told:
        box = text.get_window_extent()
        assert box.x1 <= figure.bbox.width and not any(box.overlaps(strip) for strip in strips)


@pytest.mark.parametrize("module", ALL)
def test_videos_that_cannot_be_decoded_are_left_out_and_said(
    module: object, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("one", "two"):
        write(tmp_path / "clips" / label / "a.mp4", truth(seed % 2**31, 1, 9)[0], 8)
    (tmp_path / "clips" / "two" / "$b$_c.mp4").write_bytes(b"no video")
    figure = module.draw(str(tmp_path / "out"), videos=str(tmp_path / "clips"))  # type: ignore[attr-defined]
    told = "1 of 3 videos cannot be decoded and is left out"
    assert f"{told}: two/$b$_c.mp4." in texts(figure)
    assert any("measured · partial" in text for text in texts(figure))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{told}:" and "two/$b$_c.mp4 cannot be read" in said[1] and len(said) == 2
    for label in ("one", "two"):
        (tmp_path / "clips" / label / "a.mp4").write_bytes(b"no video either")
    with pytest.raises(UserError, match=r"of 3 videos .* none can be decoded"):
        module.draw(str(tmp_path / "out"), videos=str(tmp_path / "clips"))  # type: ignore[attr-defined]


def test_many_videos_that_cannot_be_decoded_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "clips" / "a.mp4", truth(1, 1, 5)[0], 8)
    for number in range(30):
        (tmp_path / "clips" / f"broken_{number:02}.mp4").write_bytes(b"")
    (told,) = frames.opened(str(tmp_path / "clips"), 3, "fig5_comparison").notes
    assert told.startswith("30 of 31 videos cannot be decoded and are left out: clips/broken_00")
    assert told.endswith("clips/broken_23.mp4 and 6 more.")


def test_what_is_not_there_is_told(table: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'svd'.*teacher, dense"):
        fig5_comparison.draw(str(tmp_path), variants="svd")
    with pytest.raises(UserError, match=r"stage=dmd times=10"):
        fig4_samples.draw(str(tmp_path), times=7)
    video = truth(1, 1, 5)[0]
    write(tmp_path / "clips" / "one" / "a.mp4", video, 8)
    write(tmp_path / "clips" / "two" / "b.mp4", video, 8)
    with pytest.raises(UserError, match="no prompt in common"):
        fig5_comparison.draw(str(tmp_path), videos=str(tmp_path / "clips"))


@pytest.mark.parametrize("name", ["wan-1.3b", "mini"])
def test_the_overview_has_every_parameter_and_its_shape(name: str) -> None:
    config = preset(name, latent=True)
    said = [text.replace(",\n", ", ") for text in texts(fig3_overview.overview(config))]
    assert config.latent is not None
    for full, shape in expected_shapes(config).items():
        if not full.startswith("blocks.0.") or full.endswith(".bias"):
            continue
        part = full.removeprefix("blocks.0.").removeprefix("self_attn.")
        short = part.removeprefix("cross_attn.").removesuffix(".weight")
        spelt = " × ".join(map(str, shape))
        assert any(short in text and spelt in text for text in said), (full, shape)
    scalars, dense = config.latent.cached_scalars, 2 * config.width
    assert any(f"{scalars} against {dense}" in text for text in said)
    cached = [text for text in said if text.endswith("\ncached")]
    assert len(cached) == 2


def test_no_word_of_the_overview_leaves_the_figure() -> None:
    figure = fig3_overview.overview(preset("wan-1.3b", latent=True))
    figure.canvas.draw()
    wide, high = figure.bbox.width, figure.bbox.height
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if text.get_text():
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= wide and box.y1 <= high, text


@pytest.mark.parametrize("name", ["wan-1.3b", "mini"])
def test_the_overview_shows_both_forms_and_nothing_overlaps(name: str) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.text import Text

    config = preset(name, latent=True)
    assert config.latent is not None
    figure = fig3_overview.overview(config)
    figure.canvas.draw()
    words = [t for t in figure.findobj(Text) if t.get_text()]
    held = {text.get_text(): text.get_window_extent() for text in words}
    assert set(PORTABLE) - {"reference"} <= set(held)
    # only absorbed queries have the latent's width, and only rebuilt keys stand for all K tokens
    assert f"times k_up\n[L, {config.heads}, {config.latent.d_c}]" in held
    assert any(f"k nope [K, {config.heads}, {config.latent.d_nope}]" in text for text in held)
    for one, other in itertools.combinations(words, 2):
        a, b = one.get_window_extent().padded(-0.5), other.get_window_extent().padded(-0.5)
        assert not a.overlaps(b), (one, other)
    boxes = [p.get_window_extent() for p in figure.findobj(Rectangle) if p.get_width() < 3]
    for text, word in held.items():
        inside = [b for b in boxes if b.contains(*word.get_points().mean(0))]
        assert all(b.x0 <= word.x0 and word.x1 <= b.x1 for b in inside if b.width > 30), text


def test_the_preset_has_the_papers_hyperparameters() -> None:
    sources = [table4_hyperparameters.ROOT / name for name in table4_hyperparameters.DATA]
    paper, text = map(table4_hyperparameters.quoted, sources)
    table = table4_hyperparameters.rows(paper, text)
    stated = table[table["paper"].notna()]
    assert len(stated) == len(paper) + len(text) == 19 + 13
    assert stated["source"].value_counts().to_dict() == {"Table 4": 19, "text": 13}
    names = stated.groupby("agreement")["name"].agg(list)
    assert names["no setting here"] == ["GPUs", "learning rate, critic, CD"]
    # of two batches that the paper states one is kept, and no average is .99 from the first step
    assert names["different"] == ["batch, TF / CD / DMD", "EMA decay, DMD"]
    assert len(names["equal"]) == 32 - 4
    unstated = table[table["paper"].isna()]
    assert set(unstated["agreement"]) == {"not stated"} and unstated["source"].isna().all()
    for told in ("Adam betas", "guidance, CD", "guidance, DMD", "learning rate, critic, DMD"):
        assert told in names["equal"]
    # a changed value is seen
    other = table4_hyperparameters.rows(
        paper | {"lr_dmd": "3e-6", "backbone": "Wan2.1-T2V-14B"}, text | {"critic_updates": "1"}
    )
    assert (other["agreement"] == "different").sum() == 2 + 3


@pytest.mark.parametrize("step", [0, 4, 499, 2000])
def test_the_average_decays_as_the_table_says(step: int) -> None:
    stage = stages("wan-1.3b")["distribution_matching"]
    told = table4_hyperparameters.ema_told(stage)
    least, _, rest = told.removeprefix("min(").partition(", ")
    assert (least, rest) == ("0.99", "(s+1)/(s+10))")
    old, new = random_model(mini()), random_model(mini())
    for model, value in ((old, 0.0), (new, 1.0)):
        for weight in model.parameters():
            torch.nn.init.constant_(weight, value)
    trainer = SimpleNamespace(stage=stage, step=step)
    Trainer._average(trainer, old, new)  # pyright: ignore
    want = 1 - min(0.99, (step + 1) / (step + 10))
    assert all(torch.allclose(w, torch.full_like(w, want)) for w in old.parameters())
