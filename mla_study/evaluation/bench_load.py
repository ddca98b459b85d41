"""Peak memory of loading a checkpoint, measured in a process of its own.

Resident memory counts the file's mapped pages as well as the process's own ("anonymous") ones, so
the ratio holds both: pages of the file once, and nothing beside them. The high-water mark is reset
after a warm-up load of a tiny model, so that libraries do not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mla_study.config import ModelConfig
from mla_study.errors import UserError

_CHILD = """
import json, sys, time
from pathlib import Path
from mla_study.checkpoints.wan.load import load_model

def status():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {k: int(v.split()[0]) * 1024 for k, _, v in (l.partition(":") for l in lines)
            if k in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}

path, warm, dtype = sys.argv[1], sys.argv[2], sys.argv[3] or None
load_model(warm, dtype=dtype)
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before, start = status(), time.perf_counter()
model = load_model(path, dtype=dtype)
seconds, after = time.perf_counter() - start, status()
print(json.dumps({"peak": after["VmHWM"] - before["VmRSS"],
                  "anonymous": after["RssAnon"] - before["RssAnon"],
                  "of_file": after["RssFile"] - before["RssFile"], "seconds": seconds}))
"""


def write_random(folder: Path, config: ModelConfig, dtype: str = "bf16") -> Path:
    """A checkpoint of random finite weights, streamed to disk: a folder in our own layout."""
    import torch

    from mla_study.checkpoints.wan.load import expected_shapes
    from mla_study.checkpoints.wan.native import NAMES, as_bytes, parse_dtype
    from mla_study.checkpoints.wan.save import write_layout
    from mla_study.checkpoints.wan.writer import Item

    kind = parse_dtype(dtype)
    assert kind is not None
    generator = torch.Generator().manual_seed(0)
    # A prime number of values, and a start for each tensor: no two rows are the same.
    total = 4194301
    noise = as_bytes((torch.randn(total, generator=generator) * 0.02).to(kind))

    def item(name: str, shape: tuple[int, ...]) -> Item:
        def pieces() -> Iterator[memoryview]:
            at = zlib.crc32(name.encode()) % total * kind.itemsize
            left = made.nbytes
            while left > 0:
                piece = noise[at : at + left]
                yield piece
                left, at = left - len(piece), 0

        made = Item(name, NAMES[kind], shape, pieces)
        return made

    items = [item(name, shape) for name, shape in expected_shapes(config).items()]
    return write_layout(items, config, folder, "latent")


def measure_load(path: Path, warm: Path, dtype: str | None = None) -> dict[str, Any]:
    """Load a folder of weights in a fresh process.

    Args:
        path: folder of weights.
        warm: folder of a tiny checkpoint that is loaded first.
        dtype: cast to it; None keeps what is stored.

    Returns:
        ``file`` and ``peak``, ``anonymous``, ``of_file`` in bytes (growth of resident memory while
        loading: at most, and at the end of each kind), ``ratio`` peak / file, ``seconds``.

    Raises:
        UserError: the machine has no /proc, or the load failed.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("peak memory is read from /proc, which this machine lacks: use Linux")
    command = [sys.executable, "-c", _CHILD, str(path), str(warm), dtype or ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{path} could not be loaded by the benchmark: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return {"file": size, **found, "ratio": found["peak"] / size}
