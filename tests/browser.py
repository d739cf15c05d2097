"""A page in headless Chromium, driven through its debugging pipe; no packages needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """A tab of Chromium.

    Args:
        profile: folder for its profile.
        size: width and height of the window in pixels.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1000, 800)):
        assert CHROMIUM is not None
        read_command, self._write = os.pipe()
        self._read, write_answer = os.pipe()

        def connect() -> None:  # Chromium reads from 3 and writes to 4
            for source, target in ((os.dup(read_command), 3), (os.dup(write_answer), 4)):
                os.dup2(source, target)

        self._process = subprocess.Popen(
            [
                *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu"),
                *("--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-first-run"),
                *(f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"),
                "about:blank",
            ],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_command)
        os.close(write_answer)
        self._buffer, self._count, self._session = b"", 0, None
        targets = self._send("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self._send("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)

    def _send(self, method: str, timeout: float = 60, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while True:
            while b"\0" not in self._buffer:
                if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                    raise TimeoutError(method)
                part = os.read(self._read, 1 << 20)
                if not part:
                    raise RuntimeError("Chromium ended")
                self._buffer += part
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def open(self, address: str) -> None:
        """Open an address; see ``wait``."""
        self._send("Page.navigate", url=address)

    def run(self, script: str, timeout: float = 60) -> Any:
        """The value of an expression, of a promise when it is resolved."""
        answer = self._send(
            "Runtime.evaluate",
            timeout,
            expression=script,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, timeout: float = 60) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + timeout
        while not (value := self.run(condition)):
            if time.monotonic() > end:
                text = self.run("document.body.innerText")
                raise TimeoutError(f"{condition}; the page shows: {text}")
            time.sleep(0.05)
        return value

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file for an input."""
        root = self._send("DOM.getDocument")["root"]["nodeId"]
        node = self._send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def press(self, key: str) -> None:
        """Press a key and release it: ``Tab``, ``Enter``, ``ArrowRight``."""
        code = {"Tab": 9, "Enter": 13, "ArrowRight": 39}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self._send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )

    def screenshot(self, path: Path) -> None:
        """Save what the window shows as PNG."""
        data = self._send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
