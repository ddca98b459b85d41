"""A browser for tests: Debian's Chromium without a window, spoken to by the DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from websocket import WebSocket, WebSocketTimeoutException, create_connection

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60.0


def chromium() -> str:
    """The browser's program; the test is skipped where there is none."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (Debian: chromium)")


class Page:
    """One tab. Events are kept as they come: :attr:`events`."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method and give its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)
        raise TimeoutError(method)

    def listen(self, seconds: float) -> None:
        """Keep what happens for a while."""
        deadline = time.monotonic() + seconds
        self._socket.settimeout(0.1)
        while time.monotonic() < deadline:
            with contextlib.suppress(WebSocketTimeoutException):
                self.events.append(json.loads(self._socket.recv()))
        self._socket.settimeout(PATIENCE)

    def run(self, expression: str) -> Any:
        """Value of an expression in the page; promises are awaited."""
        done = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, expression: str, seconds: float = PATIENCE) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"still not: {expression}"
            self.listen(0.1)

    def open(self, address: str) -> None:
        """Load an address and wait for it."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def size(self, width: int, height: int = 900, phone: bool = False) -> None:
        """Size of the window, in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip

    def colours(self, scheme: str) -> None:
        """What the system is said to prefer: dark or light, and in either case no motion."""
        self.send(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": scheme},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ],
        )

    def key(self, name: str) -> None:
        """Press a key that has a name."""
        codes = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowLeft": 37, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(name, "")
        told = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name]}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.send("Input.dispatchKeyEvent", **down, **told)
        self.send("Input.dispatchKeyEvent", type="keyUp", **told)

    def picture(self, file: Path, full: bool = False) -> bytes:
        """A screenshot, kept in a file."""
        taken = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        content = base64.b64decode(taken["data"])
        file.write_bytes(content)
        return content

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions."""
        told: list[str] = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                told.append(str(params["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                told.append(str(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                told.append(str(params["entry"]))
        return told

    def requests(self) -> list[str]:
        """Addresses that were asked for, but for data in the page itself."""
        sent = (e["params"] for e in self.events if e.get("method") == "Network.requestWillBeSent")
        urls = [str(params["request"]["url"]) for params in sent]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]


@contextlib.contextmanager
def browser(profile: Path, *options: str) -> Generator[Page]:
    """A tab of a fresh browser, which is ended afterwards."""
    program = chromium()
    profile.mkdir(parents=True, exist_ok=True)
    command = [
        program, "--headless=new", "--disable-gpu", "--no-first-run", "--mute-audio",
        "--autoplay-policy=no-user-gesture-required", "--remote-debugging-port=0",
        f"--user-data-dir={profile}", *options, "about:blank",
    ]  # fmt: skip
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = _port(profile / "DevToolsActivePort", process)
        socket = create_connection(
            f"ws://127.0.0.1:{port[0]}{port[1]}", timeout=PATIENCE, suppress_origin=True
        )
        root = Page(socket)
        target = root.send("Target.createTarget", url="about:blank")["targetId"]
        tab = create_connection(
            f"ws://127.0.0.1:{port[0]}/devtools/page/{target}", timeout=PATIENCE,
            suppress_origin=True,
        )  # fmt: skip
        yield Page(tab)
        tab.close()
        socket.close()
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(file: Path, process: subprocess.Popen[bytes]) -> tuple[int, str]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = file.read_text().splitlines()
            return int(lines[0]), lines[1]
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        time.sleep(0.1)
    raise TimeoutError("the browser did not open its port")
