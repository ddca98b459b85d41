"""One file by range, against real servers on loopback that behave and misbehave."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from checkpoints.range_server import Start
from mla_study.checkpoints.formats import ranges
from mla_study.checkpoints.formats.remote import HttpBytes
from mla_study.checkpoints.formats.sources import open_bytes
from mla_study.errors import UserError


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


@pytest.mark.usefixtures("no_waiting")
def test_bad_addresses() -> None:
    for address in ("http://", "https:///x", "http://host:99999999/x", "http://[::1/x"):
        with pytest.raises(UserError, match="not an http"):
            HttpBytes(address)
    for address in (f"http://{'a' * 70}.example/x", "http://no-such-host.invalid/x"):
        with pytest.raises(UserError, match=r"unknown|cannot be sent|could not be read"):
            HttpBytes(address)


@pytest.mark.usefixtures("no_waiting")
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


def test_a_forked_child_uses_its_own_connection(
    start: Start, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = start(files={"/x": body})
    source = HttpBytes(site.url + "/x")
    source.read(500, 900)
    assert site.connections == 1
    monkeypatch.setattr(os, "getpid", lambda: 2)
    assert bytes(source.read(100, 200)) == body[100:200]
    assert site.connections == 2
    source.close()


def test_tokens_that_cannot_be_sent(start: Start, body: bytes) -> None:
    site = start(files={"/x": body}, redirects={"/odd": "http://[::1/x", "/port": "http://h:x/"})
    for token in ("secret\n", "secret…"):
        with pytest.raises(UserError, match="cannot be sent") as caught:
            HttpBytes(site.url + "/x", {"Authorization": token})
        assert "secret" not in str(caught.value)
    for path in ("/odd", "/port"):
        with pytest.raises(UserError, match="cannot be sent"):
            HttpBytes(site.url + path)
