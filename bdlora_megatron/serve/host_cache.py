"""What is kept in host memory, and what has to go first: plain bookkeeping, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from bdlora_megatron.errors import CapacityError

__all__ = ["HostCache"]

Value = TypeVar("Value")


class HostCache(Generic[Value]):
    """Values by key within a number of bytes; the least recently used go first.

    Room is reserved before a value is read, so that the bound holds while it is being read.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        # In order of last use. A reservation holds None.
        self._entries: dict[Hashable, tuple[int, Value | None]] = {}
        self._pinned: set[Hashable] = set()
        self.used_bytes = 0
        self.evictions = 0

    def __contains__(self, key: Hashable) -> bool:
        """Whether there is a value, not a mere reservation."""
        return self._entries.get(key, (0, None))[1] is not None

    def __len__(self) -> int:
        """Values, without reservations."""
        return sum(value is not None for _, value in self._entries.values())

    def reserve(
        self, key: Hashable, num_bytes: int, *, keep: Callable[[Hashable], bool] = lambda _: False
    ) -> bool:
        """Make room for a value to come, dropping others if need be.

        Args:
            key: A key that has neither a value nor a reservation.
            num_bytes: Its size at most.
            keep: Which of the others stay, as pinned ones do.

        Returns:
            Whether there is room now; if not, nothing was dropped.

        Raises:
            CapacityError: There would be no room in an empty cache.
        """
        assert key not in self._entries, f"{key!r} is cached already"
        if num_bytes > self.capacity_bytes:
            raise CapacityError(
                f"{key} may take {num_bytes} bytes of host memory, and the cache holds "
                f"{self.capacity_bytes}; set host_cache_bytes={num_bytes} or more"
            )
        going, capacity = [], self.capacity_bytes - self.used_bytes
        for other in self._unpinned():
            if capacity >= num_bytes:
                break
            if not keep(other):
                going.append(other)
                capacity += self._entries[other][0]
        if capacity < num_bytes:
            return False
        for other in going:
            self.drop(other)
            self.evictions += 1
        self._entries[key] = (num_bytes, None)
        self.used_bytes += num_bytes
        return True

    def could_hold(self, num_bytes: int) -> bool:
        """Whether there would be room once everything that is not pinned has gone."""
        going = sum(self._entries[key][0] for key in self._unpinned())
        return self.capacity_bytes - self.used_bytes + going >= num_bytes

    def fill(self, key: Hashable, num_bytes: int, value: Value) -> None:
        """Put a value in the place reserved for it, which shrinks to the value's size."""
        reserved, _ = self._entries.pop(key)
        assert num_bytes <= reserved, f"{key!r}: {num_bytes} bytes in a place of {reserved}"
        self._entries[key] = (num_bytes, value)
        self.used_bytes += num_bytes - reserved

    def get(self, key: Hashable) -> Value | None:
        """The value, which now counts as just used."""
        if key not in self:
            return None
        self._entries[key] = self._entries.pop(key)
        return self._entries[key][1]

    def drop(self, key: Hashable) -> None:
        """Forget a value or a reservation, if there is one."""
        size, _ = self._entries.pop(key, (0, None))
        self._pinned.discard(key)
        self.used_bytes -= size

    def pin(self, key: Hashable, *, pinned: bool = True) -> None:
        """Keep a value until it is dropped by name, or let it go again."""
        (self._pinned.add if pinned else self._pinned.discard)(key)

    def _unpinned(self) -> list[Hashable]:
        """The values that may go, least recently used first."""
        entries = self._entries.items()
        return [key for key, (_, value) in entries if value is not None and key not in self._pinned]
