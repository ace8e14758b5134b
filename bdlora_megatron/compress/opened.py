"""Adapters that a process keeps open, so that their headers are not read for every module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.compress.sources import Source
from bdlora_megatron.convert.adapter import Adapter, ModuleKey

__all__ = ["OpenAdapters"]

#: Each takes a file handle and, of a large model, some hundred kilobytes for its facts.
_MOST = 200


class OpenAdapters:
    """A collection's adapters by number, the most recently used ones open."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._open: OrderedDict[int, tuple[ExitStack, Adapter]] = OrderedDict()

    def module(self, number: int, key: ModuleKey) -> BlockFactors:
        """Read a module of an adapter.

        Args:
            number: The adapter's place among the sources.
            key: The module.

        Raises:
            AdapterFormatError: If it cannot be read any more.
        """
        if number not in self._open:
            if len(self._open) >= _MOST:
                _, (oldest, _) = self._open.popitem(last=False)
                oldest.close()
            stack = ExitStack()
            self._open[number] = (stack, stack.enter_context(self._sources[number].open()))
        self._open.move_to_end(number)
        return self._open[number][1].modules[key]

    def close(self) -> None:
        """Close all."""
        while self._open:
            _, (stack, _) = self._open.popitem()
            stack.close()
