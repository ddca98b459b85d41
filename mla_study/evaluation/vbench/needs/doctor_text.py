"""What the doctor found, as a table with its list, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mla_study.evaluation.vbench.dimensions import DIMENSIONS
from mla_study.evaluation.vbench.needs.costs import SETTING, time_text
from mla_study.evaluation.vbench.needs.doctor import Report, Row
from mla_study.evaluation.vbench.needs.weights import ITEMS, size_text
from mla_study.evaluation.vbench.runs.plan import STATIC_FILTER
from mla_study.evaluation.vbench.runs.scoring import FLICKER


def text(report: Report) -> str:
    """The report for a reader: one table, then what is missing, each item once.

    Of what was asked for by name, nothing else is listed, only counted.
    """
    lines = [f"{'dimension':<40}{'ready':<7}{'GiB':>6}{'time':>9}  lacks"]
    lines += [_line(row) for row in report.rows if row.asked]
    others = [row for row in report.rows if not row.asked]
    if not report.named:
        lines += ["others:", *(_line(row) for row in others)]
    lines += [
        "",
        f"environment: {report.environment}",
        f"device:      {report.devices}",
        *([f"detectron2:  {report.detectron2}"] if _detectron2(report) else []),
        f"weights:     {report.weights}",
        f"disk:        {_disk(report)}",
        f"memory:      {_memory(report)}",
    ]
    if report.folder is not None:
        lines.append(f"videos:      {_videos(report)}")
    lines.append(f"GiB and time are estimates ({SETTING}); a dash: not measured.")
    missing = report.missing(asked=report.named)
    if missing:
        lines += ["", f"missing or not usable ({len(missing)}):"]
        for key in missing:
            lines += _told(key, report)
    asked = [row for row in report.rows if row.asked]
    ready = sum(row.ready for row in asked)
    lines += ["", f"{ready} of {len(asked)} asked for are ready ({report.mode} mode)"]
    if missing:
        lines.append(
            f"`mla-study vbench fetch-weights --to {report.weights}` gets what an address has"
        )
    if report.unfiltered:
        lacks = report.row(STATIC_FILTER)
        lines.append(
            f"{FLICKER} would be scored on moving videos too, against VBench's protocol: its "
            f"{STATIC_FILTER} lacks {', '.join([*lacks.troubles, *lacks.lacks])}"
        )
    hidden = len(report.missing()) - len(missing)
    if hidden:
        lacking = sum(not row.ready for row in others)
        lines.append(
            f"not asked for: {lacking} of {len(others)} others are not ready, {hidden} more items "
            "are missing; without --dimensions all are listed"
        )
    return "\n".join(lines)


def _detectron2(report: Report) -> bool:
    """Whether it is worth a line: not where only what needs none was asked for."""
    asked = [DIMENSIONS.get(row.name) for row in report.rows if row.asked]
    return not report.named or any(known.detectron2 for known in asked if known is not None)


def document(report: Report) -> dict[str, Any]:
    """The report as JSON has it; sizes in bytes, memory in GiB, disk in GB, time in seconds."""
    asked = set(report.missing(asked=True))
    return {
        "schema": 1,
        "ready": report.ready,
        "mode": report.mode,
        "weights": str(report.weights),
        "environment": {"ready": report.environment_ready, "told": report.environment},
        "device": report.devices,
        "detectron2": report.detectron2,
        "disk_free_gb": report.disk_gb,
        "memory_free_gib": report.memory_gib,
        "estimates": SETTING,
        "videos": None
        if report.folder is None
        else {
            "path": str(report.folder.path),
            "videos": report.folder.videos,
            "frames": report.folder.frames,
            "passed_over": report.folder.passed_over or None,
        },
        "scorers": [
            {
                "name": row.name,
                "asked": row.asked,
                "ready": row.ready,
                "lacks": list(row.lacks),
                "troubles": list(row.troubles),
                "memory_gib": row.gib,
                "seconds": row.seconds,
            }
            for row in report.rows
        ],
        "missing": [{**_entry(key, report), "asked": key in asked} for key in report.missing()],
    }


def _entry(key: str, report: Report) -> dict[str, Any]:
    item, found = ITEMS[key], report.states.get(key)
    return {
        "key": key,
        "what": item.what,
        "kind": item.kind,
        "place": str(report.weights / item.place),
        "state": found.name if found else "missing",
        "sentence": found.sentence if found else f"detectron2: {report.detectron2}",
        "bytes": item.size,
        "bytes_exact": item.size is not None and not item.about,
        "sha256": item.sha256,
        "sha256_from": item.hash_from or None,
        "url": item.url,
        "licence": item.licence,
        "revision": item.revision or None,
        "by_hand": item.by_hand or None,
    }


def _told(key: str, report: Report) -> list[str]:
    item, entry = ITEMS[key], _entry(key, report)
    digest = "not published"
    if item.sha256:
        more = "…" if item.hash_from == "name" else ""
        digest = f"{item.sha256}{more} ({_HASHES[item.hash_from]})"
    of = " of the archive" if item.kind == "folder" and not item.by_hand else ""
    size = "code" if item.is_code else size_text(item) + of
    lines = [
        f"  {key}: {item.what}; {size}",
        f"    to      {entry['place']}",
        f"    from    {item.url}{f', {item.member} in it' if item.member else ''}",
        f"    sha256  {digest}",
        f"    licence {item.licence}",
    ]
    if item.by_hand:
        lines.append(f"    how     {item.by_hand}")
    if entry["state"] != "missing":
        lines.append(f"    {entry['state']}: {entry['sentence']}")
    return lines


_HASHES = {
    "source": "published",
    "name": "its beginning, in the file's name",
    "revision": "of its Python files at that revision",
    "recorded": "recorded by those who downloaded it",
}


def _line(row: Row) -> str:
    mark = "yes" if row.ready else "no"
    gib = "–" if row.gib is None else f"{row.gib:.1f}"
    lacks = ", ".join([*row.troubles, *row.lacks])
    return f"{row.name:<40}{mark:<7}{gib:>6}{time_text(row.seconds):>9}  {lacks}".rstrip()


def _sum_gb(keys: Iterable[str]) -> float:
    return sum(ITEMS[key].download or 0 for key in keys) / 1e9


def _disk(report: Report) -> str:
    asked = {key for row in report.rows if row.asked for key in row.lacks}
    free = "not known" if report.disk_gb is None else f"{report.disk_gb:.1f} GB free"
    need = _sum_gb(asked)
    short = report.disk_gb is not None and need > report.disk_gb
    return f"{free}; what is asked for and missing takes about {need:.1f} GB" + (
        ": not enough" if short else ""
    )


def _memory(report: Report) -> str:
    if report.memory_gib is None:
        return "not known"
    asked = [row for row in report.rows if row.asked and row.gib is not None]
    over = [row.name for row in asked if (row.gib or 0) > (report.memory_gib or 0)]
    note = f"; less than {', '.join(over)} took when measured" if over else ""
    return f"{report.memory_gib:.1f} GiB free{note}"


def _videos(report: Report) -> str:
    folder = report.folder
    assert folder is not None
    passed = f"; {folder.passed_over}" if folder.passed_over else ""
    if folder.videos == 0:
        return f"none in {folder.path}{passed}"
    frames = "frames not counted" if folder.frames is None else f"about {folder.frames:.0f} frames"
    asked = [row for row in report.rows if row.asked]
    known = [row.seconds for row in asked if row.seconds is not None]
    blank = len(asked) - len(known)
    rest = f", and what {blank} more take, of which no time is known" if blank else ""
    total = time_text(sum(known)) if known else "unknown"
    return (
        f"{folder.videos} in {folder.path}, {frames}; all that is asked for: {total}{rest}{passed}"
    )
