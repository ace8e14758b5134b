"""Where a rank's process begins; importable without torch."""

from __future__ import annotations

from multiprocessing.connection import Connection

from bdlora_megatron.serve.settings import ServeSettings

__all__ = ["enter_rank"]


def enter_rank(rank: int, settings: ServeSettings, store: str, link: Connection) -> None:
    """Run one rank and end the process.

    Args:
        rank: Which.
        settings: The server's.
        store: A file through which the ranks find each other.
        link: To the front.
    """
    from bdlora_megatron.serve.engine.rank import rank_main

    rank_main(rank, settings, store, link)
