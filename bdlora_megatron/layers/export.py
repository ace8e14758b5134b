"""Writing a collected adapter as Hugging Face PEFT's folders, from all ranks of a job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from bdlora_megatron.convert import WriteOptions, write_adapter
from bdlora_megatron.convert.adapter import Adapter
from bdlora_megatron.errors import BDLoRAError
from bdlora_megatron.runtime import refuse_together

__all__ = ["write_peft_folders"]


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
                refusal = f"the adapter was not exported to {folder}: {error}"
                break
    refuse_together(refusal)
