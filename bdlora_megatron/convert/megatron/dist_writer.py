"""Writing tensors in the format of `megatron.core.dist_checkpointing`, one part at a time.

Imported where something is written: `torch.distributed.checkpoint` takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from bdlora_megatron.convert.megatron.dist_tensors import Chunk

__all__ = ["write_dist_tensors"]


def write_dist_tensors(
    folder: Path, chunks: Sequence[Chunk], load: Callable[[int], Tensor], common: dict[str, Any]
) -> None:
    """Write a checkpoint that `dist_checkpointing.load` reads; one chunk is in memory at a time.

    Args:
        folder: An empty folder.
        chunks: All parts of all tensors, in the order to write them.
        load: Gives the part of that index in `chunks`.
        common: What `common.pt` holds: plain values.
    """
    counts: dict[str, int] = {}
    items = []
    for chunk in chunks:
        # Several chunks of one tensor are told apart by their offset; the number is a hint.
        number = counts[chunk.name] = counts.get(chunk.name, -1) + 1
        items.append(
            WriteItem(
                index=MetadataIndex(chunk.name, torch.Size(chunk.offsets), number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(
                        offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes)
                    ),
                    properties=TensorProperties(dtype=chunk.dtype),
                    size=torch.Size(chunk.size),
                ),
            )
        )
    planner = _Planner(items, chunks, load)
    writer = FileSystemWriter(folder, sync_files=False)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = create_default_global_save_plan([SavePlan(items=items)])
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    results = writer.write_data(plan, planner)
    results.wait()
    writer.finish(metadata, [results.value()])
    torch.save(common, folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends), "utf-8")


class _Planner(SavePlanner):
    """Hands the writer each chunk when it comes to writing it."""

    def __init__(
        self, items: Sequence[WriteItem], chunks: Sequence[Chunk], load: Callable[[int], Tensor]
    ) -> None:
        self._numbers = {item.index: number for number, item in enumerate(items)}
        self._chunks = chunks
        self._load = load

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        number = self._numbers[write_item.index]
        tensor = self._load(number).contiguous()
        assert tensor.shape == self._chunks[number].sizes
        # A view would take the whole tensor behind it into the file.
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the plan is made above."""

    def create_local_plan(self) -> SavePlan:
        """Not called: the plan is made above."""
        raise NotImplementedError

    create_global_plan = finish_plan = create_local_plan  # type: ignore[assignment]
