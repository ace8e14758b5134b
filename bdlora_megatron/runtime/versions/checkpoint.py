"""Saving a distributed checkpoint in this process alone or, of its files, in one that it names.

Until 0.16, Megatron-Core forks a process for each file of a checkpoint, also where nobody asked for
an asynchronous save. Such a process outlives a rank that is killed meanwhile: it waits for ever for
a queue that the rank would have filled, and holds every lock that the rank held. Since 0.17 threads
write. On all releases, a further server process would take in the results.
"""

from __future__ import annotations

import inspect
import pickle
import queue
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

__all__ = [
    "PlannedSave",
    "optimizer_format",
    "plan_distributed",
    "renumber_layers",
    "save_distributed",
    "write_files",
]

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def renumber_layers(
    sharded: Mapping[str, Any], numbers: Mapping[int, int], num_layers: int | None
) -> None:
    """Store a ``HybridModel``'s layers under the names that a ``GPTModel`` gives them.

    Args:
        sharded: What the model's ``sharded_state_dict`` gave; changed in place.
        numbers: The layer of each position.
        num_layers: Of the whole model, to stack each tensor over all layers; None where each layer
            has tensors of its own.
    """
    if num_layers is not None:
        from megatron.core.dist_checkpointing import gpt_checkpoint_interop as interop

        # It knows attention from MLP by the map alone, and asks both for every position.
        maps = interop.GPTCompatLayerMaps(numbers, {}, frozenset(), num_layers)
        interop.retarget_sharded_state_dict_to_gpt_checkpoint(dict(sharded), maps)
        return
    for entry in sharded.values():
        found = _LAYER.search(entry.key)
        if found:
            number = numbers[int(found[1])]
            entry.key = f"{entry.key[: found.start(1)]}{number}{entry.key[found.end(1) :]}"


def optimizer_format(optimizer: Any) -> dict[str, Any]:
    """Arguments of an optimizer's ``sharded_state_dict`` that make it load at any parallel size.

    Args:
        optimizer: Megatron-Core's; only of a distributed one there are several formats.
    """
    # Not needed, and slow to import, in a process that writes files.
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if not any(isinstance(part, DistributedOptimizer) for part in parts):
        return {}
    # Before 0.15 there is one such format; later releases no longer load its flattened tensors.
    known = getattr(DistributedOptimizer, "checkpoint_fully_reshardable_formats", ())
    name = "fully_reshardable" if "fully_reshardable" in known else "fully_sharded_model_space"
    return {"metadata": {"distrib_optim_sharding_type": name}}


def save_distributed(
    state: Mapping[str, Any], folder: str | Path, *, content_metadata: dict[str, Any] | None = None
) -> None:
    """Save as ``dist_checkpointing.save`` does, without starting a process.

    Args:
        state: What to save, as ``dist_checkpointing.save`` takes it.
        folder: An empty one, the same on every rank.
        content_metadata: As for ``dist_checkpointing.save``.

    Collectives:
        Those of ``dist_checkpointing.save``.
    """
    _keep_results_here()
    forks = hasattr(filesystem_async.FileSystemWriterAsync, "write_preloaded_data_multiproc")
    dist_checkpointing.save(
        dict(state),
        str(folder),
        _SaveHere("torch_dist", 1) if forks else None,
        content_metadata=content_metadata,
    )


class _SaveHere(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy, whose files this process writes by itself."""

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        # 0.14 would hand the request to a process here; later releases do as this line does.
        self.async_save(sharded_state_dict, checkpoint_dir).execute_sync()

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        request = super()._get_save_and_finalize_callbacks(writer, *args)
        if request.async_fn is None:
            return request
        # Staged by the writing function: 0.14 stages only for its process.
        write = partial(_write, writer, request.preload_fn)
        return request._replace(async_fn=write, preload_fn=None)


def _write(
    writer: Any,
    stage: Callable[[], list[Any]],
    rank: int,
    buckets: list[Any],
    results: queue.Queue[Any],
) -> None:
    """Write a rank's files one after another, each as one of Megatron-Core's processes would."""
    del rank, buckets
    results.put(write_files(_files(writer, stage())))


class PlannedSave:
    """A checkpoint of which all is settled and nothing but the ranks' files is to be written.

    Attributes:
        files: This rank's, with copies of their tensors in host memory, for ``write_files`` in
            whatever process; None where the rank has none.
    """

    def __init__(self, request: Any, writer: Any) -> None:
        """Copy what the writer is to write out of the run's hands."""
        self._finalize = list(request.finalize_fns)
        self.files: bytes | None = None
        if request.async_fn is not None:
            staged = request.preload_fn()
            # A pickle: on a CPU what is staged may be the run's own tensors.
            self.files = pickle.dumps(_files(writer, staged), pickle.HIGHEST_PROTOCOL)

    def finish(self, written: Any) -> None:
        """Describe the files, once every rank has written its own.

        Args:
            written: What ``write_files`` returned; None where there were none.

        Collectives:
            Those of Megatron-Core's ``save_state_dict_async_finalize``.
        """
        if self.files is not None:
            assert filesystem_async._results_queue is not None
            filesystem_async._results_queue.put(written)
        for finalize in self._finalize:
            finalize()


def plan_distributed(state: Mapping[str, Any], folder: str | Path) -> PlannedSave:
    """Do all that saving asks of the ranks together, and leave the writing for later.

    The folder is complete when each rank's files are written and ``finish`` was called, and must
    not be read before, whatever is in it.

    Args:
        state: As for ``save_distributed``.
        folder: As for ``save_distributed``.

    Returns:
        What is left to do.

    Collectives:
        Those of ``dist_checkpointing.save`` but for its end.
    """
    _keep_results_here()
    strategy = _SaveLater("torch_dist", 1)
    dist_checkpointing.save(dict(state), str(folder), strategy)
    assert strategy.planned is not None
    return strategy.planned


class _SaveLater(TorchDistSaveShardedStrategy):
    planned: PlannedSave | None = None
    _writer: Any = None

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        known = inspect.signature(self.async_save).parameters
        # The other strategy, since 0.17, is that of a further library.
        own = {"async_strategy": "mcore"} if "async_strategy" in known else {}
        request = self.async_save(sharded_state_dict, checkpoint_dir, **own)
        self.planned = PlannedSave(request, self._writer)

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        self._writer = writer
        return super()._get_save_and_finalize_callbacks(writer, *args)


def write_files(files: tuple[list[Any], bool, list[Any]]) -> dict[int, Any] | Exception:
    """Write a rank's files, as Megatron-Core would.

    Args:
        files: What ``PlannedSave.files`` unpickles to: transforms, whether Megatron-Core's
            multi-storage client writes, and the files' names and tensors.

    Returns:
        What to pass to ``PlannedSave.finish``, or what went wrong.
    """
    transforms, use_msc, staged = files
    written: dict[int, Any] = {}
    for number, bucket in enumerate(staged):
        outcome: queue.Queue[tuple[int, Any]] = queue.Queue()
        unfinished: queue.Queue[int] = queue.Queue()
        unfinished.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, outcome, unfinished, use_fsync=True, use_msc=use_msc
        )
        _, written[number] = outcome.get()
        if isinstance(written[number], Exception):
            return cast("Exception", written[number])
    return written


def _files(writer: Any, staged: list[Any]) -> tuple[list[Any], bool, list[Any]]:
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    return transforms, writer.use_msc, staged


def _keep_results_here() -> None:
    """What was written is told within this process, not through a server process."""
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
