"""Choosing layers by name, with the wildcards that NeMo and Megatron-Bridge take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from bdlora_megatron.errors import TargetError

__all__ = ["TargetMatcher"]


class TargetMatcher:
    """Which full module names a list of patterns selects, and which patterns selected nothing.

    A pattern without ``*`` is a layer's own name (``linear_qkv``) or a full name; with ``*`` it is
    matched against the whole full name (``*.layers.0.*.linear_qkv``).
    """

    def __init__(self, targets: Sequence[str], exclude: Sequence[str] = ()) -> None:
        self._targets = tuple(targets)
        self._exclude = tuple(exclude)
        self._unused = set(targets) | set(exclude)

    def matches(self, full_name: str) -> bool:
        """Whether a layer is selected; remembers which patterns were of use."""
        wanted = self._hits(self._targets, full_name)
        unwanted = self._hits(self._exclude, full_name)
        return wanted and not unwanted

    def _hits(self, patterns: tuple[str, ...], full_name: str) -> bool:
        hits = [pattern for pattern in patterns if _fits(pattern, full_name)]
        self._unused.difference_update(hits)
        return bool(hits)

    @property
    def unused(self) -> list[str]:
        """Patterns that have matched nothing so far, in the order given."""
        return [name for name in (*self._targets, *self._exclude) if name in self._unused]

    def check_all_used(
        self, candidates: Iterable[str], unused: Sequence[str] | None = None
    ) -> None:
        """Refuse patterns that matched nothing, since a misspelt name would pass for a choice.

        Args:
            candidates: The full names that could have been matched.
            unused: Patterns that matched nothing anywhere; this matcher's own when unset.

        Raises:
            TargetError: A pattern matched nothing; the nearest names are given.
        """
        unused = self.unused if unused is None else unused
        if not unused:
            return
        names = sorted({name.rpartition(".")[2] for name in candidates})
        near = {p: get_close_matches(p.rpartition(".")[2], names, n=1) for p in unused}
        hints = [f"{p!r} (nearest: {n[0]!r})" if n else repr(p) for p, n in near.items()]
        raise TargetError(
            f"target pattern matches no layer that can carry an adapter: {', '.join(hints)}; "
            f"layers here: {names}; wildcards match whole names, such as '*.layers.0.*.linear_qkv'"
        )


def _fits(pattern: str, full_name: str) -> bool:
    if "*" not in pattern:
        return pattern in (full_name, full_name.rpartition(".")[2])
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), full_name) is not None
