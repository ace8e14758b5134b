"""Stopping a run that is asked to, as schedulers do before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from bdlora_megatron.errors import BDLoRAError

__all__ = ["STATUS", "PreemptedError", "StopRequest"]

#: Exit status of a run that was stopped: EX_TEMPFAIL, "try again later".
STATUS = 75


class PreemptedError(BDLoRAError, RuntimeError):
    """The run was asked to stop by SIGTERM; the message says where it goes on."""


class StopRequest:
    """Listens for SIGTERM inside a ``with`` block, where the signal does not end the process.

    Attributes:
        asked: Whether it came.
    """

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        """Prepare to listen.

        Args:
            then: What to do whenever it comes.
        """
        self.asked = False
        self._then = then
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        # Only a process's main thread may listen; elsewhere the caller's own handler stays.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def agreed(self) -> bool:
        """Whether any rank was asked; the same on every rank.

        Collectives: one all-reduce of one number over all ranks.
        """
        # The command line knows this module, and starts without torch.
        import torch

        from bdlora_megatron.runtime import device

        asked = torch.tensor(int(self.asked), device=device())
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked)

    def _ask(self, number: int, frame: Any) -> None:
        del number, frame
        self.asked = True
        if self._then is not None:
            self._then()
