from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_study.checkpoints.formats.onnx_file import OnnxFile
from mla_study.checkpoints.formats.opening import open_container
from mla_study.errors import UserError

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

SELF = "/encoder/layer.0/attention/self"


def node(op: str, inputs: list[str], name: str = "", **attributes: Any) -> Any:
    output = f"{name or op}_{'_'.join(inputs)}_out"
    return helper.make_node(op, inputs, [output], name=name, **attributes)


def write(path: Path, nodes: list[Any], initialisers: dict[str, Any], **options: Any) -> str:
    """A model file; initialisers are arrays or ready TensorProtos. Not a runnable graph."""
    protos = [
        numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
        for name, value in initialisers.items()
    ]
    graph = helper.make_graph(nodes, "g", [], [], initializer=protos)
    onnx.save(helper.make_model(graph, producer_name="pytorch"), path, **options)
    return str(path)


@pytest.fixture
def draw(seed):
    generator = np.random.default_rng(seed)
    return lambda *shape: generator.normal(size=shape).astype(np.float32)


class TestNames:
    def test_like_a_torch_export(self, tmp_path, draw):
        query, key, up = draw(5, 7), draw(5, 6), draw(7, 11)
        path = write(
            tmp_path / "a.onnx",
            [
                node("MatMul", ["x", "onnx::MatMul_123"], f"{SELF}/query/MatMul"),
                node("MatMul", ["x", "onnx::MatMul_124"], f"{SELF}/key/MatMul"),
                node("MatMul", ["x", "77"], "/mlp/mlp.0/MatMul_1"),
                node("Add", ["y", "onnx::Add_9"], f"{SELF}/query/Add"),
            ],
            {
                "onnx::MatMul_123": query,
                "onnx::MatMul_124": key,
                "77": up,
                "onnx::Add_9": draw(7),
                "encoder.layer.0.attention.self.key.bias": draw(6),
            },
        )
        file = OnnxFile(path)
        stem = "encoder.layer.0.attention.self"
        assert {name: info.shape for name, info in file.tensors.items()} == {
            f"{stem}.query.weight": (7, 5),
            f"{stem}.key.weight": (6, 5),
            "mlp.0.weight": (11, 7),
            f"{stem}.query.bias": (7,),
            f"{stem}.key.bias": (6,),
        }
        np.testing.assert_array_equal(file.read(f"{stem}.query.weight"), query.T)
        before = file.bytes_read
        np.testing.assert_array_equal(file.read(f"{stem}.query.weight", 2, 5), query.T[2:5])
        assert file.bytes_read - before == 3 * 5 * 4
        digest = hashlib.sha256(query.tobytes()).hexdigest()
        assert file.raw_sha256(f"{stem}.query.weight") == digest
        assert file.metadata["producer_name"] == "pytorch"
        renamed, transposed = file.notes
        assert "4 initialisers are named after the nodes" in renamed
        assert "3 weights are stored [in, out]" in transposed

    def test_a_named_bias_names_the_weight(self, tmp_path, draw):
        product = node("MatMul", ["x", "1234"], "MatMul_7")
        path = write(
            tmp_path / "a.onnx",
            [product, node("Add", ["blocks.3.attn.k.bias", product.output[0]], "Add_8")],
            {"1234": draw(5, 6), "blocks.3.attn.k.bias": draw(6)},
        )
        assert list(OnnxFile(path).tensors) == ["blocks.3.attn.k.weight", "blocks.3.attn.k.bias"]

    def test_the_newer_exporter_keeps_scopes_in_metadata(self, tmp_path, draw):
        product = node("MatMul", ["x", "val_12"], "node_MatMul_13")
        entry = product.metadata_props.add()
        entry.key = "pkg.torch.onnx.name_scopes"
        entry.value = "['', 'blocks.0', 'blocks.0.attn', 'blocks.0.attn.q', 'linear_2']"
        path = write(tmp_path / "a.onnx", [product], {"val_12": draw(5, 6)})
        assert list(OnnxFile(path).tensors) == ["blocks.0.attn.q.weight"]

    def test_two_products_in_one_scope(self, tmp_path, draw):
        path = write(
            tmp_path / "a.onnx",
            [
                node("MatMul", ["x", "onnx::MatMul_1"], "/attn/MatMul"),
                node("MatMul", ["x", "onnx::MatMul_2"], "/attn/MatMul_1"),
                node("MatMul", ["x", "onnx::MatMul_3"], "MatMul_9"),
            ],
            {f"onnx::MatMul_{n}": draw(5, 6) for n in (1, 2, 3)},
        )
        assert list(OnnxFile(path).tensors) == [
            "attn.weight",
            "attn.MatMul_1.weight",
            "onnx::MatMul_3",  # no scope says more
        ]

    def test_an_existing_name_is_not_taken_twice(self, tmp_path, draw):
        path = write(
            tmp_path / "a.onnx",
            [node("MatMul", ["x", "onnx::MatMul_1"], "/attn/q/MatMul")],
            {"attn.q.weight": draw(3, 4), "onnx::MatMul_1": draw(5, 6)},
        )
        file = OnnxFile(path)
        assert list(file.tensors) == ["attn.q.weight", "attn.q.MatMul.weight"]
        assert file.tensors["attn.q.weight"].shape == (3, 4)


class TestOrientation:
    @pytest.mark.parametrize(
        ("op", "inputs", "attributes", "transposed"),
        [
            ("MatMul", ["x", "w"], {}, True),
            ("MatMul", ["w", "x"], {}, False),
            ("Gemm", ["x", "w", "b"], {"transB": 1}, False),
            ("Gemm", ["x", "w", "b"], {"transB": 0}, True),
            ("Gemm", ["x", "w"], {}, True),
            ("FusedMatMul", ["x", "w"], {"transB": 1}, False),
            ("Attention", ["x", "w", "b"], {"domain": "com.microsoft", "num_heads": 2}, True),
            ("Gather", ["w", "ids"], {}, False),
        ],
    )
    def test_rows_are_outputs(self, tmp_path, draw, op, inputs, attributes, transposed):
        array = draw(5, 6)
        path = write(
            tmp_path / "a.onnx", [node(op, inputs, **attributes)], {"w": array, "b": draw(6)}
        )
        file = OnnxFile(path)
        expected = array.T if transposed else array
        assert file.tensors["w"].shape == expected.shape
        np.testing.assert_array_equal(file.read("w"), expected)
        np.testing.assert_array_equal(file.read("w", 1, 4), expected[1:4])

    def test_through_transpose_cast_and_identity(self, tmp_path, draw):
        steps = [node("Cast", ["w"], to=1)]
        steps.append(node("Transpose", [steps[-1].output[0]], perm=[1, 0]))
        steps.append(node("Identity", [steps[-1].output[0]]))
        steps.append(node("MatMul", ["x", steps[-1].output[0]]))
        array = draw(5, 6)
        path = write(tmp_path / "a.onnx", steps, {"w": array})
        np.testing.assert_array_equal(OnnxFile(path).read("w"), array)

    def test_convolutions_and_stacks_keep_their_axes(self, tmp_path, draw):
        conv, stack = draw(9, 3, 1, 1), draw(2, 5, 6)
        path = write(
            tmp_path / "a.onnx",
            [
                node("Conv", ["x", "onnx::Conv_1", "onnx::Conv_2"], "/mid/qkv/Conv"),
                node("MatMul", ["x", "stack"]),
            ],
            {"onnx::Conv_1": conv, "onnx::Conv_2": draw(9), "stack": stack},
        )
        file = OnnxFile(path)
        assert list(file.tensors) == ["mid.qkv.weight", "mid.qkv.bias", "stack"]
        np.testing.assert_array_equal(file.read("mid.qkv.weight", 3, 6), conv[3:6])
        np.testing.assert_array_equal(file.read("stack"), stack)

    def test_branches_and_constants(self, tmp_path, draw):
        inside, constant = draw(5, 6), draw(4, 3)
        branch = helper.make_graph(
            [node("MatMul", ["x", "onnx::MatMul_5"], "/inner/v/MatMul")],
            "branch",
            [],
            [],
            initializer=[numpy_helper.from_array(inside, "onnx::MatMul_5")],
        )
        held = helper.make_node(
            "Constant", [], ["/q/Constant_output_0"], value=numpy_helper.from_array(constant)
        )
        scalar = helper.make_node(
            "Constant", [], ["n"], value=numpy_helper.from_array(np.array([3]))
        )
        path = write(
            tmp_path / "a.onnx",
            [
                held,
                scalar,
                node("MatMul", ["x", "/q/Constant_output_0"], "/q/MatMul"),
                helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
            ],
            {},
        )
        file = OnnxFile(path)
        assert set(file.tensors) == {"q.weight", "inner.v.weight"}
        np.testing.assert_array_equal(file.read("q.weight"), constant.T)
        np.testing.assert_array_equal(file.read("inner.v.weight"), inside.T)


class TestQuantised:
    @pytest.mark.parametrize("axis", [None, 0, 1])
    def test_dequantize_linear(self, tmp_path, seed, axis):
        generator = np.random.default_rng(seed)
        stored = generator.integers(-128, 128, size=(5, 6)).astype(np.int8)
        count = 1 if axis is None else stored.shape[axis]
        scale = generator.uniform(0.01, 0.1, size=count).astype(np.float32)
        zero = generator.integers(-9, 9, size=count).astype(np.int8)
        if axis is None:
            scale, zero = scale.reshape(()), zero.reshape(())
        linear = node("DequantizeLinear", ["w_quantized", "s", "z"], axis=axis or 0)
        path = write(
            tmp_path / "a.onnx",
            [linear, node("MatMul", ["x", linear.output[0]])],
            {"w_quantized": stored, "s": scale, "z": zero},
        )
        file = OnnxFile(path)
        shape = [1, 1] if axis is None else [-1 if a == axis else 1 for a in (0, 1)]
        wide = stored.astype(np.float32) - zero.astype(np.float32).reshape(shape)
        expected = (wide * scale.reshape(shape)).T
        assert file.tensors["w"].dtype == "I8"
        np.testing.assert_allclose(file.read("w"), expected, rtol=1e-6)
        np.testing.assert_allclose(file.read("w", 2, 5), expected[2:5], rtol=1e-6)
        assert "1 integer weights are dequantised" in file.notes[-1]

    def test_dynamic_quantisation_finds_its_scale_by_stem(self, tmp_path, seed):
        stored = np.random.default_rng(seed).integers(0, 256, size=(5, 6)).astype(np.uint8)
        path = write(
            tmp_path / "a.onnx",
            [
                node("MatMulInteger", ["x", "onnx::MatMul_1_quantized", "xz", "wz"], "/q/MatMul"),
                node("MatMulInteger", ["x", "lost_quantized", "xz", "wz"]),
            ],
            {
                "onnx::MatMul_1_quantized": stored,
                "onnx::MatMul_1_scale": np.float32(0.25).reshape(1),
                "wz": np.array(128, dtype=np.uint8),
                "lost_quantized": stored,
            },
        )
        file = OnnxFile(path)
        expected = (stored.astype(np.float32) - 128).T * 0.25
        np.testing.assert_array_equal(file.read("q.weight"), expected)
        with pytest.raises(UserError, match="scale of the integer weight"):
            file.read("lost")


def fp8_and_bf16() -> list[Any]:
    types = onnx.TensorProto
    return [types.BFLOAT16, types.FLOAT16, types.FLOAT8E4M3FN, types.FLOAT8E5M2, types.DOUBLE]


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("kind", fp8_and_bf16())
def test_stored_types(tmp_path, kind, raw):
    values = np.array([[1.0, -2.0, 0.5], [0.0, 1.5, -0.25]])  # exact in all of them
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    proto = numpy_helper.from_array(values.astype(dtype), "w")
    if not raw:
        bits = values.astype(dtype)
        field = proto.double_data if kind == onnx.TensorProto.DOUBLE else proto.int32_data
        integers = bits if field is proto.double_data else bits.view(f"u{bits.itemsize}")
        proto.ClearField("raw_data")
        field.extend(integers.ravel().tolist())
    file = OnnxFile(write(tmp_path / "a.onnx", [], {"w": proto}))
    result = file.read("w")
    assert result.dtype == (np.float64 if kind == onnx.TensorProto.DOUBLE else np.float32)
    np.testing.assert_array_equal(result, values)


class TestExternalData:
    def test_read_by_offset(self, tmp_path, draw):
        first, second = draw(5, 6), draw(7, 5)
        path = write(
            tmp_path / "a.onnx",
            [node("MatMul", ["x", "w"])],
            {"w": first, "u": second},
            save_as_external_data=True,
            location="a.data",
            size_threshold=0,
        )
        file = OnnxFile(path)
        np.testing.assert_array_equal(file.read("w"), first.T)
        np.testing.assert_array_equal(file.read("u", 2, 6), second[2:6])
        (tmp_path / "a.data").write_bytes(b"short")
        for reopened in (OnnxFile(path),):
            with pytest.raises(UserError, match=r"not in a\.data"):
                reopened.read("w")
        (tmp_path / "a.data").unlink()
        with pytest.raises(UserError, match=r"a\.data does not exist"):
            OnnxFile(path).read("w")

    def test_through_links_like_a_hub_cache(self, tmp_path, draw):
        (tmp_path / "blobs").mkdir()
        (tmp_path / "snapshot").mkdir()
        array = draw(5, 6)
        options = {"save_as_external_data": True, "location": "a.data", "size_threshold": 0}
        write(tmp_path / "blobs/a.onnx", [], {"w": array}, **options)
        for blob, name in (("a.onnx", "m.onnx"), ("a.data", "a.data")):
            target = (tmp_path / "blobs" / blob).rename(tmp_path / f"blobs/hash-{blob}")
            (tmp_path / "snapshot" / name).symlink_to(target)
        file = OnnxFile(str(tmp_path / "snapshot/m.onnx"))
        np.testing.assert_array_equal(file.read("w"), array)

    @pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "", "x\0y"])
    def test_never_outside_the_folder(self, tmp_path, location):
        (tmp_path / "secret").write_bytes(bytes(16))
        (tmp_path / "inner").mkdir()
        proto = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
        proto.ClearField("raw_data")
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": "16"}.items():
            entry = proto.external_data.add()
            entry.key, entry.value = key, value
        graph = helper.make_graph([], "g", [], [], initializer=[proto])
        path = tmp_path / "inner/a.onnx"
        path.write_bytes(helper.make_model(graph).SerializeToString())
        with pytest.raises(UserError, match="'w'"):
            OnnxFile(str(path)).read("w")


class TestRefusals:
    def test_shape_and_bytes_disagree(self, tmp_path):
        proto = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
        proto.dims[0] = 1 << 40
        file = OnnxFile(write(tmp_path / "a.onnx", [], {"w": proto}))
        with pytest.raises(UserError, match="'w' has 24 bytes where"):
            file.read("w")

    @pytest.mark.parametrize("dims", [[-1, 3], [1 << 62, 1 << 62], [0, 1 << 62]])
    def test_impossible_shapes(self, tmp_path, dims):
        proto = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
        proto.dims[:] = dims
        with pytest.raises(UserError, match="'w' claims the shape"):
            OnnxFile(write(tmp_path / "a.onnx", [], {"w": proto}))

    def test_the_same_name_twice(self, tmp_path):
        proto = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
        with pytest.raises(UserError, match="'w' is there twice"):
            OnnxFile(write(tmp_path / "a.onnx", [], {"w": proto, "again": proto}))

    @pytest.mark.parametrize("name", [b"onnx::MatMul_1", b"/attn/q/MatMul"])
    def test_names_that_are_no_text(self, tmp_path, draw, name):
        product = node("MatMul", ["x", "onnx::MatMul_1"], "/attn/q/MatMul")
        path = Path(write(tmp_path / "a.onnx", [product], {"onnx::MatMul_1": draw(2, 3)}))
        path.write_bytes(path.read_bytes().replace(name, b"\xff" + name[1:]))
        with pytest.raises(UserError, match="name is no text"):
            OnnxFile(str(path))

    def test_four_bit_types(self, tmp_path):
        proto = helper.make_tensor("w", onnx.TensorProto.INT4, [2, 2], [1, 2, 3, 4])
        file = OnnxFile(write(tmp_path / "a.onnx", [], {"w": proto}))
        with pytest.raises(UserError, match="'w' has dtype"):
            file.read("w")

    @pytest.mark.parametrize("content", [b"\0", b"not a model at all", b"\x08\x07"])
    def test_no_model(self, tmp_path, content):
        path = tmp_path / "a.onnx"
        path.write_bytes(content)
        with pytest.raises(UserError, match="no ONNX model"):
            open_container(str(path))

    def test_a_graph_without_weights(self, tmp_path):
        with pytest.raises(UserError, match="holds no initialisers"):
            OnnxFile(write(tmp_path / "a.onnx", [node("Relu", ["x"])], {}))

    def test_weights_option_is_said_to_be_ignored(self, tmp_path, draw):
        path = write(tmp_path / "a.onnx", [], {"w": draw(2, 3)})
        assert "'ema' is ignored" in OnnxFile(path, weights="ema").notes[-1]

    def test_without_the_package(self, tmp_path, draw):
        path = write(tmp_path / "a.onnx", [], {"w": draw(2, 3)})
        program = (
            "import sys; sys.modules['onnx'] = None\n"
            "from mla_study.checkpoints.formats.onnx_file import OnnxFile\n"
            "from mla_study.errors import UserError\n"
            f"try: OnnxFile({path!r})\n"
            "except UserError as error: print(error)\n"
        )
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True
        )
        assert "package onnx is not installed" in done.stdout
