"""A worker that follows the protocol and scores by the bytes of a file; names make it misbehave."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    scorer = request["scorer"]
    if scorer == os.environ.get("FAKE_BROKEN"):
        print(json.dumps({"event": "error", "reason": "its weights are not to its liking"}))
        sys.exit(2)
    print("libraries print what they like", flush=True)
    print(json.dumps({"event": "ready", "versions": {}, "patches": ["a patch"], "load_s": 0.1}))
    sys.stdout.flush()
    for line in sys.stdin:
        job = json.loads(line)
        time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
        if Path(job["path"]).with_suffix(".kill").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if Path(job["path"]).with_suffix(".fail").exists():
            print(json.dumps({"event": "failed", "id": job["id"], "reason": "a score that is NaN"}))
        else:
            told = f"{scorer} {job['prompt'] if scorer == 'scene' else ''}".encode()
            digest = hashlib.sha256(told + Path(job["path"]).read_bytes()).digest()
            # to the long mode, a video is one clip of itself
            clip = {"path": job["path"], "part": "all", "start_s": 0.0, "stop_s": 0.75}
            print(json.dumps({
                "event": "score", "id": job["id"], "value": digest[0] / 255, "counted": True,
                "terms": 1 + digest[1] % 5, "frames": 6, "seconds": 0.01, "rss_mib": 10.0,
                "more": {"clips": [clip]} if scorer == "long.split" else {},
            }))  # fmt: skip
        sys.stdout.flush()


if __name__ == "__main__":
    main()
