"""From one adapter folder to another: read, check, restructure and write, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdlora_megatron.convert.adapter import Adapter
from bdlora_megatron.convert.peft.options import check_ignorable
from bdlora_megatron.convert.registry import FormatName, open_adapter, write_adapter
from bdlora_megatron.convert.structure import Structure, StructureReport, restructure
from bdlora_megatron.convert.write_options import WriteOptions
from bdlora_megatron.models.check import base_shape, check_base

if TYPE_CHECKING:
    from bdlora_megatron.models import HFConfig

__all__ = ["Conversion", "companions", "convert_adapter", "open_fitting"]

#: A tokenizer and a chat template, which belong to what the adapter was trained on.
_COMPANIONS = (
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@contextmanager
def open_fitting(path: Path, base: HFConfig | None, **options: Any) -> Iterator[Adapter]:
    """Open an adapter, and refuse it where it does not fit the base model.

    Args:
        path: Its folder.
        base: The base model; unset, the adapter is taken as it is.
        **options: As for `open_adapter`.

    Yields:
        The adapter, with all that is known of its base model.

    Raises:
        ShapeError: If it is for another base model.
    """
    shape = None if base is None else base_shape(base)
    with open_adapter(path, base=shape, **options) as adapter:
        yield adapter if base is None else check_base(adapter, base)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a conversion makes, whatever the adapter.

    Attributes:
        format: The format to write.
        structure: The structure to give.
        options: How to write.
        base: The base model that the adapter must fit.
        base_folder: The base model's folder; whole weights in an adapter that equal its own are
            dropped.
        allow_pickle: Also read pickles, tensors and plain values only.
        ignore_unknown: Unknown options of adapters that change no update, by name.

    Raises:
        ConfigError: If an option to ignore is known.
    """

    format: FormatName
    structure: Structure = field(default_factory=Structure)
    options: WriteOptions = field(default_factory=WriteOptions)
    base: HFConfig | None = None
    base_folder: Path | None = None
    allow_pickle: bool = False
    ignore_unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ignorable(self.ignore_unknown)


def companions(folder: Path) -> tuple[Path, ...]:
    """The tokenizer and the chat template beside an adapter.

    Args:
        folder: The adapter's folder.

    Returns:
        Those of the known files that are there, in order.
    """
    found = [path for pattern in _COMPANIONS for path in sorted(folder.glob(pattern))]
    return tuple(path for path in found if path.is_file())


def convert_adapter(source: Path, target: Path, conversion: Conversion) -> StructureReport:
    """Convert one adapter. The new folder appears complete or not at all.

    A tokenizer and a chat template beside the adapter are copied along.

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
    with open_fitting(
        source,
        conversion.base,
        allow_pickle=conversion.allow_pickle,
        base_folder=conversion.base_folder,
        ignore_unknown=conversion.ignore_unknown,
    ) as adapter:
        changed = restructure(adapter, conversion.structure, dtype=conversion.options.dtype)
        beside = {str(path.relative_to(source)): path for path in companions(source)}
        options = replace(conversion.options, companions=beside)
        write_adapter(changed.adapter, target, conversion.format, options=options)
        return changed.report()
