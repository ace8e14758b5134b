"""Every adapter format by its name: what a folder holds, and its reader and writer.

A reader makes the neutral adapter, a writer takes it, and nothing converts from one format to
another directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from bdlora_megatron.convert.adapter import Adapter
from bdlora_megatron.convert.folders import new_folder
from bdlora_megatron.convert.lazy import in_memory
from bdlora_megatron.convert.peft_config import CONFIG_NAME
from bdlora_megatron.convert.peft_reader import open_peft
from bdlora_megatron.convert.peft_writer import write_peft
from bdlora_megatron.convert.write_options import WriteOptions, prepare
from bdlora_megatron.errors import AdapterFormatError, ConfigError

__all__ = [
    "FORMATS",
    "FormatName",
    "detect_format",
    "open_adapter",
    "read_adapter",
    "write_adapter",
]

FormatName: TypeAlias = Literal["peft", "megatron", "bridge", "slora"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Format:
    """One format.

    Attributes:
        sign: The file that tells a folder of this format.
        open: Opens a folder; the second argument allows pickles.
        write: Fills an empty folder.
    """

    sign: str
    open: Callable[[Path, bool], AbstractContextManager[Adapter]]
    write: Callable[[Adapter, Path, WriteOptions], None]


#: The first whose sign is there counts.
FORMATS: Mapping[FormatName, _Format] = {
    "peft": _Format(
        sign=CONFIG_NAME,
        open=lambda path, allow_pickle: open_peft(path, allow_pickle=allow_pickle),
        write=write_peft,
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
    if not folder.is_dir():
        raise AdapterFormatError(f"{folder} is no folder; pass the folder of an adapter")
    for name, kind in FORMATS.items():
        if next(folder.glob(kind.sign), None):
            return name
    signs = ", ".join(f"{kind.sign} ({name})" for name, kind in FORMATS.items())
    raise AdapterFormatError(
        f"{folder} is no adapter of a known format: looked for {signs}; pass the folder that holds "
        "one of these"
    )


@contextmanager
def open_adapter(
    path: str | Path, *, allow_pickle: bool = False, format: FormatName | None = None
) -> Iterator[Adapter]:
    """Open an adapter of any format, whatever its size.

    Args:
        path: The adapter's folder.
        allow_pickle: Also read files that are pickles, tensors and plain values only.
        format: Its format; told from its files when unset.

    Yields:
        The adapter. A module is read each time it is looked up, as long as the adapter is open, so
        that no more than that module is in memory. Shapes and scales are known without
        (`module_facts`).

    Raises:
        AdapterFormatError: If the files are missing or broken, or hold what cannot be represented.
            All such problems are listed, but for those that only a module's numbers tell: these
            are raised by the look-up.
        ConfigError: If there is no such format.
    """
    kind = _format(format or detect_format(path))
    with kind.open(Path(path), allow_pickle) as adapter:
        yield adapter


def read_adapter(
    path: str | Path, *, allow_pickle: bool = False, format: FormatName | None = None
) -> Adapter:
    """Read an adapter of any format.

    Args:
        path: The adapter's folder.
        allow_pickle: Also read files that are pickles, tensors and plain values only.
        format: Its format; told from its files when unset.

    Returns:
        The adapter, in memory of its own.
    """
    with open_adapter(path, allow_pickle=allow_pickle, format=format) as adapter:
        return in_memory(adapter)


def write_adapter(
    adapter: Adapter, path: str | Path, format: FormatName, *, options: WriteOptions | None = None
) -> Path:
    """Write an adapter, one module after the other.

    The folder appears complete or not at all, also if the process is killed on the way.

    Args:
        adapter: Lazy or in memory.
        path: The new folder.
        format: Its format.
        options: What else to do.

    Returns:
        The folder.

    Raises:
        AdapterFormatError: If there is nothing to write, or a module's numbers are not finite.
        ConfigError: If the path is taken by something that is not to be replaced, or there is no
            such format.
    """
    options = options or WriteOptions()
    kind = _format(format)
    path = Path(path).absolute()
    if options.overwrite:
        _check_replaceable(path)
    ready = prepare(adapter, options)
    with new_folder(path, overwrite=options.overwrite) as folder:
        kind.write(ready, folder, options)
    return path


def _format(name: FormatName) -> _Format:
    if name not in FORMATS:
        raise ConfigError(f"format={name!r} is unknown; wanted one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _check_replaceable(path: Path) -> None:
    """Replace adapters only: a mistyped path must not cost a home directory.

    Raises:
        ConfigError: If something else is there.
    """
    if path.is_symlink() or path.is_file():
        raise ConfigError(f"{path} is no folder and is not replaced; pass another path")
    if path.is_dir() and any(path.iterdir()):
        try:
            detect_format(path)
        except AdapterFormatError as error:
            raise ConfigError(f"{path} holds no adapter and is not replaced; {error}") from error
