"""A real Chromium for tests, driven over its DevTools pipe: no driver, no port, no dependency.

Chromium reads commands from its file descriptor 3 and answers on 4: JSON, each message ended by a NUL.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "ArrowRight": (39, ""), "ArrowLeft": (37, ""),
        "ArrowDown": (40, ""), "ArrowUp": (38, ""), "End": (35, ""), "Home": (36, ""), "/": (191, "/")}  # fmt: skip


def find() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def required() -> str:
    """Give the path of a Chromium. Without one the test is skipped; it fails where there has to be one.

    `.ci/run` sets QVSPLIT_REQUIRE_BROWSER, or, where it could install none, QVSPLIT_NO_BROWSER to the reason.
    """
    program = find()
    if program is not None:
        return program
    reason = os.environ.get("QVSPLIT_NO_BROWSER") or f"there is no browser ({', '.join(NAMES)})"
    if os.environ.get("QVSPLIT_REQUIRE_BROWSER"):
        pytest.fail(f"{reason}, and QVSPLIT_REQUIRE_BROWSER is set")
    pytest.skip(reason)


class PageError(AssertionError):
    """The page threw what was evaluated in it."""


class Browser:
    """One headless window with one page. `requests`, `errors` and `logs` hold what it did since the last `open`."""

    def __init__(self, program: str, *, width: int = 1280, height: int = 900) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="browser-")
        self._buffer = b""
        self._last = 0
        self._loaded = False
        self._session: str | None = None
        self._start(program)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
            self.resize(width, height)
        except BaseException:
            self.close()
            raise

    def _start(self, program: str) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # beyond 10, so that making one of them 3 or 4 does not close the other
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs_in, theirs_out)]
        nowhere = os.open(os.devnull, os.O_RDWR)
        words = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
                 "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
                 f"--user-data-dir={self._profile}", "about:blank"]  # fmt: skip
        duplicated = [
            (os.POSIX_SPAWN_DUP2, fd, n) for fd, n in ((high[0], 3), (high[1], 4), (nowhere, 1), (nowhere, 2))
        ]
        self._process = os.posix_spawn(program, words, dict(os.environ), file_actions=duplicated, setpgroup=0)
        for fd in (theirs_in, theirs_out, nowhere, *high):
            os.close(fd)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that this one started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._process, 0)
        for fd in (self._in, self._out):
            os.close(fd)
        shutil.rmtree(self._profile, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------ protocol

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command, and its result."""
        self._last += 1
        number = self._last
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None and not method.startswith("Target."):
            message["sessionId"] = self._session
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self._out, rest) :]
        deadline = time.monotonic() + 60
        while True:
            answer = self._next(deadline)
            if answer is not None and answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer.get("result", {}))

    def _next(self, deadline: float) -> dict[str, Any] | None:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise EOFError("the browser has ended")
            self._buffer += part
        first, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(first)
        if "method" in message:
            self._note(message["method"], message["params"])
            return None
        return message

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled":
            self.errors.append(" ".join(str(argument.get("value")) for argument in params["args"]))
        elif event == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.errors.append(f"the page says {params['message']!r}")

    # ---------------------------------------------------------------------------------------------------- page

    def open(self, file: Path, hash: str = "") -> None:
        """Load a page from disk and wait until it is there."""
        self.call("Page.navigate", url="about:blank")  # so that another hash of the same page loads it anew
        self.wait("location.href === 'about:blank'")
        self.requests, self.errors, self._loaded = [], [], False
        self.call("Page.navigate", url=file.absolute().as_uri() + hash)
        deadline = time.monotonic() + 60
        while not self._loaded:
            self._next(deadline)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise. PageError if it throws."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise PageError(done["exceptionDetails"].get("exception", {}).get("description", "the page threw"))
        return done["result"].get("value")

    def wait(self, condition: str, seconds: float = 15.0) -> None:
        """Until the JavaScript `condition` holds."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never came true: {condition}")
            time.sleep(0.01)

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of what `selector` finds first."""
        place = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'nearest'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def key(self, name: str) -> None:
        """A key pressed and released."""
        code, text = KEYS[name]
        down = {"type": "keyDown" if text else "rawKeyDown", "key": name, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", **(down | ({"text": text} if text else {})))
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int, *, scale: float = 1.0) -> None:
        """The window's inner size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def media(self, *, dark: bool = False, kind: str = "screen") -> None:
        """Light or dark; on a `screen` or in `print`."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)
