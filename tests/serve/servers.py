"""Starting `bdlora serve` as its users do, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

_PORT = re.compile(rb"listening on http://127\.0\.0\.1:(\d+)")


class RunningServer:
    """A server in a process of its own, on a free port.

    ``stop`` and the end of a ``with`` block leave no process behind, whatever has happened.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        *arguments: str,
        launcher: tuple[str, ...] = (),
        start_s: float = 120.0,
    ) -> None:
        self.folder = folder
        self.log = log
        command = [sys.executable, "-m", *launcher, "bdlora_megatron", "serve"]
        command += ["--model", str(folder / "model")]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, "--cpu", "--port", "0", *arguments],
                stderr=stderr,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + start_s
        try:
            self.port = self._until(self._find_port, deadline_s)
            self._until(self.is_ready, deadline_s)
        except BaseException:
            self.kill()
            raise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def family(self) -> list[psutil.Process]:
        """Every living process that the server has started, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and process.status() != "zombie":
                    found.append(process)
        return found

    @property
    def api(self) -> psutil.Process:
        """The process that answers."""
        return psutil.Process(self.process.pid)

    def ranks(self) -> list[psutil.Process]:
        """The ranks' processes, youngest last: those whose link to the API server is open."""
        main = self.process.pid
        return sorted(
            (p for p in self.family() if p.pid != main and p.num_threads() > 2),
            key=lambda p: p.pid,
        )

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def is_ready(self) -> bool:
        try:
            return self.get("/ready")[0] == 200
        except OSError:
            return False

    def metric(self, name: str) -> float:
        for line in self.get("/metrics")[1].decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until requests are answered."""
        self._until(self.is_ready, time.monotonic() + timeout_s)

    def stop(self, timeout_s: float = 40.0) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def wait_gone(self, timeout_s: float) -> list[psutil.Process]:
        """Wait until no process is left; returns those that are."""
        deadline_s = time.monotonic() + timeout_s
        while self.family() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return self.family()

    def kill(self) -> None:
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _find_port(self) -> int | None:
        found = _PORT.search(self.log.read_bytes())
        return int(found[1]) if found else None

    def _until(self, ask: Any, deadline_s: float) -> Any:
        while time.monotonic() < deadline_s:
            answer = ask()
            if answer:
                return answer
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-4000:]}")
