"""What ``rank-probe`` prints: the readable table, the list of operators, and one JSON document."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mla_study.probes.rank_probe import Probed, Report, depth_note

if TYPE_CHECKING:
    import pandas as pd

KEYS = ["checkpoint", "series", "step", "layer", "attention", "operator", "gauge"]
GROUP = ["checkpoint", "series", "step", "attention", "operator", "gauge"]
_SHOWN_NULL = {"composed": "gaussian_product", "qk": "gaussian_product", "ov": "gaussian_product"}


def wide(probed: Probed, gauge: str) -> pd.DataFrame:
    """One row a layer and operator: r_.99 and E(n/8) with null and z, medians over heads.

    The gauge is the one named where an operator has it, else raw; ``weighted-`` gauges follow it.
    ``of`` counts the singular values: min(m, n), or the inner rank of a product.
    """
    import pandas as pd

    table = probed.table
    data = table[table["metric"].isin(["r_0.99", "energy_at_n/8", "entropy_rank", "stable_rank"])]
    has_product = set(data[data["null"] == "gaussian_product"]["operator"])
    shown = data["operator"].map(lambda op: "gaussian_product" if op in has_product else "gaussian")
    data = data[data["null"] == shown]
    data = data[_gauge_mask(data, gauge)]
    if data.empty:
        return pd.DataFrame()
    data = data.assign(
        z=(data["value"] - data["null_value"]) / data["null_se"].where(data["null_se"] > 0),
        step=data["step"].astype("Int64").fillna(-1),
    )
    values = data.pivot_table(
        index=KEYS, columns="metric", values=["value", "null_value", "z"], aggfunc="median",
        observed=True, dropna=True, sort=False,
    )  # fmt: skip
    counted = probed.spectra.assign(step=probed.spectra["step"].astype("Int64").fillna(-1))
    size = counted.groupby(KEYS, sort=False)["index"].max()
    out = pd.DataFrame(index=values.index)
    for metric in ("r_0.99", "energy_at_n/8"):
        for what in ("value", "null_value", "z"):
            column = (what, metric)
            out[f"{metric} {what}"] = values[column] if column in values else math.nan
    for metric in ("stable_rank", "entropy_rank"):
        out[metric] = values["value", metric] if ("value", metric) in values else math.nan
    out["of"] = size.reindex(out.index)
    return out.reset_index()


def _gauge_mask(data: pd.DataFrame, gauge: str) -> pd.Series[bool]:
    weighted = data["gauge"].str.startswith("weighted-")
    plain = data["gauge"].str.removeprefix("weighted-")
    have = data.assign(plain=plain, weighted=weighted)
    chosen = have.groupby(["operator", "attention", "weighted"])["plain"].transform(
        lambda g: gauge if (g == gauge).any() else ("raw" if (g == "raw").any() else g.iloc[0])
    )
    return plain == chosen


def summary(probed: Probed, gauge: str) -> list[dict[str, Any]]:
    """Median and range over layers of r_.99 and E(n/8), an entry an operator."""
    rows = wide(probed, gauge)
    if rows.empty:
        return []
    entries: list[dict[str, Any]] = []
    for key, group in rows.groupby(GROUP, sort=False):
        entry: dict[str, Any] = dict(
            zip(GROUP, key if isinstance(key, tuple) else (key,), strict=True)
        )
        entry["step"] = None if entry["step"] == -1 else int(entry["step"])
        entry["layers"] = len(group)
        entry["of"] = int(group["of"].max())
        for metric in ("r_0.99", "energy_at_n/8"):
            column = group[f"{metric} value"]
            entry[metric] = {
                "median": _plain(column.median()),
                "min": _plain(column.min()),
                "max": _plain(column.max()),
                "null": _plain(group[f"{metric} null_value"].median()),
                "z": _plain(group[f"{metric} z"].median()),
            }
        entries.append(entry)
    return entries


def text_table(probed: Probed, gauge: str) -> str:
    """The readable table with a summary at its end."""
    lines: list[str] = []
    rows = wide(probed, gauge)
    head = (
        f"{'layer':>5} {'attention':<9} {'operator':<8} {'gauge':<17}{'r_.99':>7} {'of':>5} "
        f"{'null':>7} {'z':>8}  {'E(n/8)':>6} {'null':>6} {'z':>8} {'stable':>7} {'entropy':>8}"
    )
    if not rows.empty:
        for (label, series, step), group in rows.groupby(
            ["checkpoint", "series", "step"], sort=False
        ):
            where = (
                label
                + (f"  [{series}]" if series else "")
                + (f"  step {step}" if step >= 0 else "")
            )
            lines += [where, head]
            lines += [_line(row) for row in group.to_dict("records")]
            lines.append("")
    lines += _other_rows(probed.table)
    entries = summary(probed, gauge)
    if entries:
        lines.append(
            f"median [min .. max] over layers, gauge {gauge!r} where an operator has it; z is the "
            "difference from the null in standard deviations of one random matrix"
        )
    for entry in entries:
        r, e = entry["r_0.99"], entry["energy_at_n/8"]
        where = f"step {entry['step']}, " if entry["step"] is not None else ""
        name = entry["series"] or entry["checkpoint"]
        lines.append(
            f"  {_short(name)}: {where}{entry['attention']} {entry['operator']} ({entry['gauge']}): "
            f"r_.99 {_num(r['median'])} [{_num(r['min'])} .. {_num(r['max'])}] of {entry['of']}, "
            f"null {_num(r['null'])}; E(n/8) {_num(e['median'], 3)} "
            f"[{_num(e['min'], 3)} .. {_num(e['max'], 3)}], null {_num(e['null'], 3)}"
        )
    lines += [f"note: {note}" for note in probed.notes]
    return "\n".join(lines)


def _line(row: Mapping[Any, Any]) -> str:
    r, e = (
        [row[f"{metric} {what}"] for what in ("value", "null_value", "z")]
        for metric in ("r_0.99", "energy_at_n/8")
    )
    return (
        f"{row['layer']:>5} {row['attention']:<9} {row['operator']:<8} {row['gauge']:<17}"
        f"{_num(r[0]):>7} {row['of']:>5} {_num(r[1]):>7} {_num(r[2]):>8}  {_num(e[0], 3):>6} "
        f"{_num(e[1], 3):>6} {_num(e[2]):>8} {_num(row['stable_rank']):>7} "
        f"{_num(row['entropy_rank']):>8}"
    )


def _other_rows(table: pd.DataFrame) -> list[str]:
    """Overlaps and principal angles, by layer and step."""
    rows = table[table["metric"].str.startswith(("overlap", "principal_angle"))]
    if rows.empty:
        return []
    lines = [
        f"{'series':<10} {'step':>7} {'layer':>5} {'attention':<9} {'operator':<8} "
        f"{'metric':<24}{'value':>8} {'null':>7} {'z':>8} {'k':>5} {'of':>5}"
    ]
    for row in rows.to_dict("records"):
        se = row["null_se"]
        z = (row["value"] - row["null_value"]) / se if se and se > 0 else math.nan
        step = "" if row["step"] is None or row["step"] != row["step"] else str(row["step"])
        step = "" if step == "<NA>" else step
        lines.append(
            f"{row['series']:<10} {step:>7} {row['layer']:>5} {row['attention']:<9} "
            f"{row['operator']:<8} {row['metric']:<24}{row['value']:>8.4f} "
            f"{_num(row['null_value'], 4):>7} {_num(z):>8} {row['m']:>5} {row['n']:>5}"
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
    return f"{number:.{digits}f}"


def listing(reports: Iterable[Report]) -> str:
    """``--list``: what was found, what was left out, and why."""
    lines: list[str] = []
    for report in reports:
        lines.append(f"{report.source.path} ({report.format})")
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
            lines.append(f"left out: {len(report.found.left_out)} tensors")
            lines += [f"{n:>7} x {name}: {reason}" for (name, reason), n in groups.items()]
        lines += [f"note: {note}" for note in (*report.notes, *depth_note(report))]
        lines.append("")
    return "\n".join(lines).rstrip()


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value.item() if hasattr(value, "item") else value


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain JSON values; NaN, infinity and missing become null."""
    columns = {
        name: [None if v is None or v != v else _plain(v) for v in frame[name].astype(object).where(frame[name].notna(), None)]
        for name in frame.columns
    }  # fmt: skip
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def document(probed: Probed, run: Mapping[str, Any], gauge: str) -> dict[str, Any]:
    """Everything, as one JSON document."""
    spectra: list[dict[str, Any]] = []
    keys = ["checkpoint", "series", "step", "layer", "attention", "operator", "head", "gauge"]
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
        "path": report.source.path,
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
        "notes": [*report.notes, *depth_note(report)],
    }


def warn_lines(reports: Sequence[Report]) -> list[str]:
    """Lines that belong on stderr even when stdout is machine-readable: missing blocks."""
    return [line for r in reports if r.found.missing_layers for line in depth_note(r)]
