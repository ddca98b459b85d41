"""One picture of whatever was probed; the same bytes for the same run, whole or absent."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_files import gqa, latent, wan, write

from mla_study.errors import UserError
from mla_study.probes.rank_probe import Options
from mla_study.study.probe_plots import check_plot_path, plot_probe, short_names, writable
from mla_study.study.probing import Job, execute

HEADS = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}


def drawn(path: Path, job: Job, gauge: str = "raw", **options: Any) -> bytes:
    probed, run = execute(job, Options.of(**options), None, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_probe(probed.table, probed.spectra, path, gauge, run)
    return path.read_bytes()


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    rng = np.random.default_rng(4)
    made = {"wan": wan(rng, layers=3), "gqa": gqa(rng, layers=1), "mla": latent(rng, layers=2)}
    paths = [write(tmp_path / n / "model.safetensors", a) for n, a in made.items()]
    return str(paths[0]), str(paths[1]), str(paths[2])


@pytest.mark.parametrize("kind", list(HEADS))
def test_several_checkpoints_overlay(kind: str, files: tuple[str, ...], tmp_path: Path) -> None:
    job = Job(files)
    first = drawn(tmp_path / f"a.{kind}", job, "folded")
    assert first.startswith(HEADS[kind]) and len(first) > 5000
    assert drawn(tmp_path / f"b.{kind}", job, "folded") == first
    assert sorted(p.name for p in tmp_path.glob("*.*")) == [f"a.{kind}", f"b.{kind}"]
    assert drawn(tmp_path / f"c.{kind}", job, "raw") != first


@pytest.mark.parametrize(
    "options",
    [
        {"operators": "v"},
        {"operators": "qk", "heads": 6},
        {"metrics": "stable_rank"},
        {"gauges": "balanced"},
    ],
)
def test_whatever_was_measured_is_drawn(
    options: dict[str, Any], files: tuple[str, ...], tmp_path: Path
) -> None:
    assert drawn(tmp_path / "a.png", Job((files[1],)), **options)


def test_cross_attention_alone(tmp_path: Path) -> None:
    arrays = wan(np.random.default_rng(0), layers=2, cross=True)
    cross = {k: v for k, v in arrays.items() if "cross" in k}
    assert drawn(tmp_path / "a.svg", Job((str(write(tmp_path / "x.safetensors", cross)),)))


def test_series_and_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("svd", "random"):
        for step in (1, 2, 3):
            write(tmp_path / name / f"step_{step}.safetensors", latent(rng, layers=2))
    series = tuple(f"{name}={tmp_path}/{name}/*" for name in ("svd", "random"))
    assert drawn(tmp_path / "s.pdf", Job(series=series))
    assert drawn(tmp_path / "one.pdf", Job(series=series[:1]))
    assert drawn(tmp_path / "few.pdf", Job(series=series), metrics="r_0.99")
    pair = (f"{tmp_path}/svd/step_1.safetensors", f"{tmp_path}/random/step_1.safetensors")
    assert drawn(tmp_path / "p.png", Job(pair=pair))
    assert drawn(tmp_path / "q.png", Job(pair=pair), metrics="overlap")


def test_labels_are_as_short_as_they_can_be() -> None:
    assert short_names(["/a/b/m.pt", "/a/c/m.pt"]) == {"/a/b/m.pt": "b/m.pt", "/a/c/m.pt": "c/m.pt"}
    assert short_names(["/a/x.pt", "/a/y.pt"]) == {"/a/x.pt": "x.pt", "/a/y.pt": "y.pt"}
    assert short_names(["demo:minilm"]) == {"demo:minilm": "demo:minilm"}
    assert short_names(["a", "/a"]) == {"a": "a", "/a": "/a"}
    assert short_names([]) == {}


def test_places_that_cannot_be_drawn_into(tmp_path: Path) -> None:
    assert check_plot_path(Path("x.svg")) == "svg"
    for bad in ("x.jpg", "x", "x.PDF", "x.tar.gz"):
        with pytest.raises(UserError, match=r"give \.pdf, \.png or \.svg"):
            check_plot_path(Path(bad))
    writable(tmp_path / "new.pdf")
    with pytest.raises(UserError, match="does not exist"):
        writable(tmp_path / "no" / "x.pdf")
    (tmp_path / "d.pdf").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        writable(tmp_path / "d.pdf")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UserError, match="not writable"):
            writable(tmp_path / "closed" / "x.pdf")
