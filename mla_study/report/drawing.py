"""Drawing one figure in a worker process: the SVG alone, and what it prints is not shown."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def prepare() -> None:
    """Start-up of a worker: Ctrl-C is the parent's to hear, and nothing opens a window."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["MPLBACKEND"] = "svg"


@dataclass(frozen=True)
class Drawn:
    """What came of a drawing.

    Attributes:
        error: what went wrong, in a sentence, or empty.
        results: result folders that the figure noted as shown.
    """

    error: str
    results: tuple[str, ...] = ()


def draw(root: str, figure: str, values: Mapping[str, Any], folder: str) -> Drawn:
    """Draw ``analysis.<figure>`` of a checkout with a notebook's parameters."""
    from matplotlib import pyplot as plt

    from mla_study.errors import UserError
    from mla_study.study.plots import noting_results, only

    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        with noting_results() as noted, only("svg"), contextlib.redirect_stdout(io.StringIO()):
            function = importlib.import_module(f"analysis.{figure}").draw
            known = inspect.signature(function).parameters
            function(out_dir=folder, **{k: v for k, v in values.items() if k in known})
    except UserError as error:
        return Drawn(str(error))
    except Exception as error:
        return Drawn(f"{type(error).__name__}: {error}")
    finally:
        plt.close("all")
    return Drawn("", tuple(sorted(map(str, noted))))
