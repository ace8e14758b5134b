"""Starting and ending Megatron-Core's process groups on GPUs with NCCL, or on CPUs with gloo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from bdlora_megatron.errors import BDLoRAError, ConfigError, explain
from bdlora_megatron.runtime.cpu import cpu_is_enabled

__all__ = ["device", "from_first_rank", "model_parallel", "refuse_together"]

T = TypeVar("T")


def device() -> torch.device:
    """The device this process computes on.

    Raises:
        ConfigError: There is no CUDA, and the CPU was not chosen with ``enable_cpu``.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not cpu_is_enabled():
        raise ConfigError(
            "no CUDA device is present; call bdlora_megatron.runtime.enable_cpu() to run on the CPU"
        )
    return torch.device("cpu")


@contextmanager
def model_parallel(
    tp: int = 1,
    *,
    pp: int = 1,
    vp: int | None = None,
    cp: int = 1,
    seed: int = 1234,
    cuda_graphs: bool = False,
) -> Iterator[torch.device]:
    """Hold Megatron-Core's process groups for the length of a ``with`` block.

    The default process group is made from torchrun's environment where there is none yet, with NCCL
    on GPUs and gloo on CPUs, and is ended with the block; one that exists already is left alone.

    Args:
        tp: Tensor-parallel ranks.
        pp: Pipeline-parallel stages.
        vp: Chunks of the model on each stage, for Megatron-Core's interleaved schedule.
        cp: Context-parallel ranks.
        seed: Seed of Megatron's random streams.
        cuda_graphs: Inference steps will be captured, which those of training would not allow.

    Yields:
        The device this rank computes on.

    Raises:
        ConfigError: The number of ranks is not a multiple of ``tp * pp * cp``, torchrun's
            environment is incomplete, or there is neither CUDA nor ``enable_cpu``.
    """
    own = not torch.distributed.is_initialized()
    if own:
        _start_process_group()
    try:
        where = device()
        _initialize(tp, pp, cp, vp)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, inference_rng_tracker=cuda_graphs)
        yield where
    finally:
        parallel_state.destroy_model_parallel()
        if own:
            torch.distributed.destroy_process_group()


def _initialize(tp: int, pp: int, cp: int, vp: int | None) -> None:
    world = torch.distributed.get_world_size()
    if world % (tp * pp * cp):
        context = f" x context parallel size {cp}" if cp > 1 else ""
        raise ConfigError(
            f"{world} ranks cannot be split into tensor parallel size {tp} x pipeline parallel "
            f"size {pp}{context}; start a multiple of {tp * pp * cp} ranks"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        context_parallel_size=cp,
    )


def _start_process_group() -> None:
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the environment lacks {', '.join(missing)}; start the program with torchrun"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def refuse_together(problem: str | None) -> None:
    """Raise on every rank what rank 0 met, or the others would wait for it until they time out.

    Args:
        problem: Why rank 0 cannot go on, None where it can; what other ranks say is not heard.

    Raises:
        ConfigError: Rank 0 has a problem.

    Collectives:
        One small broadcast over all ranks; none where there is no process group.
    """
    shared = [problem]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(shared, src=0)
    if shared[0] is not None:
        raise ConfigError(shared[0])


def from_first_rank(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank.

    Args:
        make: Called on rank 0 alone; what it returns must pickle.

    Returns:
        The same value on every rank.

    Raises:
        ConfigError: Rank 0 met an error of this package or of the operating system; raised on
            every rank, with its message.

    Collectives:
        One broadcast over all ranks.
    """
    box: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            box[0] = make()
        except (BDLoRAError, OSError) as error:
            box[1] = explain(error)
    torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise ConfigError(box[1])
    made: T = box[0]
    return made
