"""Lines of JSON to and from the driver, on pipes that no library's print can reach."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

Line = dict[str, Any]
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2)."""


def die_with_driver() -> None:
    """Let the kernel end this process when the thread that started it ends, however that ends.

    The end of the input alone is not seen before the video at hand is scored, which may take long.
    Should the driver have ended before this is called, the input has too.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Channel:
    """Takes the standard output for itself; what else is printed goes to the standard error."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def say(self, event: str, **fields: Any) -> None:
        """One event. :raises ValueError: a field is no JSON, such as NaN."""
        text = json.dumps({"event": event, **fields}, allow_nan=False)
        self.out.write(text + "\n")
        self.out.flush()

    def lines(self) -> Iterator[Line]:
        """What the driver asks for, until it ends its side.

        :raises ValueError: a line is no JSON object with an id.
        """
        for text in sys.stdin:
            if not text.strip():
                continue
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("id"), str):
                raise ValueError(f"a line of the driver is no object with an id: {text.strip()}")
            yield line
