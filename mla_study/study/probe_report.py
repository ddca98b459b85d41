"""What ``rank-probe`` prints: the readable table, the list of operators, and one JSON document."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_study.probes.names import public_name, redact
from mla_study.probes.rank_probe import Probed, Report, depth_note

if TYPE_CHECKING:
    import pandas as pd

KEYS = ["checkpoint", "series", "step", "layer", "attention", "operator", "gauge"]
GROUP = ["checkpoint", "series", "step", "attention", "operator", "gauge"]
PRIMARY = ("r_0.99", "energy_at_n/8")
EXTRA = ("stable_rank", "entropy_rank")
_NULLS = {"gaussian_product": 0, "gaussian": 1}  # the nearer one is shown
_SPACES = ("overlap", "principal_angle")
_HEADS = {"r_0.99": "r_.99", "energy_at_n/8": "E(n/8)"}


def shown_metrics(table: pd.DataFrame) -> list[str]:
    """r_.99 and E(n/8), or where ``--metrics`` left them out the first two that there are."""
    have = [m for m in dict.fromkeys(table["metric"]) if not m.startswith(_SPACES)]
    return [m for m in PRIMARY if m in have] or have[:2]


def shown_rows(table: pd.DataFrame, gauge: str) -> pd.DataFrame:
    """Rows of spectra in one gauge a spectrum, beside one null.

    The gauge is the one named where an operator of a checkpoint has it, else raw, else what it
    has; ``weighted-`` gauges are chosen apart. The null is that of a product for products.
    ``step`` is -1 where there is none; ``z`` is (value - null_value) / null_se.
    """
    rows = table[~table["metric"].str.startswith(_SPACES)]
    rows = rows.assign(
        step=rows["step"].astype("Int64").fillna(-1).astype("int64"),
        weighted=rows["gauge"].str.startswith("weighted-"),
        plain=rows["gauge"].str.removeprefix("weighted-"),
        near=rows["null"].map(_NULLS),
    )
    place = ["checkpoint", "series", "step", "attention", "operator", "weighted"]

    def some_have(name: str) -> pd.Series[bool]:
        return rows.assign(has=rows["plain"] == name).groupby(place)["has"].transform("any")

    first = rows.groupby(place)["plain"].transform("first")
    wanted = first.mask(some_have("raw"), "raw").mask(some_have(gauge), gauge)
    rows = rows[(rows["plain"] == wanted) & rows["near"].notna()]
    nearest = rows.groupby([*KEYS, "head", "metric"])["near"].transform("min")
    rows = rows[rows["near"] == nearest]
    spread = rows["null_se"].where(rows["null_se"] > 0)
    return rows.assign(z=(rows["value"] - rows["null_value"]) / spread)


def wide(probed: Probed, gauge: str) -> pd.DataFrame:
    """One row a layer and operator, medians over heads: each shown metric with its null and z.

    ``of`` counts the singular values: min(m, n), or the inner rank of a product; ``METRIC cut`` is
    the value of the cut dense source, where there is one.
    """
    import pandas as pd

    rows = shown_rows(probed.table, gauge)
    if rows.empty:
        return pd.DataFrame()
    numbers = ["value", "null_value", "z"]
    medians = rows.groupby([*KEYS, "metric"], sort=False)[numbers].median().unstack("metric")
    order = rows.drop_duplicates(KEYS)[KEYS]
    out = pd.DataFrame(index=pd.MultiIndex.from_frame(order))
    for metric in shown_metrics(probed.table):
        for what in numbers:
            out[f"{metric} {what}"] = medians[what, metric]
    for metric in EXTRA:
        out[metric] = medians.get(("value", metric), math.nan)
    cut = probed.table[probed.table["null"] == "truncated_source"]
    for metric in shown_metrics(cut):
        by_place = _filled(cut[cut["metric"] == metric]).groupby(KEYS)["null_value"].median()
        out[f"{metric} cut"] = by_place.reindex(out.index)
    out["of"] = _filled(probed.spectra).groupby(KEYS, sort=False)["index"].max().reindex(out.index)
    return out.reset_index()


def _filled(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(step=frame["step"].astype("Int64").fillna(-1).astype("int64"))


def summary(probed: Probed, gauge: str) -> list[dict[str, Any]]:
    """Median and range over layers of the shown metrics, an entry an operator and gauge."""
    rows = wide(probed, gauge)
    entries: list[dict[str, Any]] = []
    if rows.empty:
        return entries
    for _, group in rows.groupby(GROUP, sort=False):
        first = group.iloc[0]
        entry: dict[str, Any] = {name: _plain(first[name]) for name in GROUP}
        entry["step"] = None if entry["step"] == -1 else entry["step"]
        entry["layers"] = len(group)
        entry["of"] = int(group["of"].max())
        for metric in shown_metrics(probed.table):
            column = group[f"{metric} value"]
            entry[metric] = {
                "median": _plain(column.median()),
                "min": _plain(column.min()),
                "max": _plain(column.max()),
                "null": _plain(group[f"{metric} null_value"].median()),
                "z": _plain(group[f"{metric} z"].median()),
            }
            if f"{metric} cut" in group and group[f"{metric} cut"].notna().any():
                entry[metric]["truncated_source"] = _plain(group[f"{metric} cut"].median())
        entries.append(entry)
    return entries


def text_table(probed: Probed, gauge: str) -> str:
    """The readable table with a summary at its end; for series the summary alone."""
    lines: list[str] = []
    rows = wide(probed, gauge)
    series = bool(probed.table["step"].notna().any())
    metrics = shown_metrics(probed.table)
    if not rows.empty and not series:
        columns = [_head(metric, number == 0) for number, metric in enumerate(metrics)]
        head = f"{'layer':>5} {'attention':<9} {'operator':<8} {'gauge':<17}" + "".join(columns)
        head += f" {'stable':>7} {'entropy':>8}"
        for label, group in rows.groupby("checkpoint", sort=False):
            lines += [str(label), head]
            lines += [_line(row, metrics) for row in group.to_dict("records")]
            lines.append("")
    lines += _space_rows(probed.table, by_layer=not series)
    entries = summary(probed, gauge)
    if entries:
        lines.append(
            f"median [min .. max] over layers, gauge {gauge!r} where an operator has it; z is the "
            "difference from the null in standard deviations of one random matrix"
        )
        if not any(str(entry["gauge"]).endswith(gauge) for entry in entries):
            why = (
                "one projection alone or no qk-norm" if gauge == "folded" else "single projections"
            )
            lines.append(f"no operator here has the gauge {gauge!r} ({why})")
    lines += [_summary_line(entry, metrics) for entry in entries]
    return "\n".join([*lines, *(f"note: {note}" for note in probed.notes)])


def _head(metric: str, first: bool) -> str:
    name = _HEADS.get(metric, metric)
    size = max(7, len(name))
    return f" {name:>{size}}" + (f" {'of':>5}" if first else "") + f" {'null':>7} {'z':>8} "


def _line(row: Mapping[Any, Any], metrics: Sequence[str]) -> str:
    text = f"{row['layer']:>5} {row['attention']:<9} {row['operator']:<8} {row['gauge']:<17}"
    for number, metric in enumerate(metrics):
        size = max(7, len(_HEADS.get(metric, metric)))
        text += f" {_value(row[f'{metric} value'], metric):>{size}}"
        text += f" {row['of']:>5}" if number == 0 else ""
        text += f" {_value(row[f'{metric} null_value'], metric):>7} {_num(row[f'{metric} z']):>8} "
    return text + f" {_num(row['stable_rank']):>7} {_num(row['entropy_rank']):>8}"


def _summary_line(entry: Mapping[str, Any], metrics: Sequence[str]) -> str:
    step = f"step {entry['step']}, " if entry["step"] is not None else ""
    name = entry["series"] or entry["checkpoint"]
    pieces: list[str] = []
    for metric in metrics:
        shown = {k: _value(v, metric) for k, v in entry[metric].items()}
        text = f"{_HEADS.get(metric, metric)} {shown['median']} [{shown['min']} .. {shown['max']}]"
        text += f" of {entry['of']}" if metric.startswith("r_") else ""
        text += f", null {shown['null']}, z {_num(entry[metric]['z'])}"
        if "truncated_source" in shown:
            text += f", cut source {shown['truncated_source']}"
        pieces.append(text)
    return (
        f"  {_short(name)}: {step}{entry['attention']} {entry['operator']} ({entry['gauge']}): "
        + "; ".join(pieces)
    )


def _space_rows(table: pd.DataFrame, by_layer: bool) -> list[str]:
    """Overlaps and principal angles, by layer, or medians over layers by step."""
    rows = table[table["metric"].str.startswith(_SPACES)]
    if rows.empty:
        return []
    columns = ["value", "null_value", "null_se", "m", "n"]
    keys = ["series", "step", "layer", "attention", "operator", "metric"]
    if not by_layer:
        keys.remove("layer")
    medians = _filled(rows).groupby(["checkpoint", *keys], sort=False)[columns].median()
    left = f"{'layer':>5}" if by_layer else f"{'series':<12} {'step':>7}"
    lines = (
        list(dict.fromkeys(rows["checkpoint"])) if by_layer else ["row spaces, median of layers"]
    )
    lines.append(
        f"{left} {'attention':<9} {'operator':<8} {'metric':<24}"
        f"{'value':>8} {'null':>7} {'z':>8} {'k':>5} {'of':>5}"
    )
    for row in medians.reset_index().to_dict("records"):
        spread = row["null_se"]
        z = (row["value"] - row["null_value"]) / spread if spread > 0 else math.nan
        left = (
            f"{row['layer']:>5}"
            if by_layer
            else f"{_short(row['series'], 12):<12} {row['step']:>7}"
        )
        lines.append(
            f"{left} {row['attention']:<9} {row['operator']:<8} {row['metric']:<24}"
            f"{row['value']:>8.4f} {_num(row['null_value'], 4):>7} {_num(z):>8} "
            f"{row['m']:>5.0f} {row['n']:>5.0f}"
        )
    return [*lines, ""]


def _short(name: str, limit: int = 60) -> str:
    return name if len(name) <= limit else "..." + name[3 - limit :]


def _num(value: Any, digits: int = 1) -> str:
    if value is None or not math.isfinite(float(value)):
        return "-"
    number = float(value)
    if digits == 1 and (number == round(number) or abs(number) >= 1000):
        return f"{number:.0f}"
    text = f"{number:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def _value(value: Any, metric: str) -> str:
    if metric.startswith(("energy", "functional_error")):
        return _num(value, 3)
    if metric.startswith(("r_", "stable", "entropy", "participation")):
        return _num(value)
    return "-" if value is None or not math.isfinite(float(value)) else f"{float(value):.4g}"


def listing(reports: Iterable[Report]) -> str:
    """``--list``: what was found, what was left out, and why."""
    lines: list[str] = []
    for report in reports:
        lines.append(f"{report.source.label} ({report.format})")
        lines.append(f"{'layer':>7} {'attention':<9} {'layout':<10} {'heads':<12} projections")
        for a in report.found.attentions:
            heads = "-" if a.heads is None else f"{a.heads.q}/{a.heads.kv} x {a.heads.dim}"
            parts = "  ".join(f"{role}[{p.m},{p.n}]" for role, p in a.parts.items())
            norms = "  ".join(a.norms)
            lines.append(
                f"{a.layer:>7} {a.kind:<9} {a.layout:<10} {heads:<12} {a.block}: {parts}"
                + (f"  norms: {norms}" if norms else "")
                + "".join(f"  ({r})" for r in a.remarks)
            )
        groups: dict[tuple[str, str], int] = defaultdict(int)
        for name, reason in report.found.left_out.items():
            groups[re.sub(r"\d+", "*", name), reason] += 1
        if groups:
            count = len(report.found.left_out)
            lines.append(f"left out: {count} tensor{'' if count == 1 else 's'}")
            lines += [f"{n:>7} x {name}: {reason}" for (name, reason), n in groups.items()]
        lines += [f"note: {note}" for note in (*report.notes, *depth_note(report))]
        lines.append("")
    return redact("\n".join(lines).rstrip())


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain JSON values; NaN, infinity and missing become null."""
    columns = {
        name: [_plain(v) for v in frame[name].astype(object).where(frame[name].notna(), None)]
        for name in frame.columns
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def document(probed: Probed, run: Mapping[str, Any], gauge: str) -> dict[str, Any]:
    """Everything, as one JSON document."""
    spectra: list[dict[str, Any]] = []
    keys = [*KEYS[:6], "head", "gauge"]
    for _, group in probed.spectra.groupby(keys, sort=False, dropna=False):
        entry = records(group.iloc[:1][keys])[0]
        spectra.append({**entry, "sigma": group["sigma"].tolist()})
    return {
        "schema": 1,
        "run": dict(run),
        "gauge": gauge,
        "summary": summary(probed, gauge),
        "notes": probed.notes,
        "checkpoints": [describe(r) for r in probed.reports],
        "table": records(probed.table),
        "spectra": spectra,
    }


def describe(report: Report) -> dict[str, Any]:
    """What was found in one checkpoint, as plain values."""
    return {
        "checkpoint": report.source.label,
        "path": public_name(report.source.path),
        "format": report.format,
        "config": report.config_path,
        "expected_layers": report.found.expected_layers,
        "missing_layers": report.found.missing_layers,
        "blocks": [
            {
                "block": a.block,
                "layer": a.layer,
                "attention": a.kind,
                "layout": a.layout,
                "heads": None if a.heads is None else vars(a.heads),
                "parts": {
                    role: {
                        "tensor": p.tensor,
                        "rows": [list(r) for r in p.rows],
                        "shape": [p.m, p.n],
                    }
                    for role, p in a.parts.items()
                },
                "norms": dict(a.norms),
                "remarks": list(a.remarks),
            }
            for a in report.found.attentions
        ],
        "left_out": dict(report.found.left_out),
        "notes": [redact(note) for note in (*report.notes, *depth_note(report))],
    }


def warn_lines(reports: Sequence[Report]) -> list[str]:
    """Lines that belong on stderr even when stdout is machine-readable: missing blocks."""
    return [line for r in reports if r.found.missing_layers for line in depth_note(r)]
