"""Which adapters the arguments of `bdlora convert` mean."""

from __future__ import annotations

import os
from pathlib import Path

from bdlora_megatron.convert.registry import detect_format
from bdlora_megatron.errors import AdapterFormatError, ConfigError

__all__ = ["find_sources"]


def find_sources(arguments: list[Path]) -> list[Path]:
    """Every adapter's folder, in order.

    Args:
        arguments: Folders of adapters, and folders of such folders.

    Returns:
        Absolute paths. Of a folder of folders all are taken, but for hidden ones: one that turns
        out to be no adapter is told when it is read.

    Raises:
        ConfigError: If an argument is neither, or two adapters have the same name. All are listed.
    """
    sources: list[Path] = []
    problems: list[str] = []
    for argument in arguments:
        path = Path(os.path.abspath(argument))
        try:
            detect_format(path)
        except AdapterFormatError as error:
            inside = _adapters_in(path)
            if not any(map(_is_adapter, inside)):
                problems.append(str(error))
            sources += inside
        else:
            sources.append(path)
    problems += _same_names(sources)
    if problems:
        raise ConfigError("\n".join(problems))
    return sources


def _adapters_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _is_adapter(path: Path) -> bool:
    try:
        detect_format(path)
    except AdapterFormatError:
        return False
    return True


def _same_names(sources: list[Path]) -> list[str]:
    by_name: dict[str, list[Path]] = {}
    for source in sources:
        by_name.setdefault(source.name, []).append(source)
    return [
        f"{len(paths)} adapters are named {name!r} and would be written to one folder: "
        f"{', '.join(map(str, paths))}; rename one, or convert them into two folders"
        for name, paths in by_name.items()
        if len(paths) > 1
    ]
