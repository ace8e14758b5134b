"""The host cache under random schedules: never over its bytes, the longest unused go first."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bdlora_megatron.errors import CapacityError
from bdlora_megatron.serve import HostCache

CAPACITY = 20


class Schedule(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.cache = HostCache(CAPACITY)
        self.sizes, self.values, self.pinned, self.order = {}, {}, set(), []

    @rule(key=st.integers(0, 7), size=st.integers(1, 9))
    def reserve(self, key, size):
        if key in self.sizes:
            return
        going, capacity = [], CAPACITY - sum(self.sizes.values())
        for other in self.order:
            if capacity < size and other in self.values and other not in self.pinned:
                going.append(other)
                capacity += self.sizes[other]
        assert self.cache.reserve(key, size) == (capacity >= size)
        if capacity < size:
            return
        for other in going:
            self.forget(other)
        self.sizes[key] = size
        self.order.append(key)

    def forget(self, key):
        del self.sizes[key]
        self.values.pop(key, None)
        self.pinned.discard(key)
        self.order.remove(key)

    @precondition(lambda self: set(self.sizes) - set(self.values))
    @rule(data=st.data())
    def fill(self, data):
        key = data.draw(st.sampled_from(sorted(set(self.sizes) - set(self.values))))
        self.sizes[key] = data.draw(st.integers(1, self.sizes[key]))
        self.values[key] = object()
        self.cache.fill(key, self.sizes[key], self.values[key])
        self.order.remove(key)
        self.order.append(key)

    @rule(key=st.integers(0, 7))
    def get(self, key):
        assert self.cache.get(key) is self.values.get(key)
        if key in self.values:
            self.order.remove(key)
            self.order.append(key)

    @rule(key=st.integers(0, 7))
    def drop(self, key):
        self.cache.drop(key)
        if key in self.sizes:
            self.forget(key)

    @precondition(lambda self: self.values)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data, pinned):
        key = data.draw(st.sampled_from(sorted(self.values)))
        self.cache.pin(key, pinned=pinned)
        (self.pinned.add if pinned else self.pinned.discard)(key)

    @invariant()
    def counts(self):
        assert self.cache.used_bytes == sum(self.sizes.values()) <= CAPACITY
        assert len(self.cache) == len(self.values)
        assert all((key in self.cache) == (key in self.values) for key in range(8))


TestHostCache = Schedule.TestCase
TestHostCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_would_never_fit_is_refused_with_what_to_set():
    with pytest.raises(CapacityError, match="set host_cache_bytes=21 or more"):
        HostCache(CAPACITY).reserve("a", 21)
