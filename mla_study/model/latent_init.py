"""Dense Wan self-attention to latent attention, one layer at a time: pure functions on its tensors.

Shapes: d width, H heads, D head channels = dn + dr, P kept rotary pairs = dr / 2, m rows, r rank,
T tokens. Arithmetic is float64. What a conversion decides, in the order in which it is applied:

``qk_norm``   W_q and W_k take up the gains of Wan's norm_q and norm_k, and the token's own 1 / rms
              becomes one constant of the inputs: 1 / E[rms] for q, E[rms] / E[rms^2] for k.
``band``      of a head's rotary pairs the first (fastest) of each axis stay rotary; the other
              d_nope channels, in their order, lose their rotation and become content. Their key
              bias then adds the same to all logits of a query, so it is dropped, exactly.
``shared_key`` the kept pairs of all heads become one key: pair p of head h is taken for
              u[p, h] kappa[p], complex, and the queries of head h absorb conj(u[p, h]).
``kv_rank``   content keys and values share one latent of rank d_c.
``q_rank``    content and rotary queries share one latent of rank d_q; their biases stay.
``latent_norm`` both latents pass an RMSNorm whose gain starts at E[rms], so that it is the identity
              on average. The basis of the latents is free otherwise and settles what that norm
              sees: c_kv is an orthonormal part of x, whose length varies little after Wan's
              LayerNorm; c_q has the length of the dense W_q x, so that its norm does what norm_q
              did (exactly so without a bias at full rank) and undoes what ``qk_norm`` lost there.

Exact, and so no decision: the bias of v moves into that of o (attention weights sum to 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float64, Int

from mla_study.config import LatentConfig
from mla_study.errors import UserError
from mla_study.model.dense_layer import DenseAttention, Moments, Projection
from mla_study.model.rope import axis_pairs
from mla_study.probes.spectrum import gram

Init = Literal["spectral", "spectral-raw", "random", "activation"]
RopeKey = Literal["svd", "mean"]
(_dsymm,) = scipy.linalg.get_blas_funcs(("symm",), dtype=np.float64)
INITS: tuple[Init, ...] = get_args(Init)

RIDGE = 1e-4
"""Part of the mean variance that is added to every input direction before an activation init."""


def default_pairs(d_rope: int, head_dim: int) -> tuple[int, int, int]:
    """The d_rope / 2 kept pairs split over (time, height, width) as Wan splits a head's.

    Raises:
        UserError: d_rope is odd, negative or beyond the head.
    """
    if d_rope % 2 or not 0 <= d_rope <= head_dim:
        raise UserError(
            f"d_rope is {d_rope}, but rotary channels come in pairs and a head has {head_dim}: "
            f"give an even number from 0 to {head_dim}"
        )
    third = d_rope // 6
    return d_rope // 2 - 2 * third, third, third


def rotary_channels(head_dim: int, pairs: tuple[int, int, int]) -> Int[np.ndarray, " dr"]:
    """Channels of a head that stay rotary: the first ``pairs`` of each axis of Wan's split.

    Raises:
        UserError: an axis has fewer pairs than asked for.
    """
    full = axis_pairs(head_dim)
    if any(k > n or k < 0 for k, n in zip(pairs, full, strict=True)):
        raise UserError(
            f"rope pairs {pairs} exceed the pairs {full} that a head of {head_dim} channels has"
        )
    starts = np.cumsum([0, *full[:2]])
    kept = np.concatenate([s + np.arange(k) for s, k in zip(starts, pairs, strict=True)])
    return np.stack([2 * kept, 2 * kept + 1], axis=1).ravel().astype(np.int64)


def content_channels(head_dim: int, pairs: tuple[int, int, int]) -> Int[np.ndarray, " dn"]:
    """Channels of a head that become content: all others, in order."""
    return np.setdiff1d(np.arange(head_dim), rotary_channels(head_dim, pairs))


@dataclass(frozen=True)
class Factors:
    """W ~ up down of full rank R, ordered so that the first r columns are the best cut to r."""

    down: Float64[np.ndarray, "R d"]
    ups: tuple[Float64[np.ndarray, "_ R"], ...]

    def cut(self, rank: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """down [r, d] and the ups [m, r]."""
        return self.down[:rank], [up[:, :rank] for up in self.ups]


def factor(
    blocks: Sequence[Float64[np.ndarray, "_ d"]],
    rank: int,
    scales: Sequence[float],
    second: Float64[np.ndarray, "d d"] | None = None,
) -> Factors:
    """The best rank-``rank`` stand-in for the row stack of the blocks, each times its scale.

    Without ``second`` it is the singular value decomposition. With C = E[x x^T] it is the
    projection on the top eigenvectors of W C W^T (output PCA, up to :data:`RIDGE`), up the
    regression of the outputs on the latent. Of either, the ups are those of the unscaled blocks.
    """
    weights = [np.full(len(block), s) for block, s in zip(blocks, scales, strict=True)]
    square = gram(blocks, blocks[0].shape[1], np.concatenate(weights))
    if second is None:
        basis = _top_eigenvectors(square, rank)
        return Factors(basis.T.copy(), tuple(block @ basis for block in blocks))
    root = scipy.linalg.cholesky(_lifted(second), lower=True, overwrite_a=True, check_finite=False)
    square = _dsymm(1.0, square, root, lower=1)
    # Symmetric, so that the transpose of the product is its Fortran order.
    basis = _top_eigenvectors((root.T @ square).T, rank)
    del square
    down = scipy.linalg.solve_triangular(root, basis, trans=1, lower=True, check_finite=False)
    spread = root @ basis
    return Factors(down.T.copy(), tuple(block @ spread for block in blocks))


def _lifted(second: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    lifted = np.array(second, order="F")
    lifted[np.diag_indices_from(lifted)] += RIDGE * max(float(second.diagonal().mean()), 1e-300)
    return lifted


def of_length(
    down: Float64[np.ndarray, "r d"],
    target: Float[np.ndarray, "m d"],
    second: Float64[np.ndarray, "d d"] | None = None,
) -> Float64[np.ndarray, "r r"]:
    """Upper triangular R with |R down x| = |the best guess of target x from down x|.

    Best on inputs of second moment C (None: unit variance). Directions that the target does not
    see keep a ten-thousandth of the mean scale, so that R has an inverse.
    """
    seen = down if second is None else down @ _lifted(second)
    inverse = scipy.linalg.cho_factor(seen @ down.T, check_finite=False)
    guess = scipy.linalg.cho_solve(inverse, seen @ target.T.astype(np.float64), check_finite=False)
    # The R of a QR, for half its work: with the floor the square's condition stays below r 1e8.
    square = gram([guess.T], len(down))
    mean = float(square.diagonal().mean())
    square[np.diag_indices_from(square)] += 1e-8 * mean or 1.0
    return np.asarray(scipy.linalg.cholesky(square, lower=True, check_finite=False)).T


def _top_eigenvectors(
    matrix: Float64[np.ndarray, "d d"], rank: int
) -> Float64[np.ndarray, "d rank"]:
    d = matrix.shape[0]
    # Divide and conquer gives all vectors sooner than "evr" gives a quarter of them.
    few = 4 * rank < d
    _, vectors = scipy.linalg.eigh(
        matrix,
        lower=True,
        subset_by_index=(d - rank, d - 1) if few else None,
        driver="evr" if few else "evd",
        overwrite_a=True,
        check_finite=False,
    )
    return vectors[:, ::-1][:, :rank]


@dataclass(frozen=True)
class SharedKey:
    """One rotary key for all heads: kappa = weight x + bias, pairs interleaved, and u [P, H]."""

    key: Projection
    u: np.ndarray


def shared_key(keys: Projection, heads: int, how: RopeKey, moments: Moments) -> SharedKey:
    """Pair p of every head as u[p, h] kappa[p] (complex): what all heads' rotary keys share.

    Args:
        keys: folded rotary rows, head by head, each head's pairs interleaved [H dr, d].
        how: ``svd`` is the best complex rank-1 stand-in over heads on inputs of these moments,
            pair by pair (a complex factor commutes with the rotation); ``mean`` has u = 1.
        moments: of the inputs; unit variance for a decomposition of the weights alone.

    Returns:
        u scaled to mean |u|^2 = 1 over heads, so that kappa has the size of one head's key.
    """
    d = keys.weight.shape[1]
    w = keys.weight.reshape(heads, -1, 2, d)
    b = keys.bias.reshape(heads, -1, 2)
    rows = (w[:, :, 0] + 1j * w[:, :, 1]).transpose(1, 0, 2)
    bias = (b[:, :, 0] + 1j * b[:, :, 1]).T
    u = np.ones(bias.shape, dtype=np.complex128)
    if how == "svd":
        seen = rows if moments.second is None else rows @ moments.second
        power = seen @ rows.conj().transpose(0, 2, 1) + bias[:, :, None] * bias.conj()[:, None]
        if moments.mean is not None:
            cross = (rows @ moments.mean)[:, :, None] * bias.conj()[:, None]
            power = power + cross + cross.conj().transpose(0, 2, 1)
        u = np.linalg.eigh(power)[1][:, :, -1] * heads**0.5
        turn = u.sum(axis=1, keepdims=True)
        u = u * np.where(np.abs(turn) > 1e-12, turn.conj() / np.maximum(np.abs(turn), 1e-300), 1)
    kappa = np.einsum("ph,phd->pd", u.conj(), rows) / heads
    offset = np.einsum("ph,ph->p", u.conj(), bias) / heads
    weight = np.stack([kappa.real, kappa.imag], axis=1).reshape(-1, d)
    return SharedKey(Projection(weight, np.stack([offset.real, offset.imag], axis=1).ravel()), u)


def absorb(queries: Projection, u: np.ndarray) -> Projection:
    """Rotary query rows [H dr, d] times conj(u): then they meet the shared key as their own."""
    pairs, heads = u.shape
    d = queries.weight.shape[1]
    w = queries.weight.reshape(heads, pairs, 2, d)
    b = queries.bias.reshape(heads, pairs, 2)
    turned = u.conj().T[:, :, None] * (w[:, :, 0] + 1j * w[:, :, 1])
    offset = u.conj().T * (b[:, :, 0] + 1j * b[:, :, 1])
    weight = np.stack([turned.real, turned.imag], axis=2).reshape(-1, d)
    return Projection(weight, np.stack([offset.real, offset.imag], axis=2).ravel())


@dataclass(frozen=True)
class Recipe:
    """How a layer is converted, sizes apart."""

    init: Init = "spectral"
    rope_key: RopeKey = "svd"
    seed: int = 0


@dataclass
class LayerConversion:
    """One layer, decomposed up to the ranks of ``latent``; :meth:`tensors` cuts it to any below.

    Attributes:
        latent: the largest d_c and d_q, and the split.
        layer: its number, for the random init alone.
    """

    dense: DenseAttention
    latent: LatentConfig
    recipe: Recipe
    moments: Moments
    layer: int = 0
    fold_q: np.ndarray = field(init=False)
    fold_k: np.ndarray = field(init=False)
    shared: SharedKey = field(init=False)

    def __post_init__(self) -> None:
        dense, latent, recipe = self.dense, self.latent, self.recipe
        self._cut_q: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}
        head_dim = dense.width // dense.heads
        rotary = dense.channels(rotary_channels(head_dim, latent.rope_pairs))
        content = dense.channels(content_channels(head_dim, latent.rope_pairs))
        mean, _ = self.moments.rms(dense.q, dense.eps)
        self.fold_q = dense.norm_q.astype(np.float64) / mean
        mean, square = self.moments.rms(dense.k, dense.eps)
        self.fold_k = dense.norm_k.astype(np.float64) * (mean / square)
        aware = self.moments if recipe.init == "activation" else Moments()
        rope_rows = dense.k.rows(rotary, self.fold_k)
        how = "mean" if recipe.init == "random" else recipe.rope_key
        self.shared = shared_key(rope_rows, dense.heads, how, aware)
        self._o_bias = dense.o.bias + dense.o.weight @ dense.v.bias.astype(np.float64)
        if recipe.init == "random":
            self._random(rotary, content, rope_rows)
            return
        self._kv = self._keys_values(content, aware)
        self._q = self._all_queries(rotary, content, aware)

    def _keys_values(self, content: np.ndarray, aware: Moments) -> Factors:
        raw = self.recipe.init == "spectral-raw"
        keys = self.dense.k.rows(content, None if raw else self.fold_k).weight
        values = self.dense.v.weight.astype(np.float64)
        sizes = [aware.power(keys).sum(), aware.power(values).sum()]
        scales = [1.0 if raw or not s > 0 else float(s) ** -0.5 for s in sizes]
        found = factor([keys, values], self.latent.d_c, scales, aware.second)
        if raw:
            folded = found.ups[0] * self.fold_k[content][:, None]
            found = Factors(found.down, (folded, found.ups[1]))
        return found

    def _all_queries(self, rotary: np.ndarray, content: np.ndarray, aware: Moments) -> Factors:
        nope = self.dense.q.rows(content, self.fold_q)
        rope = absorb(self.dense.q.rows(rotary, self.fold_q), self.shared.u)
        self._biases = nope.bias, rope.bias
        return factor([nope.weight, rope.weight], self.latent.d_q, [1.0, 1.0], aware.second)

    def _random(self, rotary: np.ndarray, content: np.ndarray, rope: Projection) -> None:
        """Gaussian factors; :meth:`tensors` gives their outputs the power of the dense ones."""
        latent, dense, d = self.latent, self.dense, self.dense.width
        heads = dense.heads
        everything = np.arange(d)
        self._power: list[float] = []
        for map_, chosen, fold in (
            (dense.k, content, self.fold_k),
            (dense.v, everything, None),
            (dense.q, content, self.fold_q),
            (dense.q, rotary, self.fold_q),
        ):
            power = self.moments.power(map_.rows(chosen, fold).weight)
            self._power.append(float(power.mean()) if len(power) else 0.0)
        key = self._draw(0, (latent.d_rope, d))
        size = float(self.moments.power(rope.weight, rope.bias).sum()) / heads
        mine = float(self.moments.power(key).sum())
        key *= (size / mine) ** 0.5 if mine > 0 else 1.0
        u = np.ones((latent.d_rope // 2, heads), dtype=np.complex128)
        self.shared = SharedKey(Projection(key, np.zeros(latent.d_rope)), u)
        nope = heads * latent.d_nope
        rows = (nope, d, nope, heads * latent.d_rope)
        downs = [self._draw(i, (r, d)) * d**-0.5 for i, r in ((1, latent.d_c), (2, latent.d_q))]
        # Drawn column by column, so that a smaller rank is a part of a larger one.
        ups = [
            self._draw(3 + i, (latent.d_c if i < 2 else latent.d_q, m)).T
            for i, m in enumerate(rows)
        ]
        self._kv, self._q = Factors(downs[0], (*ups[:2],)), Factors(downs[1], (*ups[2:],))
        self._biases = np.zeros(nope), np.zeros(rows[3])

    def _queries(self, rank: int) -> tuple[np.ndarray, list[np.ndarray]]:
        if rank not in self._cut_q:
            down, ups = self._q.cut(rank)
            if self.recipe.init != "random":
                r = of_length(down, self.dense.q.weight, self.moments.second)
                ups = [scipy.linalg.solve_triangular(r, up.T, trans=1).T for up in ups]
                down = r @ down
            self._cut_q = {rank: (down, ups)}
        return self._cut_q[rank]

    def _draw(self, which: int, shape: tuple[int, int]) -> np.ndarray:
        return np.random.default_rng([self.recipe.seed, self.layer, which]).standard_normal(shape)

    def tensors(
        self, d_c: int | None = None, d_q: int | None = None
    ) -> dict[str, Float64[np.ndarray, "..."]]:
        """The layer's new ``self_attn`` tensors by name, float64, cut to these ranks.

        ``o.weight`` is not among them: it stays as it is.

        Raises:
            ValueError: a rank beyond what the layer was decomposed to.
        """
        latent, dense = self.latent, self.dense
        d_c, d_q = d_c or latent.d_c, d_q or latent.d_q
        if d_c > latent.d_c or d_q > latent.d_q:
            raise ValueError(f"ranks {d_c}, {d_q} exceed {latent.d_c}, {latent.d_q}")
        kv_down, (k_up, v_up) = self._kv.cut(d_c)
        if self.recipe.init != "random":
            turned, mix = np.linalg.qr(kv_down.T)
            kv_down, k_up, v_up = turned.T, k_up @ mix.T, v_up @ mix.T
        q_down, (q_up, q_rope) = self._queries(d_q)
        gains: list[float] = []
        for number, down in enumerate((kv_down, q_down)):
            mean, square = self.moments.rms(Projection(down, np.zeros(len(down))), dense.eps)
            gains.append(mean)
            if self.recipe.init == "random":
                power = self._power[2 * number : 2 * number + 2]
                scale = [(p / (len(down) * square)) ** 0.5 for p in power]
                if number == 0:
                    k_up, v_up = k_up * scale[0], v_up * scale[1]
                else:
                    q_up, q_rope = q_up * scale[0], q_rope * scale[1]
        return {
            "kv_down.weight": kv_down,
            "kv_norm.weight": np.full(d_c, gains[0]),
            "k_up.weight": k_up,
            "v_up.weight": v_up,
            "k_rope.weight": self.shared.key.weight,
            "k_rope.bias": self.shared.key.bias,
            "q_down.weight": q_down,
            "q_down_norm.weight": np.full(d_q, gains[1]),
            "q_up.weight": q_up,
            "q_up.bias": self._biases[0],
            "q_rope.weight": q_rope,
            "q_rope.bias": self._biases[1],
            "o.bias": self._o_bias,
        }
