"""Memory of one pass over a full cache: counted on the meta device, or measured on a real one.

Counting runs the model's own code on tensors without content, keeps book of every storage that
lives, and takes the peak: no GPU is needed, and Wan's real shapes cost nothing. Attention proper
counts as a fused kernel, which allocates its output alone; an allocator's rounding and the
workspace of libraries are not seen.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mla_study.config import ModelConfig, WindowConfig, from_dict, to_dict
from mla_study.errors import UserError
from mla_study.evaluation.efficiency.model_cost import frame_tokens, variant_of
from mla_study.model.attention import LatentSelfAttention
from mla_study.model.cache import RollingCache
from mla_study.model.storage import DTYPES, Storage
from mla_study.model.transformer import Block, WanTransformer


@dataclass(frozen=True)
class Step:
    """One pass of a model over a chunk, its window full.

    Attributes:
        size: (height, width) of the latent; None: the model's own.
        head_group: heads that reconstruction makes at a time; None: all.
    """

    config: ModelConfig
    window: WindowConfig
    form: str | None = None
    batch: int = 1
    storage: Storage = "bf16"
    dtype: str = "bf16"
    size: tuple[int, int] | None = None
    head_group: int | None = None


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step: what lies there before it, and what it needs at its peak beside that.

    Attributes:
        text: cross-attention keys of the prompts, one a request.
    """

    weights: int
    cache: int
    text: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside the block and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._meet(given, 0)
        made = func(*args, **(kwargs or {}))
        for result in tree_leaves(made):
            if isinstance(result, Tensor):
                self._meet(result, result.untyped_storage().nbytes())
        return made

    def _meet(self, tensor: Tensor, size: int) -> None:
        """Count a storage once; what comes from outside counts 0."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Attention proper as an allocation of its output."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def counted(step: Step) -> StepMemory:
    """Peak of live tensors of a step, counted on the meta device (class ``modelled``).

    Raises:
        UserError: a form, dtype or size that does not fit the model.
    """
    held, run = _prepared(step, torch.device("meta"))
    with LiveBytes() as live, _FusedAttention():
        run()
    return replace(held, peak=live.peak)


@functools.lru_cache(maxsize=256)
def counted_slope(step: Step) -> float:
    """Bytes that one more request adds at the peak of a step, with its cache and its prompt's keys.

    Blocks free what they made, so one layer has the peak of all; what is held is held in all.
    """
    thin = replace(step, config=replace(step.config, layers=1))
    one, two = (counted(replace(thin, batch=batch)) for batch in (1, 2))
    held = two.cache + two.text - one.cache - one.text
    return held * step.config.layers + two.peak - one.peak


def measured(step: Step, device: torch.device) -> StepMemory:
    """Peak of a step on this device (class ``measured``): allocated by torch on a GPU, resident
    memory of this process on the CPU, which wants a process of its own (:func:`in_child`).

    Raises:
        UserError: as :func:`counted`; or the CPU's peak cannot be read on this system.
        torch.OutOfMemoryError: on a GPU.
    """
    held, run = _prepared(step, device)
    run()  # what libraries set up once
    return replace(held, peak=peak_of(run, device))


def in_child(step: Step) -> StepMemory:
    """:func:`measured` on the CPU in a process of its own, on one thread.

    Raises:
        UserError: the process died; MemoryError: it ran out of memory.
    """
    code = f"from {__name__} import child; child()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(to_dict(step)),
        capture_output=True,
        text=True,
        check=False,
        # memory that is let go of goes back to the system, or the warm-up's would hide the peak
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if "MemoryError" in last or "not enough memory" in last or "allocate memory" in last:
            raise MemoryError(last)
        raise UserError(f"the step's process ended with {done.returncode}: {last}")
    return StepMemory(**json.loads(done.stdout))


def child() -> None:
    """Read a step as JSON on stdin, print its :class:`StepMemory`."""
    torch.set_num_threads(1)
    step = from_dict(json.loads(sys.stdin.read()), Step, "the step")
    print(json.dumps(asdict(measured(step, torch.device("cpu")))))


def _prepared(step: Step, device: torch.device) -> tuple[StepMemory, Callable[[], object]]:
    """What a model with random weights and a full cache holds, and the call of one pass."""
    config, window = step.config, step.window
    variant = variant_of(config, step.form)
    if step.dtype not in DTYPES:
        raise UserError(f"there is no dtype '{step.dtype}': give one of {', '.join(DTYPES)}")
    size = step.size or config.latent_size
    dtype = DTYPES[step.dtype]
    with torch.device(device):
        model = WanTransformer(config).to(dtype).eval().requires_grad_(False)
        x = torch.zeros(step.batch, config.in_channels, window.chunk, *size, dtype=dtype)
        text = torch.zeros(step.batch, config.text_len, config.text_dim, dtype=dtype)
        t = torch.full((step.batch,), 500.0)
    for block in cast("list[Block]", list(model.blocks)):
        if isinstance(block.self_attn, LatentSelfAttention):
            block.self_attn.form, block.self_attn.head_group = variant, step.head_group
    cache = RollingCache(
        config, window, step.batch, frame_tokens(config, size), step.storage, device
    )
    ids, held = range(0), list[int]()
    for index in range(-(-window.key_frames // window.chunk) + 1):
        ids = range(index * window.chunk, (index + 1) * window.chunk)
        held = cache.begin(ids)
    grid = (size[0] // config.patch[1], size[1] // config.patch[2])
    with torch.no_grad():
        told = model.condition(text)
    pieces = model.step_pieces(ids, held, "relative", *grid, device)

    def run() -> object:
        with torch.no_grad():
            return model(x, t, told, pieces=pieces, memory=cache.layers())

    weights = sum(p.nbytes for p in model.parameters())
    keys = sum(t.nbytes for block in told.keys for pair in block for t in pair)
    return StepMemory(weights, cache.nbytes, keys, 0), run


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call needs at its peak: allocated on a GPU, resident in this process on the CPU.

    Raises:
        UserError: the CPU's peak cannot be read on this system.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    switch = Path("/proc/self/clear_refs")
    if not switch.exists():
        raise UserError("peak memory is read from /proc, which this machine lacks: use Linux")
    switch.write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
