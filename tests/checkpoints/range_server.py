"""A real HTTP server on loopback: byte ranges, counted traffic, bad manners on demand."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Site:
    """What the server holds, how it behaves, and what it saw."""

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    redirect_status: int = 302
    statuses: list[int] = field(default_factory=list)  # answered first, one a request
    status_headers: dict[str, str] = field(default_factory=dict)
    closed: dict[str, int] = field(default_factory=dict)  # path -> status
    ignore_range: bool = False
    chunked: bool = False
    close_each: bool = False
    drop_after: list[int] = field(default_factory=list)  # body bytes, one a request, then a reset
    short_body: int = 0  # bytes withheld from the body that Content-Length announces
    at_most: int = 0  # a shorter range than asked for
    content_range: str | None = None
    etag: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    # seen
    body_bytes: int = 0
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    headers: list[dict[str, str]] = field(default_factory=list)
    connections: int = 0
    url: str = ""


Start = Callable[..., Site]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def setup(self) -> None:
        super().setup()
        self.site.connections += 1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        site = self.site
        self.send_response(status)
        for key, value in (headers | site.extra).items():
            self.send_header(key, value)
        if site.close_each:
            self.send_header("Connection", "close")
            self.close_connection = True
        if site.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        keep = len(body) - site.short_body
        if site.drop_after:
            keep = min(keep, site.drop_after.pop(0))
        cut = keep < len(body)
        body = body[:keep]
        site.body_bytes += len(body)  # before the client can see it
        try:
            if site.chunked:
                for at in range(0, len(body), 7001):
                    piece = body[at : at + 7001]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                if not cut:
                    self.wfile.write(b"0\r\n\r\n")
            else:
                self.wfile.write(body)
            self.wfile.flush()
        except OSError:
            cut = True
        if cut:
            self.close_connection = True

    def do_GET(self) -> None:
        site = self.site
        split = urlsplit(self.path)
        path = split.path
        asked = self.headers.get("Range")
        site.requests.append((self.path, asked))
        site.headers.append({key.lower(): value for key, value in self.headers.items()})
        if site.statuses:
            return self._answer(site.statuses.pop(0), b"busy", site.status_headers)
        if path in site.closed:
            return self._answer(site.closed[path], b"no", {})
        if path in site.redirects:
            headers = {"Location": site.redirects[path]}
            return self._answer(site.redirect_status, b"elsewhere", headers)
        if path not in site.files:
            return self._answer(404, b"<html>absent</html>", {})
        body = site.files[path]
        headers = {"ETag": site.etag} if site.etag else {}
        match = re.match(r"bytes=(\d+)-(\d+)$", asked or "")
        if site.ignore_range or not match:
            return self._answer(200, body, headers)
        first, last = int(match[1]), min(int(match[2]), len(body) - 1)
        if site.at_most:
            last = min(last, first + site.at_most - 1)
        if first >= len(body):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        span = site.content_range or f"bytes {first}-{last}/{len(body)}"
        headers["Content-Range"] = span
        return self._answer(206, body[first : last + 1], headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 32

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients hang up on purpose


@contextmanager
def serve(site: Site, context: ssl.SSLContext | None = None) -> Iterator[Site]:
    """Serve the site on a free port of loopback; ``site.url`` is its address."""
    handler = type("Handler", (_Handler,), {"site": site})
    server = _Server(("127.0.0.1", 0), handler)
    scheme = "http"
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    site.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
