"""Checkpoints along training, and pairs of checkpoints: spectra by step, and row-space overlaps."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mla_study.checkpoints.locate import SUFFIXES
from mla_study.checkpoints.operators.find import Attention
from mla_study.errors import UserError
from mla_study.probes.layer import Request, subspace_rank
from mla_study.probes.rank_probe import Digests, Inspected, Options, Probed, inspect, probe_sources
from mla_study.probes.subspaces import overlap, overlap_null, principal_angles
from mla_study.probes.table import Source, table_of
from mla_study.probes.work import Item, Store, keep_open, load, run

_STEP = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt|epoch)s?[-_.=]?(\d+)", re.IGNORECASE)
_NAMED = re.compile(r"^([\w.-]+)=(.+)$", re.DOTALL)
_SHARDS = re.compile(r"-\d{5}-of-\d{5}")
Place = tuple[int, str]  # layer, kind of attention


def parse_series(texts: Sequence[str], step_regex: str | None = None) -> list[Source]:
    """Expand ``GLOB`` or ``NAME=GLOB`` into sources ordered by series and step.

    The step is read by ``step_regex`` (first group, or the whole match) from the path, by default
    from a name such as ``step_000500`` or else from the last number in the file's name.

    Raises:
        UserError: nothing matches, a name has no step, or two files of a series have the same one.
    """
    try:
        pattern = re.compile(step_regex) if step_regex else None
    except re.error as error:
        raise UserError(f"--step-regex {step_regex!r}: {error}") from None
    members: dict[str, dict[int, str]] = {}
    for text in texts:
        name, wanted = _split_name(text, len(texts) > 1)
        paths = _weights_of(glob.glob(str(Path(wanted).expanduser())))  # noqa: PTH207
        if not paths:
            raise UserError(f"--series {text!r} matches no file: quote the pattern and check it")
        held = members.setdefault(name, {})
        for path in paths:
            step = step_of(path, pattern)
            if held.get(step, path) != path:
                raise UserError(
                    f"--series {text!r}: {held[step]} and {path} are both step {step}: "
                    "narrow the pattern or give --step-regex"
                )
            held[step] = path
    return [
        Source(held[step], held[step], name, step)
        for name, held in members.items()
        for step in sorted(held)
    ]


def named_series(text: str) -> dict[str, str]:
    """``svd:DIR1,random:DIR2`` as name -> pattern, fit for :func:`parse_series` as NAME=PATTERN.

    A folder stands for all that lies in it; a pattern, or ``=`` in place of ``:``, will do too.

    Raises:
        UserError: a part without a name, or a name twice.
    """
    found: dict[str, str] = {}
    for part in re.split(r",(?=[\w.-]+[:=])", text):
        named = re.match(r"\s*([\w.-]+)[:=](.*\S)", part, re.DOTALL)
        if named is None:
            raise UserError(f"{part!r} names no series: give NAME:FOLDER, several with commas")
        name, place = named[1], named[2]
        if name in found:
            raise UserError(f"the series {name!r} is named twice: give each its own name")
        folder = Path(place).expanduser()
        found[name] = f"{glob.escape(str(folder))}/*" if folder.is_dir() else place
    return found


def _weights_of(paths: Sequence[str]) -> list[str]:
    """Weight files and folders among what a pattern matches; all where there are none."""
    suffixes = (*SUFFIXES, ".index.json")
    likely = [p for p in paths if p.lower().endswith(suffixes) or Path(p).is_dir()]
    return sorted(likely or paths)


def _split_name(text: str, several: bool) -> tuple[str, str]:
    """NAME=GLOB, or a name from the folder where there are several series."""
    named = _NAMED.match(text)
    if named and not Path(text).exists():
        return named[1], named[2]
    if not several:
        return "", text
    folder = Path(text).parent
    return (str(folder) if folder.name else text), text


def step_of(path: str, pattern: re.Pattern[str] | None = None) -> int:
    """The training step that a checkpoint's path names; UserError where it names none."""
    if pattern is not None:
        found = pattern.search(path)
        text = (found[1] if pattern.groups else found[0]) if found else None
        if text is None or not (text.isascii() and text.isdigit()):
            raise UserError(f"{path}: --step-regex {pattern.pattern!r} finds no whole number in it")
        return _bounded(path, text)
    for part in (Path(path).name, str(Path(path).parent)):
        found = _STEP.findall(part)
        if found:
            return _bounded(path, found[-1])
        digits = re.findall(r"\d+", _SHARDS.sub("", _stem(part)), re.ASCII)
        if digits:
            return _bounded(path, digits[-1])
    raise UserError(f"{path}: no training step in its name: give --step-regex with one group")


def _stem(name: str) -> str:
    return re.sub(r"\.(safetensors|pth?|bin|ckpt|gguf|onnx)$", "", name)


def _bounded(path: str, digits: str) -> int:
    if len(digits.lstrip("0")) > 18:
        raise UserError(f"{path}: {digits} is too large for a step: give --step-regex")
    return int(digits)


def probe_series(
    sources: Sequence[Source],
    options: Options,
    store: Store,
    workers: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Probed:
    """Probe every checkpoint of every series, and add the overlaps of row spaces.

    ``overlap_with_start`` compares a step with the first of its own series, ``overlap_with_NAME``
    with the same step of series NAME; the null is that of two random subspaces, mean k / d.
    The spaces are those of :func:`~mla_study.probes.layer.subspace_of`; m is k, and n is d.

    Arguments and errors as :func:`~mla_study.probes.rank_probe.probe_sources`.
    """
    probed = probe_sources(sources, options, store, workers, progress, subspaces=True)
    items: dict[tuple[Source, Place], Item] = {
        (source, (item.attention.layer, item.attention.kind)): item
        for source, item in probed.planned
    }
    by_step = {(s.series, s.step): s for s in sources}
    names = list(dict.fromkeys(s.series for s in sources))
    start = {name: next(s for s in sources if s.series == name) for name in names}
    rows: dict[Source, list[tuple[Any, ...]]] = {source: [] for source in sources}
    lacking: set[str] = set()
    # One block of all checkpoints at a time: their bases need not fit into memory together.
    for place in dict.fromkeys(place for _, place in items):
        bases = {
            source: load(items[source, place], store).basis
            for source in sources
            if (source, place) in items
        }
        for source, basis in bases.items():
            if basis is None:
                lacking.add(source.label)
                continue
            partners = {"start": start[source.series]}
            for other in names:
                if other != source.series and (other, source.step) in by_step:
                    partners[other or "unnamed"] = by_step[other, source.step]
            latent = items[source, place].attention.latent
            for name, partner in partners.items():
                theirs, metric = bases.get(partner), f"overlap_with_{name}"
                fits = theirs is not None and theirs.shape[0] == basis.shape[0]
                if theirs is not None and fits and options.wants(metric):
                    rows[source].append(overlap_row(source, place, metric, latent, basis, theirs))
    probed.table = _with_rows(probed, [row for some in rows.values() for row in some])
    if lacking:
        probed.extra_notes.append(
            f"no row space of {', '.join(sorted(lacking))} in some blocks: their rank is too small."
        )
    return probed


def overlap_row(
    source: Source,
    place: Place,
    metric: str,
    latent: bool,
    mine: np.ndarray,
    theirs: np.ndarray,
) -> tuple[Any, ...]:
    """The table's row of the overlap of two bases [d, k] and [d, l], beside that of chance."""
    d, k = mine.shape
    expected, se = overlap_null(k, theirs.shape[1], d)
    operator = "composed" if latent else "kv"
    where = (source.label, source.series, source.step, *place, operator, -1, "raw", metric)
    found = overlap(mine, theirs)
    return (*where, found, "gaussian", expected, se, k, d, "row space", "measured")


def _with_rows(probed: Probed, rows: Sequence[tuple[Any, ...]]) -> Any:
    import pandas as pd

    return pd.concat([probed.table, table_of(rows)], ignore_index=True) if rows else probed.table


def compare(
    first: Source,
    second: Source,
    options: Options,
    store: Store,
    workers: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Probed:
    """Principal angles and overlap of the row spaces of two checkpoints, layer by layer.

    Compared are the composed operator (all of its d_c directions) or the leading min(m, n) / 8
    directions of [K; V]; against a latent block a dense one gives as many directions as that has.

    Raises:
        UserError: no block is in both, or their inputs differ in width.
    """
    plans: list[Inspected] = []
    for source in (first, second):
        opened = inspect(source, options)
        plans.append(opened)
        keep_open(opened.checkpoint)
    attentions = [{(a.layer, a.kind): a for a in p.report.found.attentions} for p in plans]
    common = [place for place in attentions[0] if place in attentions[1]]
    if not common:
        raise UserError(f"{first.label} and {second.label} have no block in common")
    pairs: list[tuple[Item, Item]] = []
    for place in common:
        one, two = (found[place] for found in attentions)
        if _inputs(one) != _inputs(two):
            raise UserError(
                f"block {one.block!r} has {_inputs(one)} inputs in {first.label} and "
                f"{_inputs(two)} in {second.label}: their row spaces cannot be compared"
            )
        latent = [a for a in (one, two) if a.latent]
        k = min(subspace_rank(a) for a in (latent or (one, two)))
        request = Request((), (), subspace=k)
        pairs.append((plans[0].item(one, request), plans[1].item(two, request)))
    flat = [item for pair in pairs for item in pair]
    seen = [0, sum(p.checkpoint.bytes_read for p in plans)]

    def tick(finished: int, read: int) -> None:
        seen[0] += finished
        seen[1] += read
        if progress:
            progress(seen[0], len(flat), seen[1])

    run(flat, store, workers, tick)
    label = f"{first.label} ~ {second.label}"
    rows: list[tuple[Any, ...]] = []
    digests = Digests()
    lacking = 0
    for pair in pairs:
        results = [load(item, store) for item in pair]
        for source, result in zip((first, second), results, strict=True):
            digests.add(source.label, result.digests)
        if results[0].basis is None or results[1].basis is None:
            lacking += 1
            continue
        rows += _pair_rows(label, pair[0].attention, results[0].basis, results[1].basis)
    rows = [row for row in rows if options.wants(row[8])]
    if not rows:
        raise UserError(
            f"{first.label} and {second.label}: no block has the rank and the metrics that a "
            "comparison needs (overlap, principal_angle_*)"
        )
    probed = Probed.of_rows(rows, [p.report for p in plans], digests, seen[1])
    if lacking:
        probed.extra_notes.append(f"{lacking} blocks are left out: their rank is too small.")
    return probed


def _inputs(attention: Attention) -> int:
    return attention.parts["kv_down" if attention.latent else "k"].n


def _pair_rows(
    label: str, attention: Attention, one: np.ndarray, two: np.ndarray
) -> Iterator[tuple[Any, ...]]:
    angles = principal_angles(one, two)
    d, k = one.shape
    expected, se = overlap_null(k, two.shape[1], d)
    operator = "composed" if attention.latent else "kv"
    place = (label, "", None, attention.layer, attention.kind, operator, -1, "raw")
    tail = (k, d, "row space", "measured")
    nan = float("nan")
    yield (*place, "overlap", overlap(one, two), "gaussian", expected, se, *tail)
    values: Mapping[str, float] = {
        "min": float(angles[0]),
        "median": float(np.median(angles)),
        "max": float(angles[-1]),
    }
    for name, value in values.items():
        yield (*place, f"principal_angle_{name}", value, "none", nan, nan, *tail)
