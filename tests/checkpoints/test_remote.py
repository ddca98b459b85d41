"""Weight files at an address; the traffic is what a real server on loopback counted."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoints.range_server import Site, Start
from checkpoints.safetensors_bytes import build
from mla_study.checkpoints.formats.opening import open_container
from mla_study.checkpoints.formats.remote import parse_hub, resolve_hub
from mla_study.checkpoints.formats.sources import open_bytes
from mla_study.errors import UserError


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"blocks.{block}.{part}.weight": rng.standard_normal((rows, 61)).astype(np.float32)
        for block in range(6)
        for part, rows in (("k", 67), ("v", 67), ("ffn", 501))
    }


def failing(address: str) -> str:
    with pytest.raises(UserError) as caught:
        open_container(address)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_only_what_is_asked_for_travels(start: Start, seed: int) -> None:
    stored = weights(seed)
    file = build(stored)
    site = start(files={"/w.safetensors": file})
    seen: list[int] = []
    opened = open_container(site.url + "/w.safetensors", on_bytes=seen.append)
    assert opened.metadata == {}
    header = 8 + int.from_bytes(file[:8], "little")
    assert site.body_bytes == opened.bytes_read == header
    wanted = [name for name in stored if ".ffn." not in name]
    for name in wanted:
        np.testing.assert_array_equal(opened.read(name), stored[name])
    tensor_bytes = sum(stored[name].nbytes for name in wanted)
    assert site.body_bytes == header + tensor_bytes == opened.bytes_read == sum(seen)
    assert site.body_bytes <= 1.1 * tensor_bytes < 0.3 * len(file)
    np.testing.assert_array_equal(
        opened.read("blocks.1.ffn.weight", 3, 5), stored["blocks.1.ffn.weight"][3:5]
    )
    assert site.body_bytes == header + tensor_bytes + 2 * 61 * 4
    # A hash of what was read costs no second transfer.
    opened.raw_sha256(wanted[0])
    assert site.body_bytes == header + tensor_bytes + 2 * 61 * 4
    assert site.connections == 1
    opened.close()


def test_traffic_on_real_weights(start: Start, assets: Path) -> None:
    file = (assets / "weights" / "minilm_l6_attention_fp16.safetensors").read_bytes()
    site = start(files={"/w.safetensors": file})
    opened = open_container(site.url + "/w.safetensors")
    names = [name for name in opened.tensors if "key.weight" in name or "value.weight" in name]
    for name in names:
        opened.read(name)
    tensor_bytes = sum(opened.tensors[name].nbytes for name in names)
    assert names
    assert site.body_bytes <= 1.01 * tensor_bytes
    opened.close()


def test_server_that_ignores_ranges(start: Start, seed: int) -> None:
    file = build(weights(seed))
    site = start(files={"/w.safetensors": file}, ignore_range=True)
    sentence = failing(site.url + "/w.safetensors")
    assert "ignores byte ranges: download the file and probe the local copy" in sentence
    assert "/w.safetensors" in sentence


def test_ignored_range_is_not_read_through() -> None:
    """The server's own socket tells how much of an endless body the client took."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)
    port = listener.getsockname()[1]
    script = (
        "from mla_study.checkpoints.formats.sources import open_bytes\n"
        f"open_bytes('http://127.0.0.1:{port}/x')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True
    ) as client:
        connection, _ = listener.accept()
        connection.settimeout(10)
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n")
        sent = 0
        try:
            while sent < 200_000_000:
                sent += connection.send(bytes(65536))
        except OSError:
            pass
        connection.close()
        listener.close()
        assert "ignores byte ranges" in client.communicate(timeout=20)[1]
    assert sent < 20_000_000  # what the two sockets' buffers hold


@pytest.mark.parametrize("ignore", [True, False])
def test_html_page(start: Start, ignore: bool) -> None:
    page = b"<!DOCTYPE html>\n<html><body>Sign in to go on</body></html>"
    site = start(files={"/a/blob/main/w.safetensors": page}, ignore_range=ignore)
    sentence = failing(site.url + "/a/blob/main/w.safetensors")
    assert "HTML page instead of weights: put /resolve/ in place of /blob/" in sentence


@pytest.mark.parametrize("ignore", [True, False])
def test_small_things_that_are_no_weights(start: Start, ignore: bool) -> None:
    site = start(
        files={
            "/empty": b"",
            "/tiny": b"abc",
            "/zip": b"PK\x03\x04" + bytes(100),
            "/lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        },
        ignore_range=ignore,
    )
    assert "is empty" in failing(site.url + "/empty")
    if ignore:
        return
    assert "3 bytes, too few" in failing(site.url + "/tiny")
    assert "PyTorch or zip file, not safetensors: download it" in failing(site.url + "/zip")
    assert "git-lfs pointer" in failing(site.url + "/lfs")


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "needs a login"), (403, "needs a login"), (404, "check the address"), (418, "HTTP 418")],
)
def test_refusals_are_told_at_once(start: Start, status: int, says: str) -> None:
    site = start(closed={"/w.safetensors": status})
    sentence = failing(site.url + "/w.safetensors?token=secret")
    assert says in sentence
    assert str(status) in sentence
    assert "secret" not in sentence
    assert len(site.requests) == 1


# A hub


@pytest.fixture
def hub(start: Start, monkeypatch: pytest.MonkeyPatch, seed: int) -> Site:
    """A loopback hub that holds org/wan, whose files lie on another server."""
    pytest.importorskip("huggingface_hub")
    stored = {"blocks.0.self_attn.k.weight": np.ones((3, 5), np.float32)}
    cdn = start(files={"/cdn/w": build(stored)})
    info = {
        "id": "org/wan",
        "sha": "0123456789abcdef0123456789abcdef01234567",
        "siblings": [
            {"rfilename": "config.json"},
            {"rfilename": "sub/w.safetensors"},
            {"rfilename": "sub/config.json"},
        ],
    }
    site = start(
        files={
            "/api/models/org/wan": json.dumps(info).encode(),
            "/api/models/org/wan/revision/v1": json.dumps(info).encode(),
            f"/org/wan/resolve/{info['sha']}/config.json": b'{"dim": 5}',
        },
        redirects={
            f"/org/wan/resolve/{info['sha']}/sub/w.safetensors": cdn.url + "/cdn/w",
            "/org/wan/resolve/main/sub/w.safetensors": cdn.url + "/cdn/w",
        },
        extra={"Content-Type": "application/json"},
    )
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return site


def test_hub_listing(hub: Site) -> None:
    for address in ("hf://org/wan/sub@v1", "hf://org/wan@v1/sub"):
        listing = resolve_hub(address)
        assert listing.repo == "org/wan"
        assert listing.inside == "sub"
        assert listing.files == ("config.json", "sub/w.safetensors", "sub/config.json")
        assert hub.requests[-1][0].split("?")[0] == "/api/models/org/wan/revision/v1"
    address = listing.address("sub/w.safetensors")
    assert address == f"hf://org/wan@{listing.revision}/sub/w.safetensors"
    assert listing.url("config.json") == f"{hub.url}/org/wan/resolve/{listing.revision}/config.json"
    assert listing.headers()["authorization"] == "Bearer hf_secret"
    opened = open_container(address)
    assert opened.path == address
    assert opened.read("blocks.0.self_attn.k.weight").sum() == 15
    assert hub.headers[-1]["authorization"] == "Bearer hf_secret"
    opened.close()
    source = open_bytes(listing.address("config.json"))
    assert json.loads(bytes(source.read(0, source.size))) == {"dim": 5}
    source.close()


def test_hub_file_without_listing(hub: Site) -> None:
    opened = open_container("hf://org/wan/sub/w.safetensors")
    assert list(opened.tensors) == ["blocks.0.self_attn.k.weight"]
    assert all(not path.startswith("/api") for path, _ in hub.requests)
    opened.close()


def test_hub_refusals(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "name a weight file inside" in failing("hf://org/wan")
    assert "does not exist (HTTP 404)" in failing("hf://org/wan/absent.safetensors")
    hub.closed["/org/wan/resolve/main/closed.safetensors"] = 403
    sentence = failing("hf://org/wan/closed.safetensors")
    assert "HF_TOKEN" in sentence
    assert "hf_secret" not in sentence
    cases = (
        (404, {"X-Error-Code": "RepoNotFound"}, "no model repository org/wan"),
        (401, {"X-Error-Code": "RepoNotFound"}, "HF_TOKEN"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no revision 'v9'"),
        (403, {"X-Error-Code": "GatedRepo"}, "is gated: accept its terms"),
        (418, {}, "HTTP 418"),
    )
    for status, headers, says in cases:
        hub.statuses, hub.status_headers = [status], headers
        with pytest.raises(UserError, match=says):
            resolve_hub("hf://org/wan@v9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="did not list it"):
        resolve_hub("hf://org/wan")


def test_hub_offline(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for call in (resolve_hub, open_bytes):
        with pytest.raises(UserError, match="unset HF_HUB_OFFLINE"):
            call("hf://org/wan/sub/w.safetensors")
    assert hub.requests == []


def test_hub_package_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (resolve_hub, open_bytes):
        with pytest.raises(UserError, match=r"mla-study\[hub\]"):
            call("hf://org/wan/x.safetensors")


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://org/name", ("org/name", None, "")),
        ("hf://org/name/", ("org/name", None, "")),
        ("hf://org/name@v1.0", ("org/name", "v1.0", "")),
        ("hf://org/name@v1.0/a/b.safetensors", ("org/name", "v1.0", "a/b.safetensors")),
        ("hf://org/name/a/b.safetensors@v1.0", ("org/name", "v1.0", "a/b.safetensors")),
        ("hf://org/name@refs/pr/3/a", ("org/name", "refs/pr/3", "a")),
        ("hf://org/name/a@refs/pr/3", ("org/name", "refs/pr/3", "a")),
        ("hf://org/name@feature%2Fx/a", ("org/name", "feature/x", "a")),
        ("hf://org/name@v1/a@b", ("org/name", "v1", "a@b")),
    ],
)
def test_hub_addresses(address: str, parts: tuple[str, str | None, str]) -> None:
    assert parse_hub(address) == parts


@pytest.mark.parametrize("address", ["hf://", "hf://name", "hf://datasets/org/x", "hf:///a/b@"])
def test_bad_hub_addresses(address: str) -> None:
    if address == "hf:///a/b@":
        assert parse_hub("hf:///a/b") == ("a/b", None, "")
    with pytest.raises(UserError, match="names no model repository"):
        parse_hub(address)
