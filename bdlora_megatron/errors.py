"""The errors this package raises.

```
BDLoRAError
├── ConfigError            (ValueError)           a setting is wrong, or two disagree
├── ShapeError             (ValueError)           a tensor or model has the wrong shape
├── AdapterFormatError     (ValueError)           a file is no adapter, or more than we represent
├── UnsupportedError       (NotImplementedError)  a clear request that cannot be carried out
├── MissingDependencyError (ImportError)          an optional extra is needed
├── TargetError            (LookupError)          a target pattern matches no module
├── AdapterNotFoundError   (LookupError)          no adapter is registered under that name
├── AdapterLoadError       (RuntimeError)         a registered adapter could not be loaded
└── CapacityError          (RuntimeError)         something does not fit the room made for it
```

Every message says what was wrong, what was found, what was wanted and what to do.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

__all__ = [
    "AdapterFormatError",
    "AdapterLoadError",
    "AdapterNotFoundError",
    "BDLoRAError",
    "CapacityError",
    "ConfigError",
    "MissingDependencyError",
    "ShapeError",
    "TargetError",
    "UnsupportedError",
    "explain",
    "nearest",
]


class BDLoRAError(Exception):
    """The root of every error that this package raises on purpose.

    Attributes:
        causes: What the message lists, without the names that have it; empty where it is no list.
    """

    causes: tuple[str, ...] = ()


class ConfigError(BDLoRAError, ValueError):
    """A setting is wrong by itself, or two settings disagree."""


class ShapeError(BDLoRAError, ValueError):
    """A tensor or a model does not have the shape that is needed."""


class AdapterFormatError(BDLoRAError, ValueError):
    """A file cannot be read as an adapter, or holds what cannot be represented."""


class UnsupportedError(BDLoRAError, NotImplementedError):
    """The request is clear, and this package cannot carry it out."""


class MissingDependencyError(BDLoRAError, ImportError):
    """An optional dependency is needed; the message names the extra to install."""


class TargetError(BDLoRAError, LookupError):
    """A target pattern matches no module of the model."""


class AdapterNotFoundError(BDLoRAError, LookupError):
    """No adapter is registered under that name, or not any more."""


class AdapterLoadError(BDLoRAError, RuntimeError):
    """A registered adapter could not be loaded; the message says on which rank and why."""


class CapacityError(BDLoRAError, RuntimeError):
    """Something does not fit the room that was made for it; the message says what to set."""


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or else all of them."""
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def explain(error: BaseException, where: Path | None = None) -> str:
    """An error's message, as a sentence also where the operating system gives a word.

    Args:
        error: Any error.
        where: What was read or written, where the error does not name it.

    Returns:
        The message.
    """
    if not isinstance(error, OSError) or isinstance(error, BDLoRAError):
        return str(error)
    path = error.filename or where or "the file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"there is no room left for {path}; make room, or write to another disk"
    if error.errno == errno.EFBIG:
        return f"{path} became larger than files may be here; raise the limit (ulimit -f)"
    if error.errno == errno.EROFS:
        return f"{path} is on a read-only file system; write to another place"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not read or write {path}; change its permissions, or use another"
    return str(error)
