"""Run a function on several gloo ranks of this machine, and bring back what each returned.

Ranks start as the package's own do: from a fork server, which imports torch and Megatron-Core once
and never runs a tensor operation, so that each rank is a cheap fork of a process without threads;
and by themselves where CUDA is present, which they do not see.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from bdlora_megatron.runtime.launch import hidden_gpus, join_ranks, prepare_ranks, rank_context

PRELOAD = ("tests.preload",)


def start_fork_server() -> None:
    """Start the server process from which all ranks of this test run are forked.

    There is one for the whole process, and what it imports is settled when it starts: whoever is
    first. So it starts before any test, or each rank would import Megatron-Core by itself.
    """
    prepare_ranks(PRELOAD)


class RankError(AssertionError):
    """At least one rank failed; the message holds every failed rank's traceback."""


def run_ranks(
    world_size: int, body: Callable[..., Any], *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Call ``body(rank, world_size, *args)`` on ``world_size`` ranks joined by gloo.

    Args:
        world_size: How many ranks to start.
        body: A module-level function; it must be importable by name in the rank's process.
        *args: Passed on to ``body``; must pickle.
        timeout_s: Seconds for the whole run, start included. Collectives time out a little earlier.

    Returns:
        What each rank returned, by rank. Tensors come back as plain CPU tensors.

    Raises:
        RankError: A rank raised, died, or did not finish in time.
    """
    context = rank_context(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, store, timeout_s, pipes[rank][1], body, args),
                # Not a daemon: a checkpoint's writer starts a process of its own.
                daemon=False,
            )
            for rank in range(world_size)
        ]
        with hidden_gpus():
            for process in processes:
                process.start()
        for _, sender in pipes:
            sender.close()
        try:
            outcomes = _collect([receiver for receiver, _ in pipes], timeout_s)
        finally:
            for process in processes:
                process.join(timeout=2.0)
                if process.is_alive():
                    process.kill()
                    process.join()
    return _unwrap(outcomes)


def free_port() -> int:
    """A port that nobody listens on, below those that connections of other tests are given."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def _collect(receivers: list[Connection], timeout_s: float) -> list[tuple[str, Any]]:
    """Wait for one message from each rank; a rank that says nothing is told apart from a crash."""
    import torch

    deadline = time.monotonic() + timeout_s
    outcomes: list[tuple[str, Any]] = [("silent", f"no answer in {timeout_s} s")] * len(receivers)
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    failed = False
    while waiting:
        # Once one rank has failed its peers only wait for it: give them a moment, not the rest.
        left = min(deadline - time.monotonic(), 3.0 if failed else float("inf"))
        ready = wait(list(waiting), timeout=max(left, 0.0))
        if not ready:
            break
        for receiver in ready:
            rank = waiting.pop(receiver)  # type: ignore[index,arg-type]
            try:
                payload = receiver.recv_bytes()  # type: ignore[union-attr]
                outcomes[rank] = torch.load(io.BytesIO(payload), weights_only=False)
            except EOFError:
                outcomes[rank] = ("died", "the process ended without an answer")
            failed = failed or outcomes[rank][0] != "ok"
    return outcomes


def _unwrap(outcomes: list[tuple[str, Any]]) -> list[Any]:
    bad = [(rank, kind, what) for rank, (kind, what) in enumerate(outcomes) if kind != "ok"]
    if bad:
        # A rank that raised explains the ones that merely waited for it.
        bad.sort(key=lambda row: row[1] != "raised")
        raise RankError("\n".join(f"rank {rank} {kind}:\n{what}" for rank, kind, what in bad))
    return [what for _, what in outcomes]


def _rank_main(
    rank: int,
    world_size: int,
    store: str,
    timeout_s: float,
    sender: Connection,
    body: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    try:
        patience = timedelta(seconds=max(timeout_s - 5.0, 1.0))
        join_ranks(rank, world_size, store, cpu=True, timeout=patience)
        outcome = ("ok", body(rank, world_size, *args))
    except BaseException:
        outcome = ("raised", traceback.format_exc())
    buffer = io.BytesIO()
    torch.save(outcome, buffer)
    sender.send_bytes(buffer.getvalue())
    sender.close()
    for child in multiprocessing.active_children():
        child.terminate()
    # Skips the interpreter's tear-down: gloo's threads can hang there after a peer has failed.
    os._exit(0 if outcome[0] == "ok" else 1)
