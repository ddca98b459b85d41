"""Self-attention, dense as in Wan or latent as in VideoMLA, and Wan's cross-attention.

Shapes: B batch, L tokens, M query tokens, K key tokens, H heads, D head channels, d width.
A self-attention module splits into ``query`` (never cached), ``entry`` (what a cache keeps of a
token: unrotated keys and values, or the latent and the shared rotary key) and ``mix``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mla_study.config import LatentConfig, ModelConfig
from mla_study.kernels.latent_attention import FORMS, attend_expanded, expanded
from mla_study.kernels.latent_attention.calibrations import find
from mla_study.kernels.latent_attention.dispatch import choose
from mla_study.model.layers import RMSNorm
from mla_study.model.rope import Rotation
from mla_study.model.storage import NAMES

Entry = tuple[Tensor, Tensor]
Query = tuple[Tensor, ...]


@dataclass(frozen=True)
class Piece:
    """One segment in tokens: which queries see which keys, with both rotations ready."""

    queries: tuple[slice, ...] | None  # None: all
    keys: tuple[slice, ...] | None
    query_rotation: Rotation
    key_rotation: Rotation


@runtime_checkable
class LayerStep(Protocol):
    """One pass of one layer over a cache."""

    def extend(self, entry: Entry) -> Entry:
        """Record the entries of this pass; those of past and present, in slot order."""
        ...


@runtime_checkable
class RingStep(LayerStep, Protocol):
    """A pass over a ring that is written in place: what it holds of the past stays as it is."""

    @property
    def held(self) -> list[Entry]:
        """What a layer keeps while the past is the same: emptied when it changes."""
        ...

    @property
    def fresh(self) -> tuple[slice, ...]:
        """Tokens of the chunk among those that :meth:`extend` returns."""
        ...


@runtime_checkable
class LayerMemory(Protocol):
    """What a cache offers one layer."""

    @property
    def frames(self) -> Sequence[int]:
        """Ids of the frames that the next pass is about."""
        ...

    def step(self) -> LayerStep:
        """Begin a pass."""
        ...


def _take(x: Tensor, where: tuple[slice, ...] | None) -> Tensor:
    if where is None:
        return x
    return x[:, where[0]] if len(where) == 1 else torch.cat([x[:, s] for s in where], dim=1)


class SelfAttention(nn.Module):
    """What dense and latent self-attention share: project, join the past, attend piece by piece."""

    o: nn.Linear

    @abstractmethod
    def query(self, x: Tensor) -> Query:
        """Queries of tokens x [B, M, d], unrotated."""

    @abstractmethod
    def entry(self, x: Tensor) -> Entry:
        """What the cache keeps of tokens x [B, L, d], unrotated."""

    @abstractmethod
    def mix(self, query: Query, entry: Entry, turn_q: Rotation, turn_k: Rotation) -> Tensor:
        """Attention of rotated queries and keys, heads joined [B, M, d]."""

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        pieces: Sequence[Piece],
        memory: LayerStep | None = None,
    ) -> Float[Tensor, "B L d"]:
        """Attend; with ``memory`` the keys of the pieces index past and present together."""
        query, entry = self.query(x), self.entry(x)
        if memory is not None:
            entry = memory.extend(entry)
        return self.o(self.attend(query, entry, pieces))

    def attend(self, query: Query, entry: Entry, pieces: Sequence[Piece]) -> Tensor:
        """Attention of all pieces, before the output projection [B, M, d]."""
        outs: list[Tensor] = []
        for piece in pieces:
            mine = tuple(_take(part, piece.queries) for part in query)
            seen = (_take(entry[0], piece.keys), _take(entry[1], piece.keys))
            outs.append(self.mix(mine, seen, piece.query_rotation, piece.key_rotation))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


class DenseSelfAttention(SelfAttention):
    """Wan's own: biases, RMSNorm over all channels of q and of k before the head split."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d, config.eps), RMSNorm(d, config.eps)

    def query(self, x: Tensor) -> Query:
        """q [B, M, H, D]."""
        return (self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1)),)

    def entry(self, x: Tensor) -> Entry:
        """k and v [B, L, H, D]."""
        k = self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1))
        return k, self.v(x).unflatten(-1, (self.heads, -1))

    def mix(self, query: Query, entry: Entry, turn_q: Rotation, turn_k: Rotation) -> Tensor:
        """softmax(R q . R k / sqrt(D)) v."""
        q, k = turn_q.apply(query[0]), turn_k.apply(entry[0])
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), entry[1].to(k.dtype).transpose(1, 2)
        )
        return out.transpose(1, 2).flatten(2)


class LatentSelfAttention(SelfAttention):
    """VideoMLA's: one shared latent and one shared rotary key a token (see ``method``).

    With ``bias`` the query projections and the rotary key carry biases, which a conversion from Wan
    needs (a bias of k_nope would cancel in the softmax, and that of v moves into ``o``).

    Attributes:
        form: one of :data:`~mla_study.kernels.latent_attention.FORMS`, or ``auto``, which takes
            the form that :mod:`~mla_study.kernels.latent_attention.dispatch` finds fastest.
        head_group: heads that ``reconstruct`` expands at a time.
        keep_expanded: hold the expanded keys and values over the passes of a chunk, which is the
            memory of a dense cache again, and goes with the cache; only where a ring is read
            without gradients.
    """

    def __init__(self, config: ModelConfig, latent: LatentConfig, bias: bool = True) -> None:
        super().__init__()
        d, h = config.width, config.heads
        self.heads, self.d_nope, self.d_rope = h, latent.d_nope, latent.d_rope
        self.form = "auto"
        self.head_group: int | None = None
        self.keep_expanded = False
        self.kv_down = nn.Linear(d, latent.d_c, bias=False)
        self.kv_norm = RMSNorm(latent.d_c, config.eps)
        self.k_rope = nn.Linear(d, latent.d_rope, bias=bias)
        self.q_down = nn.Linear(d, latent.d_q, bias=False)
        self.q_down_norm = RMSNorm(latent.d_q, config.eps)
        self.q_up = nn.Linear(latent.d_q, h * latent.d_nope, bias=bias)
        self.q_rope = nn.Linear(latent.d_q, h * latent.d_rope, bias=bias)
        self.k_up = nn.Linear(latent.d_c, h * latent.d_nope, bias=False)
        self.v_up = nn.Linear(latent.d_c, d, bias=False)
        self.o = nn.Linear(d, d)

    def query(self, x: Tensor) -> Query:
        """q_nope [B, M, H, d_nope] and q_rope [B, M, H, d_rope] from the query latent."""
        c_q = self.q_down_norm(self.q_down(x))
        nope = self.q_up(c_q).unflatten(-1, (self.heads, self.d_nope))
        return nope, self.q_rope(c_q).unflatten(-1, (self.heads, self.d_rope))

    def entry(self, x: Tensor) -> Entry:
        """c_kv [B, L, d_c] and the unrotated k_r [B, L, d_rope]."""
        return self.kv_norm(self.kv_down(x)), self.k_rope(x)

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        pieces: Sequence[Piece],
        memory: LayerStep | None = None,
    ) -> Float[Tensor, "B L d"]:
        """As the base does; with ``keep_expanded`` the past is expanded once a chunk."""
        held = self.keep_expanded and len(pieces) == 1 and not torch.is_grad_enabled()
        if held and isinstance(memory, RingStep):
            query, entry = self.query(x), memory.extend(self.entry(x))
            return self.o(self._attend_held(query, entry, pieces[0], memory))
        return super().forward(x, pieces, memory)

    def mix(self, query: Query, entry: Entry, turn_q: Rotation, turn_k: Rotation) -> Tensor:
        """Latent attention in the chosen form."""
        nope, rope = query[0], turn_q.apply(query[1])
        c = entry[0].to(nope.dtype)
        k_rope = self._rotated(entry[1], turn_k).to(nope.dtype)
        form = self.form_for(nope, c.shape[1])
        options = {"head_group": self.head_group} if form == "reconstruct" else {}
        return FORMS[form](nope, rope, c, k_rope, *self._ups(), **options).flatten(2)

    def form_for(self, queries: Float[Tensor, "B M H dn"], keys: int) -> str:
        """The form that runs for these queries and so many keys."""
        if self.form != "auto":
            return self.form
        dtype, device = NAMES[queries.dtype], str(queries.device)
        form = choose(
            queries.shape[1], keys, queries.shape[0], self.heads, self.kv_down.out_features,
            self.d_rope, device, dtype, d_head=self.d_nope + self.d_rope,
            calibration=find(dtype, device, torch.get_num_threads()),
        )  # fmt: skip
        # the fused kernel's backward recomputes by this form's operations
        fused = form == "absorbed_triton" and torch.is_grad_enabled()
        return "absorbed" if fused else form

    def _rotated(self, k_rope: Tensor, turn: Rotation) -> Tensor:
        return turn.apply(k_rope[:, :, None, :])[:, :, 0]

    def _ups(self) -> tuple[Tensor, Tensor]:
        k_up = self.k_up.weight.unflatten(0, (self.heads, self.d_nope))
        return k_up, self.v_up.weight.unflatten(0, (self.heads, -1))

    def attend(self, query: Query, entry: Entry, pieces: Sequence[Piece]) -> Tensor:
        """As the base does; chunks share most of their keys, so each is reconstructed once."""
        together = len(pieces) > 1 and self.head_group is None
        if not together or self.form_for(query[0], entry[0].shape[1]) != "reconstruct":
            return super().attend(query, entry, pieces)
        keys, values = expanded(entry[0].to(query[0].dtype), *self._ups())
        outs: list[Tensor] = []
        for piece in pieces:
            mine = tuple(_take(part, piece.queries) for part in query)
            seen = (_take(keys, piece.keys), _take(values, piece.keys))
            outs.append(self._mix_expanded(mine, seen, _take(entry[1], piece.keys), piece))
        return torch.cat(outs, dim=1)

    def _mix_expanded(self, query: Query, made: Entry, k_rope: Tensor, piece: Piece) -> Tensor:
        rope = piece.query_rotation.apply(query[1])
        turned = self._rotated(k_rope, piece.key_rotation).to(query[0].dtype)
        return attend_expanded(query[0], rope, made[0], turned, made[1]).flatten(2)

    def _attend_held(self, query: Query, entry: Entry, piece: Piece, ring: RingStep) -> Tensor:
        c = entry[0].to(query[0].dtype)
        if not ring.held:
            ring.held.append(expanded(c, *self._ups()))
        else:
            for tokens in ring.fresh:
                fresh = expanded(c[:, tokens], *self._ups())
                for held, made in zip(ring.held[0], fresh, strict=True):
                    held[:, tokens] = made
        return self._mix_expanded(query, ring.held[0], entry[1], piece)


class CrossAttention(nn.Module):
    """Text (and for I2V image) cross-attention with q/k norms; keys and values can be cached.

    The text is zero-padded to a fixed length and the padding is attended, as in Wan.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d, config.eps), RMSNorm(d, config.eps)
        if config.model_type == "i2v":
            self.k_img, self.v_img = nn.Linear(d, d), nn.Linear(d, d)
            self.norm_k_img = RMSNorm(d, config.eps)

    def keys(self, context: Float[Tensor, "B T d"], image: Tensor | None = None) -> list[Entry]:
        """Keys and values [B, H, T, D] of the text, and of the image where there is one."""
        pairs = [(self.norm_k(self.k(context)), self.v(context))]
        if image is not None:
            pairs.append((self.norm_k_img(self.k_img(image)), self.v_img(image)))
        return [(self._split(k), self._split(v)) for k, v in pairs]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Float[Tensor, "B L d"], keys: Sequence[Entry]) -> Float[Tensor, "B L d"]:
        """Attend to :meth:`keys`; branches add up before the output projection."""
        q = self._split(self.norm_q(self.q(x)))
        out, *more = [F.scaled_dot_product_attention(q, k, v) for k, v in keys]
        for branch in more:
            out = out + branch
        return self.o(out.transpose(1, 2).flatten(2))
