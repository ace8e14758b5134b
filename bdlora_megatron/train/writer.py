"""A process of a rank's that writes a checkpoint's files while the rank trains on.

It is started afresh, never forked: autograd's and gloo's threads do not survive a fork. It sees no
GPU, has no part in any process group, and ends when its rank does, however that ends.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["FileWriter"]

#: A scheduler may tell all processes of a job to stop; the rank decides when this one does.
_IGNORED = {signal.SIGTERM, signal.SIGINT}


class FileWriter:
    """A rank's hold on its process, which the first write starts."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Any = None

    def write(self, files: bytes) -> None:
        """Hand over files to write, and return at once.

        Args:
            files: Of ``PlannedSave.files``. The outcome of those before must have been taken.
        """
        if self._process is None:
            self._process, self._pipe = _start()
        threading.Thread(target=self._send, args=(files,), daemon=True).start()

    def is_done(self) -> bool:
        """Whether ``outcome`` would return at once; true where nothing was handed over."""
        return self._pipe is None or self._pipe.poll()

    def outcome(self) -> tuple[Any, str | None]:
        """Wait for the files handed over.

        Returns:
            What ``write_files`` returned, and None; or None, and what went wrong.
        """
        assert self._process is not None, "nothing was handed over"
        try:
            outcome: tuple[Any, str | None] = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            status = self._process.wait()
            return (
                None,
                f"the process that writes ended with status {status}; was it out of memory?",
            )
        return outcome

    def close(self) -> None:
        """End the process; what it has not written stays unwritten."""
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.wait()

    def _send(self, files: bytes) -> None:
        # Of a process that died meanwhile, whoever asks for the outcome will hear.
        with suppress(OSError):
            self._pipe.send_bytes(files)


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = Pipe()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    # What is blocked here stays blocked in the new process.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return process, ours


def _main() -> None:
    pipe = Connection(int(sys.argv[1]))
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, jobs), daemon=True).start()
    # After the thread has begun to watch: these imports take seconds.
    from bdlora_megatron.runtime.versions.checkpoint import write_files

    while True:
        try:
            written: Any = write_files(pickle.loads(jobs.get()))
        except Exception as error:
            written = error
        failed = isinstance(written, Exception)
        # As text: not every exception survives a pickle.
        outcome = (None, f"{type(written).__name__}: {written}") if failed else (written, None)
        pipe.send_bytes(pickle.dumps(outcome))


def _receive(pipe: Connection, jobs: queue.SimpleQueue[bytes]) -> None:
    try:
        while True:
            jobs.put(pipe.recv_bytes())
    except (EOFError, OSError):
        # The rank is gone, or has no more to write.
        os._exit(0)


if __name__ == "__main__":
    _main()
