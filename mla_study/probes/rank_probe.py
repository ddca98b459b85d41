"""The walk over checkpoints: every attention operator, its spectrum, its measures, their nulls.

One tidy table comes out (:data:`~mla_study.probes.table.COLUMNS`), a row for each operator, gauge,
metric and null model, and a second one with the singular values themselves.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mla_study.checkpoints.opening import open_checkpoint
from mla_study.checkpoints.operators.find import Attention, Found, find_operators
from mla_study.checkpoints.operators.roles import parse_map
from mla_study.checkpoints.reader import Checkpoint, OpenSpec
from mla_study.errors import UserError
from mla_study.probes.covariance import covariances_of
from mla_study.probes.layer import DEFAULT_OPERATORS, Request, unavailable
from mla_study.probes.names import public_name, redact
from mla_study.probes.options import UNITS, Options
from mla_study.probes.table import COLUMNS, SPECTRA_COLUMNS, Rows, Source, table_of, typed
from mla_study.probes.work import Item, Store, identity, keep_open, load, run

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "COLUMNS",
    "SPECTRA_COLUMNS",
    "UNITS",
    "Options",
    "Probed",
    "Report",
    "depth_note",
    "inspect",
    "probe_sources",
]


@dataclass
class Report:
    """What was found in one checkpoint, and sentences about it."""

    source: Source
    format: str
    found: Found
    notes: list[str]
    config_path: str | None


@dataclass
class Probed:
    """Tables of a probe, and what the run record needs.

    ``inputs`` is the sha256 over the values read from each checkpoint, by label; ``planned`` what
    was measured, in the order of the table.
    """

    table: pd.DataFrame
    spectra: pd.DataFrame
    reports: list[Report]
    inputs: dict[str, str]
    bytes_read: int = 0
    planned: list[tuple[Source, Item]] = field(default_factory=list)
    extra_notes: list[str] = field(default_factory=list)

    @classmethod
    def of_rows(
        cls,
        rows: Sequence[tuple[Any, ...]],
        reports: list[Report],
        digests: Digests,
        bytes_read: int,
    ) -> Probed:
        """From ready rows of a comparison, without spectra."""
        import pandas as pd

        empty = typed(pd.DataFrame(columns=list(SPECTRA_COLUMNS)))
        return cls(table_of(rows), empty, reports, digests.hashed(), bytes_read)

    @property
    def validity(self) -> str:
        """``partial`` where a config or ``--layers`` says that blocks are missing."""
        return "partial" if any(r.found.missing_layers for r in self.reports) else "full"

    @property
    def notes(self) -> list[str]:
        """Sentences for the summary, each once; what many checkpoints share is said once too."""
        told: dict[str, list[str]] = {}  # what is said -> of which checkpoints
        for report in self.reports:
            label = report.source.label
            for line in (*report.notes, *depth_note(report)):
                known = line.startswith(f"{label}: ")
                told.setdefault(line.removeprefix(f"{label}: "), []).append(label if known else "")
        lines: list[str] = []
        for line, labels in told.items():
            few = [f"{label}: {line}" if label else line for label in dict.fromkeys(labels)]
            many = f"{labels[0]} and {len(labels) - 1} more: {line}"
            lines += few if len(few) < 3 else [many]
        return [redact(line) for line in dict.fromkeys(lines + self.extra_notes)]


class Digests(dict[str, list[str]]):
    """Label -> lines of tensor and sha256."""

    def add(self, label: str, digests: Mapping[str, str]) -> None:
        """Remember what a block read."""
        self.setdefault(label, []).extend(f"{name} {value}" for name, value in digests.items())

    def hashed(self) -> dict[str, str]:
        """One sha256 a label, whatever the order of the lines."""
        return {
            label: hashlib.sha256("\n".join(sorted(set(lines))).encode()).hexdigest()
            for label, lines in self.items()
        }


def depth_note(report: Report) -> list[str]:
    """How many blocks there are, how many there should be, which are missing."""
    found = report.found
    have = sum(a.kind == "self" for a in found.attentions)
    cross = len(found.attentions) - have
    kinds = f"{have} self-attention" + (f" and {cross} cross-attention" if cross else "")
    plural = "block" if len(found.attentions) == 1 else "blocks"
    lead = f"{report.source.label}: {kinds} {plural} found"
    if found.expected_layers is None:
        return [f"{lead}; no config to compare with."]
    count = found.expected_layers
    expected = f"{lead}, {count} {'layer' if count == 1 else 'layers'} expected"
    if not found.missing_layers:
        return [f"{expected}."]
    missing = ", ".join(map(str, found.missing_layers))
    plural = "blocks" if len(found.missing_layers) > 1 else "block"
    return [f"{expected}: {plural} {missing} missing."]


class Inspected(NamedTuple):
    """An open checkpoint and what was found in it."""

    report: Report
    checkpoint: Checkpoint

    def item(self, attention: Attention, request: Request, **more: Any) -> Item:
        """One of its blocks, to measure."""
        return Item(self.checkpoint.spec, identity(self.checkpoint), attention, request, **more)


def inspect(source: Source, options: Options) -> Inspected:
    """Open a checkpoint and find its operators; nothing is measured. The caller closes it.

    Raises:
        UserError: it cannot be read, or holds no attention.
    """
    spec = OpenSpec(source.path, options.weights, options.config, options.base)
    checkpoint = open_checkpoint(spec)
    try:
        found = find_operators(
            checkpoint,
            maps=[parse_map(text) for text in options.maps],
            heads=options.heads,
            kv_heads=options.kv_heads,
            layers=options.layers,
        )
        names = {p.tensor for a in found.attentions for p in a.parts.values()}
        checkpoint.note_plain_fp8(sorted(names))
        notes = [*checkpoint.notes, *found.notes, *_cannot(source, options, checkpoint, found)]
        config = checkpoint.config_path and public_name(checkpoint.config_path)
        report = Report(source, checkpoint.format, found, [redact(n) for n in notes], config)
    except BaseException:
        checkpoint.close()
        raise
    return Inspected(report, checkpoint)


def _cannot(source: Source, options: Options, checkpoint: Checkpoint, found: Found) -> list[str]:
    """Sentences about operators that were asked for and cannot be made."""
    if set(options.operators) == set(DEFAULT_OPERATORS):
        return []
    reasons = Counter(
        (op, reason)
        for attention in found.attentions
        for op, reason in unavailable(checkpoint, attention, options.operators).items()
    )
    blocks = len(found.attentions)
    return [
        f"{source.label}: {op} is not measured in {f'{count} of ' if count < blocks else ''}"
        f"{blocks} {'block' if blocks == 1 else 'blocks'}: {reason}."
        for (op, reason), count in reasons.items()
    ]


def probe_sources(
    sources: Sequence[Source],
    options: Options,
    store: Store,
    workers: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
    subspaces: bool = False,
) -> Probed:
    """Measure all blocks of all checkpoints.

    Args:
        sources: checkpoints, in the order of the table.
        options: what to measure.
        store: where finished blocks are kept; a second run with the same one goes on there.
        workers: processes; None decides by the amount of arithmetic and the number of cores.
        progress: called with (blocks finished, blocks in all, bytes read so far).
        subspaces: keep a basis of each block's row space in the store too, and add
            :data:`~mla_study.probes.table.EDGE` to the metrics.

    Raises:
        UserError: any checkpoint that cannot be read, holds no attention, or holds NaN or Inf.
    """
    request = replace(options.request, subspace=-1 if subspaces else 0)
    dense = _Dense(options) if options.source is not None else None
    planned: list[tuple[Source, Item]] = []
    reports: list[Report] = []
    seen = [0, dense.bytes_read if dense else 0]
    for source in sources:
        opened = inspect(source, options)
        keep_open(opened.checkpoint)
        seen[1] += opened.checkpoint.bytes_read
        reports.append(opened.report)
        attentions = opened.report.found.attentions
        covariances = covariances_of(options.covariance, attentions) if options.covariance else {}
        for attention in attentions:
            given = covariances.get((attention.layer, attention.kind))
            item = opened.item(attention, request, covariance=given, seed=options.seed)
            planned.append((source, item))
        if dense is not None:
            dense.check(source, attentions)
    items = [*(dense.items.values() if dense else ()), *(item for _, item in planned)]

    def tick(finished: int, read: int) -> None:
        seen[0] += finished
        seen[1] += read
        if progress:
            progress(seen[0], len(items), seen[1])

    run(items, store, workers, tick)
    digests = Digests()
    truncated = dense.spectra(store, digests) if dense else {}
    rows = Rows(options.wants, options.seed, truncated, edge=subspaces)
    for source, item in planned:
        measured = load(item, store)
        digests.add(source.label, measured.digests)
        rows.add(source, item.attention, measured)
    if not rows.spectra:
        raise UserError(_no_spectra(options, reports))
    if not rows.table and not subspaces:
        raise UserError(
            f"no row has one of the metrics {', '.join(options.metrics)}: functional errors need "
            "--covariance, overlaps --series or --compare"
        )
    return Probed(
        *rows.frames(),
        reports,
        digests.hashed(),
        seen[1],
        planned,
        _unused(options, dense, planned),
    )


def _no_spectra(options: Options, reports: list[Report]) -> str:
    attention = reports[0].found.attentions[0]
    asked = set(options.operators) & {"qk", "ov"}
    hint = "choose others with --operators"
    if asked and attention.heads is None and not attention.latent:
        hint = "give --heads N"
    return (
        f"{reports[0].source.label}: none of the operators {', '.join(options.operators)} in the "
        f"gauges {', '.join(options.gauges)} can be made from {', '.join(attention.parts)} "
        f"(block {attention.block!r}): {hint}"
    )


def _unused(
    options: Options, dense: _Dense | None, planned: Sequence[tuple[Source, Item]]
) -> list[str]:
    notes: list[str] = []
    if dense is not None and not any(item.attention.latent for _, item in planned):
        notes.append("--source is not used: no block has a composed operator.")
    elif dense is not None:
        layers = {i.attention.layer for _, i in planned if i.attention.latent}
        if lacking := sorted(layers - set(dense.items)):
            notes.append(f"{dense.label} has no dense layer {', '.join(map(str, lacking))}.")
    bare = sum(item.covariance is None for _, item in planned)
    if options.covariance is not None and bare:
        notes.append(
            f"{bare} of {len(planned)} blocks (cross-attention) have no covariance in "
            f"{options.covariance}: they have no weighted gauges."
        )
    return notes


class _Dense:
    """The dense source of ``--source``, whose cut spectrum is a null of composed operators."""

    def __init__(self, options: Options) -> None:
        assert options.source is not None
        self.label = public_name(options.source)
        asked = Options(
            operators=("kv",),
            gauges=("raw",),
            heads=options.heads,
            kv_heads=options.kv_heads,
            maps=options.maps,
        )
        opened = inspect(Source(options.source, self.label), asked)
        self.bytes_read = opened.checkpoint.bytes_read
        self.items = {
            a.layer: opened.item(a, asked.request)
            for a in opened.report.found.attentions
            if a.kind == "self" and not a.latent
        }
        keep_open(opened.checkpoint)
        if not self.items:
            raise UserError(f"{self.label} holds no dense self-attention: name the dense source")

    def check(self, source: Source, attentions: Sequence[Attention]) -> None:
        """The composed operators of a checkpoint must have the inputs of the dense ones."""
        for attention in attentions:
            if not attention.latent or attention.layer not in self.items:
                continue
            mine = self.items[attention.layer].attention.parts["k"].n
            theirs = attention.parts["kv_down"].n
            if mine != theirs:
                raise UserError(
                    f"{self.label} has {mine} inputs in layer {attention.layer}, but "
                    f"{source.label} has {theirs}: it is not its dense source"
                )

    def spectra(self, store: Store, digests: Digests) -> dict[int, np.ndarray]:
        """Singular values of [K; V] by layer, raw gauge."""
        found: dict[int, np.ndarray] = {}
        for layer, item in self.items.items():
            measured = load(item, store)
            digests.add(self.label, measured.digests)
            found[layer] = measured.spectra[0].sigma
        return found
