"""What storing cache entries in fewer bits costs, measured on a model's own activations.

Shapes: B batch, F latent frames, T tokens a frame, L = F T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
from torch import Tensor

from mla_study.config import ModelConfig, WindowConfig
from mla_study.kernels.masks import Positions, chunk_causal
from mla_study.model.attention import Piece, SelfAttention
from mla_study.model.cache import RollingCache, layout_of
from mla_study.model.storage import Storage, stored
from mla_study.model.transformer import Block, WanTransformer

STORAGES: tuple[Storage, ...] = get_args(Storage)
PARTS = ("first", "second", "output")


@dataclass(frozen=True)
class StorageError:
    """Relative RMS errors of one storage, over all layers; ``worst`` is the largest of a layer.

    ``exact`` compares with the entries as the layer computed them, ``bf16`` with a bf16 cache.
    Keys: first and second tensor of an entry (c_kv and k_r, or k and v), attention output.
    """

    storage: str
    bytes_per_token_layer: float
    of_dense_bf16: float
    exact: dict[str, float]
    bf16: dict[str, float]
    worst: dict[str, float]


@dataclass
class _Sums:
    """Squared errors and norms, a pair a layer."""

    exact: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {part: [] for part in PARTS}
    )
    bf16: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {part: [] for part in PARTS}
    )


def entry_names(config: ModelConfig) -> tuple[str, str]:
    """What the two tensors of a cache entry are called."""
    return ("k", "v") if config.latent is None else ("c_kv", "k_r")


def storage_errors(
    model: WanTransformer,
    x: Tensor,
    t: Tensor,
    text: Tensor,
    window: WindowConfig | None = None,
    positions: Positions | None = None,
    storages: Sequence[Storage] = STORAGES,
) -> list[StorageError]:
    """Errors of cached entries and of the attention that reads them, in one chunk-causal pass.

    Each layer gets the exact input; errors do not add up over layers.

    Args:
        x: latents [B, C, F, height, width], whole chunks of the window.
        t: timesteps [B]; a rollout writes its entries at 0.
        text: text embeddings [B, T, text_dim].
        window, positions: default: the model's; relative for latent attention.

    Raises:
        UserError: frames that do not fill whole chunks, or latents that do not fit the model.
    """
    window = window or model.config.window
    positions = positions or ("absolute" if model.config.latent is None else "relative")
    frames = x.shape[2]
    rule = chunk_causal(frames, window.chunk, window, positions)
    sums: dict[Storage, _Sums] = {storage: _Sums() for storage in storages}

    def measure(module: Any, given: tuple[Any, ...]) -> None:
        y, pieces = given[0], given[1]
        _measure(cast(SelfAttention, module), y, pieces, frames, sums)

    attentions = [cast(Block, block).self_attn for block in model.blocks]
    handles = [attention.register_forward_pre_hook(measure) for attention in attentions]
    try:
        with torch.no_grad():
            model(x, t, model.condition(text), rule)
    finally:
        for handle in handles:
            handle.remove()
    return [_error(model.config, storage, sums[storage]) for storage in storages]


def _measure(
    module: SelfAttention,
    y: Tensor,
    pieces: Sequence[Piece],
    frames: int,
    sums: dict[Storage, _Sums],
) -> None:
    query, entry = module.query(y), module.entry(y)

    def seen(storage: Storage | None) -> tuple[Tensor, ...]:
        held = entry
        if storage is not None:
            framed = (e.unflatten(1, (frames, -1)) for e in entry)
            first, second = (stored(e, storage).flatten(1, 2) for e in framed)
            held = (first, second)
        return (*held, module.attend(query, held, pieces))

    truth, half = seen(None), seen("bf16")
    for storage, total in sums.items():
        mine = half if storage == "bf16" else seen(storage)
        for part, a, b, c in zip(PARTS, mine, truth, half, strict=True):
            total.exact[part].append(_squares(a, b))
            total.bf16[part].append(_squares(a, c))


def _squares(mine: Tensor, reference: Tensor) -> tuple[float, float]:
    gap = (mine.double() - reference.double()).square().sum().item()
    return gap, reference.double().square().sum().item()


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    norm = sum(b for _, b in pairs)
    return (sum(a for a, _ in pairs) / norm) ** 0.5 if norm else 0.0


def _error(config: ModelConfig, storage: Storage, sums: _Sums) -> StorageError:
    rows, columns = (s // p for s, p in zip(config.latent_size, config.patch[1:], strict=True))
    one = RollingCache(config, WindowConfig(0, 0, 1), 1, rows * columns, storage)
    dense = 2 * 2 * config.width  # k and v of all heads, two bytes each
    return StorageError(
        storage,
        one.bytes_per_token_layer,
        one.bytes_per_token_layer / dense,
        {part: _ratio(pairs) for part, pairs in sums.exact.items()},
        {part: _ratio(pairs) for part, pairs in sums.bf16.items()},
        {part: max(_ratio([p]) for p in pairs) for part, pairs in sums.exact.items()},
    )


def storage_table(config: ModelConfig, errors: Sequence[StorageError]) -> str:
    """The errors as text, a line a storage."""
    first, second = entry_names(config)
    names = (first, second, "output")
    titles = [*names, *(f"{name}|bf16" for name in names), "worst output"]
    lines = [f"{'storage':<13} {'bytes':>7} {'of dense':>9}" + "".join(f" {t:>12}" for t in titles)]
    for e in errors:
        values = [*e.exact.values(), *e.bf16.values(), e.worst["output"]]
        cells = "".join(f" {value:>12.2e}" for value in values)
        lines.append(
            f"{e.storage:<13} {e.bytes_per_token_layer:>7.4g} {e.of_dense_bf16:>9.4f}{cells}"
        )
    lines.append(
        f"relative RMS errors over all layers; bytes a token a layer ({layout_of(config).scalars} "
        "scalars), of a dense bf16 cache; |bf16: against entries kept in bf16"
    )
    return "\n".join(lines)
