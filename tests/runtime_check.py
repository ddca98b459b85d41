"""The checker that the import hook puts on every function of the package, in the test run only."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# PEP 484: an int is accepted where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
