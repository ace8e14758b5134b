"""Folders that appear under their name complete or not at all, also when the process is killed."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bdlora_megatron.errors import ConfigError

__all__ = ["new_folder"]


@contextmanager
def new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Fill a folder beside `path`, and rename it to `path` when all is well.

    What a killed process left behind for the same path is removed first.

    Args:
        path: The folder to make; missing parents are made too.
        overwrite: Replace what is there. The caller has made sure that it is an adapter.

    Raises:
        ConfigError: If there is something at `path` and `overwrite` is off. It is left as it is.
    """
    _check_free(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=".partial", dir=path.parent))
    handle = os.open(partial, os.O_RDONLY)
    try:
        # Says that a living process fills this folder; the lock ends with the process.
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield partial
        # mkdtemp makes folders private; an adapter is as readable as what a plain mkdir makes.
        partial.chmod(0o777 & ~_umask())
        _move(partial, path, overwrite=overwrite)
    finally:
        os.close(handle)
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def held_alone(path: Path, refusal: str) -> Iterator[None]:
    """Hold a file or folder that one process at a time may; the lock ends with the process.

    Args:
        path: What to hold; it is there.
        refusal: What to say where another process holds it.

    Raises:
        ConfigError: Another does.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(refusal) from None
        yield
    finally:
        os.close(handle)


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _umask() -> int:
    # There is no way to read it but to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_free(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        return not any(path.iterdir())
    return not (path.exists() or path.is_symlink())


def _check_free(path: Path, *, overwrite: bool) -> None:
    if not _is_free(path) and not overwrite:
        raise ConfigError(
            f"{path} is there already and is left as it is; pass another path, or "
            "--overwrite (WriteOptions(overwrite=True))"
        )


def _move(partial: Path, path: Path, *, overwrite: bool) -> None:
    _check_free(path, overwrite=overwrite)
    old = partial.with_suffix(".old")
    if not _is_free(path):
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(path: Path) -> None:
    """Remove the folders of dead processes, which nobody has locked.

    A `.old` folder stays if there is no new one in its place: it is then the only copy.
    """
    leftovers = list(path.parent.glob(f"{glob.escape(_prefix(path))}*.partial"))
    if not _is_free(path):
        leftovers += path.parent.glob(f"{glob.escape(_prefix(path))}*.old")
    for folder in leftovers:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
