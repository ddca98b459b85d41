"""Names of a Wan transformer's tensors: one table, read both ways, original Wan <-> diffusers.

A name is ``blocks.N.`` (or nothing), a module and a leaf (``weight``, ``bias``, and what fp8 files
put beside them). In diffusers' blocks ``norm2`` is the original ``norm3``, the norm before
cross-attention; the other two block norms have no parameters. Latent self-attention has names of
its own and no counterpart in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

Naming = Literal["original", "diffusers"]

_MODEL = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_BLOCK = {
    **{f"self_attn.{name}": f"attn1.{other}" for name, other in _ATTENTION.items()},
    **{f"cross_attn.{name}": f"attn2.{other}" for name, other in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_PARAMETERS = {"head.modulation", "modulation", "scale_shift_table"}  # no leaf follows
_IN_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)", re.DOTALL)
_ONLY_DIFFUSERS = re.compile(r"^condition_embedder\.|\.attn[12]\.|^proj_out\.")
_ONLY_ORIGINAL = re.compile(r"^(?:text|time)_embedding\.|\.(?:self|cross)_attn\.|^head\.")
_LATENT = re.compile(r"\.self_attn\.kv_down\.")

# Tensors beside the weights: scales of fp8 files, and a norm that old conversions left behind.
AUXILIARY = re.compile(
    r"(?:^|\.)(?:weight_scale_inv|weight_scale|scale_weight|scale_input|input_scale|scaled_fp8)$"
    r"|\.norm_added_q\.weight$"
)


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {other: name for name, other in table.items()}


_TABLES = {
    "diffusers": (_MODEL, _BLOCK),
    "original": (_inverse(_MODEL), _inverse(_BLOCK)),
}


def translate(name: str, to: Naming) -> str | None:
    """A tensor's name in the other naming, or None where it has no counterpart.

    Args:
        name: a name in the naming that ``to`` is not, without wrappers' prefixes.
        to: the naming wanted.
    """
    whole, inside = _TABLES[to]
    match = _IN_BLOCK.fullmatch(name)
    prefix, rest = (match[1], match[2]) if match else ("", name)
    table = inside if match else whole
    if rest in _PARAMETERS:
        return prefix + table[rest] if rest in table else None
    stem, dot, leaf = rest.rpartition(".")
    if stem in _PARAMETERS or stem not in table:
        return None
    return f"{prefix}{table[stem]}{dot}{leaf}"


def to_diffusers(name: str) -> str | None:
    """diffusers' name of a tensor in original Wan names; None where it has none."""
    return translate(name, "diffusers")


def to_original(name: str) -> str | None:
    """Original Wan's name of a tensor in diffusers' names; None where it has none."""
    return translate(name, "original")


def naming_of(names: Iterable[str]) -> Naming | None:
    """Which naming a bag of names is in (without wrappers' prefixes); None: neither."""
    votes = {"original": 0, "diffusers": 0}
    for name in names:
        votes["diffusers"] += _ONLY_DIFFUSERS.search(name) is not None
        votes["original"] += _ONLY_ORIGINAL.search(name) is not None
    if not any(votes.values()):
        return None
    return "diffusers" if votes["diffusers"] > votes["original"] else "original"


def is_latent(names: Iterable[str]) -> bool:
    """Whether self-attention is latent (original naming)."""
    return any(_LATENT.search(name) for name in names)
