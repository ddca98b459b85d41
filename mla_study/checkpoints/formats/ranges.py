"""One file over HTTP byte ranges.

Only what is asked for travels: each read is one Range request on a connection kept open. A dropped
connection is resumed inside the range.
"""

from __future__ import annotations

import base64
import http.client
import os
import random
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

import numpy as np

from mla_study.checkpoints.formats.bytesource import OnBytes
from mla_study.checkpoints.formats.container import sniff
from mla_study.errors import UserError

TRIES = 5  # without progress in between
BACKOFF_S = 0.5  # doubled after each failed try
TIMEOUT_S = 30.0
PROGRESS = 1 << 20  # a try that moved this many bytes on starts the count anew
PIECE = 1 << 20
FIRST = 8  # the length field of a safetensors header; enough to learn the file's size
REDIRECTS = 8

_CONTENT_RANGE = re.compile(r"^bytes\s+(?:(\d+)-(\d+)|\*)/(\d+|\*)$", re.IGNORECASE)
_DOWNLOAD = "download the file and probe the local copy"


class _DropError(Exception):
    """A failure worth another try."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class HttpBytes:
    """A remote file read by byte range, by one thread. Pickles without its connection.

    ``headers`` go to the address' own origin only, never to one that it redirects to. Raises
    UserError where the file is absent, needs a login, cannot be read by range, changes while being
    read, or where :data:`TRIES` tries in a row fail.
    """

    remote = True

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        path: str | None = None,
        login: str = f"it needs a login: {_DOWNLOAD}",
        whole_limit: int = 0,
        on_bytes: OnBytes | None = None,
    ) -> None:
        try:
            split = urlsplit(url)
            origin = _origin(split)
        except ValueError:
            split, origin = None, None
        if split is None or origin is None or not origin[1]:
            raise UserError(f"{url!r} is not an http(s) address: check it")
        self.path = path or url
        self.name = path or split._replace(netloc=_netloc(split), query="", fragment="").geturl()
        self.on_bytes = on_bytes
        self.bytes_read = 0
        self.size = -1
        self._headers = dict(headers or {})
        if split.username:
            pair = f"{unquote(split.username)}:{unquote(split.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        self._url = split._replace(netloc=_netloc(split), fragment="").geturl()
        self._target = self._url  # where the redirects led
        self._login = login
        self._etag = self._modified = ""
        self._connection: http.client.HTTPConnection | None = None
        self._connected_to: tuple[str, str, int, int] | None = None
        self._whole_limit = whole_limit
        head = np.empty(whole_limit or FIRST, np.uint8).data
        self._head = bytes(head[: self._fill(0, head)])

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Exactly the bytes ``[start, stop)``, received piece by piece. Raises UserError."""
        if not 0 <= start <= stop:
            raise ValueError(f"bytes [{start}, {stop}) are not a range")
        if stop > self.size:
            raise UserError(
                f"{self.name} ends at byte {self.size} where {stop} were expected: "
                "the file on the server is truncated"
            )
        if stop <= len(self._head):
            return self._head[start:stop]
        buffer = np.empty(stop - start, np.uint8).data
        self._fill(start, buffer)
        return buffer

    def fingerprint(self) -> str:
        """Size with the server's ETag, else its Last-Modified."""
        return f"{self.size}-{self._etag or self._modified}"

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.update(_connection=None, _connected_to=None, on_bytes=None)
        return state

    def _fill(self, start: int, view: memoryview) -> int:
        """Receive bytes from ``start`` until the view is full or, on opening, the file ends."""
        got = 0
        failures = 0
        progress_at = 0
        while got < len(view) and (self.size < 0 or start + got < self.size):
            try:
                for count in self._pieces(start + got, view[got:]):
                    got += count
                    self.bytes_read += count
                    if self.on_bytes is not None:
                        self.on_bytes(count)
            except _DropError as drop:
                self.close()
                if got - progress_at >= PROGRESS:
                    failures, progress_at = 0, got
                failures += 1
                if failures >= TRIES:
                    raise UserError(
                        f"{self.name} could not be read ({drop}, {TRIES} tries): "
                        "try again later, or " + _DOWNLOAD
                    ) from None
                pause = BACKOFF_S * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
                time.sleep(max(pause, drop.wait_s))
            except BaseException:
                self.close()
                raise
        return got

    def _pieces(self, start: int, view: memoryview) -> Iterator[int]:
        """One request; yields the count of each piece put into the view."""
        try:
            response = self._request(start, start + len(view))
            if response.status == 200 and self._whole_limit and self.size < 0:
                yield self._take_whole(response, view)
                return
            count = self._check(response, start, start + len(view))
            at = 0
            while at < count:
                # read1, so that what came before a reset is kept
                piece = response.read1(min(PIECE, count - at))
                if not piece:
                    raise _DropError("the connection was closed early")
                view[at : at + len(piece)] = piece
                at += len(piece)
                yield len(piece)
            if response.chunked or response.will_close:  # pyright: ignore
                self.close()
            else:
                response.close()
        except ssl.SSLCertVerificationError as error:
            raise UserError(
                f"{self.name}: the server's certificate is not trusted "
                f"({error.verify_message}): check the address, or {_DOWNLOAD}"
            ) from None
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise _DropError("the host's name did not resolve") from None
            raise UserError(
                f"{self.name}: the host is unknown: check the address and the network"
            ) from None
        except (http.client.InvalidURL, ValueError):  # whose text may show the token
            raise UserError(
                f"{self.name}: the address, the token or a redirect holds something that cannot "
                "be sent: check them"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise _DropError(str(error) or type(error).__name__) from None

    def _request(self, start: int, stop: int) -> http.client.HTTPResponse:
        target = self._target
        own = _origin(urlsplit(self._url))
        for _ in range(REDIRECTS):
            split = urlsplit(target)
            headers = {
                "User-Agent": "mla_study",
                **(self._headers if _origin(split) == own else {}),
                "Accept-Encoding": "identity",  # a compressed range is not a range of the file
                "Range": f"bytes={start}-{stop - 1}",
            }
            response = self._exchange(split, headers)
            if response.status not in (301, 302, 303, 307, 308):
                if response.status == 206:
                    self._target = target
                return response
            self.close()
            where = urljoin(target, response.headers.get("Location", ""))
            scheme = urlsplit(where).scheme
            if scheme not in ("http", "https") or (split.scheme == "https" and scheme == "http"):
                raise UserError(f"{self.name} redirects to an unsafe address: {_DOWNLOAD}")
            target = where
        raise UserError(f"{self.name} redirects more than {REDIRECTS} times: check the address")

    def _exchange(self, split: SplitResult, headers: dict[str, str]) -> http.client.HTTPResponse:
        scheme, host, port = _origin(split)
        resource = quote(split.path or "/", safe="/%:@!$&'()*+,;=~")
        if split.query:
            resource += "?" + quote(split.query, safe="/%:@!$&'()*+,;=~?")
        proxy = _proxy(scheme, host)
        if proxy is not None and scheme == "http":
            resource = f"http://{split.netloc}{resource}"
            headers = headers | proxy[2]
        origin = (scheme, host, port, os.getpid())  # a forked child must not share the socket
        kept = self._connection is not None and self._connected_to == origin
        while True:
            if not kept:
                self.close()
                self._connection = _connect(scheme, host, port, proxy)
                self._connected_to = origin
            assert self._connection is not None
            try:
                self._connection.request("GET", resource, headers=headers)
                return self._connection.getresponse()
            except (OSError, http.client.HTTPException):
                # A server may close an idle connection at any time: that is no failure.
                if not kept:
                    raise
                kept = False

    def _check(self, response: http.client.HTTPResponse, start: int, stop: int) -> int:
        """The number of bytes that this answer brings, where it is an answer to the range."""
        status = response.status
        span = _CONTENT_RANGE.match(response.headers.get("Content-Range", "").strip())
        if status == 416 and self.size < 0 and span and span[3] == "0":
            self.size = 0
            return 0
        if status == 200:
            self._refuse_whole(response)
        if status != 206:
            self._refuse_status(response)
        if not span or span[1] is None or span[3] == "*":
            raise UserError(
                f"{self.name}: the server's answer does not say which bytes it holds "
                f"(Content-Range): {_DOWNLOAD}"
            )
        first, last, total = int(span[1]), int(span[2]), int(span[3])
        length = response.headers.get("Content-Length")
        count = last - first + 1
        if (
            first != start
            or not 0 < count <= stop - start
            or last >= total
            or (length is not None and length.strip() != str(count))
            or response.headers.get("Content-Encoding", "identity") != "identity"
        ):
            raise UserError(
                f"{self.name}: the server answered bytes {start}-{stop - 1} with other bytes "
                f"({span[0]}, {length} sent): {_DOWNLOAD}"
            )
        etag = response.headers.get("ETag", "")
        etag = "" if etag.startswith("W/") else etag
        if self.size < 0:
            self.size, self._etag = total, etag
            self._modified = response.headers.get("Last-Modified", "")
        elif total != self.size or (etag and self._etag and etag != self._etag):
            raise UserError(f"{self.name} changed on the server while being read: start again")
        return count

    def _take_whole(self, response: http.client.HTTPResponse, view: memoryview) -> int:
        body = response.read(len(view) + 1)
        self.close()
        if len(body) > len(view):
            raise UserError(f"{self.name} has more than {len(view)} bytes: {_DOWNLOAD}")
        self.size = len(body)
        self._etag = response.headers.get("ETag", "")
        view[: len(body)] = body
        return len(body)

    def _refuse_whole(self, response: http.client.HTTPResponse) -> None:
        kind = sniff(response.read(512))
        self.close()
        if kind == "empty":
            raise UserError(f"{self.name} is empty (0 bytes): check the address")
        if kind == "html":
            hint = "check the address"
            if "/blob/" in self.name:
                hint = "put /resolve/ in place of /blob/ in the address"
            raise UserError(f"{self.name} is an HTML page instead of weights: {hint}")
        raise UserError(f"{self.name}: the server ignores byte ranges: {_DOWNLOAD}")

    def _refuse_status(self, response: http.client.HTTPResponse) -> None:
        status = response.status
        wait = response.headers.get("Retry-After", "")
        moved = self._target != self._url
        self.close()
        if status in (408, 425, 429) or status >= 500:
            wait_s = float(min(int(wait), 30)) if wait.isdecimal() else 0.0
            raise _DropError(f"HTTP {status}", wait_s)
        if moved and status in (400, 401, 403, 404, 410):
            self._target = self._url  # signed addresses behind a redirect expire
            raise _DropError(f"HTTP {status}")
        if status in (401, 403):
            raise UserError(f"{self.name} may not be read (HTTP {status}); {self._login}")
        if status in (404, 410):
            raise UserError(f"{self.name} does not exist (HTTP {status}): check the address")
        if status == 416:
            raise UserError(f"{self.name} changed on the server while being read: start again")
        raise UserError(f"{self.name}: the server answered HTTP {status}: {_DOWNLOAD}")


def _origin(split: SplitResult) -> tuple[str, str, int]:
    scheme = split.scheme.lower()
    return scheme, split.hostname or "", split.port or (443 if scheme == "https" else 80)


def _netloc(split: SplitResult) -> str:
    return split.netloc.rpartition("@")[2]


def _proxy(scheme: str, host: str) -> tuple[str, int, dict[str, str]] | None:
    """Host, port and headers of the proxy that the environment names, if any."""
    address = urllib.request.getproxies().get(scheme)
    if not address or urllib.request.proxy_bypass(host):
        return None
    split = urlsplit(address if "://" in address else "http://" + address)
    headers: dict[str, str] = {}
    if split.username:
        pair = f"{unquote(split.username)}:{unquote(split.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    return split.hostname or "", split.port or 8080, headers


def _connect(
    scheme: str, host: str, port: int, proxy: tuple[str, int, dict[str, str]] | None
) -> http.client.HTTPConnection:
    at = (host, port) if proxy is None else proxy[:2]
    if scheme == "http":
        return http.client.HTTPConnection(*at, timeout=TIMEOUT_S)
    context = ssl.create_default_context()
    connection = http.client.HTTPSConnection(*at, timeout=TIMEOUT_S, context=context)
    if proxy is not None:
        connection.set_tunnel(host, port, headers=proxy[2])
    return connection
