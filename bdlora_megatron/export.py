"""Writing the adapter that a model carries, from all ranks of a job into one folder.

``save_adapter`` writes Megatron-Core's sharded format, in which training goes on at any parallel
size; ``export_adapter`` writes Hugging Face PEFT's, which everybody reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import parallel_state
from torch import nn

from bdlora_megatron.convert import WriteOptions, write_adapter
from bdlora_megatron.convert.adapter import Adapter, BaseShape, ModuleKey
from bdlora_megatron.convert.folders import new_folder
from bdlora_megatron.convert.megatron.format import (
    FORMAT,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    common_state,
)
from bdlora_megatron.convert.megatron.manifest import Manifest, ModuleEntry, write_manifest
from bdlora_megatron.decoder import MODULE_NAMES
from bdlora_megatron.errors import BDLoRAError, ConfigError, TargetError, explain
from bdlora_megatron.layers import collect_adapter, lora_layers
from bdlora_megatron.layers.activation import invocation_of
from bdlora_megatron.layers.anatomy import (
    decoder_keys,
    hybrid_numbers,
    layer_numbering,
    model_class,
    num_decoder_layers,
)
from bdlora_megatron.layers.collect import file_names
from bdlora_megatron.layers.geometry import check_own_heads
from bdlora_megatron.runtime import refuse_together
from bdlora_megatron.runtime.versions.checkpoint import renumber_layers, save_distributed

__all__ = [
    "HF_ADAPTER",
    "HF_ADAPTER_DENSE",
    "adapter_state",
    "export_adapter",
    "export_asked_for",
    "main_weights",
    "save_adapter",
    "write_peft_folders",
]

#: NeMo's name for the folder of an adapter in Hugging Face's format.
HF_ADAPTER = "hf_adapter"
HF_ADAPTER_DENSE = "hf_adapter-dense"

_Entries = dict[ModuleKey, tuple[ModuleEntry, tuple[Any, ...]]]


def save_adapter(model: nn.Module, path: str | Path, *, name: str | None = None) -> Path:
    """Save the adapter of a model in the format `megatron`.

    Every rank of the job calls this with the same path, on a file system that all ranks see. The
    folder appears complete or not at all.

    Args:
        model: The model, or this rank's pipeline stage of it.
        path: The new folder.
        name: The adapter's name; by default that of the folder.

    Returns:
        The folder, which `convert.open_adapter` reads on one process, and from which
        `dist_checkpointing.load` fills a model's adapter (see `docs/formats.md`).

    Raises:
        TargetError: The model has no adapter.
        ConfigError: The path exists.

    Collectives: over all ranks, those of `dist_checkpointing.save`, one all-gather of names and
    settings, two small broadcasts and a barrier.
    """
    path = Path(path).absolute()
    base, entries, invocation = _gather_entries(model)
    layers = _stacked_layers(entries, base.num_layers)
    common = common_state(layers)["content_metadata"]
    sharded = adapter_state(model, common)
    with _shared_folder(path) as folder:
        weights = folder / WEIGHTS_NAME
        save_distributed(sharded, weights, content_metadata=common)
        if torch.distributed.get_rank() == 0:
            manifest = Manifest(
                format=FORMAT,
                name=name or path.name,
                base=base,
                metadata={"model_class": model_class(model), **file_names(model)},
                modules={key: entry for key, (entry, _) in sorted(entries.items())},
                invocation_tokens=invocation,
            )
            write_manifest(folder / MANIFEST_NAME, manifest)
    return path


def adapter_state(model: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a model's adapter to ``megatron.core.dist_checkpointing``.

    Layers have a ``GPTModel``'s names in the checkpoint whatever the model's class, so that either
    class loads what the other saved.

    Args:
        model: This rank's pipeline stage, not wrapped.
        metadata: As for Megatron-Core's ``sharded_state_dict``; ``non_homogeneous_layers`` decides
            whether each layer has tensors of its own.

    Returns:
        Sharded tensors by the model's own names, to save, or to load and pass to
        ``model.load_state_dict(..., strict=False)``.
    """
    # A copy: Megatron-Core adds its process groups to it.
    state: Any = model.sharded_state_dict(metadata=dict(metadata))  # type: ignore[operator]
    sharded = {key: value for key, value in state.items() if ".adapter." in key}
    numbers = hybrid_numbers(model)
    if numbers:
        stacked = not metadata.get("non_homogeneous_layers", False)
        renumber_layers(sharded, numbers, num_decoder_layers(model) if stacked else None)
    return sharded


def export_adapter(
    model: nn.Module | Sequence[nn.Module],
    folder: str | Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    dense: bool = False,
) -> Path:
    """Write a model's adapter as a folder that PEFT, vLLM and `bdlora` read.

    Every rank of the job calls it with the same path. An adapter that is there is replaced; the
    folder appears complete or not at all. In mixed precision it holds the optimizer's float32
    copies.

    Args:
        model: The model or the chunks of this pipeline stage, wrapped by the host or not.
        folder: The adapter's folder.
        name: The adapter's name; by default that of the folder.
        base_model: Name or path of the base model, noted in the adapter's config.
        dense: Write the same function as a vanilla LoRA, for engines without BD-LoRA.

    Returns:
        The folder.

    Raises:
        TargetError: The model carries no adapter.
        UnsupportedError: A layer has no place in PEFT's format, such as a fused one.
        ConfigError: The first rank could not write, for the reason given; raised on every rank.

    Collectives: those of `collect_adapter`, and one small broadcast over all ranks.
    """
    folder = Path(folder).absolute()
    adapter = _collect(model, name or folder.name)
    write_peft_folders(adapter, {folder: dense}, base_model=base_model)
    return folder


def export_asked_for(
    settings: Any, model: nn.Module | Sequence[nn.Module], parent: str | Path
) -> list[Path]:
    """Write what ``export_peft`` and ``export_dense`` ask for into ``parent``.

    Args:
        settings: An integration's ``BDLoRA``.
        model: As in `export_adapter`.
        parent: The checkpoint's folder.

    Returns:
        The folders: ``hf_adapter``, ``hf_adapter-dense``, both or none.

    Collectives: where anything is written, those of `export_adapter`, once.
    """
    wanted = {HF_ADAPTER: settings.exports_peft, HF_ADAPTER_DENSE: settings.export_dense}
    folders = {
        Path(parent).absolute() / name: name == HF_ADAPTER_DENSE
        for name, asked in wanted.items()
        if asked
    }
    if folders:
        adapter = _collect(model, HF_ADAPTER)
        write_peft_folders(adapter, folders, base_model=settings.base_model)
    return list(folders)


def _collect(model: nn.Module | Sequence[nn.Module], name: str) -> Adapter:
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    whole = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
    with main_weights(whole):
        return collect_adapter(whole, name)


def write_peft_folders(
    adapter: Adapter, folders: Mapping[Path, bool], *, base_model: str | None = None
) -> None:
    """Let the first rank write an adapter, and every rank know what became of it.

    Every rank of the job calls it with the same arguments. An adapter that is there is replaced;
    each folder appears complete or not at all.

    Args:
        adapter: As `collect_adapter` gives it.
        folders: The folders, each with whether it is to hold the same function as a vanilla LoRA,
            for engines without BD-LoRA.
        base_model: Name or path of the base model, noted in the adapter's config.

    Raises:
        ConfigError: The first rank could not write, for the reason given; raised on every rank.

    Collectives: one small broadcast over all ranks.
    """
    refusal = None
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        for folder, dense in folders.items():
            options = WriteOptions(overwrite=True, base_model=base_model, dense=dense)
            try:
                write_adapter(adapter, folder, "peft", options=options)
            except (BDLoRAError, OSError) as error:
                refusal = f"the adapter was not exported to {folder}: {explain(error, folder)}"
                break
    refuse_together(refusal)


@contextmanager
def main_weights(model: nn.Module) -> Iterator[None]:
    """Put the optimizer's float32 copies in the factors' places inside the ``with`` block.

    Of a copy that is split over data-parallel ranks, as by Megatron's distributed optimizer, all
    parts are gathered, and get what was changed in the block. A factor without a copy stays; it is
    then what the optimizer steps.

    Args:
        model: The model, wrapped or not.

    Yields:
        Nothing.

    Collectives: where copies are split, two all-gathers over data-parallel ranks.
    """
    factors: list[Any] = [factor for factor in model.parameters() if factor.requires_grad]
    split = [factor for factor in factors if getattr(factor, "main_param_sharded", False)]
    whole = [factor for factor in factors if getattr(factor, "main_param", None) is not None]
    mains = {factor: factor.main_param.data for factor in whole if factor not in set(split)}
    parts = _gather_main_weights(split)
    mains |= {factor: main for factor, (main, _) in parts.items()}
    copies = [(factor, factor.data, main) for factor, main in mains.items()]
    for factor, _, main in copies:
        factor.data = main
    try:
        yield
    finally:
        for factor, own, _ in copies:
            factor.data = own
        for factor, (main, first) in parts.items():
            if factor.main_param is not None:
                flat = main.flatten()
                factor.main_param.data.copy_(flat[first : first + factor.main_param.numel()])


def _gather_main_weights(factors: Sequence[Any]) -> dict[Any, tuple[torch.Tensor, int]]:
    """Float32 copies of which each data-parallel rank holds one stretch, or none.

    Returns:
        Each copy, with where in it this rank's own stretch begins.
    """
    if not factors:
        return {}
    # The ranks over which one optimizer is split; their stretches follow one another.
    group: Any = parallel_state.get_data_parallel_group(
        with_context_parallel=True, partial_data_parallel=True
    )
    empty = torch.empty(0, device=factors[0].device)
    own = [empty if f.main_param is None else f.main_param.data.flatten() for f in factors]
    counts = torch.tensor([part.numel() for part in own], device=empty.device)
    every = [torch.empty_like(counts) for _ in range(group.size())]
    torch.distributed.all_gather(every, counts, group=group)
    sent = torch.zeros(int(torch.stack(every).sum(1).max()), device=empty.device)
    sent[: int(counts.sum())] = torch.cat(own)
    received = [torch.empty_like(sent) for _ in every]
    torch.distributed.all_gather(received, sent, group=group)
    stretches = [
        part[: int(sizes.sum())].split(sizes.tolist())
        for part, sizes in zip(received, every, strict=True)
    ]
    firsts = torch.stack(every)[: group.rank()].sum(0).tolist()
    copies = [torch.cat(parts) for parts in zip(*stretches, strict=True)]
    # None at all: the optimizer keeps what bfloat16 loses in a form of its own.
    return {
        factor: (copy.view(factor.shape), first)
        for factor, copy, first in zip(factors, copies, firsts, strict=True)
        if len(copy)
    }


def _gather_entries(model: nn.Module) -> tuple[BaseShape, _Entries, tuple[int, ...] | None]:
    """The base model, the settings and shapes of the modules of all stages, invocation tokens.

    Raises:
        TargetError: No stage has an adapter.
    """
    own: _Entries = {}
    layers = list(lora_layers(model))
    base = _base_shape(layers[0][1].config, num_decoder_layers(model)) if layers else None
    numbering = layer_numbering(model)
    for full_name, layer in layers:
        if layer.adapter is None:
            continue
        check_own_heads(full_name, layer.config)
        for plan in layer.adapter.plans:
            entry = ModuleEntry(num_blocks=plan.num_blocks, scale=plan.scale)
            for key in decoder_keys(full_name, plan.projection.name, numbering):
                own[key] = (entry, (plan.rank, plan.num_blocks, plan.projection))
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (base, own, invocation_of(model)))
    entries = {key: value for _, some, _ in everyone for key, value in some.items()}
    if not entries:
        raise TargetError("the model has no adapter to save; load or apply one first")
    # A stage that holds none of the layers in question knows no base either.
    base = next(base for base, _, _ in everyone if base is not None)
    invocation = next((tokens for *_, tokens in everyone if tokens is not None), None)
    # Only the delta net's rows stand by group; readers need to know how many.
    groups = max(projection.groups for _, (_, _, projection) in entries.values())
    base = replace(base, delta_heads=groups) if groups > 1 else base
    return base, entries, invocation


def _stacked_layers(entries: _Entries, num_layers: int | None) -> int | None:
    """`num_layers` if every layer has the same modules and shapes, else None."""
    by_layer: dict[int, list[Any]] = {}
    if any(key.name not in MODULE_NAMES for key in entries):
        # Layers of these families are rarely alike, and stretches of rows are tensors of their own.
        return None
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


def _base_shape(config: Any, num_layers: int) -> BaseShape:
    if getattr(config, "multi_latent_attention", False):
        # Widths of latent attention are told by its factors.
        return BaseShape(
            hidden_size=config.hidden_size,
            ffn_size=config.ffn_hidden_size,
            q_size=config.num_attention_heads * config.v_head_dim,
            num_heads=config.num_attention_heads,
            num_layers=num_layers,
        )
    groups = config.num_query_groups or config.num_attention_heads
    return BaseShape(
        hidden_size=config.hidden_size,
        ffn_size=config.ffn_hidden_size,
        q_size=config.num_attention_heads * config.kv_channels,
        kv_size=groups * config.kv_channels,
        num_heads=config.num_attention_heads,
        num_kv_heads=groups,
        head_dim=config.kv_channels,
        num_layers=num_layers,
    )
