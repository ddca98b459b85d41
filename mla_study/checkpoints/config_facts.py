"""What a model's own config (JSON or GGUF metadata) says of depth and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_study.checkpoints.reader import Checkpoint


@dataclass(frozen=True)
class ConfigFacts:
    """Heads and depth as a config (JSON or GGUF metadata) tells them; None where it does not."""

    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    model_type: str = ""
    has_cross: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ConfigFacts:
        """Read the usual keys of transformers, diffusers, original Wan, our own, and GGUF."""
        config: dict[str, Any] = dict(checkpoint.config or {})
        if not config:
            gguf = {str(k).split(".", 1)[-1]: v for k, v in checkpoint.metadata.items()}
            config = {
                "num_hidden_layers": gguf.get("block_count"),
                "num_attention_heads": gguf.get("attention.head_count"),
                "num_key_value_heads": gguf.get("attention.head_count_kv"),
                "head_dim": gguf.get("attention.key_length"),
            }
        for inner in ("model", "text_config"):
            if isinstance(config.get(inner), dict):
                config = {**config, **config[inner]}

        def first(*keys: str) -> int | None:
            for key in keys:
                value = config.get(key)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
            return None

        return cls(
            layers=first(
                "num_layers", "num_hidden_layers", "n_layer", "n_layers", "layers", "depth"
            ),
            heads=first("num_heads", "num_attention_heads", "n_head", "n_heads", "heads"),
            kv_heads=first("num_key_value_heads", "n_kv_heads", "multi_query_group_num"),
            head_dim=first("head_dim", "attention_head_dim", "d_kv", "head_size"),
            model_type=str(config.get("model_type") or ""),
            has_cross="Wan" in str(config.get("_class_name")),
        )
