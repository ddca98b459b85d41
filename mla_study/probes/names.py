"""How a checkpoint is called in tables and messages: an address without what it keeps secret."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s'\"<>]+)")
_CLOSING = ".,:;)]}"


def public_name(path: str) -> str:
    """A path as it is; an address without user, query (tokens, signatures) and fragment."""
    found = _ADDRESS.match(path)
    return path if found is None else found[1] + _bare(path[found.end(1) :])


def redact(text: str) -> str:
    """A sentence with every address in it reduced as by :func:`public_name`."""

    def shorten(found: re.Match[str]) -> str:
        rest = found[2]
        bare = _bare(rest)
        ends = rest[len(rest.rstrip(_CLOSING)) :]
        return found[1] + bare + (ends if not bare.endswith(ends) else "")

    return _ADDRESS.sub(shorten, text)


def _bare(rest: str) -> str:
    """What follows ``scheme://``, without user, query and fragment."""
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    return host.rpartition("@")[2] + slash + path
