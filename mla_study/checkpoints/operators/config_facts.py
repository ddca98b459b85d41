"""What a model's own config (JSON or GGUF metadata) says of depth and heads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mla_study.checkpoints.reader import Checkpoint
from mla_study.errors import UserError

MAX_LAYERS = 100_000

_LAYERS = ("num_hidden_groups", "num_layers", "num_hidden_layers", "n_layer", "n_layers", "layers",
           "depth")  # fmt: skip
_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads")
_KV_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "multi_query_group_num",
             "kv_n_heads")  # fmt: skip
_HEAD_DIM = ("head_dim", "attention_head_dim", "d_kv", "head_size", "kv_channels")
_LAYER_KINDS = ("layer_types", "layers_block_type", "block_types")
_INNER = ("model", "text_config", "llm_config", "language_config", "attn_config")
# sub-config -> the blocks that it describes
_VISION = re.compile(
    r"(?:^|[._])(?:vision|visual|vit|image_(?:encoder|tower|embed)|video_tower)", re.IGNORECASE
)
_AUDIO = re.compile(r"(?:^|[._])audio", re.IGNORECASE)
_ENCODER = re.compile(r"^encoder\.")
_DECODER = re.compile(r"^decoder\.")
_SINGLE = re.compile(r"(?:^|[._])single_")
_DOUBLE = re.compile(r"(?:^|[._])(?:double_blocks|transformer_blocks)[._]")


@dataclass(frozen=True)
class ConfigFacts:
    """Heads and depth as a config tells them; None where it does not.

    ``of_block`` gives what holds for one block: vision towers, encoders and decoders may have
    numbers of their own.
    """

    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    model_type: str = ""
    has_cross: bool = False
    plain_qkv: bool = False  # ChatGLM's groups: all queries, then all keys, then all values
    attention_layers: frozenset[int] | None = None  # of a hybrid model
    parts: tuple[tuple[re.Pattern[str], ConfigFacts], ...] = field(default=(), repr=False)
    ignored: tuple[str, ...] = ()

    def of_block(self, block: str) -> ConfigFacts:
        """The facts that hold for a block of this path."""
        return next((facts for pattern, facts in self.parts if pattern.search(block)), self)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ConfigFacts:
        """Read the usual keys of transformers, diffusers, original Wan, our own, and GGUF."""
        config: dict[str, Any] = dict(checkpoint.config or _inside(checkpoint.metadata))
        if not config:
            gguf = {str(k).split(".", 1)[-1]: v for k, v in checkpoint.metadata.items()}
            return cls._read(
                {
                    "num_hidden_layers": gguf.get("block_count"),
                    "num_attention_heads": gguf.get("attention.head_count"),
                    "num_key_value_heads": gguf.get("attention.head_count_kv"),
                    "head_dim": gguf.get("attention.key_length"),
                }
            )
        flat = dict(config)
        for inner in _INNER:
            if isinstance(config.get(inner), dict):
                flat.update(config[inner])
        facts = cls._read(flat)
        parts: list[tuple[re.Pattern[str], ConfigFacts]] = []
        for key, pattern in (
            ("vision_config", _VISION),
            ("vision_cfg", _VISION),
            ("audio_config", _AUDIO),
            ("encoder", _ENCODER),
            ("decoder", _DECODER),
        ):
            if isinstance(config.get(key), dict):
                parts.append((pattern, cls._read(config[key])))
        t5 = flat.get("num_layers") if "num_decoder_layers" in flat else None
        single = flat.get("num_single_layers", flat.get("depth_single_blocks"))
        sides = {
            _ENCODER: {"layers": flat.get("encoder_layers", t5),
                       "heads": flat.get("encoder_attention_heads")},
            _DECODER: {"layers": flat.get("decoder_layers", flat.get("num_decoder_layers")),
                       "heads": flat.get("decoder_attention_heads")},
            _SINGLE: {"layers": single},
            _DOUBLE: {"layers": facts.layers if single else None},
        }  # fmt: skip
        for pattern, values in sides.items():
            known = {key: number for key, v in values.items() if (number := _count(v))}
            if known:
                parts.append((pattern, replace(facts, **known)))
        return replace(facts, parts=tuple(parts))

    @classmethod
    def _read(cls, config: Mapping[str, Any]) -> ConfigFacts:
        ignored: list[str] = []

        def first(keys: tuple[str, ...]) -> int | None:
            for key in keys:
                number = _count(config.get(key))
                if number is not None:
                    return number
                # lists say it stage by stage, null and false not at all
                if isinstance(config.get(key), int | float | str) and config[key] is not False:
                    ignored.append(f"{key} = {repr(config[key])[:40]}")
            return None

        name = str(config.get("_class_name") or "")
        kind = str(config.get("model_type") or "")
        heads, dim = first(_HEADS), first(_HEAD_DIM)
        if re.match(r"UNet.*Condition|ControlNet", name) and heads is None:
            heads, dim = dim, None  # diffusers' first name for the number of heads
        kv_heads = first(_KV_HEADS)
        # Falcon's new decoder has one key and value behind each group of queries
        grouped = config.get("new_decoder_architecture") is True
        if config.get("multi_query") is True and not grouped:
            kv_heads = 1
        return cls(
            layers=first(_LAYERS),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            model_type=kind,
            has_cross="Wan" in name or config.get("is_encoder_decoder") is True,
            plain_qkv="multi_query_group_num" in config and kv_heads is not None,
            attention_layers=_hybrid(config),
            ignored=tuple(ignored),
        )


def checked_layers(count: int | None, where: str) -> int | None:
    """A number of layers that a model can have; raises :class:`UserError` for any other."""
    if count is not None and count > MAX_LAYERS:
        raise UserError(
            f"{where} says that there are {count:.6g} layers, more than {MAX_LAYERS}: "
            "mend it, or give the number with --layers"
        )
    return count


def _count(value: Any) -> int | None:
    """A positive whole number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not 0 < value < 1e18 or value != int(value):
        return None
    return int(value)


def _inside(metadata: Mapping[str, object]) -> dict[str, Any]:
    """A config that was saved into the weight file's own metadata."""
    text = metadata.get("config")
    if not isinstance(text, str) or len(text) > 1_000_000:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _hybrid(config: Mapping[str, Any]) -> frozenset[int] | None:
    """Layers with keys and values of softmax attention, where a config says it layer by layer."""
    depth = _count(config.get("num_hidden_layers")) or 0
    if depth > MAX_LAYERS:
        return None
    # the last layers of Gemma 3n have queries only
    shared = _count(config.get("num_kv_shared_layers")) or 0
    layers = set(range(depth - shared)) if shared < depth else set[int]()
    period, offset = _count(config.get("attn_layer_period")), config.get("attn_layer_offset")
    kinds = next(
        (config[key] for key in _LAYER_KINDS if isinstance(config.get(key), list) and config[key]),
        None,
    )
    if kinds is not None:
        names = [str(kind).lower() for kind in kinds[:MAX_LAYERS]]
        layers &= {
            i
            for i, kind in enumerate(names)
            if ("attention" in kind and "linear" not in kind) or kind == "hybrid"
        }
    elif period and isinstance(offset, int):
        layers = {i for i in layers if i % period == offset}
    elif not shared:
        return None
    return frozenset(layers) or None
