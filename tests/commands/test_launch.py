"""Launch lines as they are written down, read by torchrun's own parser."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import get_args_parser

from mla_study import cli
from mla_study.commands.train import Train
from mla_study.commands.vbench_sample import Sample

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def launch_lines() -> Iterator[list[str]]:
    for page in PAGES:
        whole = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ +(torchrun .*)$", whole, re.M):
            yield shlex.split(line, comments=True)[1:]


LINES = list(launch_lines())


def through(words: list[str]) -> list[str]:
    """What torchrun hands on to the module."""
    read = get_args_parser().parse_args(words)
    assert read.module and read.training_script == "mla_study"
    return read.training_script_args


def test_the_pages_have_launch_lines() -> None:
    assert sum("teacher_forcing" in line for line in LINES) == 2
    assert len(LINES) == 4


@pytest.mark.parametrize("words", LINES, ids=lambda words: words[words.index("train") + 1])
def test_a_launch_line_reaches_the_command_whole(words: list[str]) -> None:
    mine = words[words.index("mla_study") + 1 :]
    assert through(words) == mine
    command = tyro.cli(cli.Program, args=mine, config=cli._FLAGS).command
    assert isinstance(command, Train)
    assert command.preset == "wan-1.3b" and command.generator in mine and str(command.out) in mine


@pytest.mark.parametrize("command", [["train", "flow"], ["vbench", "sample"]])
def test_no_option_is_taken_by_torchrun(command: list[str]) -> None:
    kind = Train if command[0] == "train" else Sample
    names = [field.name.replace("_", "-") for field in fields(kind)]
    assert "teacher" in names or "shard" in names
    taken = {text for action in get_args_parser()._actions for text in action.option_strings}
    assert any(option.startswith("--start") for option in taken)  # as `train` once had it
    for name in names:
        assert not any(option.startswith(f"--{name}") for option in taken), name
        for given in ([f"--{name}", "x"], [f"--{name}=x"]):
            words = ["--nproc-per-node", "2", "-m", "mla_study", *command, *given]
            assert through(words) == [*command, *given]
