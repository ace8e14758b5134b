"""Saving a distributed checkpoint in this process alone, under names that all model classes share.

Until 0.16, Megatron-Core forks a process for each file of a checkpoint, also where nobody asked for
an asynchronous save. Such a process outlives a rank that is killed meanwhile: it waits for ever for
a queue that the rank would have filled, and holds every lock that the rank held. Since 0.17 threads
write. On all releases, a further server process would take in the results.
"""

from __future__ import annotations

import queue
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

__all__ = ["optimizer_format", "renumber_layers", "save_distributed"]

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
    split = DistributedOptimizer
    if not any(isinstance(one, split) for one in getattr(optimizer, "chained_optimizers", [])):
        if not isinstance(optimizer, split):
            return {}
    # Before 0.15 there is one such format; later releases no longer load its flattened tensors.
    known = getattr(split, "checkpoint_fully_reshardable_formats", ())
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
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
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
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    written: dict[int, Any] = {}
    for number, bucket in enumerate(stage()):
        outcome: queue.Queue[tuple[int, Any]] = queue.Queue()
        unfinished: queue.Queue[int] = queue.Queue()
        unfinished.put(number)
        writer.write_preloaded_data(
            transforms, number, bucket, outcome, unfinished, use_fsync=True, use_msc=writer.use_msc
        )
        _, written[number] = outcome.get()
        if isinstance(written[number], Exception):
            results.put(written[number])
            return
    results.put(written)
