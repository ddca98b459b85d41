"""Curves of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Board:
    """Scalars for TensorBoard, where it is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
            return
        self.writer = SummaryWriter(str(folder), purge_step=step or None)

    def add(self, rows: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Rows of a step, and its speed."""
        if self.writer is None:
            return
        for row in rows:
            self.writer.add_scalar(row["name"], row["value"], row["step"])
        self.writer.add_scalar("steps_per_second", 1 / seconds, rows[-1]["step"])

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            self.writer.close()
