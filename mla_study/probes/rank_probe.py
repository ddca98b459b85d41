"""The walk over checkpoints: every attention operator, its spectrum, its measures, their nulls.

One tidy table comes out (:data:`COLUMNS`), a row for each operator, gauge, metric and null model, and
a second one with the singular values themselves (:data:`SPECTRA_COLUMNS`).
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_study.checkpoints.operators import Attention, Found, find_operators
from mla_study.checkpoints.reader import OpenSpec, open_checkpoint
from mla_study.checkpoints.roles import parse_map
from mla_study.errors import UserError
from mla_study.probes.layer import DEFAULT_OPERATORS, GAUGES, OPERATORS, Request
from mla_study.probes.spectrum import METRICS
from mla_study.probes.table import COLUMNS, SPECTRA_COLUMNS, Rows, Source, typed
from mla_study.probes.work import Item, Measured, Store, run

if TYPE_CHECKING:
    import pandas as pd

UNITS = {
    "r_*": "singular values (count)",
    "energy_at_*": "fraction of the squared Frobenius norm",
    "functional_error_at_*": "relative RMS error of the output",
    "overlap_*": "fraction of the subspace dimension",
    "principal_angle_*": "radians",
    "spectral_norm": "units of the weights",
    "null_se": "units of the metric (standard deviation of one random matrix)",
    "sigma": "units of the weights",
}


@dataclass(frozen=True)
class Options:
    """All that decides what a probe measures."""

    operators: tuple[str, ...] = DEFAULT_OPERATORS
    gauges: tuple[str, ...] = GAUGES
    metrics: tuple[str, ...] = ()
    heads: int | None = None
    kv_heads: int | None = None
    layers: int | None = None
    config: str | None = None
    weights: str | None = None
    base: str | None = None
    maps: tuple[str, ...] = ()
    covariance: str | None = None
    source: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, given, known in (
            ("operator", self.operators, OPERATORS),
            ("gauge", self.gauges, GAUGES),
        ):
            for value in given:
                if value not in known:
                    raise UserError(f"there is no {name} {value!r}: choose from {', '.join(known)}")
        for pattern in self.metrics:
            if not fnmatch.filter(METRICS, pattern) and not pattern.startswith("functional_error"):
                raise UserError(
                    f"no metric is called {pattern!r}: choose from {', '.join(METRICS)}"
                )

    @property
    def request(self) -> Request:
        """What each block is asked for; a condition number asked for by name wants ``svdvals``."""
        return Request(self.operators, self.gauges, exact_tail="condition" in self.metrics)

    def wants(self, metric: str) -> bool:
        """Whether a metric belongs into the table."""
        return not self.metrics or any(fnmatch.fnmatch(metric, p) for p in self.metrics)


@dataclass
class Report:
    """What was found in one checkpoint."""

    source: Source
    format: str
    found: Found
    notes: list[str]
    config_path: str | None


@dataclass
class Probed:
    """Tables of a probe, and what the run record needs."""

    table: pd.DataFrame
    spectra: pd.DataFrame
    reports: list[Report]
    inputs: dict[str, str]
    bytes_read: int = 0
    bases: dict[Source, dict[tuple[int, str, str], np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of_rows(
        cls,
        rows: Sequence[tuple[Any, ...]],
        reports: list[Report],
        digests: Mapping[str, Sequence[str]],
        bytes_read: int,
    ) -> Probed:
        """From ready rows of a comparison, without spectra."""
        import pandas as pd

        return cls(
            typed(pd.DataFrame(list(rows), columns=list(COLUMNS))),
            typed(pd.DataFrame(columns=list(SPECTRA_COLUMNS))),
            reports,
            _digest(digests),
            bytes_read,
        )

    @property
    def validity(self) -> str:
        """``partial`` where a config or ``--layers`` says that blocks are missing."""
        return "partial" if any(r.found.missing_layers for r in self.reports) else "full"

    @property
    def notes(self) -> list[str]:
        """Sentences for the summary, each once."""
        lines = [line for r in self.reports for line in (*r.notes, *depth_note(r))]
        return list(dict.fromkeys(lines))


def depth_note(report: Report) -> list[str]:
    """How many blocks there are, how many there should be, which are missing."""
    found = report.found
    have = sum(a.kind == "self" for a in found.attentions)
    cross = len(found.attentions) - have
    kinds = f"{have} self-attention" + (f" and {cross} cross-attention" if cross else "")
    if found.expected_layers is None:
        return [f"{report.source.label}: {kinds} blocks found; no config to compare with."]
    if not found.missing_layers:
        return [
            f"{report.source.label}: {kinds} blocks found, {found.expected_layers} layers expected."
        ]
    missing = ", ".join(map(str, found.missing_layers))
    plural = "blocks" if len(found.missing_layers) > 1 else "block"
    return [
        f"{report.source.label}: {kinds} blocks found, {found.expected_layers} layers expected: "
        f"{plural} {missing} missing."
    ]


def inspect(source: Source, options: Options) -> tuple[Report, OpenSpec, str, int]:
    """Open a checkpoint and find its operators; nothing is measured."""
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
        report = Report(
            source, checkpoint.format, found, list(checkpoint.notes), checkpoint.config_path
        )
        return report, spec, checkpoint.fingerprint, checkpoint.bytes_read
    finally:
        checkpoint.close()


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
        subspaces: keep a basis of each block's row space in :attr:`Probed.bases`.

    Raises:
        UserError: any checkpoint that cannot be read, holds no attention, or holds NaN or Inf.
    """
    planned: list[tuple[Source, Item]] = []
    request = replace(options.request, subspace=-1 if subspaces else 0)
    reports: list[Report] = []
    header_bytes = 0
    for source in sources:
        report, spec, fingerprint, read = inspect(source, options)
        header_bytes += read
        reports.append(report)
        covariances = _covariances(options, report)
        for attention in report.found.attentions:
            item = Item(spec, fingerprint, attention, request, covariances.get(id(attention)))
            planned.append((source, item))
    seen = [0, header_bytes]

    def tick(finished: int, read: int) -> None:
        seen[0] += finished
        seen[1] += read
        if progress:
            progress(seen[0], len(planned), seen[1])

    run([item for _, item in planned], store, workers, tick)
    measured = [(source, item, store.load(item)) for source, item in planned]
    if not any(m.spectra for _, _, m in measured):
        raise UserError(_no_spectra(options, reports))
    truncated = _truncated(options, store, workers) if options.source else {}
    rows = Rows(options.wants, options.seed, truncated)
    for source, item, result in measured:
        rows.add(source, item, result)
    bases: dict[Source, dict[tuple[int, str, str], np.ndarray]] = {s: {} for s in sources}
    for source, item, result in measured:
        if result.basis is not None:
            attention = item.attention
            operator = "composed" if attention.latent else "kv"
            bases[source][attention.layer, attention.kind, operator] = result.basis
    return Probed(*rows.frames(), reports, _inputs(measured), seen[1], bases)


def _no_spectra(options: Options, reports: list[Report]) -> str:
    attention = reports[0].found.attentions[0]
    have = ", ".join(attention.parts)
    needs_heads = {"qk", "ov"} & set(options.operators) and attention.heads is None
    hint = "give --heads N" if needs_heads else "choose others with --operators"
    return (
        f"{reports[0].source.path}: none of the operators {', '.join(options.operators)} can be "
        f"made from {have} (block {attention.block!r}): {hint}"
    )


def _inputs(measured: Iterable[tuple[Source, Item, Measured]]) -> dict[str, str]:
    """sha256 over the values read from each checkpoint, by label."""
    digests: dict[str, list[str]] = {}
    for source, _, result in measured:
        lines = digests.setdefault(source.label, [])
        lines += [f"{name} {digest}" for name, digest in sorted(result.digests.items())]
    return _digest(digests)


def _digest(digests: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {
        label: hashlib.sha256("\n".join(sorted(set(lines))).encode()).hexdigest()
        for label, lines in digests.items()
    }


def _covariances(options: Options, report: Report) -> dict[int, tuple[str, str]]:
    """For each block the (file, key) of its input covariance."""
    if options.covariance is None:
        return {}
    from mla_study.probes.activations import load_covariance

    held = load_covariance(options.covariance)
    chosen: dict[int, tuple[str, str]] = {}
    for attention in report.found.attentions:
        key = covariance_key(held, attention)
        role = "kv_down" if attention.latent else "k"
        if key is None:
            if attention.kind == "cross":
                continue
            some = ", ".join(list(held)[:4])
            raise UserError(
                f"{options.covariance} has no covariance for block {attention.block!r} "
                f"(it has {some}): name its keys after the blocks or the projections"
            )
        if held[key].shape[0] != attention.parts[role].n:
            raise UserError(
                f"{options.covariance}: {key!r} is {list(held[key].shape)}, but block "
                f"{attention.block!r} has {attention.parts[role].n} inputs"
            )
        chosen[id(attention)] = (options.covariance, key)
    return chosen


def covariance_key(held: Mapping[str, Any], attention: Attention) -> str | None:
    """The key of a block's input covariance: a projection's name, the block's, or its number."""
    roles = ("kv_down",) if attention.latent else ("k", "v", "q")
    stems = [
        attention.parts[r].tensor.removesuffix(".weight") for r in roles if r in attention.parts
    ]
    stems.append(attention.block)
    for stem in stems:
        for key in held:
            if key == stem or key.endswith("." + stem) or stem.endswith("." + key):
                return key
    if attention.kind == "self":
        n = attention.layer
        for key in (str(n), f"layer.{n}", f"layers.{n}", f"blocks.{n}", f"layer_{n}"):
            if key in held:
                return key
    return None


def _truncated(options: Options, store: Store, workers: int | None) -> dict[int, np.ndarray]:
    """Singular values of the dense source's [K; V] by layer (raw gauge)."""
    assert options.source is not None
    dense = Options(operators=("kv",), gauges=("raw",), heads=options.heads, maps=options.maps)
    report, spec, fingerprint, _ = inspect(Source(options.source, options.source), dense)
    chosen = [a for a in report.found.attentions if a.kind == "self" and not a.latent]
    if not chosen:
        raise UserError(f"{options.source} holds no dense self-attention: name the dense source")
    items = [Item(spec, fingerprint, attention, dense.request) for attention in chosen]
    run(items, store, workers)
    return {item.attention.layer: store.load(item).spectra[0].sigma for item in items}


def probe(
    *paths: str | Path,
    out: str | Path | None = None,
    workers: int | None = 1,
    **options: Any,
) -> pd.DataFrame:
    """Probe checkpoints and return the tidy table.

    Args:
        paths: files, indices, folders, ``hf://`` or ``https://`` addresses.
        out: folder to keep finished blocks in while working, so that a run can be resumed.
        workers: processes (default 1: everything happens in this one).
        options: fields of :class:`Options`, such as ``operators=("kv",)`` or ``heads=12``.

    Returns:
        DataFrame with :data:`COLUMNS`, a row for each operator, gauge, metric and null.

    Raises:
        UserError: a sentence that names file, tensor and remedy.

    Example::

        from mla_study import probe
        frame = probe("model.safetensors")
    """
    import tempfile

    sources = [Source(str(p), str(p)) for p in paths]
    if not sources:
        raise UserError("probe() needs at least one path")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(out) if out is not None else Path(folder))
        return probe_sources(sources, Options(**options), store, workers).table
