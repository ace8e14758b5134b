"""Serving from ranks that torchrun has started, instead of starting them.

Rank 0 answers HTTP in its main thread and runs its share of the model in another; the other ranks
run theirs alone. If one dies, torchrun ends them all.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.runtime.launch import bind_gloo
from bdlora_megatron.serve.messages import Stop
from bdlora_megatron.serve.settings import ServeSettings

__all__ = ["OwnRank", "rank_of", "serve_rank", "settings_for"]

logger = logging.getLogger(__name__)


def rank_of(environment: Mapping[str, str]) -> int | None:
    """This process's rank, if torchrun has started it.

    Returns:
        The rank; None for a process that starts ranks by itself.
    """
    return int(environment["RANK"]) if "TORCHELASTIC_RUN_ID" in environment else None


def settings_for(settings: ServeSettings, environment: Mapping[str, str]) -> ServeSettings:
    """The settings with the number of ranks that torchrun has started.

    Raises:
        ConfigError: ``restarts`` or another ``tp`` is set, which is torchrun's to decide.
    """
    world = int(environment["WORLD_SIZE"])
    if settings.tensor_parallel_size not in {1, world} or settings.restarts:
        raise ConfigError(
            f"tensor_parallel_size={settings.tensor_parallel_size}, "
            f"restarts={settings.restarts} under torchrun with {world} ranks; "
            "leave both out: torchrun's --nproc-per-node and --max-restarts decide"
        )
    return replace(settings, tensor_parallel_size=world)


def serve_rank(settings: ServeSettings, rank: int, link: Connection) -> int:
    """Run this process's share of the model until it is told to stop.

    Args:
        settings: The server's.
        rank: This process's.
        link: To the API server; of ranks other than 0 never used.
    """
    import torch

    from bdlora_megatron.serve.engine.rank import listen, run_rank

    if rank:
        # torchrun passes SIGTERM on to all ranks; rank 0 drains, and tells the others when to end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    gpu = torch.cuda.is_available() and not settings.cpu
    try:
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        bind_gloo(settings.interface)
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
        run_rank(settings, link, listen(link))
        torch.distributed.destroy_process_group()
    except Exception:
        logger.critical("rank %d failed:\n%s", rank, traceback.format_exc())
        return 1
    return 0


class OwnRank:
    """Rank 0 in a thread of the API server's process; has what the API server asks of ``Ranks``."""

    def __init__(self, settings: ServeSettings) -> None:
        """Start the thread."""
        self.link, theirs = multiprocessing.Pipe()
        self._status: int | None = None

        def run() -> None:
            self._status = serve_rank(settings, 0, theirs)

        self._thread = threading.Thread(target=run, name="rank-0", daemon=True)
        self._thread.start()

    @property
    def dead(self) -> dict[int, int]:
        """Rank 0 with its status, once it has ended."""
        return {} if self._status is None else {0: self._status}

    def stop(self, *, timeout_s: float) -> bool:
        """Ask the ranks to end."""
        self.link.send(Stop())
        self._thread.join(timeout_s)
        return self._status == 0

    def kill(self) -> None:
        """Nothing: a thread can't be killed, and the process ends after this."""
