"""How people are told: the one exception that means "the input is wrong", and notes on stderr."""

from __future__ import annotations

import sys

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where, and what to do about it.

    The command line prints the sentence without a traceback and exits with code 2
    (:data:`EXIT_BAD_INPUT`). Library code raises it for anything that the caller can mend.
    """


def tell(sentence: str) -> None:
    """Tell what is worth knowing beside the output, in one sentence on stderr."""
    print(f"note: {sentence.rstrip('.')}.", file=sys.stderr, flush=True)


def counted(count: int, noun: str) -> str:
    """``1 chunk``, ``2 chunks``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
