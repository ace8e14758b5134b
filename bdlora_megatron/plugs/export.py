"""Writing the adapter that a host trains as Hugging Face PEFT's folder, from all ranks of a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdlora_megatron.convert import WriteOptions, write_adapter
from bdlora_megatron.errors import BDLoRAError, ConfigError
from bdlora_megatron.layers import collect_adapter

__all__ = ["HF_ADAPTER", "HF_ADAPTER_DENSE", "export_adapter", "export_asked_for"]

#: NeMo's name for the folder of an adapter in Hugging Face's format.
HF_ADAPTER = "hf_adapter"
HF_ADAPTER_DENSE = "hf_adapter-dense"


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
    folder appears complete or not at all.

    Args:
        model: The model or the chunks of this pipeline stage, wrapped by the host or not.
        folder: The adapter's folder.
        name: The adapter's name; the folder's when unset.
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
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    whole = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
    adapter = collect_adapter(whole, name or folder.name)
    refusal: list[str | None] = [None]
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        options = WriteOptions(overwrite=True, base_model=base_model, dense=dense)
        try:
            write_adapter(adapter, folder, "peft", options=options)
        except (BDLoRAError, OSError) as error:
            refusal[0] = str(error)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise ConfigError(f"the adapter was not exported to {folder}: {refusal[0]}")
    return folder


def export_asked_for(
    settings: Any, model: nn.Module | Sequence[nn.Module], parent: str | Path
) -> list[Path]:
    """Write what ``export_peft`` and ``export_dense`` ask for into ``parent``.

    Args:
        settings: A plug's ``BDLoRA``.
        model: As in `export_adapter`.
        parent: The checkpoint's folder.

    Returns:
        The folders: ``hf_adapter``, ``hf_adapter-dense``, both or none.
    """
    wanted = {HF_ADAPTER: settings.exports_peft, HF_ADAPTER_DENSE: settings.export_dense}
    return [
        export_adapter(
            model,
            Path(parent) / name,
            base_model=settings.base_model,
            dense=name == HF_ADAPTER_DENSE,
        )
        for name, asked in wanted.items()
        if asked
    ]
