"""Names and scales in adapter files: pairs, alpha, and which weight of a base each pair means."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mla_study.checkpoints.locate import read_json
from mla_study.checkpoints.reader import Checkpoint, peel
from mla_study.errors import UserError

_PAIR = re.compile(
    r"^(?P<stem>.+?)[._](?P<side>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)"
    r"(?:\.(?P<set>(?!weight$)[\w-]+))?(?:\.weight)?$",
    re.IGNORECASE,
)
_DOWN = {"lora_a", "lora_down", "lora.down"}
_THIRD = re.compile(r"^(?P<stem>.+?)[._](?:lora_mid|lora_E|lora\.mid)(?:\.[\w-]+)*$")
_MAGNITUDE = re.compile(r"(?:lora_magnitude_vector(?:\.[\w-]+)*|dora_scale)$")
_OTHER_KINDS = re.compile(
    r"[._](?:hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|oft_(?:diag|blocks|r)(?:\.\w+)*|vera_lambda_[bd])$",
    re.IGNORECASE,
)
KOHYA = re.compile(r"^(?:lora|lycoris)_(?:unet|te\d?|transformer|prior)_|^lycoris_")
_COMPONENT = re.compile(
    r"^(?:lora_|lycoris_)?(unet|te\d?|transformer_2|transformer|text_encoder(?:_\d)?|prior)[._]"
)
# original Wan -> diffusers, both flattened
_WAN = (
    (r"_self_attn_([qkv])$", r"_attn1_to_\1"),
    (r"_cross_attn_([qkv])$", r"_attn2_to_\1"),
    (r"_self_attn_o$", "_attn1_to_out_0"),
    (r"_cross_attn_o$", "_attn2_to_out_0"),
    (r"_cross_attn_([kv])_img$", r"_attn2_add_\1_proj"),
    (r"_self_attn_norm_([qk])$", r"_attn1_norm_\1"),
    (r"_cross_attn_norm_([qk])$", r"_attn2_norm_\1"),
    (r"_ffn_0$", "_ffn_net_0_proj"),
    (r"_ffn_2$", "_ffn_net_2"),
    (r"^text_embedding_0$", "condition_embedder_text_embedder_linear_1"),
    (r"^text_embedding_2$", "condition_embedder_text_embedder_linear_2"),
    (r"^time_embedding_0$", "condition_embedder_time_embedder_linear_1"),
    (r"^time_embedding_2$", "condition_embedder_time_embedder_linear_2"),
    (r"^time_projection_1$", "condition_embedder_time_proj"),
    (r"^head_head$", "proj_out"),
)
_TO_DIFFUSERS = tuple((re.compile(a), b) for a, b in _WAN)


@dataclass(frozen=True)
class Pair:
    """The stored tensors of one adapted weight."""

    stem: str
    down: str
    up: str
    alpha: str | None


@dataclass
class Adapter:
    """What an adapter file holds, sorted."""

    pairs: list[Pair] = field(default_factory=list)
    diffs: dict[str, str] = field(default_factory=dict)  # stem -> full difference, bias: 'diff_b'
    magnitudes: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    unmatched_scale: bool = False
    inputs_first: bool = False  # the base's layers store [inputs, outputs] (GPT-2)


def is_lora(checkpoint: Checkpoint) -> bool:
    """Whether a file holds adapter pairs instead of weights.

    Raises:
        UserError: an adapter of a kind whose products are not two factors.
    """
    pairs = [name for name in checkpoint.tensors if _PAIR.match(name)]
    if checkpoint.holds_base_layers:
        if pairs:
            checkpoint.notes.append(
                f"{len(pairs) // 2} adapter pairs beside their base layers are not merged: "
                "the base layers are read."
            )
        return False
    if not pairs:
        other = next((name for name in checkpoint.tensors if _OTHER_KINDS.search(name)), None)
        if other is not None:
            raise UserError(
                f"{checkpoint.spec.path} holds an adapter of another kind than LoRA ({other!r}): "
                "merge it with the program that trained it, and probe the result"
            )
    return bool(pairs)


def parse(checkpoint: Checkpoint) -> Adapter:
    """Sort the tensors of an adapter file.

    Raises:
        UserError: half a pair, several adapters in one file.
    """
    found = Adapter()
    halves: dict[str, dict[str, str]] = {}
    sets: set[str] = set()
    thirds = {m["stem"] for name in checkpoint.tensors if (m := _THIRD.match(name))}
    for name in checkpoint.tensors:
        match = _PAIR.match(name)
        if match:
            side = "down" if match["side"].lower() in _DOWN else "up"
            other = halves.setdefault(match["stem"], {}).setdefault(side, name)
            sets.add(match["set"] or "")
            if other != name:
                listed = ", ".join(sorted(s or "without a name" for s in sets))
                raise UserError(
                    f"{checkpoint.spec.path} holds two adapters of {match['stem']!r} ({listed}): "
                    "save one of them alone"
                )
        elif _MAGNITUDE.search(name):
            found.magnitudes.append(name)
        elif name.endswith((".diff", ".diff_b")):
            stem = name.rpartition(".")[0]
            found.diffs[stem + (" bias" if name.endswith("_b") else "")] = name
        elif not name.endswith("alpha"):
            found.rest.append(name)
    for stem, both in halves.items():
        if stem in thirds:  # of a convolution; its product has three factors
            found.rest += both.values()
            continue
        missing = {"down", "up"} - set(both)
        if missing:
            raise UserError(
                f"{checkpoint.spec.path}: the adapter of {stem!r} has no '{missing.pop()}' half: "
                "get the complete file"
            )
        alpha = f"{stem}.alpha" if f"{stem}.alpha" in checkpoint.tensors else None
        found.pairs.append(Pair(stem, both["down"], both["up"], alpha))
    if not found.pairs:
        raise UserError(
            f"{checkpoint.spec.path} holds only adapters of three factors ({found.rest[0]!r}): "
            "merge it with the program that trained it, and probe the result"
        )
    return found


def scale_rule(checkpoint: Checkpoint, adapter: Adapter) -> Callable[[Pair], float]:
    """What each product is multiplied by: alpha / rank, or alpha / sqrt(rank) (rsLoRA).

    Alpha comes from the pair's own tensor, else from ``adapter_config.json`` (``lora_alpha``,
    ``alpha_pattern``) or what diffusers writes into the metadata; without one the scale is 1.
    """
    config = peft_config(checkpoint)
    default = _number(config.get("lora_alpha"))
    patterns = config.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    rooted = config.get("use_rslora") is True
    path = checkpoint.spec.path
    adapter.inputs_first = config.get("fan_in_fan_out") is True
    adapter.unmatched_scale = default is None and any(p.alpha is None for p in adapter.pairs)

    def scale(pair: Pair) -> float:
        rank = checkpoint.tensors[pair.down].shape[0]
        if pair.alpha is not None:
            values = checkpoint.read(pair.alpha).reshape(-1)
            if values.size != 1 or not math.isfinite(values[0]):
                raise UserError(
                    f"{path}: {pair.alpha!r} is not one finite number: get an undamaged file"
                )
            return float(values[0]) / rank
        alpha = default
        for pattern, value in patterns.items():
            if _fits(str(pattern), pair.stem) and _number(value) is not None:
                alpha = _number(value)
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if rooted else alpha / rank

    return scale


def _fits(pattern: str, stem: str) -> bool:
    """Whether a key of peft's ``alpha_pattern``, the end of a path, means a stem."""
    end = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return f".{stem}".endswith("." + end)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e12 and math.isfinite(value) else None


def peft_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """An adapter's own config, from beside it or from its metadata; empty where there is none."""
    if checkpoint.adapter_config is not None:
        return read_json(checkpoint.adapter_config)
    if "lora_alpha" in (checkpoint.config or {}):
        return dict(checkpoint.config or {})
    text = checkpoint.metadata.get("lora_adapter_metadata")
    if not isinstance(text, str) or len(text) > 10_000_000:
        return {}
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    # 'transformer.lora_alpha', 'unet.lora_alpha'
    return {str(k).rpartition(".")[2]: v for k, v in told.items()} if isinstance(told, dict) else {}


def component(stem: str) -> str:
    """The part of a pipeline that a stem names (``unet``, ``te1``, ``text_encoder`` ...), or ''."""
    match = _COMPONENT.match(stem)
    return match[1] if match else ""


def _flat(name: str) -> str:
    return re.sub(r"[._]+", "_", name)


@dataclass(frozen=True)
class Targets:
    """The weights of a base by flattened names, of both Wan namings."""

    weights: Mapping[str, str]
    biases: Mapping[str, str]

    def find(self, stem: str, bias: bool = False) -> str | None:
        """The base's tensor that a stem means, or None."""
        table = self.biases if bias else self.weights
        stem = stem.removesuffix(" bias").replace(".processor.", ".")
        bare = KOHYA.sub("", stem)
        shorter = _COMPONENT.sub("", bare)
        for name in (bare, peel(bare), shorter, peel(shorter)):
            flat = _flat(name)
            for candidate in (flat, _diffusers(flat), f"{flat}_0"):
                if candidate in table:
                    return table[candidate]
        return None


def _diffusers(flat: str) -> str:
    for pattern, replacement in _TO_DIFFUSERS:
        renamed, count = pattern.subn(replacement, flat)
        if count:
            return renamed
    return flat


def targets_of(base: Checkpoint) -> Targets:
    """Weights and biases of a base under the names that adapters may call them by."""
    tables: dict[str, dict[str, str]] = {"weight": {}, "bias": {}}
    for name in base.tensors:
        stem, _, last = name.rpartition(".")
        if last in tables:
            flat = _flat(stem)
            tables[last].setdefault(flat, name)
            # an adapter in diffusers' names finds an original checkpoint by its own translation
            tables[last].setdefault(_diffusers(flat), name)
    return Targets(tables["weight"], tables["bias"])
