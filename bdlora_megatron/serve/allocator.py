"""Which adapter is in which slot: plain bookkeeping, the same on every rank.

All decisions follow from the sequence of calls alone, so ranks that make the same calls in the same
order decide alike without asking each other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from bdlora_megatron.errors import AdapterNotFoundError, CapacityError, ConfigError

__all__ = ["Placement", "SlotAllocator"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where an adapter was put.

    Attributes:
        slot: Its slot.
        first_row: Its first row in the pools.
        evicted: The slots that were emptied for it, in order; ``slot`` may be one of them.
    """

    slot: int
    first_row: int
    evicted: tuple[int, ...]


@dataclass(slots=True)
class _Resident:
    slot: int
    first_row: int
    rows: int
    uses: int = 0
    pinned: bool = False

    @property
    def idle(self) -> bool:
        return not (self.uses or self.pinned)


class SlotAllocator:
    """Slots, the pool rows behind them, who uses them, and who has to go first.

    Adapters share the rows: one of few ranks takes few. Where there are ``max_rows`` for every
    slot, each slot has rows of its own instead, so that no gap can be too small. An adapter in use
    or pinned stays where it is; of the others the least recently used goes first.
    """

    def __init__(self, num_slots: int, *, rows: int, max_rows: int) -> None:
        """Start with empty slots.

        Args:
            num_slots: How many adapters fit at once, at most.
            rows: Rows of the pools, shared by the slots.
            max_rows: The most rows that one adapter takes.

        Raises:
            ConfigError: Not even one adapter would fit.
        """
        if min(num_slots, max_rows) < 1:
            raise ConfigError(f"num_slots={num_slots}, max_rows={max_rows}; both are at least 1")
        if rows < max_rows:
            raise ConfigError(f"{rows} rows for adapters of up to {max_rows}; make room for one")
        self.num_slots = num_slots
        self.rows = rows
        self.max_rows = max_rows
        self._fixed = rows >= num_slots * max_rows
        # In order of last use.
        self._residents: dict[Hashable, _Resident] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """The adapters in slots, least recently used first."""
        return tuple(self._residents)

    @property
    def available(self) -> int:
        """Slots that are empty or hold an adapter that may go."""
        return self.num_slots - sum(not held.idle for held in self._residents.values())

    def slot(self, key: Hashable) -> int:
        """The slot of a resident adapter."""
        return self._resident(key).slot

    def rows_of(self, key: Hashable) -> tuple[int, int]:
        """First row and number of rows of a resident adapter."""
        held = self._resident(key)
        return held.first_row, held.rows

    def uses(self, key: Hashable) -> int:
        """How often an adapter is in use now; 0 where it is in no slot."""
        held = self._residents.get(key)
        return 0 if held is None else held.uses

    def place(self, key: Hashable, rows: int) -> Placement | None:
        """Find a slot and rows, emptying as many idle slots as that takes.

        Args:
            key: An adapter that is in no slot.
            rows: Pool rows that it takes.

        Returns:
            Where it goes, now taken and not yet in use; None if what is in use leaves no room, and
            then nothing was emptied.

        Raises:
            CapacityError: It would not fit an empty pool.
        """
        if not 0 < rows <= self.max_rows:
            raise CapacityError(f"{rows} rows, wanted 1 to {self.max_rows}; raise max_rank")
        assert key not in self._residents, f"{key!r} is in a slot already"
        idle = [held for held, resident in self._residents.items() if resident.idle]
        for count in range(len(idle) + 1):
            gone = idle[:count]
            stay = [held for name, held in self._residents.items() if name not in gone]
            place = self._find(stay, rows)
            if place is None:
                continue
            slots = tuple(self._residents.pop(name).slot for name in gone)
            self._residents[key] = _Resident(*place, rows)
            return Placement(slot=place[0], first_row=place[1], evicted=slots)
        return None

    def touch(self, key: Hashable) -> None:
        """Count a resident adapter as just used."""
        self._resident(key)
        self._residents[key] = self._residents.pop(key)

    def acquire(self, key: Hashable) -> int:
        """Count one more use of a resident adapter, and give its slot."""
        self.touch(key)
        held = self._residents[key]
        held.uses += 1
        return held.slot

    def release(self, key: Hashable) -> None:
        """Count one use less.

        Raises:
            ConfigError: It was not in use: more releases than acquires.
        """
        held = self._resident(key)
        if not held.uses:
            raise ConfigError(f"release of {key!r}, which is not in use; release once per acquire")
        held.uses -= 1
        self.touch(key)

    def pin(self, key: Hashable, *, pinned: bool = True) -> None:
        """Keep a resident adapter in its slot, or let it go again."""
        self._resident(key).pinned = pinned

    def evict(self, key: Hashable) -> int:
        """Empty one slot.

        Returns:
            The slot.

        Raises:
            CapacityError: The adapter is in use or pinned.
        """
        held = self._resident(key)
        if not held.idle:
            why = f"in use {held.uses} times" if held.uses else "pinned"
            raise CapacityError(f"{key!r} is {why}; release or unpin it first")
        return self._residents.pop(key).slot

    def _resident(self, key: Hashable) -> _Resident:
        held = self._residents.get(key)
        if held is None:
            raise AdapterNotFoundError(f"{key!r} is in no slot; load it first")
        return held

    def _find(self, stay: Iterable[_Resident], rows: int) -> tuple[int, int] | None:
        """The lowest free slot and the smallest gap that fits, beside those who stay."""
        stay = list(stay)
        taken = {held.slot for held in stay}
        slot = next((slot for slot in range(self.num_slots) if slot not in taken), None)
        if slot is None:
            return None
        if self._fixed:
            return slot, slot * self.max_rows
        ends = sorted((held.first_row, held.first_row + held.rows) for held in stay)
        starts = [0, *(end for _, end in ends)]
        stops = [*(start for start, _ in ends), self.rows]
        gaps = [
            (stop - start, start)
            for start, stop in zip(starts, stops, strict=True)
            if stop - start >= rows
        ]
        return (slot, min(gaps)[1]) if gaps else None
