"""From one adapter folder to another: read, check, restructure and write, module by module."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from bdlora_megatron.convert.adapter import Adapter, BaseShape
from bdlora_megatron.convert.formats import FormatName, open_adapter, write_adapter
from bdlora_megatron.convert.lazy import module_facts
from bdlora_megatron.convert.problems import Problems
from bdlora_megatron.convert.structure import Structure, StructureReport, restructure
from bdlora_megatron.convert.write_options import WriteOptions

__all__ = ["Conversion", "check_base", "convert_adapter"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a conversion makes, whatever the adapter.

    Attributes:
        format: The format to write.
        structure: The structure to give.
        options: How to write.
        base: Facts of the base model that the adapter must fit.
        allow_pickle: Also read pickles, tensors and plain values only.
    """

    format: FormatName
    structure: Structure = field(default_factory=Structure)
    options: WriteOptions = field(default_factory=WriteOptions)
    base: BaseShape | None = None
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
        AdapterFormatError: If the adapter cannot be read, does not fit the base model, or cannot
            have the structure.
        ConfigError: If the target is taken, or a budget is too small.
        UnsupportedError: If the format cannot hold the result.
    """
    with open_adapter(source, allow_pickle=conversion.allow_pickle) as adapter:
        if conversion.base is not None:
            adapter = check_base(adapter, conversion.base)
        changed = restructure(adapter, conversion.structure, dtype=conversion.options.dtype)
        write_adapter(changed.adapter, target, conversion.format, options=conversion.options)
        return changed.report()


def check_base(adapter: Adapter, base: BaseShape) -> Adapter:
    """See that an adapter is one for a base model, and note the model's facts in it.

    Args:
        adapter: Lazy or in memory.
        base: The model's facts; those that are None are not compared.

    Returns:
        The adapter, with everything known of the base model.

    Raises:
        AdapterFormatError: If a size disagrees. All that do are listed, with both.
    """
    problems, known = Problems(), {}
    for side in BaseShape.__dataclass_fields__:
        own, wanted = getattr(adapter.base, side), getattr(base, side)
        if None not in (own, wanted) and own != wanted:
            problems.add(f"{side} is {own} in the adapter and {wanted} in the base model")
        known[side] = own if wanted is None else wanted
    if base.num_layers is not None:
        beyond = [str(key) for key in module_facts(adapter) if key.layer >= base.num_layers]
        if beyond:
            problems.add(f"the base model has {base.num_layers} layers", *beyond)
    problems.raise_if_any(
        f"adapter {adapter.name!r} is not one for this base model; pass the model that it was "
        "trained on"
    )
    return replace(adapter, base=BaseShape(**known))
