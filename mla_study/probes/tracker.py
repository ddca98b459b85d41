"""Ranks along training: what ``rank-probe --series`` says of checkpoints, of a model in memory.

d width, T tokens, d_c latent rank. The operators are [W_k_up; W_v_up] diag(g) W_kv_down of latent
self-attention and [W_K; W_V] of dense one, as they are (gauge ``raw``) and on the layer's real
inputs (``weighted-raw``: the spectrum of W C^(1/2), C = E[x x^T], is that of the outputs).
Numbers, names and nulls come from the functions that probe files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float64

from mla_study.checkpoints.held import checkpoint_of
from mla_study.checkpoints.operators.find import Attention, find_operators
from mla_study.checkpoints.reader import Checkpoint
from mla_study.errors import UserError
from mla_study.probes.block import measure_block, root_of, weighted_nulls
from mla_study.probes.layer import Request, measure_attention, subspace_of, subspace_rank
from mla_study.probes.nulls import NullModel, truncated_null
from mla_study.probes.series import overlap_row
from mla_study.probes.spectrum import measures
from mla_study.probes.stacks import Spectrum, Stacks, Weights
from mla_study.probes.store import Measured
from mla_study.probes.table import COLUMNS, EDGE, Rows, Source, edge_ratio

if TYPE_CHECKING:
    from torch import Tensor, nn

METRICS = (
    "r_0.9", "r_0.9_interp", "r_0.95", "r_0.95_interp", "r_0.99", "r_0.99_interp", "energy_at_n/8",
    "entropy_rank", "participation_ratio", "stable_rank", EDGE,
)  # fmt: skip
TRACKED = (
    "step", "layer", "operator", "gauge", "metric", "value", "null", "null_value", "null_se", "m",
    "n",
)  # fmt: skip
"""Columns of the rows, a part of :data:`~mla_study.probes.table.COLUMNS`."""

_REQUEST = Request(("kv", "composed"), ("raw",), subspace=-1)
_SELF = re.compile(r"(?:^|\.)blocks\.(\d+)\.(?:\w+\.)*?self_attn$")
State = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class _Held:
    """A state dict and its self-attention blocks by layer."""

    checkpoint: Checkpoint
    layers: dict[int, Attention]

    @classmethod
    def of(cls, state: State, name: str) -> _Held:
        mine = {key: value for key, value in state.items() if ".self_attn." in key}
        checkpoint = checkpoint_of(mine or state, name)
        found = find_operators(checkpoint).attentions
        return cls(checkpoint, {a.layer: a for a in found if a.kind == "self"})

    def measure(self, layer: int, root: np.ndarray | None) -> Measured:
        return measure_block(Weights(self.checkpoint), self.layers[layer], _REQUEST, root)

    def spectrum(self, layer: int, root: np.ndarray | None) -> Spectrum:
        """Of the one operator: raw, or weighted where there is a root."""
        weights, attention = Weights(self.checkpoint), self.layers[layer]
        if attention.latent:
            return measure_attention(weights, attention, _REQUEST, root)[-1]
        return Stacks(weights, attention, root=root).run(["kv"], ["raw"])[0]

    def beside(self, layer: int, other: Attention, what: str) -> Attention:
        """The block of this state that stands beside one of the tracked model."""
        mine = self.layers.get(layer)
        if mine is None or _inputs(mine) != _inputs(other):
            held = "lacks" if mine is None else f"has {_inputs(mine)} inputs in"
            raise UserError(
                f"{what} {held} self-attention layer {layer}, where the tracked model has "
                f"{_inputs(other)} inputs: give the state of a model of the same width and depth"
            )
        return mine


def _inputs(attention: Attention) -> int:
    return attention.parts["kv_down" if attention.latent else "k"].n


class Tracker:
    """Measures a model at the steps it is asked to.

    Args:
        source: state dict of the dense model that a latent one was made of; its spectrum, cut to
            d_c, becomes the null ``truncated_source`` (of outputs too: the best of rank d_c).
        untrained: state dict of the same shapes that was never trained; the null ``untrained``,
            one model, so that its ``null_se`` is NaN.
        references: name -> state dict whose row space is compared (``overlap_with_NAME``), such as
            another init's. ``start`` is the first state that is measured, unless it is given here.
        metrics: which to give (overlaps apart).
        draws: of the Gaussian products on real inputs, at every call; of dense operators, whose
            draws cost more, half as many.
        seed: of the nulls.

    Example::

        tracker = Tracker(source=teacher.state_dict(), references={"random": other.state_dict()})
        rows += tracker.measure(student, step, attention_inputs(student, lambda: student(*batch)))
    """

    def __init__(
        self,
        source: State | None = None,
        untrained: State | None = None,
        references: Mapping[str, State] | None = None,
        *,
        metrics: Sequence[str] = METRICS,
        draws: int = 8,
        seed: int = 0,
    ) -> None:
        self._source = None if source is None else _Held.of(source, "the source")
        self._untrained = None if untrained is None else _Held.of(untrained, "the untrained state")
        self._references = {
            name: _Held.of(state, f"reference {name!r}")
            for name, state in (references or {}).items()
        }
        self.metrics, self.draws, self.seed = frozenset(metrics), draws, seed
        self._never: dict[int, NullModel] = {}
        self._bases: dict[tuple[str, int, int], np.ndarray | None] = {}

    @cached_property
    def _truncated(self) -> dict[int, np.ndarray]:
        """Singular values of the source's [K; V] by layer."""
        if self._source is None:
            return {}
        return {n: self._source.spectrum(n, None).sigma for n in self._source.layers}

    def measure(
        self,
        model: nn.Module | State,
        step: int,
        inputs: Mapping[int, Float[Tensor, "_ d"]] | None = None,
    ) -> list[dict[str, Any]]:
        """Rows of one step, all layers: a row for each metric and each null of it.

        Args:
            model: the model, or its state dict in the names of Wan; any device and float dtype.
            step: of the training, for the column.
            inputs: layer -> tokens [T, d] that entered its self-attention at this step (see
                :func:`attention_inputs`); layers that are absent have no weighted rows.

        Returns:
            dicts with the keys :data:`TRACKED`. ``null`` is ``gaussian_product`` (``gaussian`` of
            the joint operator and of overlaps, there k / d), ``truncated_source``, ``untrained``.

        Raises:
            UserError: no attention in the model, NaN or Inf in weights or inputs, or a source,
                reference or inputs that do not fit.
        """
        state = model if isinstance(model, Mapping) else model.state_dict()
        held = _Held.of(state, "the tracked model")
        rows = Rows(self.metrics.__contains__, self.seed, self._truncated, edge=True)
        source = Source("", "", "", step)
        for layer, attention in held.layers.items():
            if self._source is not None:
                self._source.beside(layer, attention, "the source")
            root, eigenvalues = _root(layer, attention, inputs or {})
            measured = held.measure(layer, root)
            if eigenvalues is not None:
                draws = self.draws if attention.latent else max(2, self.draws // 2)
                measured.nulls[1] = weighted_nulls(
                    measured.spectra[1], eigenvalues, self.seed, draws, nearest=True
                )
            rows.add(source, attention, measured, self._nulls(layer, attention, measured, root))
            rows.table += self._overlaps(source, attention, measured.basis)
        found: list[dict[str, Any]] = [dict(zip(COLUMNS, row, strict=True)) for row in rows.table]
        return [{name: row[name] for name in TRACKED} for row in found if not _beside_point(row)]

    def _nulls(
        self, layer: int, attention: Attention, measured: Measured, root: np.ndarray | None
    ) -> dict[int, dict[str, NullModel]]:
        """Nulls that are spectra of other states, by the number of the spectrum."""
        found: dict[int, dict[str, NullModel]] = {n: {} for n in range(len(measured.spectra))}
        if self._untrained is not None:
            twin = self._untrained.beside(layer, attention, "the untrained state")
            if twin.layout != attention.layout:
                raise UserError(
                    f"the untrained state is {twin.layout} in layer {layer} and the tracked model "
                    f"{attention.layout}: give one of the same shapes"
                )
            if layer not in self._never:
                self._never[layer] = _exact(self._untrained.spectrum(layer, None))
            found[0]["untrained"] = self._never[layer]
            if root is not None:
                found[1]["untrained"] = _exact(self._untrained.spectrum(layer, root))
        if self._source is not None and root is not None and attention.latent:
            best = self._source.spectrum(layer, root).sigma
            mine = measured.spectra[1]
            assert mine.inner is not None
            found[1]["truncated_source"] = truncated_null(best, mine.inner, mine.full_rank)
        return found

    def _overlaps(
        self, source: Source, attention: Attention, basis: Float64[np.ndarray, "d k"] | None
    ) -> list[tuple[Any, ...]]:
        if basis is None:  # of too small a rank, as in series
            return []
        layer, k = attention.layer, basis.shape[1]
        if "start" not in self._references:
            self._bases.setdefault(("start", layer, k), basis)
        rows: list[tuple[Any, ...]] = []
        for name in dict.fromkeys(("start", *self._references)):
            theirs = self._basis(name, attention, k)
            if theirs is not None:
                place = (layer, "self")
                metric = f"overlap_with_{name}"
                rows.append(overlap_row(source, place, metric, attention.latent, basis, theirs))
        return rows

    def _basis(self, name: str, attention: Attention, k: int) -> np.ndarray | None:
        """Row space of a reference; of a dense one as many directions as the tracked has."""
        key = name, attention.layer, k
        if key not in self._bases:
            held = self._references.get(name)
            if held is None:  # a start of another rank
                return None
            theirs = held.beside(attention.layer, attention, f"reference {name!r}")
            rank = subspace_rank(theirs) if theirs.latent else k
            self._bases[key] = subspace_of(Weights(held.checkpoint), theirs, rank)
        return self._bases[key]


def _exact(spectrum: Spectrum) -> NullModel:
    """A null of one matrix, without a spread."""
    values = {**measures(spectrum.sigma, spectrum.full_rank), EDGE: edge_ratio(spectrum)}
    return {metric: (value, float("nan")) for metric, value in values.items()}


def _beside_point(row: Mapping[str, Any]) -> bool:
    """A Gaussian matrix of full rank is no null of a product."""
    overlap = row["metric"].startswith("overlap")
    return row["operator"] == "composed" and row["null"] == "gaussian" and not overlap


def _root(
    layer: int, attention: Attention, inputs: Mapping[int, Tensor]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Root and eigenvalues of the second moment of a layer's tokens."""
    tokens = inputs.get(layer)
    if tokens is None:
        return None, None
    x = tokens.detach().double() if tokens.device.type != "mps" else tokens.cpu().double()
    if x.ndim != 2 or x.shape[1] != _inputs(attention) or not x.shape[0]:
        raise UserError(
            f"the inputs of layer {layer} are {list(x.shape)}, but its self-attention takes "
            f"[tokens, {_inputs(attention)}]: catch them with attention_inputs"
        )
    second = (x.T @ x / x.shape[0]).cpu().numpy()
    if not np.isfinite(second).all() or not second.any():
        raise UserError(
            f"the inputs of self-attention layer {layer} hold NaN or Inf, or are all zero: check "
            "the model and what it was run on"
        )
    return root_of(second)


def attention_inputs(
    model: nn.Module, run: Callable[[], object], limit: int = 4096
) -> dict[int, Float[Tensor, "_ d"]]:
    """Tokens that enter each layer's self-attention while ``run`` runs, without gradients.

    Args:
        model: a Wan transformer, wrapped or not; its mode stays as it is.
        run: calls it, once or many times (a rollout, say).
        limit: tokens kept of a layer, evenly over all that came.

    Returns:
        layer -> [T, d], T <= limit, on the model's device.

    Raises:
        UserError: the model has no such layers, or ``run`` does not call them.
    """
    import torch

    named = ((_SELF.search(name), part) for name, part in model.named_modules())
    parts = {int(found[1]): part for found, part in named if found}
    caught: dict[int, list[Tensor]] = {layer: [] for layer in parts}

    def hook(layer: int) -> Callable[..., None]:
        def see(part: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["x"]
            caught[layer].append(_evenly(x.detach().flatten(0, -2), limit))

        return see

    handles = [
        part.register_forward_pre_hook(hook(layer), with_kwargs=True)
        for layer, part in parts.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not parts or not all(caught.values()):
        missing = next((layer for layer, seen in caught.items() if not seen), "any")
        raise UserError(
            f"no tokens reached the self-attention of layer {missing}: give a Wan transformer and "
            "a call that runs it"
        )
    return {layer: _evenly(torch.cat(seen), limit) for layer, seen in caught.items()}


def _evenly(tokens: Tensor, limit: int) -> Tensor:
    import torch

    count = tokens.shape[0]
    if count <= limit:
        return tokens.clone()
    return tokens[torch.arange(limit, device=tokens.device) * count // limit]
