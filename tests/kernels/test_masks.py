"""Visibility as data: its views agree, windows keep what the rollout keeps, text says it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_study.config import WindowConfig
from mla_study.errors import UserError
from mla_study.kernels.masks import (
    Positions,
    Segment,
    Visibility,
    bidirectional,
    chunk_causal,
    chunks_of,
    step_of,
    teacher_forcing,
    window_frames,
)

WINDOWS = st.one_of(
    st.none(), st.sampled_from([WindowConfig(s, h, 1) for s in range(4) for h in range(6)])
)
POSITIONS = st.sampled_from(["absolute", "relative"])


KINDS = st.sampled_from(["bidirectional", "causal", "forcing"])
SIZES = {"chunks": st.integers(1, 4), "chunk": st.integers(1, 3)}


def rule_of(
    kind: str, chunks: int, chunk: int, window: WindowConfig | None, positions: Positions
) -> Visibility:
    if kind == "bidirectional":
        return bidirectional(chunks * chunk)
    make = chunk_causal if kind == "causal" else teacher_forcing
    return make(chunks * chunk, chunk, window, positions)


@given(kind=KINDS, window=WINDOWS, positions=POSITIONS, tokens=st.integers(1, 3), **SIZES)
def test_views_agree(
    kind: str, chunks: int, chunk: int, window: WindowConfig | None, positions: Positions,
    tokens: int,
) -> None:  # fmt: skip
    rule = rule_of(kind, chunks, chunk, window, positions)
    dense = rule.dense()
    wide = rule.tokens(tokens)
    assert wide.shape == (rule.frames * tokens, rule.frames * tokens)
    for q in range(0, wide.shape[0], 2):
        assert (wide[q] == dense[q // tokens].repeat(tokens)).all()
    lines = rule.text().splitlines()
    seen = np.array([[cell == "#" for cell in line.split()[2]] for line in lines])
    assert (seen == dense).all()
    for line, segment in zip(lines, [s for s in rule.segments for _ in s.queries], strict=True):
        keys = [tuple(map(int, word.split("@"))) for word in line.split()[3:]]
        assert keys == list(zip(segment.keys, segment.key_positions, strict=True))


@settings(max_examples=10)
@given(kind=KINDS, window=WINDOWS, positions=POSITIONS, **SIZES)
def test_flex_sees_the_same(
    kind: str, chunks: int, chunk: int, window: WindowConfig | None, positions: Positions
) -> None:
    rule = rule_of(kind, chunks, chunk, window, positions)
    tokens = 5
    mask = rule.block_mask(tokens)
    size = rule.frames * tokens
    q, k = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    zero = torch.zeros((), dtype=torch.int64)
    assert (mask.mask_mod(zero, zero, q, k).numpy() == rule.tokens(tokens)).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_dense_attention() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    rule = chunk_causal(6, 2, WindowConfig(1, 2, 2))
    tokens = 45  # 270 tokens: several blocks of 128, the last one part
    q, k, v = (torch.randn(1, 2, 6 * tokens, 16) for _ in range(3))
    mask = rule.block_mask(tokens)
    flexed = flex_attention(q, k, v, block_mask=mask)
    dense = F.scaled_dot_product_attention(q, k, v, torch.from_numpy(rule.tokens(tokens)))
    assert isinstance(flexed, torch.Tensor)
    assert (flexed - dense).abs().max() < 1e-5


@given(st.integers(0, 40), st.integers(0, 4), st.integers(0, 9))
def test_window_keeps_the_sink_and_the_latest(before: int, sink: int, history: int) -> None:
    kept = window_frames(before, sink, history)
    assert list(kept) == sorted(set(kept)) and all(0 <= f < before for f in kept)
    assert len(kept) == min(before, sink + history)
    assert set(range(min(sink, before))) <= set(kept)
    assert set(range(max(0, before - history), before)) <= set(kept)


@given(st.integers(1, 5), st.integers(1, 3), WINDOWS, POSITIONS)
def test_relative_positions_count_the_window(
    chunks: int, chunk: int, window: WindowConfig | None, positions: Positions
) -> None:
    rule = chunk_causal(chunks * chunk, chunk, window, positions)
    for segment in rule.segments:
        if positions == "relative":
            assert segment.key_positions == tuple(range(len(segment.keys)))
        else:
            assert segment.key_positions == segment.keys
        assert segment.query_positions == segment.key_positions[-chunk:]


def test_noisy_copies_see_what_the_rollout_sees() -> None:
    window = WindowConfig(1, 4, 2)
    for positions in ("absolute", "relative"):
        forcing = teacher_forcing(10, 2, window, positions)
        causal = chunk_causal(10, 2, window, positions)
        assert forcing.frame_times == (*range(10), *range(10))
        clean, noisy = forcing.segments[:5], forcing.segments[5:]
        assert clean == causal.segments
        for mine, theirs in zip(noisy, causal.segments, strict=True):
            assert mine.queries == tuple(10 + q for q in theirs.queries)
            assert mine.key_positions == theirs.key_positions
            assert mine.query_positions == theirs.query_positions
            # the chunk itself is the noisy copy, the past is clean
            assert mine.keys == (*theirs.keys[:-2], *mine.queries)


def test_a_step_of_the_rollout_is_a_segment_of_the_mask() -> None:
    rule = chunk_causal(8, 2, WindowConfig(1, 3, 2), "relative")
    held = [6, 0, 3, 7, 4, 5]  # a ring's order
    step = step_of((6, 7), held, "relative")
    at = dict(zip(rule.segments[3].keys, rule.segments[3].key_positions, strict=True))
    assert set(held) == set(at)
    assert step.key_positions == tuple(at[f] for f in held)
    assert step.query_positions == rule.segments[3].query_positions


def test_text_names_frames_and_positions() -> None:
    rule = chunk_causal(3, 1, WindowConfig(1, 0, 1), "relative")
    assert rule.text(["a", "bb", "c"]).splitlines() == [
        " a @0   #..  a@0",
        "bb @1   ##.  a@0 bb@1",
        " c @1   #.#  a@0 c@1",
    ]


def test_chunks() -> None:
    assert chunks_of(7, 3, first=1) == [(0,), (1, 2, 3), (4, 5, 6)]
    assert chunks_of(2, 3, first=2) == [(0, 1)]
    for frames, chunk, first in ((7, 3, None), (0, 1, None), (6, 3, 1), (2, 2, 4), (4, 0, None)):
        with pytest.raises(UserError):
            chunks_of(frames, chunk, first)


def test_segments_cover_every_frame_once() -> None:
    with pytest.raises(ValueError):
        Visibility(2, (Segment((0,), (0,), (0,), (0,)),))
