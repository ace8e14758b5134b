"""Starting the ranks of a run on this machine, or joining those that torchrun has started."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from bdlora_megatron import runtime
from bdlora_megatron.errors import BDLoRAError, ConfigError, MissingDependencyError
from bdlora_megatron.models import read_hf_config
from bdlora_megatron.runtime.launch import bind_gloo, join_ranks, rank_context
from bdlora_megatron.train.data import ShareOfBatch
from bdlora_megatron.train.loggers import missing_loggers
from bdlora_megatron.train.schema import TrainConfig
from bdlora_megatron.train.stop import PreemptedError, StopRequest

__all__ = ["RankDiedError", "check_launch", "launch"]

_PRELOAD = ("bdlora_megatron.train.preload",)
_GRACE_S = 5.0


class RankDiedError(BDLoRAError, RuntimeError):
    """A rank's process failed in a way that is no error of this package's."""


def launch(config: TrainConfig, *, ranks: int | None = None, interface: str | None = None) -> Any:
    """Run ``train`` on as many ranks as asked for, and wait for them.

    Under torchrun, whose environment names this process's rank, it runs here. Otherwise ranks are
    started on this machine, one per GPU, or on the CPU where there is no GPU.

    Args:
        config: The settings.
        ranks: How many; by default one copy of the model, or as many copies as the GPUs hold.
        interface: Network interface of what ranks settle over gloo; see ``runtime.bind_gloo``.

    Returns:
        What ``train`` returned on rank 0.

    Raises:
        ConfigError: The number of ranks doesn't fit the settings or the machine.
        BDLoRAError: What a rank raised; the others are ended.
        RankDiedError: A rank died without such an error.
        PreemptedError: This process or a rank was sent SIGTERM.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if ranks is not None:
            raise ConfigError("ranks are torchrun's here; leave --ranks out")
        bind_gloo(interface)
        return _train_here(config)
    count = _count(config, ranks)
    bind_gloo(interface, one_machine=True)
    context = rank_context(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="bdlora-") as folder:
        store = str(Path(folder) / "store")
        answers = [context.Pipe(duplex=False) for _ in range(count)]
        # Its other end closes when this process dies, however it dies: no rank outlives it.
        alive, held = context.Pipe(duplex=False)
        processes = [
            context.Process(
                target=_rank_main,
                args=(rank, count, store, config, interface, answers[rank][1], alive),
            )
            for rank in range(count)
        ]
        try:
            with StopRequest(partial(_terminate, processes)) as stop:
                for process in processes:
                    process.start()
                for _, sender in answers:
                    sender.close()
                if stop.asked:
                    _terminate(processes)  # those that had not started when it came
                return _outcome([receiver for receiver, _ in answers], stop)
        finally:
            held.close()
            alive.close()
            _end(processes)


def check_launch(config: TrainConfig, *, ranks: int | None = None) -> None:
    """Refuse what ``launch`` would refuse before it reads weights and data; starts nothing.

    Args:
        config: The settings.
        ranks: As for ``launch``; under torchrun its number counts.

    Raises:
        ConfigError: The settings don't fit the base model or the ranks; all problems are listed.
    """
    # It knows the layers, and with them imports Megatron-Core, which ``launch`` leaves to ranks.
    from bdlora_megatron.train.peft import resolve_peft
    from bdlora_megatron.train.start import check_start

    model, problems = config.model, []
    hf = read_hf_config(model.hf_path)
    shape = hf
    adapted = config.peft.scheme != "none"
    checks: list[Callable[[], object]] = [
        lambda: hf.check_stages(model.pipeline_model_parallel_size * (model.chunks_per_stage or 1)),
        lambda: shape.check_tp(model.tensor_model_parallel_size) if adapted else None,
        lambda: _check_loggers(config),
        lambda: resolve_peft(config.peft, hf),
        lambda: check_start(config, hf),
        lambda: _check_batch(config, _world(config, ranks)),
    ]
    for check in checks:
        try:
            check()
        except BDLoRAError as error:
            problems.append(str(error))
    if problems:
        lines = "".join(f"\n- {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problem(s) in the training settings:{lines}")


def _world(config: TrainConfig, ranks: int | None) -> int:
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return _count(config, ranks)
    world, copy = int(os.environ["WORLD_SIZE"]), config.model_parallel_size
    if world % copy:
        raise ConfigError(f"{world} ranks of torchrun; one copy of the model takes {copy}")
    return world


def _check_batch(config: TrainConfig, ranks: int) -> None:
    ShareOfBatch(
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=0,
        dp_size=ranks // config.model_parallel_size,
        multiple=config.model.microbatch_multiple,
    )


def _check_loggers(config: TrainConfig) -> None:
    if missing := missing_loggers(config.logger):
        raise MissingDependencyError(missing)


def _count(config: TrainConfig, ranks: int | None) -> int:
    copy = config.model_parallel_size
    gpus = torch.cuda.device_count()
    count = ranks or max(gpus // copy, 1) * copy
    if count % copy or count < 1:
        raise ConfigError(
            f"{count} ranks; one copy of the model takes {copy} (tensor x pipeline x context "
            f"parallel size): start a multiple of {copy}"
        )
    if gpus and count > gpus:
        raise ConfigError(f"{count} ranks on {gpus} GPUs; start fewer, or use torchrun")
    return count


def _train_here(config: TrainConfig) -> Any:
    from bdlora_megatron.train.loop import train

    if not torch.cuda.is_available():
        runtime.enable_cpu()
    return train(config)


def _rank_main(
    rank: int,
    count: int,
    store: str,
    config: TrainConfig,
    interface: str | None,
    sender: Connection,
    alive: Connection,
) -> None:
    # The process that started this one hears the interrupt too, and ends its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, args=(alive,), daemon=True).start()
    if rank:
        # Every rank reads the data; one of them tells what is odd about it.
        logging.getLogger("bdlora_megatron").setLevel(logging.ERROR)
    try:
        if not join_ranks(rank, count, store, interface=interface):
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(cores // count, 1))))
        answer: tuple[str, Any] = ("ok", _train_here(config))
    except BDLoRAError as error:
        answer = ("error", error)
    except BaseException:
        answer = ("died", f"rank {rank} failed:\n{traceback.format_exc()}")
    # Before the launcher hears of it, and before an exit that flushes nothing.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    sender.send_bytes(pickle.dumps(answer))
    sender.close()
    # A peer may have failed: gloo's threads could then hang in the interpreter's tear-down.
    os._exit(0 if answer[0] == "ok" else 1)


def _die_with_parent(alive: Connection) -> None:
    try:
        alive.recv_bytes()
    except EOFError:
        # A rank has no process of its own that could outlive it: see ``versions.checkpoint``.
        os._exit(1)


def _terminate(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)


def _outcome(receivers: Sequence[Connection], stop: StopRequest) -> Any:
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    result: Any = None
    failure: tuple[str, Any] | None = None
    while waiting:
        # Ranks that only wait for one that failed are not waited for.
        ready = wait(list(waiting), timeout=None if failure is None else _GRACE_S)
        if not ready:
            break
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            try:
                kind, what = pickle.loads(receiver.recv_bytes())
            except EOFError:
                kind, what = "died", f"rank {rank} ended without a word; was it out of memory?"
            if kind == "ok":
                result = what if rank == 0 else result
            elif failure is None or (failure[0] == "died" and kind == "error"):
                failure = (kind, what)
    if failure is None:
        return result
    if failure[0] == "error":
        raise failure[1]
    if stop.asked:
        raise PreemptedError(
            "stopped by SIGTERM while no step was computed; the last checkpoint, if there is one, "
            "is kept"
        )
    raise RankDiedError(failure[1])


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.pid is None:
            continue
        process.join(timeout=_GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()
