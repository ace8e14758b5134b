"""Which adapters the arguments of a command mean."""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bdlora_megatron.cli import output
from bdlora_megatron.convert.adapter import Adapter
from bdlora_megatron.convert.pipeline import open_fitting
from bdlora_megatron.convert.registry import detect_format
from bdlora_megatron.errors import AdapterFormatError, ConfigError
from bdlora_megatron.models.config import HFConfig, read_hf_config

__all__ = ["Source", "add_reading_options", "base_config", "find_sources", "holds_many", "opened"]

_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One adapter to look at.

    Attributes:
        path: Its folder, absolute.
        name: Its name; of a PEFT folder's second adapter `<folder>.<adapter>`.
    """

    path: Path
    name: str


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how adapters are read, the same for every command."""
    parser.add_argument(
        "--base",
        metavar="HF_DIR",
        type=Path,
        help="folder with the base model's config.json, which every adapter must fit; where its "
        "weights are there too, copies of them in an adapter are dropped",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickles too, tensors only"
    )
    parser.add_argument(
        "--ignore-unknown",
        metavar="KEY",
        action="append",
        default=[],
        help="an unknown option of adapter_config.json that changes no update (repeatable)",
    )


@contextmanager
def opened(path: Path, arguments: argparse.Namespace) -> Iterator[Adapter]:
    """Open an adapter as the options say.

    Yields:
        The adapter, which fits the base model if one was given.
    """
    base = None if arguments.base is None else base_config(arguments.base)
    with open_fitting(
        path,
        base,
        allow_pickle=arguments.allow_pickle,
        base_folder=arguments.base,
        ignore_unknown=arguments.ignore_unknown,
    ) as adapter:
        yield adapter


@functools.cache
def base_config(folder: Path) -> HFConfig:
    """The base model's config, read once for all adapters."""
    return read_hf_config(folder)


def find_sources(arguments: list[Path]) -> list[Source]:
    """Every adapter, in order.

    Args:
        arguments: Folders of adapters, and folders of such folders.

    Returns:
        The adapters. Of a folder of folders all are taken, but for hidden ones: one that turns out
        to be no adapter is told when it is read. Of a folder that PEFT saved several adapters into,
        each is taken.

    Raises:
        ConfigError: If an argument is neither, or two adapters have the same name. All are listed.
    """
    sources: list[Source] = []
    problems: list[str] = []
    for argument in arguments:
        path = Path(os.path.abspath(argument))
        why = _why_not(path)
        if why is None:
            sources += _adapters_at(path)
            continue
        inside = _folders_in(path)
        if all(map(_why_not, inside)):
            problems.append(why)
        for folder in inside:
            sources += _adapters_at(folder)
    problems += _same_names(sources)
    if problems:
        raise ConfigError("\n".join(problems))
    return sources


def holds_many(path: Path) -> bool:
    """Whether an argument means more than one adapter.

    Returns:
        False also where it is no adapter at all.
    """
    path = Path(os.path.abspath(path))
    if _why_not(path) is None:
        return len(list(_adapters_at(path))) > 1
    return not all(map(_why_not, _folders_in(path)))


def _adapters_at(path: Path) -> Iterator[Source]:
    """The folder itself, and what PEFT's `save_pretrained` put below it for other adapters."""
    yield Source(path=path, name=path.name)
    if _why_not(path) is not None or detect_format(path) != "peft":
        return
    checkpoints = []
    for folder in _folders_in(path):
        if _why_not(folder) is not None or detect_format(folder) != "peft":
            continue
        if _CHECKPOINT.fullmatch(folder.name):
            checkpoints.append(folder.name)
        else:
            yield Source(path=folder, name=f"{path.name}.{folder.name}")
    if checkpoints:
        output.note(
            f"{path} also holds {len(checkpoints)} checkpoints of the training, such as "
            f"{checkpoints[0]}; they are left out: pass one by its own path"
        )


def _folders_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _why_not(path: Path) -> str | None:
    """Why a folder is no adapter; None if it is one."""
    try:
        detect_format(path)
    except AdapterFormatError as error:
        return str(error)
    return None


def _same_names(sources: list[Source]) -> list[str]:
    by_name: dict[str, list[Path]] = {}
    for source in sources:
        by_name.setdefault(source.name, []).append(source.path)
    return [
        f"{len(paths)} adapters are named {name!r} and would be written to one folder: "
        f"{', '.join(map(str, paths))}; rename one, or convert them into two folders"
        for name, paths in by_name.items()
        if len(paths) > 1
    ]
