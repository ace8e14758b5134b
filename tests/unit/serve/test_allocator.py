"""Slots under random schedules: who goes, who stays, and that rows never overlap."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bdlora_megatron.errors import AdapterNotFoundError, CapacityError, ConfigError
from bdlora_megatron.serve import SlotAllocator

NUM_SLOTS, MAX_ROWS = 4, 5
KEYS = st.integers(0, 7)


class Schedule(RuleBasedStateMachine):
    """an allocator beside what a reader of its documentation would expect of it."""

    rows = 13  # Fewer than four of five: adapters share them.

    def __init__(self):
        super().__init__()
        self.allocator = SlotAllocator(NUM_SLOTS, rows=self.rows, max_rows=MAX_ROWS)
        self.uses, self.pinned, self.places = {}, set(), {}
        self.order = []  # Least recently used first.

    def idle(self):
        return [k for k in self.order if not self.uses[k] and k not in self.pinned]

    def touch(self, key):
        self.order.remove(key)
        self.order.append(key)

    @rule(key=KEYS, rows=st.integers(1, MAX_ROWS))
    def place(self, key, rows):
        if key in self.places:
            return
        before, idle = dict(self.places), self.idle()
        place = self.allocator.place(key, rows)
        if place is None:
            assert not self.would_fit([self.places[k] for k in before if k not in idle], rows)
            return
        by_slot = {slot: k for k, (slot, _, _) in before.items()}
        gone = [by_slot[slot] for slot in place.evicted]
        assert gone == idle[: len(gone)], "the least recently used go first"
        if gone:
            stay = [self.places[k] for k in before if k not in gone[:-1]]
            assert not self.would_fit(stay, rows), "no more go than must"
        for k in gone:
            self.forget(k)
        self.places[key] = (place.slot, place.first_row, rows)
        self.uses[key] = 0
        self.order.append(key)

    def would_fit(self, stay, rows):
        if len({slot for slot, _, _ in stay}) == NUM_SLOTS:
            return False
        taken = {row for _, first, count in stay for row in range(first, first + count)}
        starts = range(self.rows - rows + 1)
        return any(taken.isdisjoint(range(start, start + rows)) for start in starts)

    def forget(self, key):
        self.order.remove(key)
        self.pinned.discard(key)
        del self.places[key], self.uses[key]

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def acquire(self, data):
        key = data.draw(st.sampled_from(sorted(self.places)))
        assert self.allocator.acquire(key) == self.places[key][0]
        self.uses[key] += 1
        self.touch(key)

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def release(self, data):
        key = data.draw(st.sampled_from(sorted(self.places)))
        if self.uses[key]:
            self.allocator.release(key)
            self.uses[key] -= 1
            self.touch(key)
        else:
            with pytest.raises(ConfigError, match="not in use"):
                self.allocator.release(key)

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def use_soon(self, data):
        key = data.draw(st.sampled_from(sorted(self.places)))
        self.allocator.touch(key)
        self.touch(key)

    @precondition(lambda self: self.places)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data, pinned):
        key = data.draw(st.sampled_from(sorted(self.places)))
        self.allocator.pin(key, pinned=pinned)
        (self.pinned.add if pinned else self.pinned.discard)(key)

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def evict(self, data):
        key = data.draw(st.sampled_from(sorted(self.places)))
        if key in self.idle():
            assert self.allocator.evict(key) == self.places[key][0]
            self.forget(key)
        else:
            with pytest.raises(CapacityError, match=r"in use|pinned"):
                self.allocator.evict(key)

    @invariant()
    def everything_is_where_it_was(self):
        assert self.allocator.keys == tuple(self.order)
        assert self.allocator.available == NUM_SLOTS - len(self.places) + len(self.idle())
        taken = set()
        for key, (slot, first, rows) in self.places.items():
            assert self.allocator.slot(key) == slot
            assert self.allocator.rows_of(key) == (first, rows)
            assert self.allocator.uses(key) == self.uses[key]
            own = set(range(first, first + rows))
            assert taken.isdisjoint(own)
            assert max(own) < self.rows
            taken |= own
        assert len({slot for slot, _, _ in self.places.values()}) == len(self.places)


class RoomForAll(Schedule):
    """With the most rows for each slot, a free or idle slot is all that it takes."""

    rows = NUM_SLOTS * MAX_ROWS

    def would_fit(self, stay, rows):
        return len(stay) < NUM_SLOTS


TestSharedRows = Schedule.TestCase
TestRoomForAll = RoomForAll.TestCase
TestSharedRows.settings = TestRoomForAll.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)


def test_refusals():
    with pytest.raises(ConfigError, match="num_slots=0"):
        SlotAllocator(0, rows=3, max_rows=3)
    with pytest.raises(ConfigError, match="make room for one"):
        SlotAllocator(2, rows=2, max_rows=3)
    allocator = SlotAllocator(2, rows=6, max_rows=3)
    with pytest.raises(CapacityError, match="raise max_rank"):
        allocator.place("a", 4)
    with pytest.raises(AdapterNotFoundError, match="in no slot"):
        allocator.acquire("a")
