"""Which layer a block is, and which blocks are missing.

Blocks whose paths differ in numbers only are a stack (``blocks.*.self_attn``). One stack of a kind
keeps the numbers that its names carry. Several (encoder and decoder, double and single blocks)
follow each other, so that a layer's number is unique in its kind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mla_study.checkpoints.operators.blocks import Attention, Found, Kind
from mla_study.checkpoints.operators.config_facts import ConfigFacts, checked_layers
from mla_study.checkpoints.operators.roles import numbers, template

# what comes after the main stack, however it is called; the main stack keeps its numbers
_RANKS = (
    (r"(?:^|[._])decoder(?=[._]|$)|(?:^|[._])single_", 1),
    (r"vace|refiner|injector|adapter|resampler|perceiver|pooler|mtp|(?:^|[._])head|controlnet", 2),
    (r"vision|visual|image_encoder|audio|(?:^|[._])vae|first_stage|cond_stage|text_encoder"
     r"|conditioner|critic|teacher|discriminator|(?:real|fake)_score|(?:^|[._])\w*ema[._]", 3),
)  # fmt: skip
_RANKED = tuple((re.compile(pattern, re.IGNORECASE), rank) for pattern, rank in _RANKS)


@dataclass
class _Stack:
    """Blocks of one template; ``indices`` are their numbers where one number tells them apart."""

    path: str
    column: int
    attentions: list[Attention]
    indices: list[int] | None

    @property
    def rank(self) -> int:
        return max((rank for pattern, rank in _RANKED if pattern.search(self.path)), default=0)

    def name(self, index: int) -> str:
        """Path of the block of a number."""
        parts = self.attentions[0].block
        own = [str(n) for n in numbers(parts)]
        own[self.column] = str(index)
        pieces = self.path.split("*")
        return "".join(a + b for a, b in zip(pieces, [*own, ""], strict=False))


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sorting key under which ``blocks.10`` follows ``blocks.9``."""
    parts = re.split(r"([0-9]{1,18})", text)
    return tuple((1, int(p), "") if i % 2 else (0, 0, p) for i, p in enumerate(parts))


def _stacks(group: Sequence[Attention]) -> list[_Stack]:
    by_path: dict[str, list[Attention]] = {}
    for attention in group:
        by_path.setdefault(template(attention.block), []).append(attention)
    stacks: list[_Stack] = []
    for path, members in by_path.items():
        paths = [numbers(a.block) for a in members]
        columns = range(len(paths[0]))
        column = next((c for c in columns if len({p[c] for p in paths}) == len(paths)), None)
        indices = None if column is None else [p[column] for p in paths]
        stacks.append(_Stack(path, column or 0, members, indices))
    stacks = _merged(stacks)
    return sorted(stacks, key=lambda s: (s.indices is None and len(s.attentions) == 1, s.rank,
                                         natural(s.path)))  # fmt: skip


def _merged(stacks: list[_Stack]) -> list[_Stack]:
    """Stacks of one list of layers, of which some are called otherwise, as one."""
    kept: list[_Stack] = []
    by_root: dict[str, _Stack] = {}
    for stack in stacks:
        root = stack.path.split("*")[0]
        other = by_root.get(root)
        if stack.indices is None or stack.column:
            kept.append(stack)
        elif other is None or set(other.indices or ()) & set(stack.indices):
            by_root.setdefault(root, stack)
            kept.append(stack)
        else:
            other.attentions += stack.attentions
            other.indices = [*(other.indices or ()), *stack.indices]
    return kept


def _expected(
    stack: _Stack, facts: ConfigFacts, given: int | None, main: bool
) -> frozenset[int] | None:
    """Numbers that a stack should have, None where nothing says it.

    What config or ``--layers`` say holds for the main stack; what they say of another (a decoder
    beside its encoder) holds where that is as good as complete.
    """
    if stack.indices is None:
        return None
    own = facts.of_block(stack.attentions[0].block)
    count = given or own.layers
    if count is None:
        return None
    if not main:
        nearly = 2 * len(stack.indices) > count > max(stack.indices)
        if not nearly or (own is facts and not given):
            return None
    if own.attention_layers and given is None and max(own.attention_layers) < count:
        return own.attention_layers
    return frozenset(range(count))


def number_layers(
    found: Found, facts: ConfigFacts, given: int | None = None, config: str = "the config"
) -> None:
    """Give each block its layer, and name the missing ones where config or ``--layers`` tells.

    Args:
        found: its attentions are numbered and sorted, its missing layers filled in.
        facts: what the config says.
        given: ``--layers``.
        config: what to call the config in an error.

    Raises:
        UserError: a number of layers that no model has.
    """
    checked_layers(given, "--layers")
    for one in (facts, *(part for _, part in facts.parts)):
        if given is None:
            checked_layers(one.layers, config)
    found.expected_layers = given or facts.layers
    result: list[Attention] = []
    missing: set[int | str] = set()
    kinds: tuple[Kind, ...] = ("self", "cross")
    checked: set[Kind] = {"self", "cross"} if facts.has_cross else {"self"}
    if all(a.kind == "cross" for a in found.attentions):
        checked = {"cross"}
    for kind in kinds:
        stacks = _stacks([a for a in found.attentions if a.kind == kind])
        lacking: set[int | str] = set()
        if len(stacks) == 1 and stacks[0].indices is not None:
            stack, own = stacks[0], stacks[0].indices
            result += [replace(a, layer=i) for a, i in zip(stack.attentions, own, strict=True)]
            gone = (_expected(stack, facts, given, True) or frozenset()) - set(own)
            # the number alone means the whole layer
            plain = kind == "self" or "self" not in checked
            lacking |= {i if plain or i in missing else stack.name(i) for i in gone}
        else:
            result += _several(stacks, facts, given, lacking)
        if kind in checked:
            missing |= lacking
    if not facts.has_cross:  # a layer may have the one kind or the other
        missing -= _elsewhere(found, missing)
    found.attentions = sorted(result, key=lambda a: (a.layer, a.kind == "cross"))
    found.missing_layers = sorted(missing, key=lambda m: natural(str(m)))


def _elsewhere(found: Found, missing: set[int | str]) -> set[int | str]:
    """Of the missing self-attentions those whose layer has a cross-attention instead."""
    stacks = _stacks([a for a in found.attentions if a.kind == "cross"])
    if len(stacks) != 1 or stacks[0].indices is None:
        return set()
    have, root = set(stacks[0].indices), stacks[0].path.split("*")[0]
    return {m for m in missing if (m if isinstance(m, int) else _index(m, root)) in have}


def _index(path: str, root: str) -> int | None:
    """The number behind ``root`` in a path."""
    found = re.match(r"[0-9]+", path[len(root) :]) if path.startswith(root) else None
    return int(found[0]) if found else None


def _several(
    stacks: list[_Stack], facts: ConfigFacts, given: int | None, lacking: set[int | str]
) -> list[Attention]:
    """Stack after stack; in natural order where a stack's numbers are no layers of their own."""
    flat = [a for stack in stacks for a in stack.attentions]
    candidates = [s for s in stacks if s.rank < 2 and s.indices is not None]
    main = max(candidates, key=lambda s: len(s.attentions), default=None)
    sizes: list[int | None] = []
    for stack in stacks:
        own = set(stack.indices or ())
        expected = None
        if given != len(flat):
            expected = _expected(stack, facts, given, stack is main)
        if expected:
            lacking.update(stack.name(i) for i in expected - own)
            sizes.append(max(max(expected), max(own)) + 1)
        else:
            whole = stack.indices is None or own == set(range(len(own)))
            sizes.append(len(stack.attentions) if whole else None)
    if given and 0 < len(flat) < given and not lacking:
        lacking.add(f"{given - len(flat)} of {given} (the names carry no single number)")
    result: list[Attention] = []
    offset = 0
    for stack, size in zip(stacks, sizes, strict=True):
        if size is None:
            return [replace(a, layer=i) for i, a in enumerate(flat)]
        places = stack.indices or range(len(stack.attentions))
        result += [
            replace(a, layer=offset + i) for a, i in zip(stack.attentions, places, strict=True)
        ]
        offset += size
    return result
