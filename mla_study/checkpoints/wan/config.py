"""Configs of Wan transformers: original Wan, diffusers and our own JSON, and what shapes tell.

Neither shapes nor upstream's original ``config.json`` tell everything: the latter leaves out
``text_dim`` and ``patch_size`` (read from the tensors here), and no shape tells the heads of dense
attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mla_study.checkpoints.locate import read_json
from mla_study.checkpoints.wan.names import is_latent
from mla_study.config import (
    PRESETS,
    ModelConfig,
    WindowConfig,
    from_dict,
    preset,
    to_dict,
)
from mla_study.errors import UserError

SCHEMA = 1
MAX_LAYERS = 256
MAX_SIZE = 1_000_000
UPSTREAM_TEXT_LEN = 512

_OF_WEIGHTS = (
    "layers", "width", "heads", "ffn_width", "freq_dim", "text_dim", "text_len", "in_channels",
    "out_channels", "patch", "eps", "rope_base", "model_type", "learned_positions", "latent",
)  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Described:
    """A config and where it is from; ``window_told`` is False where the window is our default."""

    config: ModelConfig
    where: str
    window_told: bool
    metadata: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def inferred(shapes: Shapes) -> dict[str, Any]:
    """The fields of :class:`ModelConfig` that the shapes of tensors (original names) tell."""
    found: dict[str, Any] = {}

    def axis(field: str, name: str, index: int, ndim: int) -> None:
        shape = shapes.get(name)
        if shape is not None and len(shape) == ndim:
            found[field] = shape[index]

    axis("width", "patch_embedding.weight", 0, 5)
    axis("in_channels", "patch_embedding.weight", 1, 5)
    if "width" in found:
        found["patch"] = shapes["patch_embedding.weight"][2:]
    axis("text_dim", "text_embedding.0.weight", 1, 2)
    axis("freq_dim", "time_embedding.0.weight", 1, 2)
    axis("ffn_width", "blocks.0.ffn.0.weight", 0, 2)
    axis("out_channels", "head.head.weight", 0, 2)
    cells = math.prod(found.get("patch", (1, 2, 2)))
    if "out_channels" in found and cells and found["out_channels"] % cells == 0:
        found["out_channels"] //= cells
    blocks = {int(n.split(".")[1]) for n in shapes if n.startswith("blocks.") and _numbered(n)}
    if blocks:
        found["layers"] = max(blocks) + 1
    image = any(n.startswith("img_emb.") or ".k_img." in n for n in shapes)
    found["model_type"] = "i2v" if image else "t2v"
    return found


def _numbered(name: str) -> bool:
    part = name.split(".")[1]
    return part.isascii() and part.isdigit() and len(part) < 9


def latent_sizes(shapes: Shapes) -> dict[str, int]:
    """Sizes of latent self-attention that shapes tell: d_c, d_q, d_rope, heads, d_nope."""
    stem = "blocks.0.self_attn."
    rows = {
        key: shapes[f"{stem}{name}.weight"][0]
        for key, name in (
            ("d_c", "kv_down"),
            ("d_q", "q_down"),
            ("d_rope", "k_rope"),
            ("q_rope", "q_rope"),
            ("k_up", "k_up"),
        )
        if len(shapes.get(f"{stem}{name}.weight", ())) == 2
    }
    q_rope, k_up = rows.pop("q_rope", 0), rows.pop("k_up", 0)
    if rows.get("d_rope") and q_rope % rows["d_rope"] == 0 and q_rope:
        rows["heads"] = q_rope // rows["d_rope"]
        rows["d_nope"] = k_up // rows["heads"]
    return rows


def resolve(
    given: ModelConfig | str | None,
    beside: Mapping[str, Any] | None,
    beside_path: str | None,
    shapes: Shapes,
    path: str,
) -> Described:
    """The config of a checkpoint.

    Args:
        given: a config, a preset's name, a JSON file or a folder that holds one; it wins over
            ``beside``, the JSON that lies beside the weights (or in their metadata).
        beside: that JSON, read from ``beside_path``.
        shapes: shapes by original name.
        path: what the user calls the checkpoint.

    Raises:
        UserError: there is no config, or it is none of a Wan transformer.
    """
    if isinstance(given, ModelConfig):
        return Described(given, "the given config", True, {})
    if given is not None:
        file = _file_of(given)
        if file is None:
            return _of_preset(given, shapes)
        return parse(read_json(file), shapes, file)
    if beside is not None:
        return parse(beside, shapes, beside_path or f"the metadata of {path}")
    fields = inferred(shapes)
    alike = [
        name
        for name in PRESETS
        if all(getattr(preset(name), k) == v for k, v in fields.items()) and len(fields) > 6
    ]
    hint = f" (its shapes are those of {alike[0]})" if alike else ""
    lacking = "heads and rotary pairs" if is_latent(shapes) else "the number of heads"
    raise UserError(
        f"{path} has no config.json beside it, and shapes do not tell {lacking}: give --config "
        f"with a JSON file or one of {', '.join(PRESETS)}{hint}"
    )


def _file_of(given: str) -> str | None:
    """The JSON file that ``given`` names, or None where it is a preset's name."""
    path = Path(given)
    if path.is_dir():
        for inner in ("config.json", "transformer/config.json"):
            if (path / inner).is_file():
                return str(path / inner)
        raise UserError(f"the folder {given} holds no config.json: name the config file itself")
    if path.is_file():
        return given
    if "/" in given or given.endswith(".json"):
        raise UserError(f"the config {given} does not exist: check the path")
    return None


def _of_preset(name: str, shapes: Shapes) -> Described:
    config = preset(name, is_latent(shapes))
    fields = inferred(shapes)
    if fields["model_type"] == "i2v" and "in_channels" in fields:
        config = replace(config, model_type="i2v", in_channels=fields["in_channels"])
    return Described(config, f"preset {config.name}", False, {})


def parse(data: Mapping[str, Any], shapes: Shapes, where: str) -> Described:
    """Read a config JSON of any of the three kinds, told apart by its keys.

    Raises:
        UserError: none of them, or a variant of Wan that is not built here.
    """
    try:
        if "layers" in data and "width" in data:
            return _own(data, where)
        if "attention_head_dim" in data and "num_attention_heads" in data:
            found, told, notes = _diffusers(data, where), False, ()
        elif "dim" in data and "num_heads" in data:
            found, told, notes = _original(data, shapes, where)
        else:
            raise UserError(
                f"{where} is no config of a Wan transformer (its keys: "
                f"{', '.join(list(map(str, data))[:6]) or 'none'}): give --config with one, or a "
                f"preset's name ({', '.join(PRESETS)})"
            )
    except UserError as error:
        if where in str(error):
            raise
        raise UserError(f"{where}: {error}") from None
    return Described(_named(found), where, told, {}, notes)


def _own(data: Mapping[str, Any], where: str) -> Described:
    plain = dict(data)
    metadata = plain.pop("metadata", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{where} has a 'metadata' that is no object: mend it there")
    schema = metadata.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UserError(
            f"{where} has schema {schema!r}, but this version reads up to {SCHEMA}: update "
            "mla-study"
        )
    config = sane(from_dict(plain, ModelConfig, where), where)
    return Described(config, where, "window" in plain, metadata)


def _original(
    data: Mapping[str, Any], shapes: Shapes, where: str
) -> tuple[ModelConfig, bool, tuple[str, ...]]:
    read = _Reader(data, where)
    read.must("qk_norm", True)
    read.must("cross_attn_norm", True)
    fields = inferred(shapes)
    kind = str(data.get("model_type", "t2v"))
    notes: tuple[str, ...] = ()
    if kind not in ("t2v", "i2v", "ti2v"):
        raise UserError(f"{where} has model_type {kind!r}, but only t2v and i2v are built here")
    if kind == "i2v" and fields["model_type"] == "t2v" and shapes:
        notes = ("an i2v model without an image branch (as in Wan2.2): read as t2v.",)
        kind = "t2v"
    patch = data.get("patch_size", fields.get("patch", (1, 2, 2)))
    values = {
        "name": "wan",
        "layers": read.integer("num_layers"),
        "width": read.integer("dim"),
        "heads": read.integer("num_heads"),
        "ffn_width": read.integer("ffn_dim"),
        "freq_dim": read.integer("freq_dim", 256),
        "text_dim": read.integer("text_dim", fields.get("text_dim", 4096)),
        "text_len": read.integer("text_len", UPSTREAM_TEXT_LEN),
        "in_channels": read.integer("in_dim", 16),
        "out_channels": read.integer("out_dim", 16),
        "patch": list(patch) if isinstance(patch, list | tuple) else patch,
        "eps": data.get("eps", 1e-6),
        "model_type": "i2v" if kind == "i2v" else "t2v",
    }
    window = _window(read)
    if window is not None:
        values["window"] = to_dict(window)
    return sane(from_dict(values, ModelConfig, where), where), window is not None, notes


def _window(read: _Reader) -> WindowConfig | None:
    """Self-Forcing's local_attn_size (-1: no window), sink_size and num_frame_per_block."""
    size = read.data.get("local_attn_size", -1)
    if size in (-1, None):
        return None
    if not isinstance(size, int) or isinstance(size, bool):
        raise UserError(f"{read.where} has local_attn_size {size!r}, but an integer is needed")
    return WindowConfig.from_local_attn_size(
        size, read.integer("sink_size", 0, least=0), read.integer("num_frame_per_block", 3)
    )


def _diffusers(data: Mapping[str, Any], where: str) -> ModelConfig:
    read = _Reader(data, where)
    name = data.get("_class_name", "WanTransformer3DModel")
    if name != "WanTransformer3DModel":
        raise UserError(f"{where} describes a {name}, but only WanTransformer3DModel is read here")
    read.must("qk_norm", "rms_norm_across_heads")
    read.must("cross_attn_norm", True)
    read.must("pos_embed_seq_len", None)
    heads, dim = read.integer("num_attention_heads"), read.integer("attention_head_dim")
    channels = read.integer("in_channels", 16)
    image = data.get("image_dim") is not None or data.get("added_kv_proj_dim") is not None
    values = {
        "name": "wan",
        "layers": read.integer("num_layers", 40),
        "width": heads * dim,
        "heads": heads,
        "ffn_width": read.integer("ffn_dim", 13824),
        "freq_dim": read.integer("freq_dim", 256),
        "text_dim": read.integer("text_dim", 4096),
        "text_len": read.integer("text_len", UPSTREAM_TEXT_LEN),
        "in_channels": channels,
        "out_channels": read.integer("out_channels", channels),
        "patch": data.get("patch_size", [1, 2, 2]),
        "eps": data.get("eps", 1e-6),
        "model_type": "i2v" if image else "t2v",
    }
    return sane(from_dict(values, ModelConfig, where), where)


@dataclass(frozen=True)
class _Reader:
    data: Mapping[str, Any]
    where: str

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(
                f"{self.where} has {key} = {value!r}, but an integer of at least {least} is needed"
            )
        return value

    def must(self, key: str, value: object) -> None:
        if self.data.get(key, value) != value:
            raise UserError(
                f"{self.where} has {key} = {self.data[key]!r}, but only {value!r} is built here"
            )


def sane(config: ModelConfig, where: str) -> ModelConfig:
    """The config itself, if a model of its sizes can be built; UserError otherwise."""
    sizes = (
        *config.patch,
        config.freq_dim // 2,
        config.text_dim,
        config.text_len,
        config.in_channels,
        config.out_channels,
    )
    if config.layers > MAX_LAYERS:
        raise UserError(f"{where} has {config.layers} layers, more than {MAX_LAYERS}: mend it")
    if max(config.width, config.ffn_width, config.freq_dim, *sizes) > MAX_SIZE:
        raise UserError(f"{where} has sizes beyond {MAX_SIZE}: mend it")
    if min(sizes) < 1 or not config.eps > 0:
        raise UserError(
            f"{where} has patch {list(config.patch)}, freq_dim {config.freq_dim}, text_dim "
            f"{config.text_dim}, text_len {config.text_len} and eps {config.eps:g}: all must be "
            "positive"
        )
    return config


def _named(config: ModelConfig) -> ModelConfig:
    """The preset that it equals in what checkpoints state, with its own window."""
    for name in PRESETS:
        known = preset(name)
        if same_weights(config, known):
            return replace(known, window=config.window)
    return config


def same_weights(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configs mean the same function of the same tensors: all but window and flow."""
    return all(getattr(one, field) == getattr(other, field) for field in _OF_WEIGHTS)
