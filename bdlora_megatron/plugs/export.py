"""Writing the adapter that a host trains as Hugging Face PEFT's folder, from all ranks of a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bdlora_megatron.convert.adapter import Adapter
from bdlora_megatron.layers import collect_adapter
from bdlora_megatron.layers.export import write_peft_folders
from bdlora_megatron.layers.main_weights import main_weights

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
    folder appears complete or not at all. In mixed precision it holds the optimizer's float32
    copies, where a rank has them whole.

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
    adapter = _collect(model, name or folder.name)
    write_peft_folders(adapter, {folder: dense}, base_model=base_model)
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
