"""Headless Chromium through its DevTools protocol, spoken over a pipe: no port, no driver, no package.

Messages are JSON, each ended by a zero byte; the browser reads them from file descriptor 3 and answers on 4.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
    # Whatever tried to reach a host would fail, and be seen to.
    *("--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND"),
]
DEADLINE = 60.0


def find_chromium() -> str | None:
    """The browser's program, if there is one and this system can hand it a pipe."""
    if os.name != "posix":
        return None
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """One page in the browser, and what it did: requests, console messages, errors.

    Attributes:
        requested: addresses of every request the page made.
        complaints: console messages, uncaught errors and log entries.
    """

    def __init__(self, write: int, read: int):
        self._write, self._read, self._buffer, self._last, self._session = write, read, b"", 0, ""
        self.requested: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; collects events on the way."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + DEADLINE
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select([self._read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"Chromium did not answer within {DEADLINE:.0f} seconds"
            more = os.read(self._read, 1 << 20)
            assert more, "Chromium ended"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(parameters))

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Shows a file in a window of the given size and waits until it is drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        self.wait(lambda: self.run("document.body?.dataset.drawn ?? ''") != "", "the page is drawn")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def settle(self) -> dict[str, Any]:
        """Waits until everything is drawn; returns what is chosen."""
        self.run("new Promise(requestAnimationFrame).then(() => drawing)")
        return json.loads(self.run("document.body.dataset.drawn"))

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Waits until `condition()` holds."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, f"not so within {DEADLINE:.0f} seconds: {what}"
            time.sleep(0.02)

    def choose(self, select_id: str, value: object) -> dict[str, Any]:
        """Takes an entry of a selector, as a user's choice does."""
        script = "const s = document.getElementById({}); s.value = {}; s.dispatchEvent(new Event('change'))"
        self.run("{" + script.format(json.dumps(select_id), json.dumps(str(value))) + "}")
        return self.settle()

    def click(self, selector: str, *, x: float = 0.5, y: float = 0.5) -> dict[str, Any]:
        """Clicks into an element, at a fraction of its width and height."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.run(
            f"(({{left, top, width, height}}) => [left, top, width, height])({element}.getBoundingClientRect())"
        )
        at = {"x": box[0] + x * box[2], "y": box[1] + y * box[3], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **at)
        return self.settle()

    def press(self, *keys: str) -> dict[str, Any]:
        """Presses keys one after the other, into what has the focus."""
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])
        return self.settle()

    def photograph(self, path: Path) -> None:
        """Writes a PNG of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1})
        path.write_bytes(base64.b64decode(shot["data"]))


KEYS = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


@contextmanager
def browse(program: str, profile: Path) -> Iterator[Tab]:
    """A tab of a new browser with an empty profile; both end with the block."""
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()
    # The browser expects 3 and 4, whatever these are here; the shell moves them there and becomes the browser.
    moved = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
    command = ["bash", "-c", moved, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen(command, pass_fds=(to_browser, from_browser), stdout=nothing, stderr=nothing)
    os.close(to_browser)
    os.close(from_browser)
    try:
        tab = Tab(write, read)
        yield tab
        tab._session = ""
        tab.call("Browser.close")
        process.wait(DEADLINE)
    finally:
        process.kill()
        process.wait()
        os.close(write)
        os.close(read)
