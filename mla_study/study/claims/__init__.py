"""The claims ledger: each claim of the paper, the number behind it, its null, a computed verdict.

``evaluate(results)`` judges all claims by a results folder and returns a list of ``Outcome``: the
claim, its verdict and why, numbers with bounds, units and roles, the files it was judged by with
their run hashes, classes, validity and hardware, the figure that shows it and the command that
measures its tables anew.
"""

from __future__ import annotations

from mla_study.study.claims.definitions import CLAIMS
from mla_study.study.claims.ledger import evaluate
from mla_study.study.claims.model import Claim, Number, Outcome
from mla_study.study.claims.sources import Source

__all__ = ["CLAIMS", "Claim", "Number", "Outcome", "Source", "evaluate"]
