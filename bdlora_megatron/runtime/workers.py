"""Worker processes that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading

__all__ = ["die_with_parent"]


def die_with_parent() -> None:
    """Leave this worker process as soon as its parent has gone.

    One that outlives a killed run would go on writing into its folder.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers have a parent"
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
