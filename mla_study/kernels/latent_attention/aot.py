"""Ahead-of-time compilation of the fused kernel: what the compiler says, without a GPU.

Example, for one size (the whole sweep, without arguments, takes about half an hour)::

    python -m mla_study.kernels.latent_attention.aot --d-c 192 --arch 90
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mla_study.errors import EXIT_BAD_INPUT, UserError
from mla_study.kernels.latent_attention.triton_tiles import (
    SCALINGS,
    SHARED_LIMIT,
    Tiles,
    offsets,
    padded,
    parts,
    tiles,
)

MOST_TMEM = 512  # columns of tensor memory of an SM of sm_100
POINTERS = {
    "q_ptr": "{float}",
    "r_ptr": "{float}",
    "c_ptr": "{cache}",
    "k_ptr": "{cache}",
    "cis_ptr": "fp32",
    "c_scales_ptr": "bf16",
    "k_scales_ptr": "bf16",
    "out_ptr": "{out}",
    "lse_ptr": "{out}",
}
ANY_NUMBER = ("heads", "rows", "keys", "c_tokens", "k_tokens", "stride_cs", "stride_ks")


@dataclass(frozen=True)
class Variant:
    """What a compiled kernel is specialised to, besides its tiles."""

    arch: int
    d_c: int
    d_rope: int = 32
    dtype: str = "bf16"
    scheme: str = "none"
    rotate: bool = False
    split: bool = False


@dataclass(frozen=True)
class Facts:
    """What the compiler made of it: registers a thread, bytes a block, instructions in the code.

    The code holds the step over whole key tiles and once more the masked one over the last tile,
    so instructions count both. ``tcgen05`` are the matrix products of sm_100 (UTC..MMA).
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    tmem_columns: int
    hgmma: int
    mma: int
    tcgen05: int

    def refused(self, arch: int) -> str | None:
        """Why these tiles are no choice; None where they are."""
        if self.shared_bytes > SHARED_LIMIT[arch]:
            return "shared memory"
        if self.tmem_columns > MOST_TMEM:
            return "tensor memory"
        return "spills" if self.spill_bytes else None


def compiled(variant: Variant, shape: Tiles) -> Any:
    """Triton's compiled kernel for an architecture that need not be there.

    :raises UserError: Triton is not installed.
    """
    from mla_study.kernels.latent_attention.absorbed_triton import kernels

    source = kernels()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = source.latent_attention
    widths = parts(variant.d_c, shape.widest, shape.narrowest)
    scaling = SCALINGS[variant.scheme]
    constants: dict[str, Any] = {
        "PARTS": widths,
        "OFFSETS": offsets(widths),
        "D_C": variant.d_c,
        "D_ROPE": variant.d_rope,
        "W_ROPE": padded(variant.d_rope),
        "ROTATE": variant.rotate,
        "C_SCALING": scaling,
        "K_SCALING": scaling,
        "SPLIT": variant.split,
        "BM": shape.BM,
        "BN": shape.BN,
    }
    names = {
        "float": variant.dtype,
        "cache": "i8" if scaling else variant.dtype,
        "out": "fp32" if variant.split else variant.dtype,
    }
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in POINTERS:
            signature[name] = "*" + POINTERS[name].format(**names)
        else:
            signature[name] = "fp32" if name == "log2_scale" else "i32"
        if name not in (*ANY_NUMBER, "log2_scale"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", variant.arch, 32),
        options={"num_warps": shape.warps, "num_stages": shape.stages},
    )


def facts(variant: Variant, shape: Tiles) -> Facts:
    """Compile and read the binary: cuobjdump's resource usage, nvdisasm's instructions."""
    built = compiled(variant, shape)
    shared = int(built.metadata.shared)
    tmem = int(getattr(built.metadata, "tmem_size", 0) or 0)
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(built.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
        code = _output(knobs.nvidia.nvdisasm.path, "-c", str(file))
    found = re.search(r"Function latent_attention:\s*REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not name the kernel: {usage[:500]}")
    counts = {
        name: len(re.findall(pattern, code))
        for name, pattern in {
            "hgmma": r"\bHGMMA\b",
            "mma": r"\bHMMA\b",
            "tcgen05": r"\bUTC\w*MMA\b",
        }.items()
    }
    return Facts(int(found[1]), int(found[2]), shared, tmem, **counts)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(argv: Sequence[str] | None = None) -> None:
    """Print the facts of one size; without a size, sweep all of them and write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m mla_study.kernels.latent_attention.aot",
        description="Compile the fused kernel for GPUs that need not be there.",
    )
    parser.add_argument("--d-c", type=int, help="one latent size; without it, the whole sweep")
    parser.add_argument("--d-rope", type=int, default=32)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--out", type=Path, default=Path("results/data/kernel_aot"))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(argv)
    if given.d_c is None:
        from mla_study.kernels.latent_attention import aot_sweep

        tiles_file = Path(__file__).with_name("tiles.json")
        aot_sweep.write(aot_sweep.swept(given.processes), given.out, tiles_file)
        return
    names = [field.name for field in dataclasses.fields(Facts)]
    print("arch", *Tiles._fields, *names)
    for arch in given.arch or sorted(SHARED_LIMIT):
        shape = tiles(arch, given.d_c, given.d_rope, torch.bfloat16)
        found = facts(Variant(arch, given.d_c, given.d_rope), shape)
        print(arch, *shape, *dataclasses.astuple(found))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
