"""Pictures and networks that a seed makes: what the recorded values of other programs belong to."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

CASES = ("fine", "coarse", "noisy", "flat-edged")
"""Names of :func:`picture`, whose NIQE is recorded."""


def picture(name: str) -> np.ndarray:
    """A picture, uint8 [H, W, 3], of ``CASES``."""
    seed = CASES.index(name)
    rng = np.random.default_rng(seed)
    size = ((200, 310), (288, 300), (200, 200), (240, 240))[seed]
    blur = (0.8, 4.0, 2.0, 1.5)[seed]
    made = gaussian_filter(rng.standard_normal((*size, 3)), (blur, blur, 0))
    made = 128 + 50 * made / made.std()
    if name == "noisy":
        made += 30 * rng.standard_normal(made.shape)
    if name == "flat-edged":
        made[:, :120] = (40, 90, 200)
    return np.rint(made).clip(0, 255).astype(np.uint8)


def openai_weights() -> dict[str, np.ndarray]:
    """A small CLIP in OpenAI's names: 2 + 2 layers of width 64, pictures of 64, 100 words."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (64,),
        "visual.positional_embedding": (17, 64),
        "visual.conv1.weight": (64, 3, 16, 16),
        "visual.proj": (64, 48),
        "positional_embedding": (12, 64),
        "token_embedding.weight": (100, 64),
        "text_projection": (64, 48),
        "logit_scale": (),
    }
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{name}.weight": (64,), f"{name}.bias": (64,)}
    for tower in ("visual.", ""):
        for layer in range(2):
            block = f"{tower}transformer.resblocks.{layer}"
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{name}.weight": (64,), f"{block}.{name}.bias": (64,)}
            shapes |= {
                f"{block}.attn.in_proj_weight": (192, 64),
                f"{block}.attn.in_proj_bias": (192,),
            }
            for name, wide, deep in (
                ("attn.out_proj", 64, 64),
                ("mlp.c_fc", 256, 64),
                ("mlp.c_proj", 64, 256),
            ):
                shapes |= {f"{block}.{name}.weight": (wide, deep), f"{block}.{name}.bias": (wide,)}
    return {name: _drawn(name, shape) for name, shape in shapes.items()}


def _drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter by its name: Gaussian of a deviation that suits its inputs."""
    rng = np.random.default_rng(list(name.encode()))
    scale = max(1, int(np.prod(shape[1:]))) ** -0.5 if len(shape) > 1 else 0.3
    return np.asarray(scale * rng.standard_normal(shape), dtype=np.float32)


def rife_weights(gain: float = 1.0) -> dict[str, np.ndarray]:
    """RIFE v3.8's parameters, drawn by name, with the published file's prefix.

    Args:
        gain: of the first block's flow: with 40 it sees far motion.
    """
    made: dict[str, np.ndarray] = {}

    def layer(name: str, *shape: int, wide: int) -> None:
        made[f"module.{name}.weight"] = _drawn(name, shape)
        made[f"module.{name}.bias"] = _drawn(f"{name}.bias", (wide,)) / 10

    def slopes(name: str, wide: int) -> None:
        made[f"module.{name}.weight"] = np.full(wide, 0.25, dtype=np.float32)

    for block in ("block0", "block1", "block2"):
        for index, (wide, deep) in enumerate(((45, 11), (90, 45))):
            layer(f"{block}.conv0.{index}.0", wide, deep, 3, 3, wide=wide)
            slopes(f"{block}.conv0.{index}.1", wide)
        for part in (f"{block}.convblock{n}.{index}" for n in range(4) for index in range(2)):
            layer(f"{part}.0", 90, 90, 3, 3, wide=90)
            slopes(f"{part}.1", 90)
        for head, wide in (("conv1", 4), ("conv2", 1)):
            layer(f"{block}.{head}.0", 90, 45, 4, 4, wide=45)
            slopes(f"{block}.{head}.1", 45)
            layer(f"{block}.{head}.2", 45, wide, 4, 4, wide=wide)
    made["module.block0.conv1.2.weight"] *= gain
    return made


def pair(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two frames in [0, 1], float32 [1, 3, H, W], the second moved left by ``seed`` pixels."""
    rng = np.random.default_rng(seed)
    first = gaussian_filter(rng.standard_normal((3, height, width)), (0, 2, 2), mode="wrap")
    first = np.clip(0.5 + 0.2 * first / first.std(), 0, 1).astype(np.float32)[None]
    return first, np.roll(first, -seed, 3)
