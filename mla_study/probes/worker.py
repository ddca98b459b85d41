"""``python -m mla_study.probes.worker``: measures blocks that its parent sends (see ``work``)."""

from __future__ import annotations

import os
import signal
import sys

from mla_study.probes.work import one_thread, serve


def main() -> None:
    """Serve until the parent closes the pipe; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the replies
    with one_thread():
        serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
