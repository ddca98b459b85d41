from __future__ import annotations

import collections
import hashlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_study.checkpoints.formats.opening import open_container
from mla_study.checkpoints.formats.torch_file import TorchFile
from mla_study.errors import UserError

torch = pytest.importorskip("torch")


def saved(path: Path, what: Any, **options: Any) -> str:
    torch.save(what, path, **options)
    return str(path)


def matrices(seed: int, *names: str, rows: int = 7, columns: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, columns, generator=generator) for name in names}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("dtype", "name", "result"),
    [
        ("float64", "F64", np.float64),
        ("float32", "F32", np.float32),
        ("float16", "F16", np.float32),
        ("bfloat16", "BF16", np.float32),
        ("float8_e4m3fn", "F8_E4M3", np.float32),
        ("float8_e5m2", "F8_E5M2", np.float32),
        ("int8", "I8", np.float32),
        ("int64", "I64", np.float64),
        ("bool", "BOOL", np.float32),
    ],
)
def test_values_and_rows_of_each_dtype(tmp_path, seed, zipped, dtype, name, result):
    if not zipped and dtype.startswith("float8"):
        pytest.skip("torch does not read fp8 in its legacy format")
    torch.manual_seed(seed)
    tensor = (torch.randn(11, 3, 5) * 3).to(getattr(torch, dtype))
    path = saved(tmp_path / "a.pt", {"w": tensor}, _use_new_zipfile_serialization=zipped)
    file = TorchFile(path)
    info = file.tensors["w"]
    assert (info.shape, info.dtype, info.nbytes) == (
        (11, 3, 5),
        name,
        tensor.numel() * tensor.itemsize,
    )
    expected = tensor.to(torch.float64).numpy()
    whole = file.read("w")
    assert whole.dtype == result
    np.testing.assert_array_equal(whole, expected)
    before = file.bytes_read
    np.testing.assert_array_equal(file.read("w", 3, 8), expected[3:8])
    assert file.bytes_read - before == 5 * 15 * tensor.itemsize
    np.testing.assert_array_equal(file.read("w", 9), expected[9:])
    assert file.read("w", 5, 5).shape == (0, 3, 5)
    stored = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert file.raw_sha256("w") == hashlib.sha256(stored).hexdigest()


def test_nothing_but_the_pickle_is_read_on_opening(tmp_path):
    path = saved(tmp_path / "a.pt", {"w": torch.zeros(500, 500), "n": torch.tensor(3.0)})
    file = TorchFile(path)
    assert file.bytes_read < 2000
    assert file.read("n").shape == ()
    assert file.read("n") == 3.0
    status = Path(path).stat()
    assert file.fingerprint == f"{status.st_size}-{status.st_mtime_ns}"
    with pytest.raises(ValueError):
        file.read("w")[0, 0] = 1  # the mapping must not change under later reads


def test_non_contiguous_and_tied_tensors(tmp_path, seed):
    base = matrices(seed, "w", rows=6, columns=9)["w"]
    path = saved(tmp_path / "a.pt", {"t": base.T, "s": base[:, ::2], "w": base, "tied": base})
    file = TorchFile(path)
    np.testing.assert_array_equal(file.read("t", 2, 5), base.T[2:5].numpy())
    np.testing.assert_array_equal(file.read("s"), base[:, ::2].numpy())
    assert file.raw_sha256("w") == file.raw_sha256("tied")


def test_a_bare_tensor_and_a_list(tmp_path, seed):
    tensors = matrices(seed, "a", "b")
    bare = TorchFile(saved(tmp_path / "a.pt", tensors["a"]))
    assert list(bare.tensors) == ["tensor"]
    listed = TorchFile(saved(tmp_path / "b.pt", [1, tensors["a"], tensors["b"]]))
    assert list(listed.tensors) == ["1", "2"]
    with pytest.raises(UserError, match="single tensor"):
        TorchFile(bare.path, weights="generator")


class TestWrappers:
    def test_released_style(self, fixtures):
        path = str(fixtures / "formats/self_forcing/released_style.pt")
        chosen, other = TorchFile(path), TorchFile(path, weights="generator_ema")
        assert len(chosen.tensors) == len(other.tensors) == 69
        (note,) = chosen.notes
        assert "'generator' is read" in note
        assert "--weights" in note
        assert "generator_ema" in note
        assert not other.notes
        key = "model.blocks.1.self_attn.k.weight"  # prefixes are the reader's
        a, b = chosen.read(key), other.read(key)
        assert chosen.tensors[key].dtype == "F32"
        assert other.tensors[key].dtype == "BF16"
        np.testing.assert_allclose(b, 1.01 * a, rtol=2**-8)

    def test_only_an_average(self, fixtures):
        file = TorchFile(str(fixtures / "formats/self_forcing/trainer_ema_fsdp_prefix_bf16.pt"))
        assert not file.notes
        assert all(name.startswith("model._fsdp_wrapped_module.") for name in file.tensors)

    def test_unknown_name_lists_the_known(self, fixtures):
        path = str(fixtures / "formats/self_forcing/released_style.pt")
        with pytest.raises(UserError, match="'generator', 'generator_ema'") as caught:
            TorchFile(path, weights="emma")
        assert path in str(caught.value)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda weights: {"state_dict": weights, "epoch": 3},
            lambda weights: {"model": {"module": weights}, "step": 7, "config": {"lr": 0.1}},
            lambda weights: {"whatever": {"generator": weights}},
            lambda weights: collections.OrderedDict(params=weights),
            lambda weights: {"params_ema": weights, "history": [1.0, 2.0, {"a": None}]},
            lambda weights: {"decay": torch.tensor(0.9), "betas": torch.ones(2), "ema": weights},
        ],
    )
    def test_peeled(self, tmp_path, seed, wrap):
        weights = matrices(seed, "blocks.0.q.weight", "blocks.0.k.weight")
        assert list(TorchFile(saved(tmp_path / "a.pt", wrap(weights))).tensors) == list(weights)

    def test_nested_modules_keep_their_names(self, tmp_path, seed):
        inner = matrices(seed, "weight")
        nested = {"encoder": {"0": {"q": inner}, "1": {"q": inner}}, "head": matrices(seed, "w")}
        file = TorchFile(saved(tmp_path / "a.pt", {"model": nested}))
        assert set(file.tensors) == {"encoder.0.q.weight", "head.w"}  # one object, one name

    def test_the_optimizer_is_never_probed(self, tmp_path, seed):
        weights = matrices(seed, "q.weight")
        moments = {0: matrices(seed, "exp_avg")}
        optimizer = {"state": moments, "param_groups": [{"lr": 0.1}]}
        path = saved(
            tmp_path / "a.pt",
            {"opt": moments, "adam": optimizer, "generator_optimizer": moments, "model": weights},
        )
        file = TorchFile(path)
        assert list(file.tensors) == ["q.weight"]
        assert not file.notes
        with pytest.raises(UserError, match="give --weights one of 'model'"):
            TorchFile(path, weights="adam")
        with pytest.raises(UserError, match="no weights, the state of training apart"):
            TorchFile(saved(tmp_path / "b.pt", optimizer))

    def test_a_name_deep_inside(self, tmp_path, seed):
        one, two = matrices(seed, "w"), matrices(seed + 1, "w")
        path = saved(
            tmp_path / "a.pt",
            {"run": {"model": one, "teacher": two}, "older": {"teacher": one}},
        )
        np.testing.assert_array_equal(
            TorchFile(path, weights="run.teacher").read("w"), two["w"].numpy()
        )
        with pytest.raises(UserError, match=r"'run\.teacher', 'older\.teacher'"):
            TorchFile(path, weights="teacher")

    def test_plain_values_become_metadata(self, tmp_path, seed):
        path = saved(tmp_path / "a.pt", {"step": 700, "name": "x", "model": matrices(seed, "w")})
        assert TorchFile(path).metadata == {"step": 700, "name": "x"}

    def test_a_dictionary_inside_itself(self, tmp_path, seed):
        weights = matrices(seed, "w")
        weights["self"] = weights
        assert list(TorchFile(saved(tmp_path / "a.pt", {"model": weights})).tensors) == ["w"]

    def test_two_tensors_of_one_name(self, tmp_path, seed):
        pair = {"a.b": torch.ones(2, 2), "a": {"b": torch.zeros(2, 2)}}
        with pytest.raises(UserError, match=r"two tensors are called 'a\.b'"):
            TorchFile(saved(tmp_path / "a.pt", pair))


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class TestRefusals:
    @pytest.mark.parametrize("form", ["zip", "legacy", "pickle2", "pickle4", "pickle5"])
    def test_a_payload_is_named_and_never_executed(self, tmp_path, form):
        marker = tmp_path / "executed"
        thing = {"w": torch.ones(2, 2), "evil": _Payload(marker)}
        path = tmp_path / "evil.pt"
        if form.startswith("pickle"):
            path.write_bytes(pickle.dumps(thing["evil"], protocol=int(form[-1])))
        else:
            saved(path, thing, _use_new_zipfile_serialization=form == "zip")
        with pytest.raises(UserError, match=r"(posix|nt|os)\.system") as caught:
            open_container(str(path))
        assert not marker.exists()
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        for tempting in ("weights_only", "safe_globals", "allowlist", "trust"):
            assert tempting not in message

    def test_a_whole_module(self, tmp_path):
        path = saved(tmp_path / "a.pt", torch.nn.Linear(3, 2))
        with pytest.raises(UserError, match=r"whole model.*state_dict.*safetensors"):
            TorchFile(path)

    def test_meta_tensors(self, tmp_path):
        path = saved(tmp_path / "a.pt", {"model": {"q": torch.empty(3, 3, device="meta")}})
        with pytest.raises(UserError, match="tensor 'q' is a meta tensor"):
            TorchFile(path)

    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
    def test_sparse_quantised_and_complex(self, tmp_path):
        odd = {
            "sparse": torch.eye(4).to_sparse(),
            "quantised": torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8),
            "complex": torch.ones(3, 3, dtype=torch.complex64),
            "fine": torch.ones(3, 3),
        }
        file = TorchFile(saved(tmp_path / "a.pt", odd))
        assert file.read("fine").sum() == 9
        for name in ("sparse", "quantised", "complex"):
            with pytest.raises(UserError, match=f"{name}.*save it as"):
                file.read(name)
        with pytest.raises(UserError, match="no tensor 'absent'"):
            file.read("absent")

    def test_an_expanded_view_is_not_written_out(self, tmp_path):
        view = torch.ones(1).expand(200_000, 200_000)
        file = TorchFile(saved(tmp_path / "a.pt", {"w": view}))
        assert file.tensors["w"].shape == (200_000, 200_000)
        for attempt in (lambda: file.read("w"), lambda: file.raw_sha256("w")):
            with pytest.raises(UserError, match=r"'w'.*expanded view"):
                attempt()

    @pytest.mark.parametrize(
        ("body", "says"),
        [
            (b"ctorch\nFloatTensor\n", "values are not in the file"),
            (b"ctorch\nTensor\n", "values are not in the file"),
            (b"cbuiltins\nbytearray\n", "asks for builtins.bytearray"),
            (b"c__builtin__\nbytearray\n", "asks for builtins.bytearray"),
        ],
    )
    def test_memory_that_a_pickle_merely_asks_for(self, tmp_path, body, says):
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w") as archive:
            gigabytes = (3 << 30).to_bytes(8, "little")
            call = b"X\x01\x00\x00\x00w" + body + b"\x8a\x08" + gigabytes + b"\x85R"
            archive.writestr("a/data.pkl", b"\x80\x02}" + call + b"s.")
            archive.writestr("a/version", "3\n")
        with pytest.raises(UserError, match=says):
            TorchFile(str(path))

    def test_sharded_tensors(self, tmp_path):
        # What a pickle of a DTensor asks for, without a process group to make one.
        body = b"\x80\x02ctorch.distributed.tensor\nDTensor\n."
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", body)
            archive.writestr("a/version", "3\n")
        with pytest.raises(UserError, match=r"sharded tensors \(torch\.distributed\.tensor"):
            TorchFile(str(path))

    def test_a_subclass_is_refused_when_read(self, tmp_path, monkeypatch):
        file = TorchFile(saved(tmp_path / "a.pt", {"w": torch.ones(2, 2)}))

        class Sharded(torch.Tensor):
            pass

        file._tensors = {"w": file._tensors["w"].as_subclass(Sharded)}
        with pytest.raises(UserError, match="is a Sharded"):
            file.read("w")

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_cut_anywhere(self, tmp_path, seed, zipped):
        path = saved(
            tmp_path / "a.pt", matrices(seed, "q", "k"), _use_new_zipfile_serialization=zipped
        )
        data = Path(path).read_bytes()
        for length in np.linspace(5, len(data) - 1, 23).astype(int):
            Path(path).write_bytes(data[:length])
            with pytest.raises(UserError, match="download"):
                TorchFile(path)

    def test_a_legacy_file_that_claims_more_than_it_has(self, tmp_path):
        path = saved(
            tmp_path / "a.pt", {"w": torch.ones(3, 77)}, _use_new_zipfile_serialization=False
        )
        data = Path(path).read_bytes()
        assert data.count(b"K\xe7") == 1  # 231 values
        Path(path).write_bytes(data.replace(b"K\xe7", b"J\x00\x00\x00\x10"))
        with pytest.raises(UserError, match="claim more than"):
            TorchFile(path)

    def test_compressed_records(self, tmp_path):
        path = saved(tmp_path / "a.pt", {"w": torch.ones(9, 9)})
        packed = tmp_path / "b.pt"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", 8) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
        with pytest.raises(UserError, match="is compressed"):
            TorchFile(str(packed))

    def test_other_zip_files(self, tmp_path):
        buffer = io.BytesIO()
        np.savez(buffer, a=np.ones(3))
        path = tmp_path / "a.npz"
        path.write_bytes(buffer.getvalue())
        with pytest.raises(UserError, match="zip archive without PyTorch weights"):
            TorchFile(str(path))

    def test_no_tensors_at_all(self, tmp_path):
        with pytest.raises(UserError, match=r"holds no weights.*'step', 'config'"):
            TorchFile(saved(tmp_path / "a.pt", {"step": 3, "config": {"lr": 0.1}}))

    def test_absent_path(self, tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            TorchFile(str(tmp_path / "a.pt"))

    def test_without_torch(self, tmp_path):
        path = saved(tmp_path / "a.pt", {"w": torch.ones(2, 2)})
        program = (
            "import sys; sys.modules['torch'] = None\n"
            "from mla_study.checkpoints.formats.torch_file import TorchFile\n"
            "from mla_study.errors import UserError\n"
            f"try: TorchFile({path!r})\n"
            "except UserError as error: print(error)\n"
        )
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True
        )
        assert "package torch is not installed" in done.stdout


@pytest.mark.assets
def test_real_files(assets):
    for path in sorted(assets.glob("weights/*.pth")):
        file = TorchFile(str(path))
        reference = torch.load(path, map_location="cpu", weights_only=True)
        assert list(file.tensors) == list(reference)
        for name, tensor in reference.items():
            np.testing.assert_array_equal(file.read(name), tensor.to(torch.float64).numpy())
    latents = TorchFile(str(assets / "latents/test_latents_wan.pth"))  # saved on a GPU
    assert latents.tensors["tensor"].shape == (1, 16, 16, 40, 64)
    assert np.isfinite(latents.read("tensor")).all()
