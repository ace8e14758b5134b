"""Following a tutorial as its reader does: files are written, commands typed, servers started.

A block of YAML, JSON or Python below a line that ends in "`name`:" is what a new file holds. Blocks
of shell are run; a block of text below one is what it prints. A command that serves runs on until
the page's end, or until a command that needs its memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.docs.pages import ROOT, Block, blocks

_FILE = re.compile(r"`(?P<name>[\w.-]+)`:\s*$")
_NUMBERS = re.compile(r"\d")
#: The port on the pages; tests take a free one.
_PORT = "8000"


@dataclass(kw_only=True)
class Reader:
    """Someone with a folder, a port and a page.

    Attributes:
        folder: Where commands run.
        port: The port in place of 8000.
        skip: Commands that the test has prepared the results of.
        environment: Variables of the commands.
        start: The heading to begin at; everything before it has been prepared.
        until: The heading to end before.
        prelude: Python that stands before each snippet, where the machine lacks what it needs.
        exact: Whether outputs are compared with their numbers: nothing stands in for anything.
        printed: What each block of shell or Python printed, by the number of its line.
    """

    folder: Path
    port: int
    skip: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)
    start: str | None = None
    until: str | None = None
    prelude: str = ""
    exact: bool = False
    printed: dict[int, str] = field(default_factory=dict)
    _server: subprocess.Popen[bytes] | None = None

    def follow(self, page: str) -> None:
        """Do all that a page says, and see that it prints what the page shows."""
        text = self._part((ROOT / "docs" / page).read_text("utf-8"))
        lines = text.splitlines()
        last = ""
        try:
            for block in blocks(text):
                if block.language == "text":
                    _check_output(page, block, last, exact=self.exact)
                    continue
                name = _FILE.search("\n".join(lines[: block.line - 1]).rstrip() + "\n")
                if name and block.language != "sh":
                    (self.folder / name["name"]).write_text(self._ours(block.body), "utf-8")
                elif block.language in ("sh", "python"):
                    last = self.printed[block.line] = self._run(page, block)
        finally:
            self.stop()

    def _part(self, text: str) -> str:
        """The part that is followed; lines before it stay, empty, so that numbers of lines hold."""
        begin = text.index(f"\n{self.start}\n") if self.start else 0
        end = text.index(f"\n{self.until}\n") if self.until else len(text)
        return "\n" * text.count("\n", 0, begin) + text[begin:end]

    def stop(self) -> None:
        """End the server that runs; it must have ended well."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.send_signal(signal.SIGTERM)
        try:
            status = server.wait(90)
        finally:
            # Its ranks are in its session; a failure must not leave them behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
        assert status == 0, self._log().read_text("utf-8")[-3000:]

    def _run(self, page: str, block: Block) -> str:
        if block.language == "python":
            source = self.prelude + self._ours(block.body)
            return self._call([sys.executable, "-W", "ignore", "-c", source], page)
        commands = [command for command in block.commands() if command not in self.skip]
        printed = []
        for command in commands:
            if command.startswith("bdlora serve"):
                self._serve(command)
                continue
            if command.startswith("bdlora generate"):
                self.stop()
            script = f"set -euo pipefail\n{self._ours(command)}"
            printed.append(self._call(["bash", "-c", script], page))
        return "\n".join(printed)

    def _call(self, command: list[str], page: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, f"{page}: {command[-1]}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def _serve(self, command: str) -> None:
        assert self._server is None, "one server at a time"
        with self._log().open("wb") as log:
            self._server = subprocess.Popen(
                ["bash", "-c", f"exec {self._ours(command)} --port {self.port}"],
                cwd=self.folder,
                env=self._environment(),
                stderr=log,
                stdout=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + 600
        while time.monotonic() < deadline_s and self._server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://localhost:{self.port}/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(self._log().read_text("utf-8")[-3000:])

    def _log(self) -> Path:
        return self.folder / "server.log"

    def _ours(self, text: str) -> str:
        return text.replace(f"localhost:{_PORT}", f"localhost:{self.port}")

    def _environment(self) -> dict[str, str]:
        bin_folder = Path(sys.executable).parent
        return {
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            **self.environment,
        }


def _check_output(page: str, block: Block, printed: str, *, exact: bool) -> None:
    """Compare what a page shows of an output with the real one.

    Where a random model stands in for the tutorial's, only lines without numbers can be held to
    what is printed. How a table is set does not count.
    """
    real = {_shape(line) for line in printed.splitlines()}
    for line in block.body.splitlines():
        if line.strip() and line.strip() != "..." and (exact or not _NUMBERS.search(line)):
            assert _shape(line) in real, (
                f"docs/{page}, below line {block.line}: the command does not print\n{line}\n"
                f"but\n{printed}"
            )


def _shape(line: str) -> str:
    return re.sub(r"-{2,}", "--", " ".join(line.split()))
