"""Every adapter format by its name: what a folder holds, and its reader and writer.

A reader makes the neutral adapter, a writer takes it, and nothing converts from one format to
another directly.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from bdlora_megatron.convert.adapter import Adapter, BaseShape
from bdlora_megatron.convert.adapter.lazy import in_memory
from bdlora_megatron.convert.bridge.config import BRIDGE_SIGNS
from bdlora_megatron.convert.bridge.format import open_bridge, write_bridge
from bdlora_megatron.convert.bridge.swift import is_swift, open_swift
from bdlora_megatron.convert.collection.manifest import CORE_NAME
from bdlora_megatron.convert.collection.reader import open_compressed
from bdlora_megatron.convert.folders import new_folder
from bdlora_megatron.convert.hints import folder_hint
from bdlora_megatron.convert.megatron.format import MANIFEST_NAME, open_megatron, write_megatron
from bdlora_megatron.convert.megatron.run import RUN_NAME, open_run
from bdlora_megatron.convert.peft.config import CONFIG_NAME
from bdlora_megatron.convert.peft.reader import open_peft
from bdlora_megatron.convert.peft.writer import write_peft
from bdlora_megatron.convert.slora.format import MANIFEST_NAME as SLORA_NAME
from bdlora_megatron.convert.slora.format import adapter_name, open_slora, write_slora
from bdlora_megatron.convert.write_options import WriteOptions, prepare
from bdlora_megatron.errors import AdapterFormatError, ConfigError, UnsupportedError

__all__ = [
    "FORMATS",
    "FormatName",
    "detect_format",
    "open_adapter",
    "read_adapter",
    "write_adapter",
]

FormatName: TypeAlias = Literal["peft", "megatron", "bridge", "slora", "compressed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reading:
    """What a reader may be told."""

    allow_pickle: bool
    base: BaseShape | None
    base_folder: Path | None
    ignore_unknown: Collection[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Format:
    """One format.

    Attributes:
        signs: Files that tell a folder of this format.
        open: Opens a folder.
        write: Fills an empty folder.
    """

    signs: tuple[str, ...]
    open: Callable[[Path, _Reading], AbstractContextManager[Adapter]]
    write: Callable[[Adapter, Path, WriteOptions], None]


def _refuse(adapter: Adapter, *_: object) -> None:
    raise UnsupportedError(
        f"adapter {adapter.name!r} cannot be written compressed by itself: its basis is that of a "
        "collection; bdlora compress makes one"
    )


#: Those that are written too. The first whose sign is there counts.
FORMATS: Mapping[FormatName, _Format] = {
    "peft": _Format(
        signs=(CONFIG_NAME,),
        open=lambda path, reading: open_peft(
            path,
            allow_pickle=reading.allow_pickle,
            ignore_unknown=reading.ignore_unknown,
            base=reading.base,
            base_folder=reading.base_folder,
        ),
        write=write_peft,
    ),
    "megatron": _Format(
        signs=(MANIFEST_NAME, RUN_NAME),
        open=lambda path, reading: (
            open_megatron(path)
            if (path / MANIFEST_NAME).is_file()
            else open_run(path, base=reading.base)
        ),
        write=write_megatron,
    ),
    "bridge": _Format(
        signs=BRIDGE_SIGNS,
        open=lambda path, reading: (
            open_swift(path, base=reading.base, ignore_unknown=reading.ignore_unknown)
            if is_swift(path)
            else open_bridge(path, base=reading.base)
        ),
        write=write_bridge,
    ),
    "slora": _Format(signs=(SLORA_NAME,), open=lambda path, _: open_slora(path), write=write_slora),
}


_ALL: Mapping[FormatName, _Format] = {
    **FORMATS,
    "compressed": _Format(
        signs=(CORE_NAME,), open=lambda path, _: open_compressed(path), write=_refuse
    ),
}


def detect_format(path: str | Path) -> FormatName:
    """Tell an adapter's format from its files.

    Args:
        path: The adapter's folder.

    Returns:
        The format's name.

    Raises:
        AdapterFormatError: If the folder is missing or of no format that is known.
    """
    folder = Path(path)
    if not folder.exists() and (folder.with_name(adapter_name(folder)) / SLORA_NAME).is_file():
        # S-LoRA lists one adapter several times, told apart by a number at the end.
        return "slora"
    if not folder.is_dir():
        raise AdapterFormatError(f"{folder} is no folder; pass the folder of an adapter")
    if is_swift(folder):
        # It has PEFT's config, and none of its tensors.
        return "bridge"
    for name, kind in _ALL.items():
        if any(next(folder.glob(sign), None) for sign in kind.signs):
            return name
    signs = ", ".join(f"{sign} ({n})" for n, kind in _ALL.items() for sign in kind.signs)
    hint = folder_hint(folder)
    why = f", {hint}" if hint else f": looked for {signs}; pass the folder that holds one of these"
    raise AdapterFormatError(f"{folder} is no adapter of a known format{why}")


@contextmanager
def open_adapter(
    path: str | Path,
    *,
    allow_pickle: bool = False,
    format: FormatName | None = None,
    base: BaseShape | None = None,
    base_folder: Path | None = None,
    ignore_unknown: Collection[str] = (),
) -> Iterator[Adapter]:
    """Open an adapter of any format, whatever its size.

    Args:
        path: The adapter's folder.
        allow_pickle: Also read files that are pickles, tensors and plain values only.
        format: Its format; told from its files when unset.
        base: The base model's heads, for fused checkpoints that do not tell them (`bridge`,
            `peft`).
        base_folder: The base model's folder in Hugging Face's format. Whole weights beside the
            factors (`peft`) are dropped where they equal its own, and refused elsewhere.
        ignore_unknown: Options of an `adapter_config.json` that are unknown here and that the
            caller knows to change no update.

    Yields:
        The adapter. A module is read each time it is looked up, as long as the adapter is open, so
        that no more than that module is in memory. Shapes and scales are known without
        (`module_facts`).

    Raises:
        AdapterFormatError: If the files are missing or broken, or hold what cannot be represented.
            All such problems are listed, but for those that only a module's numbers tell: these
            are raised by the look-up.
        ConfigError: If there is no such format, or an option to ignore is known.
    """
    kind = _format(format or detect_format(path))
    reading = _Reading(
        allow_pickle=allow_pickle,
        base=base,
        base_folder=base_folder,
        ignore_unknown=ignore_unknown,
    )
    with kind.open(Path(path), reading) as adapter:
        yield adapter


def read_adapter(
    path: str | Path,
    *,
    allow_pickle: bool = False,
    format: FormatName | None = None,
    base: BaseShape | None = None,
    base_folder: Path | None = None,
    ignore_unknown: Collection[str] = (),
) -> Adapter:
    """Read an adapter of any format.

    Args:
        path: The adapter's folder.
        allow_pickle: Also read pickles, but only their tensors and plain values.
        format: The format; by default detected from the files.
        base: The base model's heads, for fused checkpoints that do not record them (`bridge`,
            `peft`).
        base_folder: The base model's folder in Hugging Face's format. Whole weights beside the
            factors (`peft`) are dropped if they equal the base model's, and refused otherwise.
        ignore_unknown: Options of an `adapter_config.json` that this package does not know and
            that the caller knows not to change the update.

    Returns:
        The adapter, with every factor in memory.
    """
    with open_adapter(
        path,
        allow_pickle=allow_pickle,
        format=format,
        base=base,
        base_folder=base_folder,
        ignore_unknown=ignore_unknown,
    ) as adapter:
        return in_memory(adapter)


def write_adapter(
    adapter: Adapter, path: str | Path, format: FormatName, *, options: WriteOptions | None = None
) -> Path:
    """Write an adapter, one module after the other.

    The folder appears complete or not at all, even if the process is killed.

    Args:
        adapter: Lazy or in memory.
        path: The new folder.
        format: The format to write.
        options: Options of the writers, such as ``dense`` and ``overwrite``.

    Returns:
        The folder.

    Raises:
        AdapterFormatError: The adapter is empty, or a module's numbers are not finite.
        ConfigError: The path exists and must not be replaced, or the format is unknown.
    """
    options = options or WriteOptions()
    kind = _format(format)
    path = Path(path).absolute()
    if options.overwrite:
        _check_replaceable(path)
    ready = prepare(adapter, options)
    with new_folder(path, overwrite=options.overwrite) as folder:
        kind.write(ready, folder, options)
        for name, source in options.companions.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / name)
    return path


def _format(name: FormatName) -> _Format:
    if name not in _ALL:
        raise ConfigError(f"format={name!r} is unknown; wanted one of {', '.join(_ALL)}")
    return _ALL[name]


def _check_replaceable(path: Path) -> None:
    """Replace adapters only: a mistyped path must not cost a home directory.

    Raises:
        ConfigError: If something else is there.
    """
    if path.is_symlink() or path.is_file():
        raise ConfigError(f"{path} is no folder and is not replaced; pass another path")
    if (path / RUN_NAME).is_file():
        raise ConfigError(f"{path} is a checkpoint of a training and is not replaced; move it")
    if path.is_dir() and any(path.iterdir()):
        try:
            detect_format(path)
        except AdapterFormatError as error:
            raise ConfigError(f"{path} holds no adapter and is not replaced; {error}") from error
