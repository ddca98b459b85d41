"""A throwaway project with figures of its own, for the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

MODULE = '''
"""A line."""

TITLE = "A line"
PROVENANCE = "null-model"
DATA = ("results/data/line",)


def draw(out_dir, slope, label):
    import matplotlib.pyplot as plt
    from mla_study.study.plots import save_figure, stamp, style

    with style():
        figure, axes = plt.subplots()
        axes.plot([0, 1], [0, slope], label=label)
        axes.legend()
        stamp(figure, PROVENANCE, "full", "ab" * 32)
        save_figure(figure, f"{out_dir}/NAME")
'''
PARAMETERS = """\
slope = 1.5  # float: rise over run
label = "a line"  # str: what the legend says
count = 3  # int: not used
marks = [1, 2]  # list: not used
loud = False  # bool: not used
out_dir = "."  # str: folder for the figure
"""
BODY = "from analysis.NAME import draw\n\ndraw(out_dir, slope, label)"


@dataclass
class Checkout:
    """A folder with notebooks/, analysis/ and results/, and the driver called as the user does."""

    root: Path

    @property
    def figures(self) -> Path:
        return self.root / "results" / "figures"

    def add(self, name: str, *, body: str = BODY, module: str = MODULE) -> None:
        def cell(source: str, *tags: str) -> dict[str, object]:
            return {
                "cell_type": "code",
                "execution_count": None,
                "id": f"cell{len(source)}",
                "metadata": {"tags": list(tags)},
                "outputs": [],
                "source": source,
            }

        notebook = {
            "cells": [cell(PARAMETERS, "parameters"), cell(body.replace("NAME", name))],
            "metadata": {"kernelspec": {"name": "another", "display_name": "x", "language": "r"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        (self.root / "notebooks" / f"{name}.ipynb").write_text(json.dumps(notebook))
        (self.root / "analysis" / f"{name}.py").write_text(module.replace("NAME", name))

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """``run_figures(*arguments)`` in a process of its own; the arguments are Python source."""
        code = (
            "import sys\n"
            "from mla_study.errors import UserError\n"
            "from mla_study.study.figures import run_data, run_figures\n"
            "try:\n"
            f"    sys.exit({' '.join(map(str, arguments))})\n"
            "except UserError as error:\n"
            "    sys.exit(print(error, file=sys.stderr) or 2)\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.root,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, call: str = "run_figures()", **environment: str) -> tuple[int, str, str]:
        process = self.start(call, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


@pytest.fixture
def make_checkout(tmp_path: Path) -> Callable[[str], Checkout]:
    def make(name: str) -> Checkout:
        checkout = Checkout(tmp_path / name)
        for folder in ("notebooks", "analysis", "results/data/line"):
            (checkout.root / folder).mkdir(parents=True)
        (checkout.root / "analysis" / "__init__.py").write_text("")
        (checkout.root / "results/data/line/table.csv").write_text("x\n1\n")
        return checkout

    return make


@pytest.fixture
def checkout(make_checkout: Callable[[str], Checkout]) -> Checkout:
    return make_checkout("checkout")
