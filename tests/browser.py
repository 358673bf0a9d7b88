"""A headless Chromium, driven over WebDriver: its requests are JSON over HTTP, and need no package."""

from __future__ import annotations

import base64
import json
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from waiting import wait_until

from dray.clock import Deadline

BOUND = 60.0
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)

needs_browser = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="chromium and chromedriver are not installed",
)


class Browser:
    """One window.

    Args:
        driver: the URL of chromedriver.
        profile: a new folder for what the browser keeps.
    """

    def __init__(self, driver: str, profile: Path, width: int = 1280, height: int = 1600) -> None:
        self._driver = driver
        self._opener = build_opener(ProxyHandler({}))
        flags = [*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        wanted = {
            "goog:chromeOptions": {"binary": shutil.which("chromium"), "args": flags},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._session = ""
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    def open(self, url: str) -> None:
        """Open `url`, and wait until it is loaded."""
        self._ask("POST", "/url", {"url": url})

    def resize(self, width: int, height: int) -> None:
        """Give the window another size, in pixels; Chromium has none that is narrower than 500."""
        self._ask("POST", "/window/rect", {"width": width, "height": height})

    def run(self, script: str) -> Any:
        """What the function body `script` returns in the page."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def text(self, selector: str) -> str:
        """The text that an element shows; empty if there is no such element."""
        return str(self.run(f"return document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def wait_for(self, words: str, selector: str = "body") -> None:
        """Wait until an element shows `words`."""
        wait_until(lambda: words in self.text(selector), words, BOUND, story=lambda: self.text("body"))

    @property
    def url(self) -> str:
        """The address that the window shows."""
        return str(self._ask("GET", "/url"))

    def messages(self) -> list[str]:
        """What the browser has logged since the last call: errors of scripts, and what a policy has refused."""
        return [each["message"] for each in self._ask("POST", "/se/log", {"type": "browser"})]

    def cookies(self) -> list[dict[str, Any]]:
        """The cookies of the page, also those that scripts do not see."""
        return list(self._ask("GET", "/cookie"))

    def screenshot(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self._ask("GET", "/screenshot"))

    def close(self) -> None:
        self._ask("DELETE", "")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = Request(f"{self._driver}{self._session}{path}", content, method=method)
        try:
            with self._opener.open(request, timeout=BOUND) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise AssertionError(error.read().decode(errors="replace")) from error


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in `folder`; it has ended afterwards."""
    command = ["chromedriver", "--port=0", "--allowed-ips=127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        deadline, line = Deadline.after(BOUND), ""
        while "started successfully on port" not in line:
            assert select.select([process.stdout], [], [], deadline.remaining)[0], "chromedriver does not start"
            line = process.stdout.readline()
            assert line, "chromedriver has ended"
        window = Browser(f"http://127.0.0.1:{line.split()[-1].rstrip('.')}", folder)
        try:
            yield window
        finally:
            window.close()
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
