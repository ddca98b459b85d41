"""Ahead-of-time compilation of the fused kernel: what the compiler says, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_study.kernels.latent_attention.triton_tiles import (
    SCALINGS,
    SHARED_LIMIT,
    Tiles,
    offsets,
    padded,
    parts,
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
