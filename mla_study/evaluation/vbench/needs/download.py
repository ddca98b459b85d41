"""A file over HTTP, by range from where an earlier attempt stopped.

``FILE.part`` holds what has come, ``FILE.part.json`` which version of the address it is from (its
ETag or date), so that a file that has changed since starts anew. Nothing here checks the content.
"""

from __future__ import annotations

import errno
import fcntl
import http.client
import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from mla_study.errors import UserError

TIMEOUT_S = 60.0
ATTEMPTS = 5
_BLOCK = 1 << 20
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_AGENT = "mla-study"

OnBytes = Callable[[int, int, int | None], object]
"""Called with bytes that came, bytes there now, and the file's size if that is known."""


class DownloadError(Exception):
    """Why an address did not give its file. ``cause`` is the same for files that failed alike.

    Attributes:
        host: where no connection came about, so that further files need not try.
    """

    def __init__(self, cause: str, host: str = "") -> None:
        super().__init__(cause)
        self.cause, self.host = cause, host


class _CutError(Exception):
    """The connection ended early: to be tried again."""


@dataclass(frozen=True)
class Patience:
    """How often to try again, and how long to wait: ``wait_s`` doubles from one to the next."""

    attempts: int = ATTEMPTS
    wait_s: float = 1.0
    timeout_s: float = TIMEOUT_S


PATIENCE = Patience()


def download(
    url: str,
    part: Path,
    *,
    size: int | None = None,
    patience: Patience = PATIENCE,
    on_bytes: OnBytes = lambda new, there, total: None,
) -> None:
    """Bring ``url`` into ``part``, going on from what is there.

    Attempts that bring something do not count. A server without ranges sends the file from its
    start.

    Args:
        size: bytes it must have; None where that is not known.

    Raises:
        DownloadError: the address does not give it, or not with that size.
        UserError: the disk is full or the folder cannot be written, or another process is at it.
    """
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise UserError(
                    f"another process is writing {part}: wait for it, or end it"
                ) from None
            try:
                _download(url, part, file, size, patience, on_bytes)
            except DownloadError:
                if file.tell() == 0:
                    discard(part)
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full at {part}: free some space, and the same command goes on"
            ) from None
        raise UserError(
            f"{part} cannot be written ({error.strerror or error}): check its folder"
        ) from None


def discard(part: Path) -> None:
    """Remove a part and what is known of it."""
    for path in (part, _notes(part)):
        path.unlink(missing_ok=True)


def _download(
    url: str, part: Path, file: IO[bytes], size: int | None, patience: Patience, on_bytes: OnBytes
) -> None:
    left, wait = patience.attempts, patience.wait_s
    while True:
        before = file.tell()
        if size is not None and before == size:
            break
        try:
            _once(url, part, file, size, patience.timeout_s, on_bytes)
            break
        except _CutError as error:
            left = patience.attempts if file.tell() > before else left - 1
            if left <= 0:
                raise DownloadError(str(error)) from None
            wait = patience.wait_s if file.tell() > before else min(60.0, 2 * wait)
            time.sleep(wait)
    file.flush()
    _notes(part).unlink(missing_ok=True)


def _once(
    url: str, part: Path, file: IO[bytes], size: int | None, timeout_s: float, on_bytes: OnBytes
) -> None:
    """One request; :class:`_CutError` where another may do better."""
    host = urlsplit(url).netloc
    there = file.tell()
    if size is not None and there > size:
        there = _restart(file)
    headers = {"User-Agent": _AGENT, "Accept-Encoding": "identity"}
    if there:
        headers["Range"] = f"bytes={there}-"
        mark = _mark(part, url)
        if mark:
            headers["If-Range"] = mark
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=timeout_s
        ) as answer:
            total = _begin(answer, file, there, url, size)
            _remember(part, url, answer)
            while block := answer.read(_BLOCK):
                file.write(block)
                on_bytes(len(block), file.tell(), total)
    except urllib.error.HTTPError as error:
        _refused(error, file, there, host, size)
        return
    except (http.client.HTTPException, TimeoutError, ConnectionError, urllib.error.URLError) as e:
        file.flush()
        raise _why(e, host) from None
    file.flush()
    if total is not None and file.tell() < total:
        raise _CutError(f"{host} ends the connection before the file is whole")


def _begin(
    answer: Any, file: IO[bytes], there: int, url: str, size: int | None
) -> int | None:  # fmt: skip
    """Where the answer starts, and the size that the file will have."""
    length = answer.headers.get("Content-Length")
    left = int(length) if length and length.isdigit() else None
    if answer.status == 206:
        start, total = _range(answer.headers.get("Content-Range"))
        if start != there:
            _restart(file)
            raise _CutError(f"{urlsplit(url).netloc} sends another part than asked for")
        total = total if total is not None else (None if left is None else there + left)
    else:
        if there:
            _restart(file)
        total = left
    if size is not None and total is not None and total != size:
        raise DownloadError(f"{url} has {total:,} bytes instead of {size:,}: the file has changed")
    return total


def _range(text: str | None) -> tuple[int | None, int | None]:
    """``bytes 5-9/10`` -> (5, 10)."""
    kind, _, rest = (text or "").strip().partition(" ")
    span, _, total = rest.partition("/")
    start = span.partition("-")[0]
    if kind != "bytes" or not start.isdigit():
        return None, int(total) if total.isdigit() else None
    return int(start), int(total) if total.isdigit() else None


def _restart(file: IO[bytes]) -> int:
    file.seek(0)
    file.truncate()
    return 0


def _refused(
    error: urllib.error.HTTPError, file: IO[bytes], there: int, host: str, size: int | None
) -> None:
    code = error.code
    if code == 416:
        _, total = _range(error.headers.get("Content-Range"))
        if total is not None and total == there and size in (None, total):
            return
        _restart(file)
        raise _CutError(f"{host} does not send the rest of the file")
    if code in _AGAIN:
        raise _CutError(f"{host} answers HTTP {code}")
    if code in (401, 403):
        raise DownloadError(f"{host} refuses it (HTTP {code}): see whether its page wants a login")
    if code in (404, 410):
        raise DownloadError(f"{host} does not have it any more (HTTP {code})")
    raise DownloadError(f"{host} answers HTTP {code} ({error.reason})")


def _why(error: Exception, host: str) -> Exception:
    reason = getattr(error, "reason", error)
    if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT):
        return reason
    if isinstance(reason, socket.gaierror):
        return DownloadError(f"{host} cannot be found: is there a network?", host)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return DownloadError(f"{host} has a certificate that is not trusted", host)
    if isinstance(reason, ConnectionRefusedError):
        return DownloadError(f"{host} refuses the connection: is there a network?", host)
    if isinstance(reason, OSError) and reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return DownloadError(f"{host} cannot be reached: is there a network?", host)
    if isinstance(reason, TimeoutError):
        return _CutError(f"{host} does not answer in time")
    if isinstance(reason, (ConnectionError, http.client.IncompleteRead)):
        return _CutError(f"{host} ends the connection before the file is whole")
    if isinstance(error, urllib.error.URLError):
        return DownloadError(f"{host} cannot be asked ({reason})", host)
    return _CutError(f"{host} answers what is no HTTP ({type(error).__name__})")


def _notes(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _mark(part: Path, url: str) -> str | None:
    """ETag or date of the version that the part is from, if the address is the same."""
    with suppress(OSError, ValueError):
        told = json.loads(_notes(part).read_text(encoding="utf-8"))
        if isinstance(told, dict) and told.get("url") == url:
            return told.get("mark")
    return None


def _remember(part: Path, url: str, answer: Any) -> None:
    etag = answer.headers.get("ETag") or ""
    mark = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
    _notes(part).write_text(json.dumps({"url": url, "mark": mark}), encoding="utf-8")
