"""Against real servers on loopback; the traffic is what the server counted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from checkpoints.range_server import Site, serve
from checkpoints.safetensors_bytes import build
from mla_study.checkpoints import ranges
from mla_study.checkpoints.bytesource import open_bytes
from mla_study.checkpoints.container import open_container
from mla_study.checkpoints.remote import HttpBytes, parse_hub, resolve_hub
from mla_study.errors import UserError

Start = Callable[..., Site]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "BACKOFF_S", 0.0)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(serve(Site(**kwargs), *args))


@pytest.fixture
def body(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(300_007)


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


def test_ranges_are_exact(start: Start, body: bytes) -> None:
    site = start(files={"/x": body}, etag='"abc"')
    source = HttpBytes(site.url + "/x")
    assert source.size == len(body)
    assert source.remote
    for begin, end in ((0, 0), (0, 3), (2, 8), (5, 100_003), (300_000, 300_007), (9, 9)):
        assert bytes(source.read(begin, end)) == body[begin:end]
    assert source.fingerprint() == '300007-"abc"'
    with pytest.raises(UserError, match="truncated"):
        source.read(300_000, 300_008)
    with pytest.raises(ValueError):
        source.read(5, 4)
    source.close()
    assert bytes(source.read(100, 200)) == body[100:200]  # opens again
    source.close()


@pytest.mark.parametrize("variant", [{"chunked": True}, {"close_each": True}, {"at_most": 40_000}])
def test_other_lawful_servers(start: Start, body: bytes, variant: dict[str, int]) -> None:
    site = start(files={"/x": body}, **variant)
    source = HttpBytes(site.url + "/x")
    assert bytes(source.read(11, 200_000)) == body[11:200_000]
    assert bytes(source.read(300_000, 300_007)) == body[300_000:]
    source.close()


def test_resumes_inside_the_range(start: Start, body: bytes) -> None:
    site = start(files={"/x": body})
    source = HttpBytes(site.url + "/x")
    site.drop_after = [100_000, 0, 70_000]
    assert bytes(source.read(1000, 300_000)) == body[1000:300_000]
    assert [asked for _, asked in site.requests[1:]] == [
        "bytes=1000-299999",
        "bytes=101000-299999",
        "bytes=101000-299999",
        "bytes=171000-299999",
    ]
    assert site.body_bytes == 8 + 299_000 == source.bytes_read  # nothing travels twice
    source.close()


def test_gives_up_after_some_tries(start: Start, body: bytes) -> None:
    site = start(files={"/x": body})
    source = HttpBytes(site.url + "/x")
    site.drop_after = [1000] * 50
    with pytest.raises(UserError, match=r"closed early, 5 tries.*probe the local copy"):
        source.read(1000, 300_000)
    assert len(site.requests) == 1 + ranges.TRIES
    site.drop_after = []
    assert bytes(source.read(8, 300_000)) == body[8:300_000]
    source.close()


def test_progress_renews_the_tries(
    start: Start, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PROGRESS", 20_000)
    site = start(files={"/x": body})
    source = HttpBytes(site.url + "/x")
    site.drop_after = [25_000] * 11
    assert bytes(source.read(0, 300_000)) == body[:300_000]
    source.close()


def test_short_bodies(start: Start, body: bytes) -> None:
    site = start(files={"/x": body})
    source = HttpBytes(site.url + "/x")
    site.short_body = 7
    with pytest.raises(UserError, match="closed early"):
        source.read(0, 1000)
    source.close()


def test_busy_server_is_asked_again(start: Start, body: bytes) -> None:
    site = start(files={"/x": body}, statuses=[503, 429, 500], status_headers={"Retry-After": "0"})
    source = HttpBytes(site.url + "/x")
    assert source.size == len(body)
    site.statuses = [503] * 9
    with pytest.raises(UserError, match=r"HTTP 503, 5 tries"):
        source.read(50, 60)
    source.close()


def test_waits_between_tries(start: Start, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(ranges, "BACKOFF_S", 0.5)
    site = start(files={"/x": body}, statuses=[503] * 4)
    HttpBytes(site.url + "/x").close()
    assert len(waited) == 4
    for wait, base in zip(waited, (0.5, 1, 2, 4), strict=True):
        assert 0.7 * base <= wait <= 1.3 * base
    waited.clear()
    site.statuses, site.status_headers = [429], {"Retry-After": "17"}
    HttpBytes(site.url + "/x").close()
    assert waited == [17.0]


def test_stale_connection_is_no_failure(
    start: Start, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "TRIES", 1)
    site = start(files={"/x": body})
    source = HttpBytes(site.url + "/x")
    assert source._connection is not None
    assert source._connection.sock is not None
    source._connection.sock.shutdown(socket.SHUT_RDWR)
    assert bytes(source.read(100, 200)) == body[100:200]
    source.close()


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
        "from mla_study.checkpoints.bytesource import open_bytes\n"
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


@pytest.mark.parametrize(
    "span",
    ["bytes 0-7/*", "bytes 1-8/300007", "bytes 0-8/300007", "bytes 0-7/4", "items 0-7/9", "bytes"],
)
def test_wrong_content_range(start: Start, body: bytes, span: str) -> None:
    site = start(files={"/x": body}, content_range=span)
    with pytest.raises(UserError, match="probe the local copy"):
        HttpBytes(site.url + "/x")


def test_compressed_ranges_are_refused(start: Start, body: bytes) -> None:
    site = start(files={"/x": body}, extra={"Content-Encoding": "gzip"})
    with pytest.raises(UserError, match="other bytes"):
        HttpBytes(site.url + "/x")
    assert site.headers[0]["accept-encoding"] == "identity"


def test_change_on_the_server(start: Start, body: bytes) -> None:
    site = start(files={"/x": body}, etag='"one"')
    source = HttpBytes(site.url + "/x")
    source.read(8, 20)
    site.etag = '"two"'
    with pytest.raises(UserError, match="changed on the server"):
        source.read(20, 30)
    site.etag = '"one"'
    site.files["/x"] = body + b"more"
    with pytest.raises(UserError, match="changed on the server"):
        source.read(20, 30)
    site.files["/x"] = body[:100]
    with pytest.raises(UserError, match="changed on the server"):
        source.read(200, 230)
    source.close()


def test_redirects_keep_the_token_at_home(start: Start, body: bytes) -> None:
    elsewhere = start(files={"/cdn/x%20y": body})
    site = start(redirects={"/x": "/y", "/y": elsewhere.url + "/cdn/x%20y?sig=1"})
    source = HttpBytes(site.url + "/x", {"Authorization": "Bearer secret"})
    assert bytes(source.read(100, 200)) == body[100:200]
    assert [headers.get("authorization") for headers in site.headers] == ["Bearer secret"] * 2
    assert all("authorization" not in headers for headers in elsewhere.headers)
    assert len(site.requests) == 2  # asked once, then straight to where it led
    # A signed address expires: the way is asked for anew.
    elsewhere.closed["/cdn/x%20y"] = 403
    site.redirects["/y"] = elsewhere.url + "/fresh"
    elsewhere.files["/fresh"] = body
    elsewhere.files.pop("/cdn/x%20y")
    assert bytes(source.read(200, 300)) == body[200:300]
    assert len(site.requests) == 4
    source.close()


def test_bad_redirects(start: Start) -> None:
    site = start(redirects={"/loop": "/loop", "/file": "file:///etc/passwd", "/none": ""})
    for path, says in (("/loop", "redirects more than"), ("/file", "unsafe")):
        with pytest.raises(UserError, match=says):
            HttpBytes(site.url + path)


def test_bad_addresses() -> None:
    for address in ("http://", "https:///x", "http://host:99999999/x", "http://[::1/x"):
        with pytest.raises(UserError, match="not an http"):
            HttpBytes(address)
    for address in (f"http://{'a' * 70}.example/x", "http://no-such-host.invalid/x"):
        with pytest.raises(UserError, match=r"unknown|not a valid|could not be read"):
            HttpBytes(address)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError, match=r"refused, 5 tries"):
        HttpBytes(f"http://127.0.0.1:{port}/x")


def test_odd_paths_and_logins_in_the_address(start: Start, body: bytes) -> None:
    site = start(files={"/a%20b/%C3%A9": body})
    source = HttpBytes(site.url.replace("//", "//me:p%40ss@") + "/a b/é?sig=a%2Fb")
    assert site.requests[0][0] == "/a%20b/%C3%A9?sig=a%2Fb"
    assert site.headers[0]["authorization"] == "Basic bWU6cEBzcw=="
    assert "sig" not in source.name
    assert "ss@" not in source.name
    source.close()


def test_pickles_without_its_connection(start: Start, body: bytes) -> None:
    site = start(files={"/x": body})
    source = HttpBytes(site.url + "/x", on_bytes=lambda count: None)
    again = pickle.loads(pickle.dumps(source))
    assert bytes(again.read(100, 200)) == bytes(source.read(100, 200)) == body[100:200]
    assert len(site.requests) == 3
    again.close()
    source.close()


def test_an_interrupt_leaves_a_usable_source(start: Start, body: bytes) -> None:
    site = start(files={"/x": body})

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    source = HttpBytes(site.url + "/x")
    source.on_bytes = interrupt
    with pytest.raises(KeyboardInterrupt):
        source.read(100, 300_000)
    source.on_bytes = None
    assert bytes(source.read(100, 200)) == body[100:200]
    source.close()


def test_json_is_taken_whole(start: Start) -> None:
    text = json.dumps({"weight_map": {"x" * 40: "y"}}).encode()
    for variant in ({}, {"ignore_range": True}, {"ignore_range": True, "chunked": True}):
        site = start(files={"/w.safetensors.index.json": text}, **variant)
        source = open_bytes(site.url + "/w.safetensors.index.json")
        assert bytes(source.read(0, source.size)) == text
        assert len(site.requests) == 1
        source.close()


def test_proxy_of_the_environment(
    start: Start, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = start(files={"/x": body})
    monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//user:pw@"))
    source = HttpBytes("http://weights.invalid/x")
    assert bytes(source.read(100, 200)) == body[100:200]
    assert proxy.requests[0][0] == "http://weights.invalid/x"
    assert proxy.headers[0]["host"] == "weights.invalid"
    assert proxy.headers[0]["proxy-authorization"] == "Basic dXNlcjpwdw=="
    source.close()
    monkeypatch.setenv("no_proxy", "weights.invalid")
    with pytest.raises(UserError):
        HttpBytes("http://weights.invalid/x")


def test_certificates(
    tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("this openssl makes no certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site = start(context, files={"/x": body})
    with pytest.raises(UserError, match="certificate is not trusted"):
        HttpBytes(site.url + "/x")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    source = HttpBytes(site.url + "/x")
    assert bytes(source.read(1, 299_999)) == body[1:299_999]
    # Never from https down to http.
    site.redirects["/down"] = "http://127.0.0.1:1/x"
    with pytest.raises(UserError, match="unsafe"):
        HttpBytes(site.url + "/down")
    source.close()


def test_a_forked_child_uses_its_own_connection(start: Start, body: bytes) -> None:
    site = start(files={"/x": body})
    source = HttpBytes(site.url + "/x")
    connections = site.connections
    child = os.fork()
    if child == 0:
        ok = bytes(source.read(500, 900)) == body[500:900]
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(source.read(100, 200)) == body[100:200]
    assert site.connections == connections + 1
    source.close()


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
