"""One place that opens bytes, local or remote."""

from __future__ import annotations

from mla_study.checkpoints.formats import remote
from mla_study.checkpoints.formats.bytesource import ByteSource, LocalBytes, OnBytes, is_remote
from mla_study.errors import UserError


def open_bytes(path_or_url: str, on_bytes: OnBytes | None = None) -> ByteSource:
    """A byte source for a local path, ``http(s)://`` address or ``hf://org/name/file``.

    ``on_bytes(n)`` is called after each piece of ``n`` bytes. Raises UserError.
    """
    if not is_remote(path_or_url):
        return LocalBytes(path_or_url, on_bytes)
    scheme = path_or_url.split("://", 1)[0].lower()
    if scheme == "hf":
        return remote.open_hub_file(path_or_url, on_bytes)
    if scheme in ("http", "https"):
        return remote.HttpBytes(
            path_or_url, whole_limit=remote.whole_limit(path_or_url), on_bytes=on_bytes
        )
    raise UserError(
        f"{path_or_url}: {scheme}:// addresses are not read here; "
        "use https://, hf://org/name/file or a local copy"
    )
