"""Second moments collected by hooks against hand-computed ones; the file that carries them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mla_study.errors import UserError
from mla_study.probes import activations
from mla_study.probes.activations import (
    Covariances,
    collect_covariance,
    covariance_names,
    load_covariance,
    save_covariance,
)
from mla_study.probes.block import root_of
from mla_study.probes.spectrum import singular_values
from mla_study.probes.stacks import Spectrum
from mla_study.probes.table import functional_errors

torch = pytest.importorskip("torch", reason="torch is not installed")
nn = torch.nn


class Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d) for _ in range(3))

    def forward(self, hidden: Any) -> Any:
        q, k, v = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


class Tower(nn.Module):
    def __init__(self, d: int = 6, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(d) for _ in range(layers))
        self.unused = nn.Linear(d, d)

    def forward(self, hidden: Any, scale: float = 1.0) -> Any:
        for block in self.blocks:
            hidden = hidden + scale * block(hidden)
        return hidden


def _moment(x: Any) -> np.ndarray:
    rows = x.detach().double().reshape(-1, x.shape[-1]).numpy()
    return rows.T @ rows / len(rows)


def _psd(rng: np.random.Generator, d: int) -> np.ndarray:
    a = rng.standard_normal((d, d + 2))
    return a @ a.T


@pytest.fixture
def tower(seed: int) -> Tower:
    torch.manual_seed(seed)
    return Tower()


def test_moments_of_a_tower_are_those_of_its_layers_inputs(tower: Tower) -> None:
    batches = [torch.randn(2, 5, 6), torch.randn(1, 9, 6)]
    got = collect_covariance(tower, batches)
    assert list(got) == ["blocks.0.k_proj", "blocks.1.k_proj"]
    assert got.tokens == {"blocks.0.k_proj": 19, "blocks.1.k_proj": 19}
    first = torch.cat([b.reshape(-1, 6) for b in batches])
    second = torch.cat([(b + tower.blocks[0](b)).reshape(-1, 6) for b in batches])
    for name, x in zip(got, (first, second), strict=True):
        assert got[name].dtype == np.float64
        np.testing.assert_allclose(got[name], _moment(x), rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(got[name], got[name].T)


def test_moments_are_sums_in_float64_over_many_steps(
    tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "_TOKENS_A_STEP", 7)
    x = torch.randn(3, 11, 6) * 1e3 + 1e4
    got = collect_covariance(tower, [x])["blocks.0.k_proj"]
    np.testing.assert_allclose(got, _moment(x), rtol=1e-13)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_inputs_are_upcast_first(tower: Tower, dtype: str) -> None:
    x = torch.randn(1, 50, 6).to(getattr(torch, dtype)) * 200
    got = collect_covariance(tower.to(x.dtype), [x], r"blocks\.0\.k_proj$")
    np.testing.assert_allclose(got["blocks.0.k_proj"], _moment(x), rtol=1e-13)


def test_a_transformer_encoder_is_hooked_at_its_attention(seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.5)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(3, 7, 8)
    got = collect_covariance(encoder, [x])
    assert list(got) == ["layers.0.self_attn", "layers.1.self_attn"]
    np.testing.assert_allclose(got["layers.0.self_attn"], _moment(x), rtol=1e-12)
    encoder.eval()
    with torch.no_grad():
        middle = encoder.layers[0](x)
    np.testing.assert_allclose(got["layers.1.self_attn"], _moment(middle), rtol=1e-4, atol=1e-6)


def test_cross_attention_is_measured_on_what_the_keys_see() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, pair: dict[str, Any]) -> Any:
            return self.self_attn(pair["x"], key=pair["context"], value=pair["context"])

    pair = {"x": torch.randn(1, 3, 4), "context": torch.randn(1, 5, 4)}
    got = collect_covariance(Cross(), [pair], forward=lambda module, batch: module(batch))
    np.testing.assert_allclose(got["self_attn"], _moment(pair["context"]), rtol=1e-12)


@pytest.mark.parametrize("targets", [r"[qkv]_proj$", lambda n: n.endswith("_proj")])
def test_modules_that_share_an_input_share_the_work(
    tower: Tower, targets: str | Callable[[str], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = activations._Collector._second_moment

    def counted(self: Any, x: Any) -> Any:
        calls.append(1)
        return real(self, x)

    monkeypatch.setattr(activations._Collector, "_second_moment", counted)
    got = collect_covariance(tower, [torch.randn(2, 5, 6), torch.randn(2, 5, 6)], targets)
    assert len(got) == 6
    assert len(calls) == 4
    np.testing.assert_array_equal(got["blocks.1.q_proj"], got["blocks.1.v_proj"])
    assert not np.array_equal(got["blocks.0.q_proj"], got["blocks.1.q_proj"])


def test_an_input_changed_in_place_between_modules_is_seen_again() -> None:
    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.key = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Any) -> Any:
            self.k(x)
            x.mul_(2)
            return self.key(x)

    x = torch.randn(4, 3)
    got = collect_covariance(Sly(), [x.clone()])
    np.testing.assert_allclose(got["key"], 4 * got["k"], rtol=1e-12)


def test_batches_are_passed_by_their_kind(tower: Tower) -> None:
    x = torch.randn(2, 5, 6)
    want = collect_covariance(tower, [x])
    for batch in ({"hidden": x, "scale": 1.0}, (x, 1.0), [x]):
        got = collect_covariance(tower, iter([batch]))
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


def test_padding_can_be_left_out(tower: Tower) -> None:
    x, keep = torch.randn(2, 5, 6), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    got = collect_covariance(tower, [x], "blocks.0.k_proj", mask=lambda _: keep)
    np.testing.assert_allclose(got["blocks.0.k_proj"], _moment(x[keep.bool()]), rtol=1e-12)
    assert got.tokens == {"blocks.0.k_proj": 8}
    assert collect_covariance(tower, [x], mask=lambda _: None).tokens["blocks.0.k_proj"] == 10


def test_the_model_is_left_as_it_was(tower: Tower) -> None:
    tower.train()
    tower.blocks[1].eval()
    collect_covariance(tower, [torch.randn(1, 3, 6)])
    assert tower.training
    assert tower.blocks[0].training
    assert not tower.blocks[1].training
    assert not any(m._forward_pre_hooks for m in tower.modules())
    with pytest.raises(RuntimeError):
        collect_covariance(tower, [torch.randn(1, 3, 5)])
    assert not any(m._forward_pre_hooks for m in tower.modules())
    assert tower.training


def test_no_activation_outlives_the_run(tower: Tower) -> None:
    x = torch.randn(1, 3, 6)
    seen = weakref.ref(x)
    collect_covariance(tower, (b for b in [x]))
    del x
    gc.collect()
    assert seen() is None


def test_collecting_says_what_is_wrong(tower: Tower) -> None:
    x = torch.randn(1, 3, 6)
    with pytest.raises(UserError, match=r"matches the targets.*blocks\.0\.q_proj"):
        collect_covariance(tower, [x], "nothing_here")
    with pytest.raises(UserError, match="no linear layer"):
        collect_covariance(nn.ReLU(), [x])
    with pytest.raises(UserError, match="'unused'"):
        collect_covariance(tower, [x], "k_proj|unused")
    with pytest.raises(UserError, match="no tokens"):
        collect_covariance(tower, [])
    with pytest.raises(UserError, match=r"'blocks\.0\.k_proj' holds NaN"):
        collect_covariance(tower, [x * np.nan])
    with pytest.raises(UserError, match="without a tensor"):
        collect_covariance(nn.Sequential(nn.Identity()), [3], "0")
    widths = nn.Sequential(nn.Identity())
    with pytest.raises(UserError, match="3 and of 4"):
        collect_covariance(widths, [torch.ones(2, 3), torch.ones(2, 4)], "0")


# Files


def test_a_saved_file_reads_back_and_is_reproducible(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cov = Covariances({"b.k": _psd(rng, 7), "a.k": _psd(rng, 3)}, {"b.k": 12, "a.k": 5})
    path = tmp_path / "cov.safetensors"
    for _ in range(2):
        save_covariance(path, cov)
        assert [p.name for p in tmp_path.iterdir()] == ["cov.safetensors"]
    first = path.read_bytes()
    save_covariance(path, Covariances(dict(reversed(cov.items())), cov.tokens))
    assert path.read_bytes() == first
    assert covariance_names(path) == ["a.k", "b.k"]
    got = load_covariance(path)
    assert got.tokens == cov.tokens
    for name in cov:
        np.testing.assert_allclose(got[name], cov[name], rtol=1e-15)
    assert list(load_covariance(path, ["b.k"])) == ["b.k"]
    save_covariance(str(path), {"x": np.eye(2)})
    assert load_covariance(str(path)).tokens == {}


def test_singular_float32_and_zero_moments_are_accepted(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((64, 3))
    thin = low @ low.T
    save_file(
        {"thin": thin, "single": thin.astype(np.float32), "zero": np.zeros((4, 4))},
        tmp_path / "c.safetensors",
    )
    got = load_covariance(tmp_path / "c.safetensors")
    np.testing.assert_allclose(got["thin"], thin)
    assert got["single"].dtype == np.float64


def _one(**tensors: np.ndarray) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path)


BAD_FILES = {
    "missing": (lambda path: None, "cannot be read"),
    "folder": (lambda path: path.mkdir(), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "text": (lambda path: path.write_text("<html>no</html>" * 9), "cannot be read"),
    "nothing": (lambda path: save_file({}, path), "any tensor"),
    "vector": (_one(c=np.ones(4)), r"shape \[4\]"),
    "oblong": (_one(c=np.ones((3, 4))), r"shape \[3, 4\]"),
    "void": (_one(c=np.ones((0, 0))), r"shape \[0, 0\]"),
    "nan": (_one(c=np.full((2, 2), np.nan)), "NaN or Inf"),
    "inf": (_one(c=np.diag([1.0, np.inf])), "NaN or Inf"),
    "asymmetric": (_one(c=np.array([[2.0, 0.1], [0.1 + 1e-6, 2.0]])), "not symmetric"),
    "negative": (_one(c=np.diag([1.0, -1e-6])), "negative eigenvalues"),
    "all-negative": (_one(c=-np.eye(3)), "negative eigenvalues"),
    "hollow": (_one(c=np.array([[0.0, 1.0], [1.0, 0.0]])), "negative eigenvalues"),
    "integers": (_one(c=np.eye(2, dtype=np.int64)), "I64"),
    "half": (_one(c=np.eye(2, dtype=np.float16)), "F16"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, what = BAD_FILES[kind]
    path = tmp_path / "cov.safetensors"
    make(path)
    with pytest.raises(UserError, match=what) as error:
        load_covariance(path)
    assert "cov.safetensors" in str(error.value)


def test_a_truncated_file_and_an_unknown_name(tmp_path: Path) -> None:
    path = tmp_path / "cov.safetensors"
    save_covariance(path, {"layer": np.eye(9)})
    with pytest.raises(UserError, match=r"cov\.safetensors does not hold 'other': it has layer"):
        load_covariance(path, ["other"])
    path.write_bytes(path.read_bytes()[:-8])
    for read in (load_covariance, covariance_names):
        with pytest.raises(UserError, match="cannot be read"):
            read(path)


@pytest.mark.parametrize("tokens", ["{", "[]", '{"a": "x"}', "3", '{"a": null}'])
def test_odd_token_counts_do_not_spoil_a_file(tokens: str, tmp_path: Path) -> None:
    save_file({"a": np.eye(2)}, tmp_path / "c", metadata={"tokens": tokens})
    assert load_covariance(tmp_path / "c").tokens == {}


def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no covariance"):
        save_covariance(tmp_path / "c", {})
    with pytest.raises(UserError, match="cannot write"):
        save_covariance(tmp_path / "absent" / "c", {"a": np.eye(2)})
    (tmp_path / "c").write_text("old")

    def full(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    import safetensors.numpy

    monkeypatch.setattr(safetensors, "numpy", SimpleNamespace(save_file=full))
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", safetensors.numpy)
    with pytest.raises(UserError, match="No space left"):
        save_covariance(tmp_path / "c", {"a": np.eye(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert (tmp_path / "c").read_text() == "old"


# Spectra under a second moment


def test_square_root(seed: int) -> None:
    cov = _psd(np.random.default_rng(seed), 9)
    root, values = root_of(cov.copy())
    np.testing.assert_allclose(root @ root.T, cov, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(cov), rtol=1e-10, atol=1e-10)
    root, _ = root_of(np.diag([4.0, -1e-18]))
    np.testing.assert_allclose(np.abs(root), [[2.0], [0.0]], atol=1e-15)


def error_of_cut(sigma: np.ndarray, k: int) -> float:
    """Told of a spectrum that has an eighth of its directions at k."""
    spectrum = Spectrum("kv", -1, "weighted-raw", sigma, 8 * k, 8 * k, "gram")
    return functional_errors(spectrum)["functional_error_at_n/8"]


@pytest.mark.parametrize("m", [4, 30])
def test_the_error_of_a_cut_is_reached_by_the_whitened_cut_and_by_none_better(
    m: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    d, k = 12, 3
    x = rng.standard_normal((5000, d)) * np.geomspace(1, 0.02, d) @ rng.standard_normal((d, d))
    cov = x.T @ x / len(x)
    w = rng.standard_normal((m, d))
    root, _ = root_of(cov.copy())
    got = error_of_cut(singular_values([w[:1] @ root, w[1:] @ root])[0], k)

    def error(v: np.ndarray) -> float:
        return float(np.sqrt(np.square(x @ (w - v).T).sum() / np.square(x @ w.T).sum()))

    top = np.linalg.eigh(w @ cov @ w.T)[1][:, -k:]
    assert error(top @ top.T @ w) == pytest.approx(got, rel=1e-8)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    assert error((u[:, :k] * s[:k]) @ vt[:k]) >= got - 1e-12
    for _ in range(5):
        q = np.linalg.qr(rng.standard_normal((m, k)))[0]
        assert error(q @ q.T @ w) >= got - 1e-12


def test_the_error_of_a_cut_at_its_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, cov = rng.standard_normal((8, 5)), _psd(rng, 5)
    root, _ = root_of(cov)
    sigma, method = singular_values([w @ root])
    assert error_of_cut(sigma, 0) == 1.0
    assert error_of_cut(sigma, 5) == error_of_cut(sigma, 99) == 0.0
    assert np.isnan(error_of_cut(singular_values([np.zeros((8, 5))])[0], 2))
    np.testing.assert_allclose(sigma, np.linalg.svd(w @ root)[1], rtol=1e-8)
    assert method in ("gram", "svdvals")
    assert error_of_cut(np.array([1.0, 1e-9]), 1) == pytest.approx(1e-9)
