import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mla_study.errors import UserError
from mla_study.rollout.prompts import WordHash
from mla_study.training.data.ode_pairs import OdePairs
from mla_study.training.data.order import place

ENCODE = WordHash(4, 3)
SHAPE = (3, 2, 5, 4)  # C, F, h, w


def write(folder: Path, states: np.ndarray, prompts: list[str], shape: str | None = None) -> None:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(folder), map_size=2**24) as base, base.begin(write=True) as view:
        for row, (state, prompt) in enumerate(zip(states, prompts, strict=True)):
            view.put(f"latents_{row}_data".encode(), state.astype(np.float16).tobytes())
            view.put(f"prompts_{row}_data".encode(), prompt.encode())
        told = shape or " ".join(map(str, states.shape))
        view.put(b"latents_shape", told.encode())
        view.put(b"prompts_shape", str(len(prompts)).encode())


def test_trajectories_come_out_as_they_went_in(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((5, 4, 3, 3, 5, 4)).astype(np.float16)  # N S F C h w
    write(tmp_path / "a", states[:3], ["p0", "p1", "p2"])
    write(tmp_path / "b", states[3:], ["p3", "ü4"])
    data = OdePairs(tmp_path, ENCODE, SHAPE, seed)
    made, batch = data.trajectories(range(5)), data.batch(range(5))
    assert made.shape == (5, 4, 3, 2, 5, 4) and batch.latents is not None
    for n in range(5):
        row = place(n, 5, seed)
        assert batch.captions[n] == ["p0", "p1", "p2", "p3", "ü4"][row]
        expected = torch.from_numpy(states[row, :, :2]).float()
        assert torch.equal(made[n].transpose(1, 2), expected)
        assert torch.equal(batch.latents[n].transpose(0, 1), expected[-1])
    assert torch.equal(
        data.batch([3, 8]).context, ENCODE([batch.captions[3], data.batch([8]).captions[0]])
    )
    facts = data.facts()
    data.close()
    assert OdePairs(tmp_path, ENCODE, SHAPE, seed).facts() == facts


def test_an_lmdb_that_does_not_fit(tmp_path: Path) -> None:
    states = np.zeros((2, 4, 3, 3, 5, 4), np.float16)
    for shape, told in (
        ((3, 4, 5, 4), None), ((2, 2, 5, 4), None), ((3, 2, 4, 4), None),
        (SHAPE, "2 4 x"), (SHAPE, "2 4 3"),
    ):  # fmt: skip
        write(tmp_path, states, ["a", "b"], told)
        with pytest.raises(UserError, match="latents_shape"):
            OdePairs(tmp_path, ENCODE, shape)
    write(tmp_path, states, ["a", "b"], "2 5 3 3 5 4")
    with pytest.raises(UserError, match=r"latents_\d_data has 1440 bytes, but .* has 1800"):
        OdePairs(tmp_path, ENCODE, SHAPE).batch([0])
    write(tmp_path, states, ["a", "b"], "3 4 3 3 5 4")
    with pytest.raises(UserError, match="lacks prompts_2_data"):
        OdePairs(tmp_path, ENCODE, SHAPE)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no trajectory"):
        OdePairs(tmp_path / "none", ENCODE, SHAPE)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="pip install lmdb"):
        OdePairs(tmp_path, ENCODE, SHAPE)
