"""What the model costs: against diffusers, against dense masks, in memory, over a long rollout.

Every ratio comes from one interleaved run on one thread. Worth running on a machine that does
nothing else::

    mla-study bench-model --quick --no-write
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from tqdm import tqdm

from mla_study.config import ModelConfig, WindowConfig, mini, wan_1_3b
from mla_study.errors import UserError
from mla_study.evaluation.bench_load import measure_load, write_random
from mla_study.evaluation.goals import Goal, Row, say, show, write_rows
from mla_study.evaluation.timing import Spread, interleaved, threads
from mla_study.kernels.masks import Visibility, chunk_causal, teacher_forcing
from mla_study.model.cache import RollingCache
from mla_study.model.storage import Storage
from mla_study.model.transformer import WanTransformer
from mla_study.rollout.measure import steadiness
from mla_study.rollout.stream import Rollout, random_model

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from mla_study.model.attention import Piece, SelfAttention
    from mla_study.model.transformer import Block

PROGRAM = "bench-model"
TINY = replace(mini(), name="tiny", learned_positions=False, rope_base=10000.0, text_len=512)
QUARTER = replace(
    wan_1_3b(), name="quarter", layers=2, width=384, heads=3, ffn_width=2240,
    latent=None,
)  # fmt: skip
# (frames, rows, columns) of the two dense forwards, (rows, columns) of training passes
_FULL_SIZES = (12, 12, 12), (3, 60, 104), (16, 26)


def against_diffusers(config: ModelConfig, size: tuple[int, int, int], repeats: int) -> Row:
    """Our dense forward over that of diffusers' ``WanTransformer3DModel``, same weights.

    Args:
        size: latent frames, height and width.

    Raises:
        UserError: diffusers is missing, or the outputs differ (then there is no number).
    """
    try:
        from diffusers import WanTransformer3DModel  # pyright: ignore[reportPrivateImportUsage]
    except ImportError:
        raise UserError("the comparison needs diffusers: pip install 'mla-study[video]'") from None
    from mla_study.checkpoints.wan.layouts import diffusers_json
    from mla_study.checkpoints.wan.names import to_diffusers

    ours = random_model(config)
    theirs: Any = WanTransformer3DModel.from_config(json.loads(diffusers_json(config)))
    theirs.eval().load_state_dict({to_diffusers(k): v for k, v in ours.state_dict().items()})
    make = torch.Generator().manual_seed(0)
    x = torch.randn(1, config.in_channels, *size, generator=make)
    t, text = torch.tensor([500.0]), torch.randn(1, 512, config.text_dim, generator=make)

    def mine() -> Tensor:
        return ours(x, t, ours.condition(text))

    def other() -> Tensor:
        return theirs(x, t, text, return_dict=False)[0]

    with torch.no_grad():
        gap = float((mine() - other()).abs().max())
        if not gap < 1e-4:
            raise UserError(f"{config.name}: outputs differ by {gap:.3g}, so there is no ratio")
        times = interleaved({"ours": mine, "diffusers": other}, repeats)
    noise = times.noise
    setting = f"{config.name} {'x'.join(map(str, size))}, A/A {noise.low:.3f} to {noise.high:.3f}"
    ratio = times.ratio("ours", "diffusers")
    return Row.of("dense forward / diffusers", ratio, "ratio", setting, Goal("<=", 1.0))


@contextmanager
def dense_masks(model: WanTransformer, rule: Visibility, tokens: int) -> Generator[None]:
    """Dense self-attention by one square mask over all tokens, in place of segments."""
    mask = torch.from_numpy(rule.tokens(tokens))
    attentions = [cast("Block", block).self_attn for block in model.blocks]

    def masked(
        self: SelfAttention, query: tuple[Tensor], entry: tuple[Tensor, Tensor], pieces: list[Piece]
    ) -> Tensor:
        # absolute positions: a token has the same rotation in whatever segment it is seen
        cis = torch.cat([piece.query_rotation.cis for piece in pieces])
        turn = replace(pieces[0].query_rotation, cis=cis)
        q, k, v = turn.apply(query[0]), turn.apply(entry[0]), entry[1]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        return out.transpose(1, 2).flatten(2)

    for attention in attentions:
        attention.attend = masked.__get__(attention)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for attention in attentions:
            del attention.attend


def training_passes(
    config: ModelConfig,
    frames: int,
    size: tuple[int, int],
    window: WindowConfig | None,
    teacher: bool,
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One training pass (forward and backward) by segments, and the same by dense masks."""
    model = random_model(config).train()
    make = torch.Generator().manual_seed(0)
    copies = 2 if teacher else 1
    x = torch.randn(1, config.in_channels, copies * frames, *size, generator=make)
    t = torch.rand(1, copies * frames, generator=make) * 999
    text = model.condition(torch.zeros(1, 1, config.text_dim))
    text = replace(
        text, keys=tuple(tuple((k.detach(), v.detach()) for k, v in b) for b in text.keys)
    )
    rule = (
        teacher_forcing(frames, config.window.chunk, window)
        if teacher
        else chunk_causal(frames, config.window.chunk, window)
    )
    tokens = size[0] * size[1] // (config.patch[1] * config.patch[2])

    def step() -> Tensor:
        model.zero_grad()
        out = model(x, t, text, rule)
        out.square().mean().backward()
        return out.detach()

    def dense() -> Tensor:
        with dense_masks(model, rule, tokens):
            return step()

    return step, dense


def against_dense_masks(frames: int, size: tuple[int, int], repeats: int) -> list[Row]:
    """Seconds of the training passes by segments over those by the full square."""
    rows: list[Row] = []
    for name, teacher, window in (
        ("chunk-causal", False, None),
        ("chunk-causal, window 1 + 6", False, WindowConfig()),
        ("teacher forcing", True, None),
    ):
        step, dense = training_passes(QUARTER, frames, size, window, teacher)
        gap = float((step() - dense()).abs().max())
        if not gap < 1e-4:
            raise UserError(f"{name}: segments and mask differ by {gap:.3g}, so there is no ratio")
        times = interleaved({"segments": step, "mask": dense}, repeats, 1)
        noise = times.noise
        setting = (
            f"{QUARTER.name} width, {frames} frames of {size[0]}x{size[1]}, forward and backward, "
            f"A/A {noise.low:.3f} to {noise.high:.3f}"
        )
        ratio = times.ratio("segments", "mask")
        rows.append(Row.of(f"{name} / dense mask", ratio, "ratio", setting, Goal("<", 1.0)))
    return rows


_PEAK = """
import sys
import torch
from mla_study.config import WindowConfig
from mla_study.evaluation.bench_model import QUARTER, training_passes
from mla_study.evaluation.efficiency.step_memory import peak_of

torch.set_num_threads(1)
frames, which, *size = map(int, sys.argv[1:])
warm = training_passes(QUARTER, 3, tuple(size), WindowConfig(), False)[which]
warm()
call = training_passes(QUARTER, frames, tuple(size), WindowConfig(), False)[which]
print(peak_of(call, torch.device("cpu")))
"""


def training_memory(frames: int, size: tuple[int, int]) -> list[Row]:
    """Peak memory of a windowed training pass at a length and at twice that length."""
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("peak memory is read from /proc, which this machine lacks: use Linux")
    rows: list[Row] = []
    for which, name in enumerate(("segments", "dense mask")):
        peaks = [
            float(_python("-c", _PEAK, *map(str, (n, which, *size)))) / 1e6
            for n in (frames, 2 * frames)
        ]
        setting = f"quarter width, {size[0]}x{size[1]} latents, window 1 + 6"
        for n, peak in zip((frames, 2 * frames), peaks, strict=True):
            rows.append(
                Row(f"peak of a training pass, {name}", peak, "MB", f"{setting}, {n} frames")
            )
        goal = Goal("<=", 2.2) if which == 0 else None
        grown = peaks[1] / peaks[0]
        rows.append(Row(f"twice the frames, peak of {name}", grown, "ratio", setting, goal))
    return rows


def cache_bytes() -> list[Row]:
    """Allocated bytes a token and a layer, latent over dense bf16, at Wan 1.3B's shapes."""
    dense, latent = (replace(wan_1_3b(kind), layers=1) for kind in (False, True))

    def held(config: ModelConfig, storage: Storage) -> float:
        return RollingCache(config, WindowConfig(0, 0, 1), 1, 1560, storage).bytes_per_token_layer

    base = held(dense, "bf16")
    kinds: tuple[tuple[str, Storage, Goal], ...] = (
        ("bf16", "bf16", Goal("==", 224 / 3072)),
        ("int8 per channel", "int8-channel", Goal("<=", 0.04)),
        ("int8 per token", "int8-token", Goal("<=", 0.04)),
    )
    setting = f"wan-1.3b, bytes a token and layer over {base:g}"
    return [
        Row(f"cache, latent {name} / dense bf16", held(latent, kind) / base, "ratio", setting, goal)
        for name, kind, goal in kinds
    ]


def long_rollout(chunks: int) -> list[Row]:
    """Pace and memory at the end of a rollout against its start, dense and latent miniature."""
    rows: list[Row] = []
    span = min(100, chunks // 2)
    for latent in (False, True):
        rollout = Rollout(random_model(mini(latent)), "a")
        kind = "latent" if latent else "dense"
        total = chunks + span
        with tqdm(total=total, desc=f"{kind} rollout", unit="chunk", disable=None) as bar:
            found = steadiness(rollout, chunks, span, span, lambda done, bar=bar: bar.update())
        setting = f"mini {kind}, {chunks} chunks after {span}, medians of {span}"
        rows.append(
            Row("last chunks / first chunks", found.ratio, "ratio", setting, Goal("<=", 1.05))
        )
        grown = found.rss_growth / 1e6
        rows.append(Row("growth of resident memory", grown, "MB", setting, Goal("<=", 1.0)))
    return rows


def loading(config: ModelConfig) -> list[Row]:
    """Peak memory of loading a checkpoint over its size, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        warm = write_random(Path(folder) / "warm", replace(mini(), learned_positions=False))
        say(PROGRAM, f"writing a checkpoint of {config.name}'s shape (bf16)")
        big = write_random(Path(folder) / "big", config)
        found = measure_load(big, warm)
    setting = f"{config.name} shape, {found['file'] / 1e9:.3g} GB bf16, memory-mapped"
    return [
        Row("peak of loading / file", found["ratio"], "ratio", setting, Goal("<=", 1.1)),
        Row("memory of its own / file", found["anonymous"] / found["file"], "ratio", setting),
    ]


def starting(repeats: int) -> list[Row]:
    """Wall seconds of an import and of ``--help``, less those of an empty interpreter."""
    code = "import mla_study, sys; assert 'torch' not in sys.modules"

    def wall(*arguments: str) -> float:
        begun = time.perf_counter()
        _python(*arguments)
        return time.perf_counter() - begun

    calls = {"nothing": ("-c", ""), "import": ("-c", code), "help": ("-m", "mla_study", "--help")}
    seconds = {name: [wall(*call) for _ in range(repeats + 1)][1:] for name, call in calls.items()}
    extra = [a - b for a, b in zip(seconds["import"], seconds["nothing"], strict=True)]
    setting = "wall time of a process, torch is not imported"
    return [
        Row.of("import mla_study", Spread.of(extra), "s", setting, Goal("<", 0.3)),
        Row.of("mla-study --help", Spread.of(seconds["help"]), "s", "wall time", Goal("<", 1.0)),
    ]


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the benchmark's process ended with {done.returncode}: {last}")
    return done.stdout.strip()


def bench_model(quick: bool = False, write: bool = True) -> int:
    """Run everything, print each row as it is measured, write ``results/data/bench_model``.

    Args:
        quick: small shapes and few repeats, to try it; nothing is written.
    """
    tiny, quarter, causal = ((3, 8, 8), (3, 12, 16), (8, 8)) if quick else _FULL_SIZES
    repeats, frames, layers = (3, 6, 1) if quick else (15, 24, 30)
    parts: tuple[tuple[str, Callable[[], Sequence[Row]]], ...] = (
        ("dense forward, tiny", lambda: [against_diffusers(TINY, tiny, 2 * repeats)]),
        ("dense forward, quarter width", lambda: [against_diffusers(QUARTER, quarter, repeats)]),
        ("training passes", lambda: against_dense_masks(frames // 2, causal, repeats)),
        ("memory of training passes", lambda: training_memory(frames, causal)),
        ("cache", cache_bytes),
        ("long rollout", lambda: long_rollout(40 if quick else 2000)),
        ("loading", lambda: loading(replace(wan_1_3b(), layers=layers))),
        ("starting", lambda: starting(3 if quick else 9)),
    )
    rows: list[Row] = []
    with threads(1):
        for name, part in parts:
            say(PROGRAM, name)
            found = list(part())
            show(found)
            rows += found
    if write and not quick:
        config = {"repeats": repeats, "threads": 1, "clock": "CPU seconds of the process"}
        modules = ("mla_study.evaluation.bench_model",)
        say(PROGRAM, f"wrote {write_rows('bench_model', rows, config=config, modules=modules)}")
    return 0
