import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mla_study.errors import UserError
from mla_study.training.data.shards import Shards

KILLED = """
import os, signal, sys, torch, safetensors.torch
from pathlib import Path
from mla_study.training.data.shards import Shards
save = safetensors.torch.save_file
def dies(tensors, path):
    save(tensors, path)
    if "3" in tensors:
        os.truncate(path, 40)
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = dies
shards = Shards(Path(sys.argv[1]), seconds=0)
with shards.adding():
    for number in range(7):
        shards.put(str(number), torch.full((3,), float(number)))
"""


def test_a_kill_in_the_middle_of_a_save_loses_that_shard_only(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert list(tmp_path.glob(".shard-*.tmp*"))
    shards = Shards(tmp_path)
    assert [str(n) in shards for n in range(7)] == [True] * 3 + [False] * 4
    with shards.adding():
        assert not list(tmp_path.glob(".shard-*.tmp*"))
        for number in range(3, 7):
            shards.put(str(number), torch.full((3,), float(number)))
    again = Shards(tmp_path)
    assert len(again) == 7 and len(list(tmp_path.glob("shard-*"))) == 4
    for number in range(7):
        assert again.read(str(number)).tolist() == [number] * 3


def test_a_shard_is_full_at_its_limit(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    made = {f"k{n}": torch.randn(5) for n in range(7)}
    shards = Shards(tmp_path, limit=3 * 20)
    with shards.adding():
        for key, value in made.items():
            shards.put(key, value)
            assert key in shards and torch.equal(shards.read(key), value)
        assert len(list(tmp_path.glob("shard-*"))) == 2
    assert len(list(tmp_path.glob("shard-*"))) == 3
    other = Shards(tmp_path)
    assert all(torch.equal(other.read(key), value) for key, value in made.items())


def test_what_another_process_added_is_found(tmp_path: Path) -> None:
    one, other = Shards(tmp_path), Shards(tmp_path)
    with one.adding():
        one.put("a", torch.ones(2))
    assert "a" not in other
    with other.adding():
        assert "a" in other
        other.put("b", torch.zeros(2))
    one.scan()
    assert one.read("b").tolist() == [0, 0]


def test_what_was_made_before_an_error_is_kept(tmp_path: Path) -> None:
    shards = Shards(tmp_path)

    def interrupted() -> None:
        with shards.adding():
            shards.put("a", torch.ones(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "a" in Shards(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is damaged .* delete it"):
        Shards(tmp_path)
