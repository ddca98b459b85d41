"""Weight files by address, without downloading them: ``https://`` and ``hf://`` (a model hub)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from mla_study.checkpoints.formats.bytesource import OnBytes
from mla_study.checkpoints.formats.ranges import TIMEOUT_S, HttpBytes
from mla_study.errors import UserError

__all__ = ["HttpBytes", "HubListing", "open_hub_file", "parse_hub", "resolve_hub", "whole_limit"]


def whole_limit(address: str) -> int:
    """What to take whole: the JSON descriptions beside weights, up to 64 MB."""
    return 64_000_000 if urlsplit(address).path.endswith(".json") else 0


@dataclass(frozen=True)
class HubListing:
    """A model repository at one commit: its files, and where they are.

    ``inside`` is the path within the repository that was asked for ('' for the whole of it);
    ``files`` are all paths in it, relative to its root; :meth:`address` of one of them goes to
    :func:`mla_study.checkpoints.formats.opening.open_container`, in any process.
    """

    repo: str
    revision: str
    inside: str
    files: tuple[str, ...]

    def address(self, file: str) -> str:
        """``hf://org/name@commit/file``."""
        return f"hf://{self.repo}@{self.revision}/{file}"

    def url(self, file: str) -> str:
        """The https address of a file, where it is read by range."""
        return _hub_url(self.repo, self.revision, file)

    def headers(self) -> dict[str, str]:
        """What to send with it: the user's token, where there is one."""
        return _hub_headers()


def resolve_hub(address: str) -> HubListing:
    """List ``hf://org/name[@revision][/path]`` (``@revision`` may also stand at the end).

    Asks the hub that ``HF_ENDPOINT`` names, with ``HF_TOKEN``. Raises UserError where the
    repository is absent or closed, or huggingface_hub is not installed.
    """
    repo, revision, inside = parse_hub(address)
    hub = _hub()
    errors = hub.errors
    try:
        api = hub.HfApi(endpoint=_endpoint(), library_name="mla_study")
        info = api.model_info(repo, revision=revision, timeout=TIMEOUT_S)
    except errors.GatedRepoError:
        raise UserError(f"{address} is gated: {_hub_login(repo)}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{address}: {repo} has no revision {revision!r}: check it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{address}: there is no model repository {repo}, or it is private: "
            "check its name, or set HF_TOKEN to a token that may read it"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise UserError(f"{address} cannot be read offline: unset HF_HUB_OFFLINE") from None
    except errors.HFValidationError:
        raise UserError(f"{address}: {repo!r} is not a repository name: check it") from None
    except Exception as error:  # the client library of huggingface_hub has changed twice
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"HTTP {status}" if status else f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{address}: the hub at {_endpoint()} did not list it ({why}): "
            "check the network and HF_ENDPOINT, or try again later"
        ) from None
    files = tuple(sibling.rfilename for sibling in info.siblings or ())
    return HubListing(repo, info.sha or revision or "main", inside, files)


def open_hub_file(address: str, on_bytes: OnBytes | None = None) -> HttpBytes:
    """The bytes of ``hf://org/name[@revision]/path/in/repo``. Raises UserError."""
    repo, revision, inside = parse_hub(address)
    if not inside:
        raise UserError(f"{address} is a repository: name a weight file inside it")
    if _hub().constants.HF_HUB_OFFLINE:
        raise UserError(f"{address} cannot be read offline: unset HF_HUB_OFFLINE")
    return HttpBytes(
        _hub_url(repo, revision or "main", inside),
        _hub_headers(),
        path=address,
        login=_hub_login(repo),
        whole_limit=whole_limit(inside),
        on_bytes=on_bytes,
    )


def parse_hub(address: str) -> tuple[str, str | None, str]:
    """``hf://org/name[@revision][/path][@revision]`` -> (``org/name``, revision, path)."""
    rest = address.split("://", 1)[-1].strip("/")
    found = re.match(r"^([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.*))?$", rest)
    if not found or found[1].split("/")[0] in ("datasets", "spaces", "buckets", "models"):
        raise UserError(f"{address} names no model repository: write hf://org/name[/file][@rev]")
    repo, revision, path = found[1], found[2], found[3] or ""
    if revision is None and "@" in path:
        path, _, revision = path.rpartition("@")
    return repo, unquote(revision) if revision else None, path.strip("/")


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise UserError(
            "hf:// addresses need huggingface_hub: install it with `pip install 'mla-study[hub]'`"
        ) from None
    return huggingface_hub


def _endpoint() -> str:
    # huggingface_hub reads the variable only once, when imported
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _hub_url(repo: str, revision: str, file: str) -> str:
    return _hub().hf_hub_url(repo, file, revision=revision, endpoint=_endpoint())


def _hub_headers() -> dict[str, str]:
    hub = _hub()
    try:
        return dict(hub.utils.build_hf_headers(library_name="mla_study"))
    except Exception as error:
        raise UserError(f"the hub's token cannot be read: {error}") from None


def _hub_login(repo: str) -> str:
    return (
        f"accept its terms at {_endpoint()}/{repo} if it has any, "
        "then set HF_TOKEN to a token that may read it"
    )
