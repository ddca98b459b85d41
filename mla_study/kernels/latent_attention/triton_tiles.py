"""Tile sizes of the fused kernel, and what it takes: pure functions of shapes, without Triton."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from mla_study.errors import UserError

SCALINGS = {"none": 0, "token": 1, "channel": 2, "channel, short frames": 3}
D_C = range(64, 513, 16)
MOST_ROPE = 64
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
FAMILIES = {80: 80, 87: 80, 90: 90, 100: 100, 103: 100}
INTERPRETED = 0  # an "architecture" of its own
FEW_ROWS = 64
TILES_FILE = Path(__file__).with_name("tiles.json")


class Tiles(NamedTuple):
    """Rows and keys of a tile, warps and stages of a program, bounds of the parts of d_c."""

    BM: int
    BN: int
    warps: int
    stages: int
    widest: int = 512
    narrowest: int = 16


def parts(d_c: int, widest: int = 512, narrowest: int = 16) -> tuple[int, ...]:
    """Powers of two, ``narrowest`` to ``widest``, that add up to d_c: 192 = 128 + 64.

    The last is rounded up where at most an eighth of it is padding (240 = 128 + 112 of 128): fewer
    and wider products, and fewer registers, than 128 + 64 + 32 + 16.
    """
    found: list[int] = []
    while d_c > 0:
        above = min(widest, max(narrowest, 2 ** (d_c - 1).bit_length()))
        found.append(above if 8 * d_c >= 7 * above or above == narrowest else above // 2)
        d_c -= found[-1]
    return tuple(found)


def offsets(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Where each part begins."""
    return tuple(sum(widths[:i]) for i in range(len(widths)))


def padded(d_rope: int) -> int:
    """Width of the rotary tile: the next power of two, at least the 16 of a tensor core."""
    return max(16, 2 ** (d_rope - 1).bit_length() if d_rope > 0 else 0)


def family(arch: int) -> int | None:
    """Architecture whose table serves ``arch`` (103 -> 100); None where none does.

    sm_86, sm_89 and sm_120 have less than half the shared memory and no table.
    """
    return FAMILIES.get(arch)


def unsupported(
    d_c: int,
    d_rope: int,
    dtype: torch.dtype,
    keys: int | None = None,
    arch: int | None = None,
    int8: bool = False,
) -> str | None:
    """Why the kernel does not take a shape, in a sentence; None where it does.

    Args:
        dtype: of the queries, and of the cache where it is not int8.
        keys: number of keys, where it is known.
        arch: compute capability (90 for sm_90), INTERPRETED, or None for a GPU yet unknown.
        int8: the cache is to be dequantised in the kernel.
    """
    if d_c not in D_C:
        return (
            f"the fused kernel takes d_c from {D_C[0]} to {D_C[-1]} in steps of {D_C.step}, "
            f"not {d_c}"
        )
    if d_rope < 2 or d_rope > MOST_ROPE or d_rope % 2:
        return f"the fused kernel takes an even d_rope from 2 to {MOST_ROPE}, not {d_rope}"
    dtypes = [torch.float16, torch.bfloat16]
    if arch == INTERPRETED:
        dtypes = [torch.float16, torch.float32]
    if dtype not in dtypes:
        names = " and ".join(str(d).removeprefix("torch.") for d in dtypes)
        where = "in Triton's interpreter" if arch == INTERPRETED else "on a GPU"
        mine = str(dtype).removeprefix("torch.")
        return f"the fused kernel computes in {names} {where}, not in {mine}"
    if keys is not None and keys < 1:
        return "the fused kernel needs at least one key"
    if arch in (None, INTERPRETED):
        return None
    if family(arch) is None:
        return f"the fused kernel has tile sizes for sm_80, sm_90 and sm_100, not for sm_{arch}"
    if _found(arch, d_c, d_rope, int8, few=False) is None:
        cache = "an int8 cache" if int8 else "a cache"
        return (
            f"no tile size of the fused kernel is without spills for {cache} of "
            f"d_c = {d_c} and d_rope = {d_rope} on sm_{arch}"
        )
    return None


def splits_of(
    programs: int, keys: int, block: int, processors: int, wanted: int | None = None
) -> tuple[int, int]:
    """(splits, keys a split): enough splits that ``programs`` of them fill the processors.

    Every split holds whole tiles of ``block`` keys, two at least, and none is empty.

    Args:
        programs: row tiles of all samples.
        wanted: this many splits (or as many as there are tiles) whatever the processors.
    """
    blocks = math.ceil(keys / block)
    if wanted is None:
        wanted = min(processors // programs, blocks // 2)
    each = math.ceil(blocks / max(1, min(wanted, blocks)))
    return math.ceil(blocks / each), each * block


@functools.cache
def table() -> dict[str, list[tuple[int, int, Tiles]]]:
    """Kind (:func:`kind_of`) -> (first d_c, last d_c, tiles), as the last sweep found."""
    text = TILES_FILE.read_text(encoding="utf-8")
    return {
        kind: [(first, last, Tiles(*numbers)) for first, last, numbers in rows]
        for kind, rows in json.loads(text).items()
    }


def kind_of(arch: int, d_rope: int, int8: bool, few: bool) -> str:
    """Name of a list of the table: what besides d_c a choice depends on."""
    rotary = 32 if d_rope <= 32 else MOST_ROPE
    cache, rows = "int8" if int8 else "float", "few" if few else "many"
    return f"sm_{family(arch)} {cache} {rows} rope {rotary}"


def tiles(
    arch: int,
    d_c: int,
    d_rope: int,
    dtype: torch.dtype,
    rows: int | None = None,
) -> Tiles:
    """Tile sizes without spills that fit the shared memory, from the table of the last sweep.

    Args:
        arch: compute capability, or INTERPRETED.
        dtype: that of the cache; torch.int8 where it is dequantised in the kernel. float16 and
            bfloat16 share their sizes.
        rows: queries times heads; up to 64 of them take a tile of 64 rows. None: many.

    Raises:
        UserError: a size that :func:`unsupported` refuses.
    """
    if arch == INTERPRETED:
        return Tiles(16, 16, 4, 1)
    int8 = dtype == torch.int8
    few = rows is not None and rows <= FEW_ROWS
    found = _found(arch, d_c, d_rope, int8, few) or _found(arch, d_c, d_rope, int8, False)
    if found is None:
        known = torch.float16 if int8 else dtype
        raise UserError(str(unsupported(d_c, d_rope, known, arch=arch, int8=int8)))
    return found


def _found(arch: int, d_c: int, d_rope: int, int8: bool, few: bool) -> Tiles | None:
    if family(arch) is None:
        return None
    for first, last, found in table().get(kind_of(arch, d_rope, int8, few), []):
        if first <= d_c <= last:
            return found
    return None
