"""From one adapter folder to another: read, check, restructure and write, module by module."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bdlora_megatron.convert.registry import FormatName, open_adapter, write_adapter
from bdlora_megatron.convert.structure import Structure, StructureReport, restructure
from bdlora_megatron.convert.write_options import WriteOptions
from bdlora_megatron.models.check import base_shape, check_base

if TYPE_CHECKING:
    from bdlora_megatron.models import HFConfig

__all__ = ["Conversion", "convert_adapter"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a conversion makes, whatever the adapter.

    Attributes:
        format: The format to write.
        structure: The structure to give.
        options: How to write.
        base: The base model that the adapter must fit.
        allow_pickle: Also read pickles, tensors and plain values only.
    """

    format: FormatName
    structure: Structure = field(default_factory=Structure)
    options: WriteOptions = field(default_factory=WriteOptions)
    base: HFConfig | None = None
    allow_pickle: bool = False


def convert_adapter(source: Path, target: Path, conversion: Conversion) -> StructureReport:
    """Convert one adapter. The new folder appears complete or not at all.

    Args:
        source: The adapter's folder.
        target: The new folder.
        conversion: What to make.

    Returns:
        Every module before and after.

    Raises:
        AdapterFormatError: If the adapter cannot be read, or cannot have the structure.
        ConfigError: If the target is taken, or a budget is too small.
        ShapeError: If the adapter does not fit the base model.
        UnsupportedError: If the format cannot hold the result.
    """
    base = conversion.base
    with open_adapter(
        source,
        allow_pickle=conversion.allow_pickle,
        base=None if base is None else base_shape(base),
    ) as adapter:
        if base is not None:
            adapter = check_base(adapter, base)
        changed = restructure(adapter, conversion.structure, dtype=conversion.options.dtype)
        write_adapter(changed.adapter, target, conversion.format, options=conversion.options)
        return changed.report()
