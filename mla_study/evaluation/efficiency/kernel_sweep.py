"""The sweep that chooses tile sizes: every d_c, every architecture, the first that does not spill.

Preference is an order, not a measurement: many rows a tile (every key byte that is loaded serves
more queries), then many keys, then stages.

Example, for one size (the whole sweep, without arguments, takes about half an hour)::

    python -m mla_study.evaluation.efficiency.kernel_sweep --d-c 192 --arch 90
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mla_study.errors import EXIT_BAD_INPUT, UserError
from mla_study.kernels.latent_attention.aot import Facts, Variant, facts
from mla_study.kernels.latent_attention.triton_tiles import (
    D_C,
    SHARED_LIMIT,
    TILES_FILE,
    Tiles,
    kind_of,
    tiles,
)

ARCHES = (80, 90, 100)
CHECKED = (64, 128, 192, 256, 384, 512)  # every variant is compiled there, elsewhere the hardest
WIDE_STEP = 64

_HOPPER = (
    (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 3), (64, 64, 8, 2),
    (64, 32, 8, 3), (64, 32, 8, 2),
)  # fmt: skip
_AMPERE = (
    (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2),
    (64, 16, 4, 2), (32, 32, 4, 2), (32, 16, 4, 2),
)  # fmt: skip
# a part as narrow as the rows would lay the warps along the rows: each then holds all channels
_FEW_ROWS = (
    Tiles(16, 32, 4, 2, 64, 32), Tiles(16, 16, 4, 2, 64, 32), Tiles(16, 32, 8, 3, 128, 32),
    Tiles(16, 16, 8, 2, 64, 32),
)  # fmt: skip


def candidates(arch: int, int8: bool) -> list[Tiles]:
    """What is tried, best first; int8, which needs registers to unpack, begins lower."""
    if arch == 80:
        given = _AMPERE[5:] if int8 else _AMPERE
        return [*(Tiles(*numbers, widest=64) for numbers in given), *_FEW_ROWS]
    given = [numbers for numbers in _HOPPER if numbers[3] == 2] if int8 else _HOPPER
    if arch == 90:
        wide = [Tiles(*numbers, widest=512 if int8 else 128) for numbers in given]
        return [*wide, Tiles(64, 32, 8, 2, 256), *_FEW_ROWS]
    wide = [Tiles(*numbers, widest=128) for numbers in given]
    return [*wide, Tiles(64, 32, 8, 1, 128), Tiles(64, 16, 8, 2, 128), *_FEW_ROWS]


def variants(arch: int, d_c: int, int8: bool, d_rope: int) -> list[Variant]:
    """What a choice must compile to without spills; the most demanding first."""
    if d_rope > 32:
        return [Variant(arch, d_c, d_rope)]
    if not int8:
        most = [Variant(arch, d_c, d_rope, rotate=True, split=True)]
        return [*most, Variant(arch, d_c, d_rope)] if d_c in CHECKED else most
    schemes = ("channel", "token") if d_c in CHECKED else ("channel",)
    return [Variant(arch, d_c, d_rope, scheme=s, rotate=True, split=True) for s in schemes]


def step_of(int8: bool, d_rope: int) -> int:
    """Of d_c: the paper's kind is compiled at every size, the others share that of the next one."""
    return WIDE_STEP if int8 or d_rope > 32 else D_C.step


def sweep(
    arch: int, kinds: Sequence[tuple[bool, int]] = ((False, 32), (True, 32), (False, 64))
) -> Iterator[dict[str, Any]]:
    """Rows of the table of one architecture; ``status`` is "picked" or why not.

    :param kinds: pairs of (int8, d_rope).
    """
    for int8, d_rope in kinds:
        last = 0
        for d_c in D_C[:: step_of(int8, d_rope) // D_C.step]:
            given = candidates(arch, int8)
            picked = yield from _first(given, max(0, last - 1), arch, d_c, int8, d_rope, False)
            if picked is None:
                continue
            last = given.index(picked)
            if d_rope <= 32 and picked.BM > 64:
                small = [i for i, tile in enumerate(given) if tile.BM <= 64]
                yield from _first(given, max(small[0], last), arch, d_c, int8, d_rope, True)


def _first(
    given: list[Tiles], start: int, arch: int, d_c: int, int8: bool, d_rope: int, few: bool
) -> Any:
    kind = kind_of(arch, d_rope, int8, few)
    for shape in given[start:]:
        rows: list[dict[str, Any]] = []
        refused: str | None = None
        for variant in variants(arch, d_c, int8, d_rope):
            try:
                found = facts(variant, shape)
                refused = found.refused(arch)
            except Exception as error:  # the compiler's own passes can fail
                found, refused = Facts(0, 0, 0, 0, 0, 0, 0), f"error: {type(error).__name__}"
            rows.append(_row(kind, variant, shape, found))
            if refused:
                break
        for row in rows:
            yield {**row, "status": refused or "picked"}
        if not refused:
            return shape
    return None


def _row(kind: str, variant: Variant, shape: Tiles, found: Facts) -> dict[str, Any]:
    return {
        "kind": kind,
        **dataclasses.asdict(variant),
        **shape._asdict(),
        **dataclasses.asdict(found),
    }


def ranges(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, int, list[int]]]]:
    """The choices as tiles.json holds them: kind -> [first d_c, last d_c, tiles]."""
    chosen: dict[str, dict[int, list[int]]] = {}
    for row in rows:
        if row["status"] == "picked":
            shape = [row[name] for name in Tiles._fields]
            chosen.setdefault(row["kind"], {})[row["d_c"]] = shape
    found: dict[str, list[tuple[int, int, list[int]]]] = {}
    for kind, sizes in chosen.items():
        runs: list[tuple[int, int, list[int]]] = []
        step = step_of("int8" in kind, int(kind.split()[-1]))
        for d_c, shape in sorted(sizes.items()):
            first = max(D_C[0], d_c - step + D_C.step)
            if runs and runs[-1][2] == shape and runs[-1][1] == first - D_C.step:
                runs[-1] = (runs[-1][0], d_c, shape)
            else:
                runs.append((first, d_c, shape))
        found[kind] = runs
    return found


def _swept(arch: int) -> list[dict[str, Any]]:
    return list(sweep(arch))


def swept(processes: int = 2) -> list[dict[str, Any]]:
    """Rows of all architectures."""
    with ProcessPoolExecutor(processes) as pool:
        return [row for some in pool.map(_swept, ARCHES) for row in some]


def write(rows: Sequence[dict[str, Any]], folder: Path, tiles_file: Path) -> None:
    """Write tiles.json, and the result folder with the whole table."""
    import pandas as pd

    from mla_study.study.runs import atomic_write, write_result

    lines = [
        f'"{kind}": [\n  ' + ",\n  ".join(json.dumps(run) for run in runs) + "\n]"
        for kind, runs in ranges(rows).items()
    ]
    atomic_write(tiles_file, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    import triton

    write_result(
        folder,
        {"table": pd.DataFrame(rows)},
        config={"arches": ARCHES, "triton": triton.__version__},
        inputs={},
        seed=None,
        modules=["mla_study.evaluation.efficiency.kernel_sweep"],
        provenance="measured",
        validity="full",
        units={"shared_bytes": "B", "spill_bytes": "B", "registers": "1/thread"},
        notes=[
            "compiler statistics of code compiled ahead of time: nothing was run on a GPU",
            "hgmma, mma and tcgen05 count instructions of the code, which holds the step over "
            "whole key tiles and the masked one over the last",
            "spill_bytes is the stack frame of a thread",
            "status is that of the tiles: picked where every compiled variant of a size passed",
        ],
        observed={},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the facts of one size; without a size, sweep all of them and write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m mla_study.evaluation.efficiency.kernel_sweep",
        description="Compile the fused kernel for GPUs that need not be there.",
    )
    parser.add_argument("--d-c", type=int, help="one latent size; without it, the whole sweep")
    parser.add_argument("--d-rope", type=int, default=32)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--out", type=Path, default=Path("results/data/kernel_aot"))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(argv)
    if given.d_c is None:
        tiles_file = TILES_FILE
        write(swept(given.processes), given.out, tiles_file)
        return
    names = [field.name for field in dataclasses.fields(Facts)]
    print("arch", *Tiles._fields, *names)
    for arch in given.arch or sorted(SHARED_LIMIT):
        shape = tiles(arch, given.d_c, given.d_rope, torch.bfloat16)
        found = facts(Variant(arch, given.d_c, given.d_rope), shape)
        print(arch, *shape, *dataclasses.astuple(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
