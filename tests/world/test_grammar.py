"""Captions: what is read, what is refused, and what a seed draws."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_study.config import mini
from mla_study.errors import UserError
from mla_study.world.grammar import (
    GRAMMAR,
    SLOTS,
    TOKENS,
    Caption,
    all_captions,
    caption_of,
    parse_caption,
    sample_captions,
    tokens,
)
from mla_study.world.text import CaptionEncoder

EXAMPLE = "fast red square moving right middle center on stripes"


def test_the_example_says_what_it_says() -> None:
    assert parse_caption(EXAMPLE) == Caption(
        "fast", "red", "square", "right", "middle", "center", "stripes"
    )


def test_every_caption_is_read_back() -> None:
    known = all_captions()
    assert len(known) == 2 * 6 * 4 * 4 * 3 * 3 * 3 == len(set(map(str, known)))
    assert all(parse_caption(caption_of(caption)) == caption for caption in known)


def test_case_spaces_and_a_full_stop_do_not_matter() -> None:
    assert parse_caption(f"  {EXAMPLE.upper().replace(' ', '   ')}. ") == parse_caption(EXAMPLE)


@pytest.mark.parametrize(
    ("given_text", "suggested"),
    [
        ("fats red sqare moving rigth midle centre on stripe", EXAMPLE),
        ("fast red square right middle center stripes", EXAMPLE),
        ("", "slow red square moving left top left-side on night"),
        ("xyzzy zzz", "slow red square moving left top left-side on night"),
    ],
)
def test_a_text_outside_the_grammar_is_refused_with_the_grammar_and_a_suggestion(
    given_text: str, suggested: str
) -> None:
    with pytest.raises(UserError, match=re.escape(suggested)) as refused:
        parse_caption(given_text)
    assert GRAMMAR in str(refused.value) and "\n" not in str(refused.value)


@given(st.text(max_size=80))
def test_random_text_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="nearest caption"):
        parse_caption(text)


def test_a_caption_of_unknown_words_cannot_be_made() -> None:
    with pytest.raises(UserError, match="no colour of the world: give red, green"):
        Caption("fast", "pink", "square", "right", "middle", "center", "stripes")


def test_a_seed_draws_the_same_captions_and_reaches_every_word(seed: int) -> None:
    drawn = sample_captions(400, seed)
    assert drawn == sample_captions(400, seed) != sample_captions(400, seed, 1)
    for slot, words in SLOTS.items():
        assert {getattr(caption, slot) for caption in drawn} == set(words)
    assert sample_captions(0, seed) == []


def test_the_draw_is_the_same_on_every_machine() -> None:
    assert [all_captions().index(c) for c in sample_captions(4, 7)] == [4157, 901, 258, 1905]


def test_a_negative_seed_or_count_is_refused() -> None:
    with pytest.raises(UserError, match="seed of -1"):
        sample_captions(1, -1)
    with pytest.raises(UserError, match="-2 captions"):
        sample_captions(-2, 0)


def test_each_caption_has_eight_words_of_its_own() -> None:
    told = [tuple(tokens(caption)) for caption in all_captions()]
    assert len(told) == len(set(told)) == 5184 and {len(words) for words in told} == {TOKENS}
    known = [*(word for words in SLOTS.values() for word in words), "moving"]
    assert len(known) == len(set(known)) and set[str]().union(*told) == set(known)


def test_the_encoder_tells_the_background_too() -> None:
    encode = CaptionEncoder.of(mini())
    told = encode([EXAMPLE, EXAMPLE.replace("stripes", "night"), ""])
    assert told.shape == (3, 8, 96)
    assert (told[0, :7] == told[1, :7]).all() and (told[0, 7] != told[1, 7]).any()
    assert (told[2] == 0).all() and (told[0].norm(dim=1) > 0).all()


def test_the_encoder_refuses_what_it_cannot_tell() -> None:
    import dataclasses

    with pytest.raises(UserError, match="nearest caption"):
        CaptionEncoder.of(mini())(["a cat"])
    with pytest.raises(UserError, match="needs 8"):
        CaptionEncoder.of(dataclasses.replace(mini(), text_len=7))
