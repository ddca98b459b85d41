"""Tile sizes: pure functions of shapes, and the committed sweep that they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla_study.errors import UserError
from mla_study.evaluation.efficiency.kernel_sweep import ARCHES, ranges
from mla_study.kernels.latent_attention.triton_tiles import (
    D_C,
    INTERPRETED,
    SHARED_LIMIT,
    Tiles,
    kind_of,
    offsets,
    padded,
    parts,
    splits_of,
    table,
    tiles,
    unsupported,
)
from mla_study.study.runs import read_result

FOLDER = Path(__file__).resolve().parents[2] / "results" / "data" / "kernel_aot"


@pytest.mark.parametrize("widest", [64, 128, 512])
def test_parts_are_powers_of_two_with_little_padding(widest: int) -> None:
    for d_c in D_C:
        widths = parts(d_c, widest)
        assert all(w & (w - 1) == 0 and 16 <= w <= widest for w in widths)
        assert offsets(widths)[-1] < d_c <= sum(widths)
        assert sum(widths) <= d_c * 8 / 7
    assert parts(192, widest) == {64: (64, 64, 64), 128: (128, 64), 512: (128, 64)}[widest]


def test_parts_no_narrower_than_asked() -> None:
    assert parts(208, 64, 32) == (64, 64, 64, 32)
    assert parts(240, 64, 32) == (64, 64, 64, 32, 32)
    for d_c in D_C:
        widths = parts(d_c, 64, 32)
        assert set(widths) <= {32, 64} and d_c <= sum(widths) < d_c + 32


def test_rotary_width() -> None:
    assert [padded(n) for n in (2, 16, 18, 32, 48, 64)] == [16, 16, 32, 32, 64, 64]


@given(
    programs=st.integers(1, 500),
    keys=st.integers(1, 20000),
    block=st.sampled_from([16, 32, 64]),
    processors=st.integers(1, 160),
    wanted=st.one_of(st.none(), st.integers(1, 400)),
)
def test_splits_cover_the_keys_and_none_is_empty(
    programs: int, keys: int, block: int, processors: int, wanted: int | None
) -> None:
    splits, each = splits_of(programs, keys, block, processors, wanted)
    assert each % block == 0 and (splits - 1) * each < keys <= splits * each
    if wanted is None and splits > 1:
        assert splits * programs <= processors and each >= 2 * block


def test_few_queries_fill_a_gpu() -> None:
    assert splits_of(1, 15600, 64, 132)[0] >= 110
    assert splits_of(439, 15600, 64, 132)[0] == 1


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("d_rope", [16, 32, 64])
def test_every_size_has_tiles(arch: int, d_rope: int) -> None:
    for d_c in D_C:
        assert unsupported(d_c, d_rope, torch.bfloat16, 100, arch) is None
        many = tiles(arch, d_c, d_rope, torch.bfloat16)
        assert tiles(arch, d_c, d_rope, torch.float16) == many
        few = tiles(arch, d_c, d_rope, torch.bfloat16, rows=12)
        assert min(64, many.BM) == few.BM or d_rope > 32


def test_reasons() -> None:
    half = torch.float16
    assert unsupported(192, 32, half) is None
    assert "steps of 16, not 200" in str(unsupported(200, 32, half))
    assert "from 64 to 512" in str(unsupported(528, 32, half))
    for odd in (0, 7, 66):
        assert f"even d_rope from 2 to 64, not {odd}" in str(unsupported(192, odd, half))
    assert "float16 and bfloat16 on a GPU, not in float32" in str(
        unsupported(192, 32, torch.float32)
    )
    assert unsupported(192, 32, torch.float32, arch=INTERPRETED) is None
    assert "at least one key" in str(unsupported(192, 32, half, keys=0))
    assert "not for sm_89" in str(unsupported(192, 32, half, arch=89))
    assert unsupported(192, 32, half, arch=103) is None
    assert "int8 cache of d_c = 192 and d_rope = 64" in str(
        unsupported(192, 64, half, arch=90, int8=True)
    )
    with pytest.raises(UserError, match="not for sm_75"):
        tiles(75, 192, 32, half)


def test_the_table_is_the_committed_sweep() -> None:
    result = read_result(FOLDER)
    assert result.provenance == "measured"
    assert any("nothing was run on a GPU" in note for note in result.run["notes"])
    rows = result.table.to_dict("records")
    found = {k: [(a, b, Tiles(*t)) for a, b, t in runs] for k, runs in ranges(rows).items()}
    assert found == table()
    picked = result.table[result.table.status == "picked"]
    assert (picked.spill_bytes == 0).all()
    assert (picked.shared_bytes <= picked.arch.map(SHARED_LIMIT)).all()
    assert (picked[picked.arch == 90].query("BM >= 64").hgmma > 0).all()
    for arch in ARCHES:
        sizes = picked[picked.kind == kind_of(arch, 32, False, False)].d_c
        assert set(sizes) == set(D_C)
