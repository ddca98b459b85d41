"""A worker that follows the protocol and scores by the bytes of a file; names make it misbehave."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mla_study.evaluation.vbench.worker.channel import die_with_driver


def split(job: dict[str, Any]) -> dict[str, Any]:
    """A video as one clip of six frames at eight a second."""
    name = Path(job["name"]).stem
    file = Path(job["out"]) / f"{name}_full.mp4"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(Path(job["path"]).read_bytes())
    clip = {"path": str(file), "clip": file.stem, "part": name, "start_s": 0.0, "stop_s": 0.75}
    return {"frames": 6, "fps": "8", "clips": [{**clip, "frames": 6}]}


def main() -> None:
    die_with_driver()
    if "FAKE_PIDS" in os.environ:
        (Path(os.environ["FAKE_PIDS"]) / str(os.getpid())).touch()
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
            said = {
                "event": "score", "id": job["id"], "value": digest[0] / 255, "counted": True,
                "terms": 1 + digest[1] % 5, "frames": 6, "seconds": 0.01, "rss_mib": 10.0,
            }  # fmt: skip
            if Path(job["path"]).with_suffix(".short").exists():
                said["frames"] = 3
            if scorer == "static_filter":
                said["value"] = int(not Path(job["path"]).with_suffix(".moves").exists())
            if scorer == "long.split":
                said |= {"value": 1, "more": split(job)}
            print(json.dumps(said))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
