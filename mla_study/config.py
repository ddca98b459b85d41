"""Every default of the project: frozen dataclasses, and presets named after the paper's models.

Unknown keys are an error, JSON goes both ways, and :func:`config_hash` is stable across machines
and Python versions (canonical JSON, SHA-256).

Example::

    mla-study config wan-1.3b
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from mla_study.errors import UserError

C = TypeVar("C")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value < 1:
            raise UserError(f"{type(owner).__name__}.{name} is {value}, but it must be at least 1.")


@dataclass(frozen=True)
class LatentConfig:
    """Latent self-attention of VideoMLA (method, section "Latent self-attention").

    ``d_c`` and ``d_rope`` are cached per token and layer; ``d_q`` is not. ``rope_pairs`` are the
    complex rotary pairs kept for (time, height, width), two channels each.
    """

    d_c: int = 192
    d_q: int = 768
    d_nope: int = 96
    d_rope: int = 32
    rope_pairs: tuple[int, int, int] = (6, 5, 5)

    def __post_init__(self) -> None:
        _positive(self, "d_c", "d_q")
        if self.d_nope < 0 or self.d_rope < 0:
            raise UserError(
                f"LatentConfig has d_nope = {self.d_nope} and d_rope = {self.d_rope}, "
                "but neither may be negative."
            )
        if self.d_rope % 2:
            raise UserError(
                f"LatentConfig.d_rope is {self.d_rope}, but rotary channels come in pairs: "
                "give an even number."
            )
        if min(self.rope_pairs) < 0 or 2 * sum(self.rope_pairs) != self.d_rope:
            raise UserError(
                f"LatentConfig.rope_pairs {self.rope_pairs} hold {sum(self.rope_pairs)} pairs, "
                f"but d_rope = {self.d_rope} needs {self.d_rope // 2}."
            )

    @property
    def cached_scalars(self) -> int:
        """Scalars cached for a token and a layer: d_c + d_rope (224 in the paper)."""
        return self.d_c + self.d_rope


@dataclass(frozen=True)
class WindowConfig:
    """What a step of the chunk-causal rollout sees, all in latent frames.

    ``sink`` frames are kept for good, ``history`` counts the most recent cached frames **besides**
    the chunk that is being made, ``chunk`` frames are made together. The paper's (1, 6, 3) gives
    10 key frames; ``local_attn_size`` of Self-Forcing counts the chunk in, see
    :meth:`from_local_attn_size`.
    """

    sink: int = 1
    history: int = 6
    chunk: int = 3

    def __post_init__(self) -> None:
        _positive(self, "chunk")
        if self.sink < 0 or self.history < 0:
            raise UserError(
                f"WindowConfig has sink = {self.sink} and history = {self.history}, "
                "but neither may be negative."
            )

    @property
    def key_frames(self) -> int:
        """Frames whose keys a step of the steady state reads."""
        return self.sink + self.history + self.chunk

    @classmethod
    def from_local_attn_size(cls, size: int, sink: int = 1, chunk: int = 3) -> WindowConfig:
        """The window that Self-Forcing's ``local_attn_size`` (sink and chunk counted in) means."""
        if size < sink + chunk:
            raise UserError(
                f"local_attn_size {size} is smaller than sink + chunk = {sink} + {chunk}: "
                "it counts both in, so give at least their sum."
            )
        return cls(sink=sink, history=size - sink - chunk, chunk=chunk)


@dataclass(frozen=True)
class FlowConfig:
    """Rectified flow (method, "Training"): timestep shift, grid and the few-step schedule."""

    shift: float = 5.0
    train_timesteps: int = 1000
    denoise_steps: tuple[int, ...] = (1000, 750, 500, 250)

    def __post_init__(self) -> None:
        _positive(self, "train_timesteps")
        if not self.shift > 0:
            raise UserError(f"FlowConfig.shift is {self.shift}, but it must be positive.")
        steps = self.denoise_steps
        if not steps or list(steps) != sorted(set(steps), reverse=True) or min(steps) < 1:
            raise UserError(
                f"FlowConfig.denoise_steps {steps} must fall strictly and stay above 0."
            )


@dataclass(frozen=True)
class ModelConfig:
    """A Wan2.1 transformer, its window and its flow; ``latent`` set makes self-attention latent.

    ``latent_size`` is the native (height, width) of a latent frame, ``codec_stride`` how many video
    frames, rows and columns one latent position stands for, ``fps`` counts video frames.
    """

    name: str = "wan-1.3b"
    layers: int = 30
    width: int = 1536
    heads: int = 12
    ffn_width: int = 8960
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_base: float = 10000.0
    model_type: Literal["t2v", "i2v"] = "t2v"
    learned_positions: bool = False
    latent_size: tuple[int, int] = (60, 104)
    codec_stride: tuple[int, int, int] = (4, 8, 8)
    fps: float = 16.0
    latent: LatentConfig | None = None
    window: WindowConfig = field(default_factory=WindowConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)

    def __post_init__(self) -> None:
        _positive(self, "layers", "width", "heads", "ffn_width", "in_channels", "out_channels")
        if min(*self.latent_size, *self.codec_stride) < 1 or not self.fps > 0:
            raise UserError(
                f"ModelConfig has latent_size {self.latent_size}, codec_stride {self.codec_stride} "
                f"and fps {self.fps}, but all of them must be positive."
            )
        if self.width % self.heads or self.head_dim % 2:
            raise UserError(
                f"ModelConfig.width {self.width} does not split into {self.heads} heads "
                "of an even size."
            )
        if self.latent is None:
            return
        split = self.latent.d_nope + self.latent.d_rope
        if split != self.head_dim:
            raise UserError(
                f"LatentConfig splits a head into {self.latent.d_nope} + {self.latent.d_rope} = "
                f"{split} channels, but ModelConfig '{self.name}' has heads of {self.head_dim}."
            )
        for name in ("d_c", "d_q"):
            if getattr(self.latent, name) > self.width:
                raise UserError(
                    f"LatentConfig.{name} is {getattr(self.latent, name)}, which exceeds the model "
                    f"width {self.width}: a latent cannot be wider than its input."
                )

    @property
    def head_dim(self) -> int:
        """Channels of a head, d_h."""
        return self.width // self.heads


def wan_1_3b(latent: bool = False) -> ModelConfig:
    """Wan2.1-T2V-1.3B; with ``latent`` the VideoMLA default (d_c 192, 96 + 32; paper, Table 4)."""
    return ModelConfig(latent=LatentConfig() if latent else None)


def wan_14b(latent: bool = False) -> ModelConfig:
    """Wan2.1-T2V-14B: 40 blocks of width 5120 with the same heads of 128 channels."""
    return ModelConfig(
        name="wan-14b",
        layers=40,
        width=5120,
        heads=40,
        ffn_width=13824,
        latent=LatentConfig() if latent else None,
    )


def mini(latent: bool = False) -> ModelConfig:
    """The miniature that trains on a laptop CPU: 4 blocks of width 96, d_c = d / 8 = 12."""
    return ModelConfig(
        name="mini",
        layers=4,
        width=96,
        heads=3,
        ffn_width=384,
        freq_dim=64,
        text_dim=96,
        text_len=8,
        rope_base=100.0,
        learned_positions=True,
        latent_size=(6, 6),
        codec_stride=(1, 4, 4),
        fps=8.0,
        latent=LatentConfig(d_c=12, d_q=48, d_nope=24, d_rope=8, rope_pairs=(2, 1, 1))
        if latent
        else None,
        flow=FlowConfig(shift=3.0),
    )


def small(latent: bool = False) -> ModelConfig:
    """About 50 M parameters for one GPU: 12 blocks of width 512 on 64-pixel clips, d_c = d / 8."""
    return dataclasses.replace(
        mini(),
        name="small",
        layers=12,
        width=512,
        heads=8,
        ffn_width=2048,
        freq_dim=256,
        text_dim=256,
        latent_size=(16, 16),
        latent=LatentConfig(d_c=64, d_q=256, d_nope=48, d_rope=16, rope_pairs=(4, 2, 2))
        if latent
        else None,
    )


PRESETS = {"wan-1.3b": wan_1_3b, "wan-14b": wan_14b, "small": small, "mini": mini}


def preset(name: str, latent: bool = False) -> ModelConfig:
    """The preset of that name; raises :class:`UserError` with the nearest names otherwise."""
    key = name.replace("_", "-").lower()
    key = {"wan-1-3b": "wan-1.3b"}.get(key, key)
    if key not in PRESETS:
        raise UserError(f"There is no preset '{name}'; there are {', '.join(PRESETS)}.")
    return PRESETS[key](latent)


def parse_window(text: str) -> WindowConfig:
    """``sink,history,chunk`` in latent frames, as the command line has it; UserError for others."""
    parts = text.replace(" ", "").split(",")
    if len(parts) != 3 or not all(part.isdecimal() and len(part) < 7 for part in parts):
        raise UserError(f"--window is '{text}': give sink,history,chunk in latent frames, as 1,6,3")
    return WindowConfig(*map(int, parts))


def to_dict(config: Any) -> dict[str, Any]:
    """A plain dictionary of a config dataclass: tuples become lists, configs dictionaries."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_json(config: Any) -> str:
    """Indented JSON of a config dataclass; :func:`from_json` reads it back to an equal object."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def config_hash(config: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a config dataclass or of a plain mapping."""
    plain = config if isinstance(config, Mapping) else to_dict(config)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def from_json(text: str | Path, cls: type[C] = ModelConfig) -> C:
    """Read a config from JSON text or from a :class:`~pathlib.Path`; strict in keys and types."""
    where = "the JSON text"
    if isinstance(text, Path):
        where = str(text)
        try:
            text = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read ({error}); give a JSON config file.") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error}); mend it there.") from None
    return from_dict(data, cls, where)


def from_dict(data: Any, cls: type[C] = ModelConfig, where: str = "the config") -> C:
    """Build config dataclass ``cls`` from a mapping; unknown keys and wrong types are errors."""
    if not isinstance(data, Mapping):
        raise UserError(
            f"{where} holds {type(data).__name__} where {cls.__name__} needs an object."
        )
    known = {f.name for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            others = f"known are {', '.join(sorted(known))}."
            hint = f"did you mean '{near[0]}'?" if near else others
            raise UserError(f"{where} has an unknown key '{key}' for {cls.__name__}: {hint}")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(value, hints[key], f"{where}, {key}") for key, value in data.items()}
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if dataclasses.is_dataclass(hint):
        return from_dict(value, typing.cast(Any, hint), where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {value!r}, but a list is needed.")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise UserError(f"{where} has {len(value)} entries, but {len(kinds)} are needed.")
        return tuple(_convert(v, k, where) for v, k in zip(value, kinds, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is {value!r}, but an object is needed.")
        return dict(value)
    if origin is Literal:
        if value not in args:
            choices = ", ".join(map(str, args))
            raise UserError(f"{where} is {value!r}, but one of {choices} is needed.")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is {value!r}, but {hint.__name__} is needed.")
    return value
