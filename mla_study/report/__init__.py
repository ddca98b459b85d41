"""The report: every claim of the paper on one static page, with its number, null and verdict.

Nothing on the page is written by hand but the words around it: verdicts come from the claims
ledger, figures from ``analysis``, videos from the miniature that the package carries. The same data
give the same bytes.
"""

from __future__ import annotations
