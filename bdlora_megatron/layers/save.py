"""Saving a model's adapter, from all ranks of a job into one folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from bdlora_megatron.convert.adapter import BaseShape, ModuleKey
from bdlora_megatron.convert.folders import new_folder
from bdlora_megatron.convert.manifest import Manifest, ModuleEntry, write_manifest
from bdlora_megatron.convert.megatron_format import (
    FORMAT,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    common_state,
)
from bdlora_megatron.errors import ConfigError, TargetError
from bdlora_megatron.layers.apply import lora_layers
from bdlora_megatron.layers.load import decoder_keys
from bdlora_megatron.runtime import refuse_together
from bdlora_megatron.runtime.versions.checkpoint import save_distributed

__all__ = ["save_adapter"]

_Entries = dict[ModuleKey, tuple[ModuleEntry, tuple[Any, ...]]]


def save_adapter(model: nn.Module, path: str | Path, *, name: str | None = None) -> Path:
    """Save the adapter of a model in the format `megatron`.

    Every rank of the job calls it with the same path, on a file system that all of them see. The
    folder appears complete or not at all.

    Args:
        model: The model, or this rank's pipeline stage of it.
        path: The new folder.
        name: The adapter's name; the folder's when unset.

    Returns:
        The folder, which `convert.open_adapter` reads on one process, and from which
        `dist_checkpointing.load` fills a model's adapter (see `docs/formats.md`).

    Raises:
        TargetError: The model has no adapter.
        ConfigError: There is something at the path.

    Collectives: over all ranks, those of `dist_checkpointing.save`, one all-gather of names and
    settings, two small broadcasts and a barrier.
    """
    path = Path(path).absolute()
    base, entries = _gather_entries(model)
    layers = _stacked_layers(entries, base.num_layers)
    common = common_state(layers)["content_metadata"]
    # A copy: Megatron-Core adds its process groups to it.
    state: Any = model.sharded_state_dict(metadata=dict(common))  # type: ignore[operator]
    sharded = {key: value for key, value in state.items() if ".adapter." in key}
    with _shared_folder(path) as folder:
        weights = folder / WEIGHTS_NAME
        save_distributed(sharded, weights, content_metadata=common)
        if torch.distributed.get_rank() == 0:
            manifest = Manifest(
                format=FORMAT,
                name=name or path.name,
                base=base,
                modules={key: entry for key, (entry, _) in sorted(entries.items())},
            )
            write_manifest(folder / MANIFEST_NAME, manifest)
    return path


def _gather_entries(model: nn.Module) -> tuple[BaseShape, _Entries]:
    """The base model, and the settings and shapes of the modules of all pipeline stages.

    Raises:
        TargetError: No stage has an adapter.
    """
    own: _Entries = {}
    base = None
    for full_name, layer in lora_layers(model):
        base = _base_shape(layer.config)
        if layer.adapter is None:
            continue
        for plan in layer.adapter.plans:
            entry = ModuleEntry(num_blocks=plan.num_blocks, scale=plan.scale)
            for key in decoder_keys(full_name, plan.projection.name):
                own[key] = (entry, (plan.rank, plan.num_blocks, plan.projection))
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (base, own))
    entries = {key: value for _, some in everyone for key, value in some.items()}
    if not entries:
        raise TargetError("the model has no adapter to save; load or apply one first")
    # A stage that holds none of the layers in question knows no base either.
    return next(base for base, _ in everyone if base is not None), entries


def _stacked_layers(entries: _Entries, num_layers: int | None) -> int | None:
    """`num_layers` if every layer has the same modules and shapes, else None."""
    by_layer: dict[int, list[Any]] = {}
    for key, (_, shape) in sorted(entries.items()):
        by_layer.setdefault(key.layer, []).append((key.name, shape))
    same = all(shapes == next(iter(by_layer.values())) for shapes in by_layer.values())
    return num_layers if same and len(by_layer) == num_layers else None


@contextmanager
def _shared_folder(path: Path) -> Iterator[Path]:
    """A folder that rank 0 makes and renames, and all ranks fill.

    Raises:
        ConfigError: Rank 0 cannot make it.
    """
    with ExitStack() as stack:
        box: list[Path | None] = [None]
        refusal = None
        if torch.distributed.get_rank() == 0:
            try:
                folder = stack.enter_context(new_folder(path, overwrite=False))
                (folder / WEIGHTS_NAME).mkdir()
                box = [folder]
            except ConfigError as error:
                refusal = str(error)
        refuse_together(refusal)
        torch.distributed.broadcast_object_list(box, src=0)
        yield cast("Path", box[0])
    # Only now has rank 0 renamed it.
    torch.distributed.barrier()


def _base_shape(config: Any) -> BaseShape:
    groups = config.num_query_groups or config.num_attention_heads
    return BaseShape(
        hidden_size=config.hidden_size,
        ffn_size=config.ffn_hidden_size,
        q_size=config.num_attention_heads * config.kv_channels,
        kv_size=groups * config.kv_channels,
        num_heads=config.num_attention_heads,
        num_kv_heads=groups,
        head_dim=config.kv_channels,
        num_layers=config.num_layers,
    )
