"""Fig. 3: the block, drawn from a config with the names and shapes of the model's own parameters.

Left the block, right its latent self-attention: what goes down and up, what is rotated, what is
cached of a token (c_kv and the unrotated k_r) and what is not. Below, the two forms that attention
has over that cache, and scalars cached of a token and layer, latent and dense, to scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_study.checkpoints.wan.load import expected_shapes
from mla_study.config import ModelConfig
from mla_study.config import preset as preset_of
from mla_study.study.plots import COLOURS, COLUMN_WIDTH, save_figure, stamp, style
from mla_study.study.runs import run_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ID = "fig3_overview"
TITLE = "The block and its latent self-attention with real shapes: what is cached"
PROVENANCE = ("modelled",)
DATA = ()
HIGH = 5.5
_WEIGHT, _TENSOR, _CACHED, _PLAIN = "white", "#E8E8E8", COLOURS["orange"], "#DCEBF5"
_SIZE = 4.6


@dataclass(frozen=True)
class Box:
    """A box with text about (x, y), in inches from the upper left corner."""

    x: float
    y: float
    wide: float
    high: float
    text: str
    colour: str = _WEIGHT
    size: float = _SIZE
    spacing: float = 1.15

    @property
    def top(self) -> tuple[float, float]:
        return self.x, self.y - self.high / 2

    @property
    def bottom(self) -> tuple[float, float]:
        return self.x, self.y + self.high / 2


def draw(out_dir: str, preset: str = "wan-1.3b") -> Figure:
    """Draw and save ``fig3_overview.{pdf,png,svg}``.

    Args:
        out_dir: where the three files go.
        preset: a preset of the config, made latent.

    Raises:
        UserError: there is no such preset.
    """
    config = preset_of(preset, latent=True)
    run = run_record(
        config={"figure": ID, "model": config},
        inputs={},
        seed=None,
        modules=(f"analysis.{ID}",),
        provenance="modelled",
        validity="full",
    )
    with style():
        figure = overview(config)
        stamp(figure, PROVENANCE, "full", run["run_hash"]).set_y(0.004)
        save_figure(figure, Path(out_dir) / ID)
    return figure


def weight(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    """A parameter of block 0 as it is called, with its shape and whether it has a bias.

    >>> weight({"blocks.0.ffn.0.weight": (8, 2), "blocks.0.ffn.0.bias": (8,)}, "ffn.0")
    'ffn.0.weight\\n8 × 2, bias'
    """
    full = f"blocks.0.{name}"
    shape = " × ".join(map(str, shapes[f"{full}.weight"]))
    bias = ", bias" if f"{full}.bias" in shapes else ""
    return f"{name.removeprefix('self_attn.').removeprefix('cross_attn.')}.weight\n{shape}{bias}"


def overview(config: ModelConfig) -> Figure:
    """The figure of a latent config; nothing is written."""
    import matplotlib.pyplot as plt

    shapes = expected_shapes(config)
    figure = plt.figure(figsize=(COLUMN_WIDTH, HIGH))
    figure.set_layout_engine("none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, COLUMN_WIDTH)
    axis.set_ylim(HIGH, 0)
    axis.axis("off")
    told = f"{config.name}, one of {config.layers} blocks: latent self-attention of {config.heads}"
    axis.text(0.04, 0.1, f"{told} heads of {config.head_dim}", fontsize=6.3, weight="bold",
              va="center")  # fmt: skip
    _block(axis, config, shapes)
    _attention(axis, config, shapes)
    _forms(axis, config)
    _legend(axis)
    _bars(axis, config)
    return figure


def _block(axis: Axes, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """The strip on the left: the whole block from top to bottom."""
    d, x, wide = config.width, 0.43, 0.7
    modulation = " × ".join(map(str, shapes["blocks.0.modulation"]))
    cross = ", ".join("qkvo")
    norms = shapes["blocks.0.cross_attn.norm_q.weight"][0]
    boxes = [
        Box(x, 0.34, wide, 0.16, f"h [L, {d}]", _TENSOR),
        Box(x, 0.64, wide, 0.26, f"norm1, modulation\n{modulation}"),
        Box(x, 0.97, wide, 0.22, "self_attn", _PLAIN, 5.2),
        Box(x, 1.46, wide, 0.22, weight(shapes, "norm3")),
        Box(x, 1.88, wide, 0.52, f"cross_attn to text\n{cross}.weight\n{d} × {d}, bias\n"
            f"norm_q.weight,\nnorm_k.weight\n{norms}"),
        Box(x, 2.46, wide, 0.24, "norm2,\nmodulation"),
        Box(x, 2.81, wide, 0.26, weight(shapes, "ffn.0")),
        Box(x, 3.18, wide, 0.26, "GELU, " + weight(shapes, "ffn.2")),
        Box(x, 3.62, wide, 0.16, f"h [L, {d}]", _TENSOR),
    ]  # fmt: skip
    sums = {2: 1.2, 4: 2.22, 7: 3.42}
    for number, box in enumerate(boxes):
        _draw(axis, box)
        if number + 1 == len(boxes):
            break
        below = boxes[number + 1].top
        if number in sums:
            _arrow(axis, box.bottom, (x, sums[number] - 0.035))
            axis.text(x, sums[number], "+", fontsize=5.5, ha="center", va="center",
                      bbox={"boxstyle": "circle,pad=0.08", "fc": "white", "lw": 0.5})  # fmt: skip
            _arrow(axis, (x, sums[number] + 0.035), below)
        else:
            _arrow(axis, box.bottom, below)
    left = x - wide / 2 - 0.05
    starts = [0.46, 1.27, 2.29]
    for start, stop in zip(starts, sums.values(), strict=True):
        axis.plot([x, left, left, x - 0.05], [start, start, stop, stop], color="0.4", lw=0.5)
    # what the right-hand side shows in full
    for y, to in ((0.86, 0.24), (1.08, 3.74)):
        axis.plot([x + wide / 2, 0.87], [y, to], color="0.6", lw=0.5, ls=":")


def _attention(axis: Axes, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    latent = config.latent
    assert latent is not None
    h, d, dn, dr = config.heads, config.width, latent.d_nope, latent.d_rope

    def named(name: str) -> str:
        return weight(shapes, f"self_attn.{name}")

    columns = [1.16, 1.66, 2.16, 2.66, 3.13]
    q, kv, kr = (columns[0] + columns[1]) / 2, (columns[2] + columns[3]) / 2, columns[4]
    wide, middle = 0.46, (columns[0] + columns[4]) / 2
    source = Box(middle, 0.34, 2.44, 0.16, f"x = norm1(h), modulated  [L tokens, {d}]", _TENSOR)
    downs = [
        Box(q, 0.68, 0.74, 0.26, named("q_down")),
        Box(kv, 0.68, 0.74, 0.26, named("kv_down")),
        Box(kr, 0.68, wide, 0.26, named("k_rope").replace(", ", ",\n"), size=4.2),
    ]
    norms = [
        Box(q, 1.04, 0.74, 0.26, named("q_down_norm")),
        Box(kv, 1.04, 0.74, 0.26, named("kv_norm")),
    ]
    held = [
        Box(q, 1.42, 0.74, 0.24, f"$c_q$ [L, {latent.d_q}]\nnot cached", _TENSOR),
        Box(kv, 1.42, 0.74, 0.24, f"$c_{{kv}}$ [L, {latent.d_c}]\ncached", _CACHED),
        Box(kr, 1.42, wide, 0.24, f"$k_r$ [L, {dr}]\ncached", _CACHED),
    ]
    ups = [
        Box(x, 1.86, wide, 0.3, named(name).replace(", ", "\n+ "), size=4.3)
        for x, name in zip(columns, ("q_up", "q_rope", "k_up", "v_up"), strict=False)
    ]
    made = [
        Box(x, 2.27, wide, 0.24, f"{name}\n[L, {h}, {size}]", _TENSOR, 4.4)
        for x, name, size in zip(
            columns, ("q nope", "q rope", "k nope", "v"), (dn, dr, dn, d // h), strict=False
        )
    ]
    mix = Box(
        middle, 3.02, 2.44, 0.3,
        r"softmax( ($q_{nope}\cdot k_{nope}$ + $\mathrm{R}q_{rope}\cdot \mathrm{R}k_r$) / "
        rf"$\sqrt{{{config.head_dim}}}$ ) v" + f"\nof {h} heads; $k_r$ is shared by all of them",
        _PLAIN, 5, 1.5,
    )  # fmt: skip
    out = Box(middle, 3.37, 0.9, 0.26, named("o"))
    last = Box(middle, 3.67, 1.2, 0.16, f"to the sum  [L, {d}]", _TENSOR)
    for box in (source, *downs, *norms, *held, *ups, *made, mix, out, last):
        _draw(axis, box)
    for box in downs:
        _arrow(axis, (box.x, source.bottom[1]), box.top)
    for down, norm, tensor in zip(downs, norms, held, strict=False):
        _arrow(axis, down.bottom, norm.top)
        _arrow(axis, norm.bottom, tensor.top)
    _arrow(axis, downs[2].bottom, held[2].top)
    for up, tensor, origin in zip(ups, made, (q, q, kv, kv), strict=True):
        _arrow(axis, (origin + (up.x - origin) * 0.7, held[0].bottom[1]), up.top)
        _arrow(axis, up.bottom, tensor.top)
    for number, tensor in enumerate([*made, held[2]]):
        if number in (1, 4):  # rotated by what the window says of their positions, after the cache
            turn = Box(tensor.x, 2.63, 0.2, 0.18, "R", COLOURS["sky"], 5.5)
            _arrow(axis, tensor.bottom, turn.top)
            _draw(axis, turn, round_=True)
            _arrow(axis, turn.bottom, (tensor.x, mix.top[1]))
        else:
            _arrow(axis, tensor.bottom, (tensor.x, mix.top[1]))
    _arrow(axis, mix.bottom, out.top)
    _arrow(axis, out.bottom, last.top)


def _forms(axis: Axes, config: ModelConfig) -> None:
    """The two forms of attention over the cache: where ``k_up`` and ``v_up`` are applied."""
    latent = config.latent
    assert latent is not None
    h, dn, dv = config.heads, latent.d_nope, config.width // config.heads
    d_c, cached = latent.d_c, f"$c_{{kv}}$ [K, {latent.d_c}]"
    axis.text(0.04, 3.9, "Attention over K cached tokens has two forms, alike but for rounding:",
              fontsize=5.4, va="center")  # fmt: skip
    rows = (
        (4.04, "absorbed", "k_up goes to the queries, v_up behind the mean; nothing is rebuilt", (
            Box(0, 0, 0.5, 0, f"q nope\n[L, {h}, {dn}]", _TENSOR),
            Box(0, 0, 0.54, 0, f"times k_up\n[L, {h}, {d_c}]"),
            Box(0, 0, 0.82, 0, f"softmax over cached\n{cached}, $k_r$", _PLAIN),
            Box(0, 0, 0.6, 0, f"mean of $c_{{kv}}$\n[L, {h}, {d_c}]", _TENSOR),
            Box(0, 0, 0.54, 0, f"times v_up\n[L, {h}, {dv}]"),
        )),
        (4.44, "reconstruct", "keys and values of all cached tokens are rebuilt, as drawn above", (
            Box(0, 0, 0.5, 0, cached.replace(" [", "\n["), _CACHED),
            Box(0, 0, 0.54, 0, "times k_up,\ntimes v_up"),
            Box(0, 0, 0.82, 0, f"k nope [K, {h}, {dn}],\nv [K, {h}, {dv}]", _TENSOR),
            Box(0, 0, 0.6, 0, "softmax over\nk nope, $k_r$", _PLAIN),
            Box(0, 0, 0.54, 0, f"mean of v\n[L, {h}, {dv}]", _TENSOR),
        )),
    )  # fmt: skip
    for y, name, told, parts in rows:
        axis.text(0.08, y, name, fontsize=5, weight="bold", va="center")
        axis.text(0.62, y, told, fontsize=5, va="center")
        left, gap = 0.08, 0.065
        for number, part in enumerate(parts):
            box = replace(part, x=left + part.wide / 2, y=y + 0.19, high=0.24)
            if number:
                _arrow(axis, (left - gap, box.y), (left, box.y))
            _draw(axis, box)
            left += part.wide + gap


def _legend(axis: Axes) -> None:
    entries = (("parameter", _WEIGHT), ("not cached", _TENSOR), ("cached", _CACHED))
    for number, (name, colour) in enumerate(entries):
        x = 0.12 + 0.62 * number
        _draw(axis, Box(x, 4.88, 0.12, 0.09, "", colour))
        axis.text(x + 0.1, 4.88, name, fontsize=5, va="center")
    _draw(axis, Box(2.02, 4.88, 0.13, 0.11, "R", COLOURS["sky"], 4.2), round_=True)
    axis.text(2.12, 4.88, "rotation by place in the window", fontsize=5, va="center")


def _bars(axis: Axes, config: ModelConfig) -> None:
    """Cached scalars of a token and layer, to scale."""
    latent = config.latent
    assert latent is not None
    dense = 2 * config.width
    left, full = 0.42, 2.9
    axis.text(0.04, 5.02, f"Scalars cached of a token and layer, to scale: {latent.cached_scalars} "
              f"against {dense} ({dense / latent.cached_scalars:.1f} times fewer)", fontsize=5.4,
              va="center")  # fmt: skip
    rows = (
        ("latent", 5.13, ((latent.d_c, "", _CACHED), (latent.d_rope, "", COLOURS["yellow"]))),
        ("dense", 5.27, ((config.width, f"k {config.width}", _CACHED),
                         (config.width, f"v {config.width}", _CACHED))),
    )  # fmt: skip
    for name, y, parts in rows:
        axis.text(left - 0.04, y, name, fontsize=5, ha="right", va="center")
        start = left
        for size, text, colour in parts:
            wide = full * size / dense
            _draw(axis, Box(start + wide / 2, y, wide, 0.1, text, colour, 5))
            start += wide
        if name == "latent":
            told = f"$c_{{kv}}$ {latent.d_c} + $k_r$ {latent.d_rope}"
            axis.text(start + 0.04, y, told, fontsize=5, va="center")


def _draw(axis: Axes, box: Box, round_: bool = False) -> None:
    from matplotlib.patches import Ellipse, Rectangle

    look: dict[str, Any] = {"fc": box.colour, "ec": "0.25", "lw": 0.5, "zorder": 2}
    if round_:
        axis.add_patch(Ellipse((box.x, box.y), box.wide, box.high, **look))
    else:
        corner = box.x - box.wide / 2, box.y - box.high / 2
        axis.add_patch(Rectangle(corner, box.wide, box.high, **look))
    axis.text(
        box.x, box.y, box.text, fontsize=box.size, ha="center", va="center", zorder=3,
        linespacing=box.spacing,
    )  # fmt: skip


def _arrow(axis: Axes, start: tuple[float, float], stop: tuple[float, float]) -> None:
    look = {"arrowstyle": "-|>,head_width=0.09,head_length=0.16", "lw": 0.5, "color": "0.25",
            "shrinkA": 0, "shrinkB": 0}  # fmt: skip
    axis.annotate("", stop, start, arrowprops=look, zorder=1)
