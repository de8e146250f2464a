"""A headless Chromium that says what text it shows, in shadow trees too (DevTools by a pipe)."""

from __future__ import annotations

import itertools
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--window-size=1600,1000", "--remote-debugging-pipe"),
)
_ALL_TEXT = """
(() => {
  const walk = (node) => {
    if (node.nodeType === 3) return node.data;
    if (node.tagName === 'STYLE' || node.tagName === 'SCRIPT') return '';
    const inner = node.shadowRoot ? [...node.shadowRoot.childNodes] : [];
    return [...inner, ...node.childNodes].map(walk).join(' ');
  };
  return walk(document.body).replace(/\\s+/g, ' ');
})()
"""


class Browser:
    """One page at a time; a context manager."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        words = shlex.join([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"])
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {words} 3<&{to_read} 4>&{to_write}"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(to_write)
        self._numbers = itertools.count(1)
        self._rest = b""

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # its own session: nobody else's browser
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def text_with(self, url: str, wanted: list[str], seconds: float = 90) -> str:
        """All text of the page, as soon as it holds what is wanted, or at the end of the time."""
        target = self._ask("Target.createTarget", url=url)["targetId"]
        session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        deadline = time.monotonic() + seconds
        text = ""
        while time.monotonic() < deadline and not all(w in text for w in wanted):
            time.sleep(0.5)
            found = self._ask("Runtime.evaluate", session=session, expression=_ALL_TEXT)
            text = str(found["result"].get("value", ""))
        return text

    def _ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._receive())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self, seconds: float = 60) -> bytes:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], seconds)
            part = os.read(self._read, 1 << 16) if ready else b""
            assert part, "the browser does not answer"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return message
