"""The one exception that means "the input is wrong", and the exit code that goes with it."""

from __future__ import annotations

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where, and what to do about it.

    The command line prints the sentence without a traceback and exits with code 2
    (:data:`EXIT_BAD_INPUT`). Library code raises it for anything that the caller can mend.
    """
