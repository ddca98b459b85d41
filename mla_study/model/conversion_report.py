"""What a conversion to latent attention changes in a layer, on the same inputs.

Shapes: B samples, T tokens, M sampled queries, H heads, D head channels, d width.
Logits count up to a constant a query (softmax does not see it); outputs are those of the whole
layer without its constant bias. Errors are relative: |difference| / |dense|, Frobenius norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mla_study.config import LatentConfig, ModelConfig
from mla_study.model.attention import LatentSelfAttention
from mla_study.model.dense_layer import DenseAttention, Projection
from mla_study.model.latent_init import (
    LayerConversion,
    absorb,
    content_channels,
    rotary_channels,
)
from mla_study.model.layers import RMSNorm
from mla_study.model.rope import RotaryEmbedding, Rotation
from mla_study.probes.spectrum import (
    effective_rank,
    effective_rank_interpolated,
    factored_singular_values,
    singular_values,
)

DECISIONS = ("qk_norm", "band", "shared_key", "kv_rank", "q_rank", "latent_norm")
"""In the order of :mod:`~mla_study.model.latent_init`; the last gives the latent layer itself."""

QUERIES = 64


@dataclass(frozen=True)
class Errors:
    """Relative errors of centred logits and of the layer's output."""

    logits: float
    output: float


@dataclass(frozen=True)
class Heads:
    """Rotated queries of M tokens, rotated keys and values of T tokens, head by head."""

    q: Float[Tensor, "B M H D"]
    k: Float[Tensor, "B T H D"]
    v: Float[Tensor, "B T H Dv"]


class Probe:
    """One dense layer on some of its inputs: the reference that conversions are compared with.

    Args:
        dense: the layer.
        tokens: attention inputs [B, T, d]; arithmetic is in their dtype.
        config: the dense model's.
        grid: frames, height and width of the T tokens.
    """

    def __init__(
        self,
        dense: DenseAttention,
        tokens: Float[Tensor, "B T d"],
        config: ModelConfig,
        grid: tuple[int, int, int],
    ) -> None:
        self.dense, self.tokens, self.config, self.grid = dense, tokens, config, grid
        total = tokens.shape[1]
        self.some = torch.arange(min(QUERIES, total)) * total // min(QUERIES, total)

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """Centred logits [B, H, M, T] and outputs [B, M, d] of the dense layer."""
        q = _rms_norm(self._q, self.dense.norm_q, self.dense.eps)
        k = _rms_norm(self._k, self.dense.norm_k, self.dense.eps)
        turn = self._rotation(None)
        return self._attend(
            Heads(self._turn(turn, self._heads(q), True), self._turn(turn, self._heads(k)), self._v)
        )

    def steps(self, conversion: LayerConversion, stored: Mapping[str, Tensor]) -> dict[str, Errors]:
        """Errors after each decision, all those before it applied."""
        return {
            name: self._errors(heads)
            for name, heads in zip(DECISIONS, self._ladder(conversion, stored), strict=True)
        }

    def final(self, latent: LatentConfig, stored: Mapping[str, Tensor]) -> Errors:
        """Errors of the latent layer with these tensors."""
        return self._errors(self._latent(latent, stored))

    def _errors(self, heads: Heads) -> Errors:
        logits, output = self._attend(heads)
        return Errors(_relative(logits, self.reference[0]), _relative(output, self.reference[1]))

    def _ladder(self, conversion: LayerConversion, stored: Mapping[str, Tensor]) -> list[Heads]:
        latent = conversion.latent
        head_dim, pairs = self.config.head_dim, latent.rope_pairs
        q = self._heads(self._q * self._like(conversion.fold_q))
        fold_k = self._like(conversion.fold_k)
        k = self._heads(self._k * fold_k)
        full, kept = self._rotation(None), self._rotation(pairs)
        steps = [Heads(self._turn(full, q, True), self._turn(full, k), self._v)]

        rotary, content = (
            torch.from_numpy(f(head_dim, pairs)) for f in (rotary_channels, content_channels)
        )
        k_nope = (k - (fold_k * self._like(self.dense.k.bias)).unflatten(0, k.shape[2:]))[
            ..., content
        ]
        q_nope = q[:, self.some][..., content]
        q_rope, k_rope = self._turn(kept, q[..., rotary], True), self._turn(kept, k[..., rotary])
        steps.append(Heads(_cat(q_nope, q_rope), _cat(k_nope, k_rope), self._v))

        k_rope = self._turn(
            kept, F.linear(self.tokens, stored["k_rope.weight"], stored["k_rope.bias"])[:, :, None]
        ).expand(*k_rope.shape)
        q_rope = self._turn(kept, self._absorbed(conversion, latent), True)
        steps.append(Heads(_cat(q_nope, q_rope), _cat(k_nope, k_rope), self._v))

        c = F.linear(self.tokens, stored["kv_down.weight"])
        k_nope, v = (self._heads(F.linear(c, stored[f"{n}_up.weight"])) for n in "kv")
        steps.append(Heads(_cat(q_nope, q_rope), _cat(k_nope, k_rope), v))

        c = F.linear(self.tokens, stored["q_down.weight"])
        q_nope = self._heads(F.linear(c[:, self.some], stored["q_up.weight"], stored["q_up.bias"]))
        q_rope = self._heads(F.linear(c, stored["q_rope.weight"], stored["q_rope.bias"]))
        steps.append(Heads(_cat(q_nope, self._turn(kept, q_rope, True)), steps[-1].k, v))
        return [*steps, self._latent(latent, stored)]

    def _absorbed(self, conversion: LayerConversion, latent: LatentConfig) -> Tensor:
        rows = self.dense.channels(rotary_channels(self.config.head_dim, latent.rope_pairs))
        map_ = absorb(self.dense.q.rows(rows, conversion.fold_q), conversion.shared.u)
        return self._heads(self._project(map_))

    def _latent(self, latent: LatentConfig, stored: Mapping[str, Tensor]) -> Heads:
        module = latent_module(self.config, latent, stored)
        kept = self._rotation(latent.rope_pairs)
        with torch.no_grad():
            nope, rope = module.query(self.tokens)
            c, shared = module.entry(self.tokens)
        k_nope, v = (self._heads(F.linear(c, stored[f"{n}_up.weight"])) for n in "kv")
        shared = self._turn(kept, shared[:, :, None]).expand(-1, -1, k_nope.shape[2], -1)
        q = _cat(nope[:, self.some], self._turn(kept, rope, True))
        return Heads(q, _cat(k_nope, shared), v)

    def _attend(self, heads: Heads) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (heads.q, heads.k, heads.v))
        logits = q @ k.transpose(-1, -2) * self.config.head_dim**-0.5
        logits = logits - logits.mean(-1, keepdim=True)
        out = (torch.softmax(logits, -1) @ v).transpose(1, 2).flatten(2)
        return logits, F.linear(out, self._like(self.dense.o.weight))

    def _turn(self, rotation: Rotation, x: Tensor, queries: bool = False) -> Tensor:
        """Rotated; of queries only the sampled tokens."""
        turned = rotation.apply(x)
        return turned[:, self.some] if queries else turned

    def _rotation(self, kept: tuple[int, int, int] | None) -> Rotation:
        rope = RotaryEmbedding(self.config.head_dim, self.config.rope_base, kept)
        frames, height, width = self.grid
        return rope.table(range(frames), height, width, self.tokens.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.dense.heads, x.shape[-1] // self.dense.heads))

    def _like(self, x: np.ndarray) -> Tensor:
        return torch.as_tensor(x, dtype=self.tokens.dtype)

    def _project(self, map_: Projection) -> Tensor:
        return F.linear(self.tokens, self._like(map_.weight), self._like(map_.bias))

    @cached_property
    def _q(self) -> Tensor:
        return self._project(self.dense.q)

    @cached_property
    def _k(self) -> Tensor:
        return self._project(self.dense.k)

    @cached_property
    def _v(self) -> Tensor:
        return self._heads(F.linear(self.tokens, self._like(self.dense.v.weight)))


def latent_module(
    config: ModelConfig, latent: LatentConfig, stored: Mapping[str, Tensor]
) -> LatentSelfAttention:
    """The module with these tensors, without copying them."""
    with torch.device("meta"):
        module = LatentSelfAttention(config, latent)
    module.load_state_dict(dict(stored), assign=True)
    return module.requires_grad_(False)


def ranks(dense: DenseAttention, stored: Mapping[str, Tensor]) -> dict[str, float]:
    """r_.99 of [W_K; W_V] (raw gauge) and of the composed operator that takes its place."""
    # Energies do not see the tail that a Gram blurs.
    sigma, _ = singular_values([dense.k.weight, dense.v.weight], tail_ratio=0.0)
    gain = stored["kv_norm.weight"].double()
    up = torch.cat([stored["k_up.weight"], stored["v_up.weight"]]).double() * gain
    after = factored_singular_values(up.numpy(), stored["kv_down.weight"].double().numpy())
    out: dict[str, float] = {}
    for name, s in (("before", sigma), ("after", after)):
        out[f"r_0.99_{name}"] = float(effective_rank(s, 0.99))
        out[f"r_0.99_interp_{name}"] = effective_rank_interpolated(s, 0.99)
    return out


def _rms_norm(x: Tensor, gain: np.ndarray, eps: float) -> Tensor:
    norm = RMSNorm(x.shape[-1], eps)
    norm.weight.data = torch.as_tensor(gain, dtype=x.dtype)
    with torch.no_grad():
        return norm(x)


def _cat(nope: Tensor, rope: Tensor) -> Tensor:
    return torch.cat([nope, rope], dim=-1)


def _relative(x: Tensor, reference: Tensor) -> float:
    size = float(reference.double().norm())
    gap = float((x - reference).double().norm())
    return gap / size if size > 0 else (0.0 if gap == 0 else float("inf"))
