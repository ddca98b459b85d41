"""``python -m mla_study.probes.worker``: measures blocks that its parent sends (see ``work``)."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from typing import Any

from mla_study.probes.work import one_thread, serve


def main() -> None:
    """Serve until the parent closes the pipe or ends, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the replies
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        # A killed parent closes the pipe: then stop at once, in the middle of a block too.
        try:
            while True:
                inbox.put(pickle.load(sys.stdin.buffer))
        except (EOFError, pickle.UnpicklingError):
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def answer(line: bytes) -> None:
        replies.write(line)
        replies.flush()

    threading.Thread(target=listen, daemon=True).start()
    with one_thread():
        serve(inbox.get, answer)


if __name__ == "__main__":
    main()
