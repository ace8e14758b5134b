"""PEFT's patterns of module paths, matched within a time limit: they are regexes from strangers."""

from __future__ import annotations

import functools
import importlib.util
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bdlora_megatron.errors import AdapterFormatError

__all__ = ["Patience", "first_match", "why_unsafe"]

_LONGEST = 1 << 16
# A path has at most 128 characters: a repeat has as many ends to try, an alternation its branches.
_PATH, _QUICK = 128.0, 1e6


@dataclass(slots=True)
class Patience:
    """How long one config's patterns may still be matched.

    Attributes:
        seconds: The time left.
    """

    seconds: float = 3.0


def first_match(
    patterns: Mapping[str, float], path: str, default: float, patience: Patience
) -> float:
    """The value of the first pattern that matches the end of a path, as PEFT chooses it.

    Args:
        patterns: Values by pattern.
        path: A module's path in the base model.
        default: The value where none matches.
        patience: The time left, from which the time taken is subtracted.

    Raises:
        AdapterFormatError: If no time is left.
    """
    for pattern, value in patterns.items():
        start = time.perf_counter()
        try:
            found = _matches(pattern, path, patience.seconds)
        except TimeoutError:
            found = False
        patience.seconds -= time.perf_counter() - start
        if patience.seconds <= 0:
            raise AdapterFormatError(
                "matching the patterns of adapter_config.json against the modules takes too long; "
                "name the modules more plainly"
            )
        if found:
            return value
    return default


def why_unsafe(pattern: str) -> str | None:
    """Why a pattern cannot be used, if so.

    Returns:
        The end of a sentence about it; None for a good one.
    """
    if len(pattern) > _LONGEST:
        return f"has {len(pattern)} characters, more than {_LONGEST}"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    if not _is_quick(pattern) and _interruptible() is None:
        return (
            "may match for years, and the package that stops in time is missing; "
            "pip install 'bdlora-megatron[convert]'"
        )
    return None


def _is_quick(pattern: str) -> bool:
    """Whether a bound on the ways to match it, from its characters alone, is small."""
    plain = re.sub(r"\\\d", "(", pattern)  # a back reference
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "_", re.sub(r"\\.", "_", plain))
    if re.search(r"\)[*+{]", plain):
        return False
    plain = plain.replace("(?", "(")
    groups = plain.count("(") + plain.count("?")
    branches = plain.count("|") + plain.count("?") + groups
    # Equal groups are the worst division of the branches.
    alternations: float = (branches / groups) ** groups if groups else branches + 1
    return alternations * _PATH ** len(re.findall(r"[*+{]", plain)) <= _QUICK


def _matches(pattern: str, path: str, seconds: float) -> bool:
    # As PEFT: the pattern stands for the end of the path.
    whole = rf"(.*\.)?({pattern})$"
    if _is_quick(pattern):
        return _compiled(whole).match(path) is not None
    module = _interruptible()
    assert module is not None, "why_unsafe has refused it"
    found: object = module.match(whole, path, timeout=max(seconds, 1e-3))
    return found is not None


# A config may name every module by itself, more than the re module keeps compiled.
@functools.lru_cache(maxsize=16384)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


@functools.cache
def _interruptible() -> Any:
    """The regex package, which matches as `re` does and takes a time limit; None if missing."""
    return importlib.import_module("regex") if importlib.util.find_spec("regex") else None
