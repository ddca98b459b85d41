"""Damages checkpoints and what lies beside them, and runs the whole command on each.

``python command_fuzzing.py KIND COUNT SEED FOLDER`` ends with exit code 0 if each run gave a table
or exit code 2 with one sentence, in time and memory. The folder keeps the mutant that did not.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints.fuzzing import MEGABYTES, SECONDS, blind, memory_mb, mutate, number
from checkpoints.safetensors_bytes import build
from probe_files import as_bf16, gqa, latent, wan

Folder = dict[str, bytes]  # file name -> content
ROLES = ("query", "key", "value")
OPTIONS: list[list[str]] = [
    [],
    ["--json", "--operators", "kv,qk,ov,composed,o", "--heads", "2"],
    ["--csv", "--operators", "q,k,v,qkv", "--metrics", "r_0.99,condition"],
    ["--list"],
    ["--list", "--json"],
    ["--json", "--layers", "2", "--gauge", "folded"],
]


def rng_of(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def safetensors_folders() -> list[Folder]:
    """A dense model with qk-norms, one in bf16, grouped queries, a latent one, fp8, an adapter."""
    dense = wan(rng_of(), layers=1, d=6, cross=True)
    fp8 = {k: rng_of().integers(0, 100, v.shape).astype(np.uint8) for k, v in dense.items()}
    scales = {f"{k}_scale": np.float32([2.0]) for k in fp8 if "norm" not in k}
    adapter = {
        f"base_model.model.layers.0.self_attn.{r}_proj.lora_{side}.weight": rng_of()
        .standard_normal((2, 6) if side == "A" else (6, 2))
        .astype(np.float32)
        for r in "kv"
        for side in "AB"
    }
    return [
        {"m.safetensors": build(dense)},
        {"m.safetensors": build(*as_bf16(dense))},
        {"m.safetensors": build(gqa(rng_of(), layers=1, d=8, heads=4, kv=2, dim=2))},
        {"m.safetensors": build(latent(rng_of(), layers=1, d=6, r=3))},
        {"m.safetensors": build({**fp8, **scales}, dict.fromkeys(fp8, "F8_E4M3"))},
        {"m.safetensors": build(adapter)},
    ]


def torch_folders(zipped: bool) -> list[Folder]:
    import torch

    dense = {k: torch.from_numpy(v) for k, v in wan(rng_of(), layers=1, d=6).items()}
    half = {f"model.{k}": v.to(torch.bfloat16) for k, v in dense.items()}
    folders: list[Folder] = []
    for what in (dense, {"generator": half, "generator_ema": dense, "step": 3}):
        out = io.BytesIO()
        torch.save(what, out, _use_new_zipfile_serialization=zipped)
        folders.append({"m.pt": out.getvalue()})
    return folders


def gguf_folders(scratch: Path) -> list[Folder]:
    import gguf

    folders: list[Folder] = []
    for kind in ("Q8_0", "F16"):
        path = scratch / "seed.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint32("llama.block_count", 1)
        writer.add_uint32("llama.attention.head_count", 2)
        quantised = gguf.GGMLQuantizationType[kind]
        for role, rows in (("q", 8), ("k", 4), ("v", 4), ("output", 32)):
            array = rng_of().standard_normal((rows, 32)).astype(np.float32)
            blocks = gguf.quants.quantize(array, quantised)
            writer.add_tensor(f"blk.0.attn_{role}.weight", blocks, raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        folders.append({"m.gguf": path.read_bytes()})
    return folders


def onnx_folders() -> list[Folder]:
    from onnx import helper, numpy_helper

    arrays = {f"onnx::MatMul_{n}": rng_of(n).standard_normal((6, 6)) for n in range(3)}
    nodes = [
        helper.make_node(
            "MatMul", ["x", name], [f"y{n}"], name=f"/encoder/layer.0/attention/self/{role}/MatMul"
        )
        for n, (name, role) in enumerate(zip(arrays, ROLES, strict=True))
    ]
    protos = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    graph = helper.make_graph(nodes, "g", [], [], initializer=protos)
    return [{"m.onnx": helper.make_model(graph).SerializeToString()}]


def sharded_folder() -> Folder:
    arrays = gqa(rng_of(), layers=2, d=8, heads=4, kv=2, dim=2)
    shards: Folder = {}
    weight_map: dict[str, str] = {}
    for n in (0, 1):
        name = f"model-{n + 1:05d}-of-00002.safetensors"
        mine = {k: v for k, v in arrays.items() if f".{n}." in k}
        shards[name] = build(mine)
        weight_map |= dict.fromkeys(mine, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    facts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    facts |= {"model_type": "llama", "head_dim": 2, "architectures": ["X"], "text_config": {}}
    facts |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    return {
        **shards,
        "model.safetensors.index.json": json.dumps(index).encode(),
        "config.json": json.dumps(facts).encode(),
    }


def covariance_folder() -> Folder:
    inputs = rng_of().standard_normal((30, 6))
    second = {f"blocks.0.{kind}_attn.k": inputs.T @ inputs / 30 for kind in ("self", "cross")}
    return {
        "m.safetensors": build(wan(rng_of(), layers=1, d=6, cross=True)),
        "c.safetensors": build(second),
    }


def edit_json(rng: random.Random, data: bytes) -> bytes:
    """Puts something else in the place of a value, or damages the text."""
    if rng.random() < 0.4:
        return blind(rng, data)
    holder: Any = json.loads(data)
    whole = holder
    while True:
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.7:
            holder = holder[key]
            continue
        odd = [None, True, "", "../up", "/etc/passwd", "\0", 1.5, [], {}, [[1]], "a" * 300]
        holder[key] = rng.choice([*odd, number(rng), -number(rng), "1"])
        return json.dumps(whole).encode()


def mutant(rng: random.Random, kind: str, folder: Folder) -> tuple[Folder, list[str]]:
    """A damaged copy of a folder, and the arguments of the command."""
    options = rng.choice(OPTIONS)
    if kind in ("index", "config"):
        victim = {"index": "model.safetensors.index.json", "config": "config.json"}[kind]
        arguments = [rng.choice([".", "model.safetensors.index.json"])]
        return {**folder, victim: edit_json(rng, folder[victim])}, arguments + options
    if kind == "covariance":
        damaged = mutate(rng, "safetensors", folder["c.safetensors"])
        arguments = ["m.safetensors", "--covariance", "c.safetensors", "--operators", "kv"]
        return {**folder, "c.safetensors": damaged}, arguments
    [name] = folder
    gently = rng.random() < 0.3
    damaged = values_only(rng, folder[name]) if gently else mutate(rng, kind, folder[name])
    return {name: damaged}, [name, *options]


def values_only(rng: random.Random, data: bytes) -> bytes:
    """Flips bits in the middle of the second half, where the values of all formats lie."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 3, 30])):
        damaged[rng.randrange(len(data) // 2, len(data) * 3 // 4)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def run(arguments: list[str]) -> str:
    """Run the command; ``table`` or ``refused``, AssertionError for anything else."""
    from mla_study.cli import rank_probe_main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = rank_probe_main(arguments)
    said, told = out.getvalue(), err.getvalue()
    assert "Traceback" not in told, told
    if code == 0:
        assert said, "a table must be printed"
        if "--json" in arguments:
            json.loads(said)
        return "table"
    assert code == 2, f"exit code {code}"
    assert not said, "nothing is printed where all is refused"
    assert told.count("\n") == 1 and told.startswith("rank-probe: "), told
    assert len(told) < 1500, told
    return "refused"


def folders_of(kind: str, scratch: Path) -> list[Folder]:
    makers: dict[str, Callable[[], list[Folder]]] = {
        "safetensors": safetensors_folders,
        "torch": lambda: torch_folders(True),
        "legacy": lambda: torch_folders(False),
        "gguf": lambda: gguf_folders(scratch),
        "onnx": onnx_folders,
        "index": lambda: [sharded_folder()],
        "config": lambda: [sharded_folder()],
        "covariance": lambda: [covariance_folder()],
    }
    return makers[kind]()


def fill(place: Path, folder: Folder) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name, content in folder.items():
        (place / name).write_bytes(content)


def without_record() -> None:
    """Who ran what on which machine takes longer than a probe of this size."""
    from mla_study.study import probing, runs

    probing.code_hash = runs.code_hash = lambda *names, **more: "0" * 64
    runs.observe = dict


def main(kind: str, count: int, seed: str, scratch: Path) -> int:
    warnings.simplefilter("error")
    scratch.mkdir(parents=True, exist_ok=True)
    without_record()
    folders = folders_of(kind, scratch)
    place = scratch / "mutant"
    for folder in folders:
        for options in OPTIONS:
            fill(place, folder)
            os.chdir(place)
            path = "." if len(folder) > 2 else next(iter(folder))
            made = run([path, *options])
            assert made == "table" or options, "an undamaged checkpoint gives a table"
            os.chdir(scratch)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), resource.RLIM_INFINITY))
    before = memory_mb()
    outcomes = {"table": 0, "refused": 0}
    slowest = 0.0
    for index in range(count):
        rng = random.Random(f"{seed}/{kind}/{index}")
        damaged, arguments = mutant(rng, kind, rng.choice(folders))
        fill(place, damaged)
        os.chdir(place)
        told = f"{kind} mutant {index} of seed {seed}, kept in {place}, {arguments}:"
        started = time.monotonic()
        try:
            outcomes[run(arguments)] += 1
        except BaseException:
            print(told)
            traceback.print_exc(file=sys.stdout)
            return 1
        slowest = max(slowest, time.monotonic() - started)
        grown = memory_mb() - before
        if slowest > SECONDS or grown > MEGABYTES:
            print(f"{told} took {slowest:.1f} s, and the process grew by {grown:.0f} MB")
            return 1
        os.chdir(scratch)
    grown = memory_mb() - before
    print(json.dumps({**outcomes, "slowest_s": round(slowest, 3), "grown_mb": round(grown)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])))
