"""Formulas as the paper's Table 1 prints them, in numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping


def evaluated(formula: str, values: Mapping[str, float]) -> float:
    """A formula of the paper's table, such as ``n W (d_c + d_rope)``, in numbers."""
    spelt = re.sub(r"(?<=[\w)])\s+(?=[\w(])", "*", formula).replace("^", "**")
    return float(eval(spelt, {"__builtins__": {}}, dict(values)))
