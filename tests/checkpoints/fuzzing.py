"""Damages small valid weight files and opens them, in a process of its own.

``python fuzzing.py FORMAT COUNT SEED FOLDER`` ends with exit code 0 if each mutant was either read
to its last tensor or refused by a UserError of one line, in time and memory. The mutant that was
open when the process died is FOLDER/mutant.SUFFIX.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

SECONDS = 5.0
MEGABYTES = 1000
SUFFIXES = {"safetensors": "safetensors", "torch": "pt", "legacy": "pt", "gguf": "gguf"} | {
    "onnx": "onnx"
}
INTERESTING = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 1 << 16, 1 << 31, (1 << 31) - 1, (1 << 32) - 1]
INTERESTING += [1 << 40, 1 << 62, 1 << 63, (1 << 63) - 1, (1 << 64) - 1]


def flip_bits(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_bytes(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice([1, 2, 5])):
        data[rng.randrange(len(data))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])


def set_integer(rng: random.Random, data: bytearray) -> None:
    layout = rng.choice(["<H", "<I", "<Q", ">I"])
    width = struct.calcsize(layout)
    at = rng.randrange(max(1, len(data) - width))
    value = rng.choice(INTERESTING) & ((1 << 8 * width) - 1)
    data[at : at + width] = struct.pack(layout, value)


def cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def drop_chunk(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice([1, 2, 8, 40])]


def repeat_chunk(rng: random.Random, data: bytearray) -> None:
    at, to = rng.randrange(len(data)), rng.randrange(len(data))
    chunk = data[at : at + rng.choice([1, 4, 16, 100, 400])]
    if rng.random() < 0.5:
        data[to:to] = chunk
    else:
        data[to : to + len(chunk)] = chunk


def insert_noise(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.choice([1, 3, 8, 64]))


BLIND = [flip_bits, set_bytes, set_integer, cut, drop_chunk, repeat_chunk, insert_noise]


def blind(rng: random.Random, data: bytes) -> bytes:
    mutant = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if mutant:
            rng.choice(BLIND)(rng, mutant)
    return bytes(mutant)


def number(rng: random.Random) -> int:
    return rng.choice([*INTERESTING, -1, -(1 << 40), rng.randrange(1000)])


def edit_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Edits the header's fields, or its text, and mends its length."""
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.5:
        text = blind(rng, text)
    else:
        header = json.loads(text)
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        field = rng.choice(["dtype", "shape", "data_offsets", "drop", "other"])
        if field == "dtype":
            entry["dtype"] = rng.choice(["F64", "BF16", "F8_E4M3", "F4", "X", "", 3, None])
        elif field == "drop":
            del entry[rng.choice(list(entry))]
        elif field == "other":
            entry[rng.choice(list(entry))] = rng.choice([None, 1.5, "x", [], {}, [[1]], True])
        else:
            entry[field][rng.randrange(len(entry[field]))] = number(rng)
        text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def edit_torch(rng: random.Random, data: bytes) -> bytes:
    """Damages one record and writes an archive whose checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    pickled = next(name for name in records if name.endswith("/data.pkl"))
    victim = pickled if rng.random() < 0.8 else rng.choice(list(records))
    records[victim] = blind(rng, records[victim])
    if rng.random() < 0.1:
        del records[rng.choice(list(records))]
    out = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return out.getvalue()


def edit_onnx(rng: random.Random, data: bytes) -> bytes:
    """Sets fields of the model's messages."""
    import onnx

    model = onnx.ModelProto.FromString(data)
    tensor = rng.choice(model.graph.initializer)
    for _ in range(rng.choice([1, 1, 2])):
        where = rng.randrange(7)
        if where == 0:
            value = max(-(1 << 63), min((1 << 63) - 1, number(rng)))
            tensor.dims[rng.randrange(len(tensor.dims))] = value
        elif where == 1:
            tensor.data_type = rng.randrange(-1, 30)
        elif where == 2:
            tensor.raw_data = blind(rng, tensor.raw_data)
        elif where == 3:
            tensor.data_location = 1
            for key in ("location", "offset", "length"):
                entry = tensor.external_data.add()
                entry.key, entry.value = (
                    key,
                    rng.choice(["", ".", "..", "0", "x\0", str(number(rng))]),
                )
        elif where == 4:
            node = rng.choice(model.graph.node)
            node.input[rng.randrange(len(node.input))] = rng.choice(
                list(model.graph.initializer)
            ).name
            node.op_type = rng.choice(["MatMul", "Gemm", "DequantizeLinear", "Transpose", "Cast"])
        elif where == 5:
            node = rng.choice(model.graph.node)
            node.output[0] = rng.choice([*node.input, ""])
            node.name = rng.choice(["", "/", "//", "/a/a.0/", "é/x", "/" * 99])
        else:
            tensor.name = rng.choice(["", "1", rng.choice(list(model.graph.initializer)).name])
    return model.SerializeToString()


EDITS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "safetensors": edit_safetensors,
    "torch": edit_torch,
    "onnx": edit_onnx,
}


def mutate(rng: random.Random, kind: str, data: bytes) -> bytes:
    if kind in EDITS and rng.random() < 0.6:
        return EDITS[kind](rng, data)
    return blind(rng, data)


def safetensors_seeds() -> list[bytes]:
    from safetensors.numpy import save

    arrays = {f"blocks.0.attn.{n}.weight": np.ones((3, 4), np.float32) for n in "qk"}
    return [save(arrays), save({**arrays, "v": np.ones((2, 2), np.float16)}, {"format": "pt"})]


def torch_seeds(zipped: bool) -> list[bytes]:
    import torch

    weights = {f"blocks.0.attn.{n}.weight": torch.ones(3, 4) for n in "qkv"}
    odd = {"h": torch.ones(2, 3).half(), "t": torch.ones(4, 3).T, "n": torch.tensor(1)}
    odd["p"] = torch.nn.Parameter(torch.ones(5))
    wrapped = {"generator": weights, "generator_ema": odd, "step": 3, "optimizer": {"state": {}}}
    seeds: list[bytes] = []
    for what in (weights, wrapped, odd, torch.ones(2, 2)):
        out = io.BytesIO()
        torch.save(what, out, _use_new_zipfile_serialization=zipped)
        seeds.append(out.getvalue())
    return seeds


def gguf_seeds(folder: Path) -> list[bytes]:
    import gguf

    seeds: list[bytes] = []
    for kind in ("Q8_0", "Q4_1", "BF16"):
        path = folder / "seed.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint32("llama.block_count", 1)
        writer.add_array("general.tags", ["a", "b"])
        writer.add_array("llama.attention.head_count_kv", [1, 2])
        array = np.ones((2, 32), np.float32)
        quantised = gguf.GGMLQuantizationType[kind]
        blocks = gguf.quants.quantize(array, quantised)
        writer.add_tensor("blk.0.attn_k.weight", blocks, raw_dtype=quantised)
        writer.add_tensor("blk.0.attn_norm.weight", array[0])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        seeds.append(path.read_bytes())
    return seeds


def onnx_seeds() -> list[bytes]:
    from onnx import helper, numpy_helper

    arrays: dict[str, np.ndarray] = {
        "onnx::MatMul_1": np.ones((3, 4), np.float32),
        "q.bias": np.ones(4, np.float32),
        "w_quantized": np.ones((3, 4), np.int8),
        "s": np.ones(1, np.float32),
        "z": np.zeros(1, np.int8),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"], name="/attn/q/MatMul"),
        helper.make_node("Add", ["y", "q.bias"], ["a"], name="/attn/q/Add"),
        helper.make_node("DequantizeLinear", ["w_quantized", "s", "z"], ["d"], axis=0),
        helper.make_node("Transpose", ["d"], ["t"], perm=[1, 0]),
        helper.make_node("Gemm", ["x", "t"], ["g"], name="/attn/k/Gemm", transB=1),
    ]
    protos = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    typed = helper.make_tensor("typed", 10, [2, 2], [1.0, 2.0, 3.0, 4.0])
    graph = helper.make_graph(nodes, "g", [], [], initializer=[*protos, typed])
    return [helper.make_model(graph).SerializeToString()]


def seeds_of(kind: str, folder: Path) -> list[bytes]:
    if kind == "safetensors":
        return safetensors_seeds()
    if kind == "gguf":
        return gguf_seeds(folder)
    return onnx_seeds() if kind == "onnx" else torch_seeds(zipped=kind == "torch")


def attempt(path: Path) -> str:
    """'read' or 'refused'; anything else that happens is the finding."""
    from mla_study.checkpoints.formats.container import Container, TensorInfo
    from mla_study.checkpoints.formats.opening import open_container
    from mla_study.errors import UserError

    def read_whole(file: Container, info: TensorInfo) -> None:
        values = file.read(info.name)
        assert values.shape == info.shape, (info, values.shape)
        assert values.dtype in (np.float32, np.float64), (info, values.dtype)

    def read_second_row(file: Container, info: TensorInfo) -> None:
        if info.shape:
            rows = min(1, max(0, info.shape[0] - 1))
            assert file.read(info.name, 1, 2).shape == (rows, *info.shape[1:]), info

    def digest(file: Container, info: TensorInfo) -> None:
        assert len(file.raw_sha256(info.name)) == 64

    refusals: list[str] = []
    try:
        file = open_container(str(path))
    except UserError as error:
        refusals.append(str(error))
    else:
        for info in list(file.tensors.values()):
            for step in (read_second_row, read_whole, digest):
                try:
                    step(file, info)
                except UserError as error:
                    refusals.append(str(error))
        file.close()
    for message in refusals:
        assert "\n" not in message, message
        assert str(path) in message, message
        assert len(message) < 1000, message
    return "refused" if refusals else "read"


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(kind: str, count: int, seed: str, folder: Path) -> int:
    warnings.simplefilter("error", RuntimeWarning)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"mutant.{SUFFIXES[kind]}"
    seeds = seeds_of(kind, folder)
    for data in seeds:
        path.write_bytes(data)
        assert attempt(path) == "read"
    # Several times what is allowed: a wild allocation is measured, and does not take the machine.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), resource.RLIM_INFINITY))
    before = memory_mb()
    outcomes: dict[str, int] = {}
    slowest = 0.0
    for index in range(count):
        rng = random.Random(f"{seed}/{kind}/{index}")
        path.write_bytes(mutate(rng, kind, rng.choice(seeds)))
        started = time.monotonic()
        try:
            outcome = attempt(path)
        except BaseException:
            print(f"{kind} mutant {index} of seed {seed}, kept as {path}:")
            traceback.print_exc(file=sys.stdout)
            return 1
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        slowest = max(slowest, elapsed := time.monotonic() - started)
        if elapsed > SECONDS or memory_mb() - before > MEGABYTES:
            grown = memory_mb() - before
            print(f"{kind} mutant {index} of seed {seed}, kept as {path}:")
            print(f"took {elapsed:.1f} s and the process grew by {grown:.0f} MB")
            return 1
    grown = memory_mb() - before
    print(json.dumps({**outcomes, "slowest_s": round(slowest, 3), "grown_mb": round(grown)}))
    return 0


def arguments() -> tuple[str, int, str, Path]:
    kind, count, seed, folder = sys.argv[1:]
    return kind, int(count), seed, Path(folder)


if __name__ == "__main__":
    sys.exit(main(*arguments()))
