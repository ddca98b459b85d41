"""Checkpoints along training, and pairs of checkpoints: spectra by step, and row-space overlaps."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mla_study.checkpoints.operators import Attention
from mla_study.errors import UserError
from mla_study.probes.layer import Request, subspace_rank
from mla_study.probes.rank_probe import Options, Probed, inspect, probe_sources
from mla_study.probes.subspaces import overlap, overlap_null, principal_angles
from mla_study.probes.table import COLUMNS, Source, typed
from mla_study.probes.work import Item, Store, run

_STEP = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt|epoch)s?[-_.=]?(\d+)", re.IGNORECASE)
_NAMED = re.compile(r"^([\w.-]+)=(.+)$", re.DOTALL)


def parse_series(texts: Sequence[str], step_regex: str | None = None) -> list[Source]:
    """Expand ``GLOB`` or ``NAME=GLOB`` into sources ordered by step.

    The step is read by ``step_regex`` (first group, or the whole match) from the path, by default
    from a name such as ``step_000500`` or else from the last number in the file's name.

    Raises:
        UserError: nothing matches, a name has no step, or two files have the same one.
    """
    try:
        pattern = re.compile(step_regex) if step_regex else None
    except re.error as error:
        raise UserError(f"--step-regex {step_regex!r}: {error}") from None
    members: dict[str, dict[int, str]] = {}
    for text in texts:
        named = _NAMED.match(text)
        name, wanted = (named[1], named[2]) if named else ("", text)
        if not named and len(texts) > 1 and not os.path.exists(text):
            name = os.path.dirname(text) or text
        paths = sorted(glob.glob(os.path.expanduser(wanted)))
        if not paths:
            raise UserError(f"--series {text!r} matches no file: quote the pattern and check it")
        held = members.setdefault(name, {})
        for path in paths:
            step = step_of(path, pattern)
            if step in held:
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


def step_of(path: str, pattern: re.Pattern[str] | None = None) -> int:
    """The training step that a checkpoint's path names."""
    if pattern is not None:
        found = pattern.search(path)
        text = (found[1] if pattern.groups else found[0]) if found else None
        if text is None or not text.isdigit():
            raise UserError(f"{path}: --step-regex {pattern.pattern!r} finds no whole number in it")
        return int(text)
    for part in (os.path.basename(path), os.path.dirname(path)):
        found = _STEP.findall(part)
        if found:
            return int(found[-1])
        part = re.sub(r"-\d{5}-of-\d{5}", "", os.path.splitext(part)[0])
        digits = re.findall(r"\d+", part)
        if digits:
            return int(digits[-1])
    raise UserError(f"{path}: no training step in its name: give --step-regex with one group")


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
    """
    probed = probe_sources(sources, options, store, workers, progress, subspaces=True)
    rows: list[tuple[Any, ...]] = []
    by_place = {(s.series, s.step): bases for s, bases in probed.bases.items()}
    series = list(dict.fromkeys(s.series for s in sources))
    start = {name: min(s.step or 0 for s in sources if s.series == name) for name in series}
    for source in sources:
        mine = by_place[source.series, source.step]
        partners = {"start": by_place[source.series, start[source.series]]}
        for other in series:
            if other != source.series and (other, source.step) in by_place:
                partners[other or "unnamed"] = by_place[other, source.step]
        for name, theirs in partners.items():
            rows += list(_overlap_rows(source, f"overlap_with_{name}", mine, theirs))
    probed.table = _appended(probed, rows)
    return probed


Bases = Mapping[tuple[int, str, str], np.ndarray]


def _overlap_rows(
    source: Source, metric: str, mine: Bases, theirs: Bases
) -> Iterable[tuple[Any, ...]]:
    for (layer, kind, operator), basis in mine.items():
        other = next((b for (l, k, _), b in theirs.items() if (l, k) == (layer, kind)), None)
        if other is None or other.shape[0] != basis.shape[0]:
            continue
        expected, se = overlap_null(basis.shape[1], other.shape[1], basis.shape[0])
        place = (source.label, source.series, source.step, layer, kind, operator, -1, "raw")
        shape = (basis.shape[1], basis.shape[0])
        yield (*place, metric, overlap(basis, other), "gaussian", expected, se, *shape) + (
            "row space",
            "measured",
        )


def _appended(probed: Probed, rows: Sequence[tuple[Any, ...]]) -> Any:
    import pandas as pd

    extra = typed(pd.DataFrame(list(rows), columns=list(COLUMNS)))
    return pd.concat([probed.table, extra], ignore_index=True)


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
    plans = [inspect(source, options) for source in (first, second)]
    attentions = [{(a.layer, a.kind): a for a in report.found.attentions} for report, *_ in plans]
    common = [place for place in attentions[0] if place in attentions[1]]
    if not common:
        raise UserError(f"{first.path} and {second.path} have no block in common")
    items: list[tuple[Item, Item]] = []
    for place in common:
        pair = [found[place] for found in attentions]
        k = _common_rank(pair)
        request = Request((), (), subspace=k)
        made = [
            Item(spec, fingerprint, attention, request)
            for (_, spec, fingerprint, _), attention in zip(plans, pair, strict=True)
        ]
        if made[0].attention.parts["kv_down" if pair[0].latent else "k"].n != (
            made[1].attention.parts["kv_down" if pair[1].latent else "k"].n
        ):
            raise UserError(
                f"block {pair[0].block!r} has different input widths in {first.path} "
                f"and {second.path}: their row spaces cannot be compared"
            )
        items.append((made[0], made[1]))
    flat = [item for pair in items for item in pair]
    seen = [0, 0]

    def tick(finished: int, read: int) -> None:
        seen[0] += finished
        seen[1] += read
        if progress:
            progress(seen[0], len(flat), seen[1])

    run(flat, store, workers, tick)
    label = f"{first.label} ~ {second.label}"
    rows: list[tuple[Any, ...]] = []
    digests: dict[str, list[str]] = {first.label: [], second.label: []}
    for one, two in items:
        results = [store.load(one), store.load(two)]
        for source, result in zip((first, second), results, strict=True):
            digests[source.label] += [f"{n} {d}" for n, d in sorted(result.digests.items())]
        bases = [result.basis for result in results]
        if bases[0] is None or bases[1] is None:
            continue
        rows += _pair_rows(label, one.attention, bases[0], bases[1])
    if not rows:
        raise UserError(
            f"{first.path} and {second.path}: no block has the rank that a comparison needs"
        )
    return Probed.of_rows(rows, [report for report, *_ in plans], digests, seen[1])


def _common_rank(pair: Sequence[Attention]) -> int:
    latent = [a for a in pair if a.latent]
    return min(subspace_rank(a) for a in (latent or pair))


def _pair_rows(
    label: str, attention: Attention, one: np.ndarray, two: np.ndarray
) -> Iterable[tuple[Any, ...]]:
    angles = principal_angles(one, two)
    expected, se = overlap_null(one.shape[1], two.shape[1], one.shape[0])
    operator = "composed" if attention.latent else "kv"
    place = (label, "", None, attention.layer, attention.kind, operator, -1, "raw")
    tail = (one.shape[1], one.shape[0], "row space", "measured")
    nan = float("nan")
    yield (*place, "overlap", overlap(one, two), "gaussian", expected, se, *tail)
    for name, value in (
        ("min", angles[0]),
        ("median", float(np.median(angles))),
        ("max", angles[-1]),
    ):
        yield (*place, f"principal_angle_{name}", float(value), "none", nan, nan, *tail)
