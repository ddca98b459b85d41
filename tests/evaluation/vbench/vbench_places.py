"""Made-up weights folders, environments and a server, for the tests of VBench's needs."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mla_study.evaluation.vbench.needs.environment import PINS, PINS_DETECTRON2, PINS_LONG
from mla_study.evaluation.vbench.needs.weights import ITEMS, Item


def environment(root: Path, **changed: str) -> Path:
    """A folder that looks like VBench's environment, whose torch sees no GPU."""
    site = root / "lib" / "python3.11" / "site-packages"
    for name, version in {**PINS, **PINS_LONG, **PINS_DETECTRON2, **changed}.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(text)
    python = root / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho 'devices []'\n")
    python.chmod(0o755)
    return root


def small(monkeypatch: Any, key: str, content: bytes, **more: Any) -> Item:
    """Make an item of the table one of this content."""
    digest = hashlib.sha256(content).hexdigest()
    told = {"size": len(content), "sha256": digest, **more}
    item = replace(ITEMS[key], **told)
    monkeypatch.setitem(ITEMS, key, item)
    return item


def put(weights: Path, key: str, content: bytes) -> Path:
    """Write an item's file."""
    path = weights / ITEMS[key].place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@dataclass
class Files:
    """What a server has, and how it behaves; ``asked`` are (path, Range) in order.

    Attributes:
        cuts: path -> after how many bytes the next answer ends, once each.
        broken: path -> statuses of the next answers.
        moved: path -> where it sends to.
    """

    base: str = ""
    content: dict[str, bytes] = field(default_factory=dict[str, bytes])
    cuts: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    broken: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    moved: dict[str, str] = field(default_factory=dict[str, str])
    etags: dict[str, str] = field(default_factory=dict[str, str])
    ranges: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list[tuple[str, "str | None"]])

    def add(self, item: Item, content: bytes) -> str:
        """Serve an item where ``--mirror`` asks for it; returns the path."""
        path = "/" + item.url.partition("://")[2]
        self.content[path] = content
        return path


@contextmanager
def serving() -> Iterator[Files]:
    """A server on a free port of 127.0.0.1."""
    files = Files()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            files.asked.append((self.path, wanted))
            if files.broken.get(self.path):
                self.send_error(files.broken[self.path].pop(0))
                return
            if self.path in files.moved:
                self.send_response(302)
                self.send_header("Location", files.moved[self.path])
                self.end_headers()
                return
            body = files.content.get(self.path)
            if body is None:
                self.send_error(404)
                return
            etag = files.etags.get(self.path, '"one"')
            start = 0
            same = self.headers.get("If-Range") in (None, etag)
            if wanted and files.ranges and same:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            self.send_header("ETag", etag)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            rest = body[start:]
            if files.cuts.get(self.path):
                rest = rest[: files.cuts[self.path].pop(0)]
            self.wfile.write(rest)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    files.base = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
