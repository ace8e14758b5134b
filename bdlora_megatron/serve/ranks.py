"""Starting the ranks' processes, and making sure that none is left."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from bdlora_megatron.runtime import launch
from bdlora_megatron.serve.logs import configure_logging
from bdlora_megatron.serve.messages import Stop
from bdlora_megatron.serve.settings import ServeSettings

__all__ = ["Ranks", "enter_rank", "prepare_ranks"]

logger = logging.getLogger(__name__)

_PRELOAD = ("bdlora_megatron.serve.preload",)


def prepare_ranks(settings: ServeSettings) -> None:
    """Set up what all ranks share, and start the process that they are forked from, if they are.

    The fork server has this process's environment, and ends with it.

    Raises:
        ConfigError: The machine has no network interface of that name.
    """
    launch.bind_gloo(settings.interface, one_machine=True)
    if settings.cpu:
        os.environ.setdefault(
            "OMP_NUM_THREADS", str(max(_cores() // settings.tensor_parallel_size, 1))
        )
    launch.prepare_ranks(_PRELOAD)


def enter_rank(rank: int, settings: ServeSettings, store: str, link: Connection) -> None:
    """Run one rank and end the process; where a rank's process begins.

    Args:
        rank: Which.
        settings: The server's.
        store: A file through which the ranks find each other.
        link: To the API server.
    """
    try:
        from bdlora_megatron.serve.engine.rank import rank_main
    except Exception:
        configure_logging(rank=rank)
        said = traceback.format_exc()
        hint = (
            "; flash-attn-4 is broken here: pip uninstall flash-attn-4"
            if "flash_attn" in said and "cute" in said
            else ""
        )
        logger.critical("rank %d cannot import what it serves with%s\n%s", rank, hint, said)
        sys.exit(1)
    rank_main(rank, settings, store, link)


class Ranks:
    """The processes of one server's ranks on this machine.

    A rank ends when its link to this process does, so none survives this process, however it ends.
    """

    def __init__(self, settings: ServeSettings, *, enter: Callable[..., None] = enter_rank) -> None:
        """Start the processes; they load the model by themselves.

        Args:
            settings: The server's.
            enter: What each process runs, in place of ``enter_rank`` and with its arguments.
        """
        prepare_ranks(settings)
        context = launch.rank_context(_PRELOAD)
        self._folder = tempfile.mkdtemp(prefix="bdlora-")
        self._links: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(settings.tensor_parallel_size):
            ours, theirs = context.Pipe()
            store = str(Path(self._folder, "store"))
            process = context.Process(
                target=enter, args=(rank, settings, store, theirs), name=f"bdlora-rank-{rank}"
            )
            with launch.hidden_gpus() if settings.cpu else nullcontext():
                process.start()
            theirs.close()
            self._links.append(ours)
            self.processes.append(process)

    @property
    def link(self) -> Connection:
        """To rank 0."""
        return self._links[0]

    @property
    def dead(self) -> dict[int, int]:
        """Ranks that have ended, with their exit statuses."""
        return {
            rank: process.exitcode
            for rank, process in enumerate(self.processes)
            if process.exitcode is not None
        }

    def stop(self, *, timeout_s: float) -> bool:
        """Ask the ranks to end, and end those that do not."""
        try:
            self.link.send(Stop())
        except OSError:
            timeout_s = 0.0
        deadline_s = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(deadline_s - time.monotonic(), 0.0))
        well = all(process.exitcode == 0 for process in self.processes)
        self.kill()
        return well

    def kill(self) -> None:
        """End all ranks at once; they are gone when this returns."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()
        for link in self._links:
            link.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _cores() -> int:
    """The cores that this process may use; a container's may be fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
