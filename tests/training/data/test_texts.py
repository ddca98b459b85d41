from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mla_study.errors import UserError
from mla_study.training.data.shards import Shards
from mla_study.training.data.texts import Texts, fingerprint, ready


class Counting:
    """An encoder of one token a letter; it counts what it is asked."""

    def __init__(self) -> None:
        self.loaded = 0
        self.asked: list[str] = []

    def load(self) -> "Counting":
        self.loaded += 1
        return self

    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        self.asked += prompts
        return [torch.tensor([[ord(c), -1.0] for c in p + "."]).bfloat16() for p in prompts]


def test_each_prompt_is_embedded_once(tmp_path: Path) -> None:
    encoder = Counting()
    texts = Texts(Shards(tmp_path), 5, encoder.load)
    ready(texts, ["ab", "c", "ab"])
    assert encoder.asked == ["ab", "c", ""]
    made = texts(["c", "ab", ""])
    assert made.shape == (3, 5, 2) and made.dtype == torch.float32
    assert made[1].tolist() == [[97, -1], [98, -1], [46, -1], [0, 0], [0, 0]]
    again = Texts(Shards(tmp_path), 5, encoder.load)
    ready(again, ["ab", "c"])
    assert encoder.loaded == 1 and torch.equal(again(["c", "ab", ""]), made)
    ready(again, ["ab", "d"])
    assert encoder.loaded == 2 and encoder.asked == ["ab", "c", "", "d"]
    with pytest.raises(UserError, match="no embedding of 'x'"):
        again(["x"])


def test_weights_of_equal_size_are_told_apart(tmp_path: Path) -> None:
    body = bytearray(3 * 2**20)
    path = tmp_path / "w"
    path.write_bytes(body)
    first = fingerprint(path)
    body[-1] = 1
    path.write_bytes(body)
    assert fingerprint(path) != first
    inside = fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(tmp_path) != inside
    with pytest.raises(UserError, match="cannot be read"):
        fingerprint(tmp_path / "none")
