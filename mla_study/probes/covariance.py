"""Which second moment of a file belongs to which attention block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mla_study.checkpoints.formats.opening import open_container
from mla_study.checkpoints.operators.find import Attention
from mla_study.checkpoints.operators.roles import is_cross, match_weight, numbers
from mla_study.errors import UserError

_ROLES = ("kv_down", "k", "kv", "qkv", "v", "q", "q_down")  # whose input is the keys' input


def covariances_of(
    path: str, attentions: Sequence[Attention]
) -> dict[tuple[int, str], tuple[str, str]]:
    """For each block, by (layer, kind), the (file, key) of its inputs' second moment.

    Only the file's header is read. Cross-attention may lack one; self-attention may not.

    Raises:
        UserError: the file is unreadable, a block has no match, or a width differs.
    """
    container = open_container(path)
    try:
        shapes = {name: info.shape for name, info in container.tensors.items()}
    finally:
        container.close()
    chosen: dict[tuple[int, str], tuple[str, str]] = {}
    for attention in attentions:
        key = covariance_key(shapes, attention)
        if key is None:
            if attention.kind == "cross":
                continue
            some = ", ".join(list(shapes)[:4])
            raise UserError(
                f"{path} has no covariance for block {attention.block!r} (it has {some}): "
                "name its keys after the blocks or the projections"
            )
        role = "kv_down" if attention.latent else "k"
        n = attention.parts[role].n
        if shapes[key] != (n, n):
            raise UserError(
                f"{path}: {key!r} is {list(shapes[key])}, but block {attention.block!r} has "
                f"{n} inputs: collect it on that model"
            )
        chosen[attention.layer, attention.kind] = (path, key)
    return chosen


def covariance_key(held: Mapping[str, object] | Iterable[str], attention: Attention) -> str | None:
    """The key of a block's input covariance, or None.

    In this order: a projection's or the block's own name, one that ends or begins it at a dot, the
    layer's number (``3``, ``layers.3``), or the only key that names the same layer, kind of
    attention and a projection (the same model under another library's names).
    """
    keys = list(held)
    roles = ("kv_down",) if attention.latent else ("k", "v")
    if attention.kind == "self":
        roles += ("q_down",) if attention.latent else ("q",)
    stems = [
        attention.parts[r].tensor.removesuffix(".weight") for r in roles if r in attention.parts
    ]
    stems.append(attention.block)
    for stem in stems:
        if stem in keys:
            return stem
    for stem in stems:
        near = [k for k in keys if k.endswith("." + stem) or stem.endswith("." + k)]
        if len(near) == 1:
            return near[0]
    layer = attention.layer
    if attention.kind == "self":
        for key in (str(layer), *(f"{w}{s}{layer}" for w in _LAYER_WORDS for s in "._")):
            if key in keys:
                return key
    cross = attention.kind == "cross"
    alike = [k for k in keys if numbers(k) == (layer,) and is_cross(k) == cross]
    for role in _ROLES[: 5 if cross else len(_ROLES)]:
        matching = [k for k in alike if (found := match_weight(k)) and found.role == role]
        if len(matching) == 1:
            return matching[0]
    return None


_LAYER_WORDS = ("layer", "layers", "block", "blocks", "h", "blk")
