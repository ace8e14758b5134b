"""Starting the ranks of one machine: how their processes begin, and what each does first.

CUDA does not survive a fork: a process whose parent has asked the driver anything, if only whether
it is there, can use no GPU. So ranks are spawned where CUDA is present. Elsewhere a fork server
imports torch and Megatron-Core once, and each rank is a cheap fork of it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Literal

from bdlora_megatron.errors import ConfigError

__all__ = [
    "INTERFACE_HELP",
    "bind_gloo",
    "cuda_is_present",
    "hidden_gpus",
    "imported_for_forks",
    "join_ranks",
    "prepare_ranks",
    "rank_context",
    "start_method",
]

#: Of the option `--interface`, which `bdlora train`, `bench` and `serve` have in common.
INTERFACE_HELP = (
    "network interface of what ranks settle over gloo (default: GLOO_SOCKET_IFNAME, or loopback "
    "for ranks of one machine)"
)
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def cuda_is_present() -> bool:
    """Whether ranks can use GPUs. Does not import torch, which takes seconds.

    Returns:
        What ``torch.cuda.is_available()`` says where torch is imported already. Otherwise whether
        the driver names a device, with regard to ``CUDA_VISIBLE_DEVICES``.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        return bool(torch.cuda.is_available())
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return found and count.value > 0


def start_method() -> Literal["spawn", "forkserver"]:
    """How a rank's process begins: ``spawn`` where CUDA is present, ``forkserver`` elsewhere."""
    return "spawn" if cuda_is_present() else "forkserver"


def rank_context(preload: Sequence[str] = ()) -> SpawnContext | ForkServerContext:
    """The context in which to make ranks' processes and the pipes to them.

    Args:
        preload: Modules that a fork server imports once, before the first rank. They must import
            others inside ``imported_for_forks``. Without effect once the fork server runs.

    Returns:
        A context of ``multiprocessing``.
    """
    if start_method() == "spawn":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def prepare_ranks(preload: Sequence[str]) -> None:
    """Start the fork server now, if ranks will be forked, so that its imports overlap with ours.

    Args:
        preload: As for ``rank_context``.
    """
    if isinstance(rank_context(preload), ForkServerContext):
        forkserver.ensure_running()


@contextmanager
def hidden_gpus() -> Iterator[None]:
    """Start processes inside this block that shall see no GPU, whatever the machine has.

    Hiding them later, in the process itself, is too late: imports may have asked the driver.
    """
    before = os.environ.get(_VISIBLE)
    os.environ[_VISIBLE] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VISIBLE]
        else:
            os.environ[_VISIBLE] = before


@contextmanager
def imported_for_forks() -> Iterator[None]:
    """Import inside this block what a fork server imports: no question reaches CUDA's driver.

    Megatron-Core and torch ask on import whether CUDA is there. A fork server runs only where it is
    not, so the answer is known, and asking would bar every later fork from a GPU if it were wrong.
    """
    import torch

    asked = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = asked


def join_ranks(
    rank: int,
    world_size: int,
    store: str,
    *,
    cpu: bool = False,
    interface: str | None = None,
    timeout: timedelta | None = None,
) -> bool:
    """Make this process one of a machine's ranks: its device, and the default process group.

    The group is NCCL's on GPUs, one for each rank, and gloo's on CPUs.

    Args:
        rank: Which.
        world_size: How many there are, all on this machine.
        store: A file, not there yet, through which the ranks find each other.
        cpu: Leave GPUs alone.
        interface: As for ``bind_gloo``.
        timeout: How long a collective may wait for peers; torch's default when None.

    Returns:
        Whether this rank computes on a GPU.

    Raises:
        ConfigError: There is no such interface, or there are fewer GPUs than ranks.

    Collectives:
        The rendezvous of ``torch.distributed.init_process_group``.
    """
    import torch

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    bind_gloo(interface, one_machine=True)
    gpu = torch.cuda.is_available() and not cpu
    if gpu:
        if torch.cuda.device_count() < world_size:
            raise ConfigError(
                f"{world_size} ranks on {torch.cuda.device_count()} GPUs; start fewer, or use "
                "torchrun on several machines"
            )
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return gpu


def bind_gloo(interface: str | None, *, one_machine: bool = False) -> None:
    """Settle on which network interface gloo's groups of this process talk.

    GPUs' ranks have gloo groups too, for what is decided on hosts. Left to itself gloo takes the
    interface of the host's name, which may be closed to it, or open to others.

    Args:
        interface: A name such as ``eth0``. When None, what ``GLOO_SOCKET_IFNAME`` says; where
            that is not set either, loopback for ranks of one machine, and gloo's choice otherwise.
        one_machine: Whether all ranks are on this machine.

    Raises:
        ConfigError: There is no such interface.
    """
    if interface is not None:
        os.environ[_GLOO_INTERFACE] = interface
    elif one_machine:
        os.environ.setdefault(_GLOO_INTERFACE, "lo0" if sys.platform == "darwin" else "lo")
    source = _GLOO_INTERFACE if interface is None else "interface"
    known = [name for _, name in socket.if_nameindex()]
    # Gloo takes several, with commas between them.
    for name in filter(None, os.environ.get(_GLOO_INTERFACE, "").split(",")):
        if name not in known:
            raise ConfigError(
                f"{source}: network interface {name!r} is not on this machine; it has "
                f"{', '.join(known)}: name one of them"
            )
