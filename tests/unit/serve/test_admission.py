"""The queue as plain Python: order, slots and bounded waiting, under random and hostile loads."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlora_megatron.errors import AdapterLoadError, ConfigError
from bdlora_megatron.serve.engine.admission import Admission, Admitted, Refused, Take


class Slots:
    """Slots that load at once; what is idle goes, least recently used first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.uses: Counter[str] = Counter()
        self.order: list[str] = []
        self.loads = 0

    def is_resident(self, adapter: str) -> bool:
        return adapter in self.order

    def take(self, adapter: str) -> Take:
        if adapter not in self.order:
            idle = [a for a in self.order if not self.uses[a]]
            if len(self.order) == self.count:
                if not idle:
                    return Take.NO_SLOT
                self.order.remove(idle[0])
            self.loads += 1
        else:
            self.order.remove(adapter)
        self.order.append(adapter)
        self.uses[adapter] += 1
        return Take.TAKEN

    def release(self, adapter: str) -> None:
        self.uses[adapter] -= 1


def serve(admission: Admission, slots: Slots, arrivals, lengths, *, capacity: int, steps: int):
    """Run requests of so many steps each; returns the steps each waited."""
    running: dict[int, int] = {}
    adapters, arrived, waited = {}, {}, {}
    for step in range(steps):
        for request_id, adapter in arrivals(step):
            admission.add(request_id, adapter)
            adapters[request_id], arrived[request_id] = adapter, step
        for left in admission.admit(capacity - len(running), slots):
            assert isinstance(left, Admitted)
            assert left.adapter == adapters[left.request_id]
            waited[left.request_id] = step - arrived[left.request_id]
            running[left.request_id] = lengths(left.request_id)
        assert len(running) <= capacity
        for request_id in list(running):
            running[request_id] -= 1
            if not running[request_id]:
                del running[request_id]
                adapter = adapters[request_id]
                admission.finished(adapter)
                if adapter is not None:
                    slots.release(adapter)
    return waited, arrived, adapters


def test_requests_run_in_order_while_there_is_room():
    admission, slots = Admission(), Slots(4)
    for request_id, adapter in enumerate(["a", "c", "b", "a"]):
        admission.add(request_id, adapter)
    assert [left.request_id for left in admission.admit(3, slots)] == [0, 1, 2]
    assert [left.request_id for left in admission.admit(3, slots)] == [3]
    assert len(admission) == 0


def test_those_behind_a_request_without_a_slot_go_first():
    admission, slots = Admission(), Slots(1)
    for request_id, adapter in enumerate(["a", "b", "a", None]):
        admission.add(request_id, adapter)
    assert {left.request_id for left in admission.admit(9, slots)} == {0, 2, 3}
    assert 1 in admission


@pytest.mark.parametrize("length", [1, 7, 40])
def test_a_rare_adapter_waits_no_longer_than_patience_and_the_requests_that_run(length):
    """Two busy adapters ask again in every step for ever; the rare one still gets in."""
    patience, slots = 10, Slots(2)
    admission = Admission(patience=patience)

    def arrivals(step):
        yield 3 * step, "busy"
        yield 3 * step + 1, "busier"
        if step == 20:
            yield 3 * step + 2, "rare"

    waited, *_ = serve(
        admission, slots, arrivals, lambda _: length, capacity=3 * length, steps=40 + 4 * length
    )
    assert waited[62] <= patience + length + 1


def test_without_closing_the_rare_adapter_would_starve():
    """The same load with no patience at all: what the test above guards against is real."""
    admission, slots = Admission(patience=10**9), Slots(2)

    def arrivals(step):
        yield 3 * step, "busy"
        yield 3 * step + 1, "busier"
        if step == 20:
            yield 3 * step + 2, "rare"

    waited, *_ = serve(admission, slots, arrivals, lambda _: 7, capacity=21, steps=500)
    assert 62 not in waited


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), adapters=st.integers(1, 12))
def test_everyone_is_served_within_a_bound(seed, count, adapters):
    """Random loads whose sum the slots can carry: all run, and none waits beyond a bound."""
    rng = random.Random(seed)
    patience, longest, stop = 8, 6, 200
    admission, slots = Admission(patience=patience, lookahead=count), Slots(count)
    lengths = {}

    def arrivals(step):
        if step < stop and rng.random() < 0.3:
            request_id = step
            lengths[request_id] = rng.randint(1, longest)
            name = None if rng.random() < 0.2 else f"a{int(rng.paretovariate(1)) % adapters}"
            yield request_id, name

    waited, arrived, _ = serve(
        admission, slots, arrivals, lengths.__getitem__, capacity=8, steps=stop + 3000
    )
    assert set(waited) == set(arrived)
    # Each of the others that may be served first costs one slot for one run of the longest.
    assert max(waited.values(), default=0) <= patience + (adapters + 1) * (longest + patience)
    assert len(admission) == 0
    assert not admission.closed


def test_waiting_for_an_adapter_groups_its_requests():
    """Twenty alternating requests over two adapters and one slot: two loads, not twenty."""
    admission, slots = Admission(patience=1000), Slots(1)

    def arrivals(step):
        if step == 0:
            yield from ((i, "ab"[i % 2]) for i in range(20))

    waited, *_ = serve(admission, slots, arrivals, lambda _: 3, capacity=4, steps=200)
    assert len(waited) == 20
    assert slots.loads == 2


def test_one_adapter_takes_no_more_than_its_share():
    admission, slots = Admission(per_adapter=2), Slots(4)
    for request_id in range(5):
        admission.add(request_id, "a")
    admission.add(5, "b")
    assert [left.request_id for left in admission.admit(9, slots)] == [0, 1, 5]
    admission.finished("a")
    assert [left.request_id for left in admission.admit(9, slots)] == [2]


def test_an_adapter_that_fails_refuses_its_requests_and_no_others():
    admission = Admission()

    class Failing(Slots):
        def take(self, adapter):
            if adapter == "bad":
                raise AdapterLoadError("the disk is gone")
            return Take.TAKEN

    for request_id, adapter in enumerate(["bad", "good", "bad"]):
        admission.add(request_id, adapter)
    left = admission.admit(9, Failing(4))
    gone = ("the disk is gone", "AdapterLoadError")
    assert left == [Refused(0, *gone), Admitted(1, "good"), Refused(2, *gone)]
    assert len(admission) == 0


def test_loading_adapters_are_asked_for_a_few_at_a_time():
    admission, asked = Admission(lookahead=2), []

    class Loading(Slots):
        def take(self, adapter):
            asked.append(adapter)
            return Take.LOADING

    for request_id in range(6):
        admission.add(request_id, f"a{request_id // 2}")
    assert admission.admit(9, Loading(4)) == []
    assert asked == ["a0", "a1"]


def test_a_request_that_is_taken_back_closes_nothing():
    admission, slots = Admission(patience=1), Slots(1)
    admission.add(0, "a")
    admission.admit(9, slots)
    admission.add(1, "b")
    for _ in range(3):
        admission.admit(9, slots)
    assert admission.closed == {"a"}
    admission.remove(1)
    assert not admission.closed


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="patience=0"):
        Admission(patience=0)


def test_a_slot_that_was_cleared_waits_for_the_adapter_it_was_cleared_for():
    """The one that waits is being loaded again just then; another must not slip in."""

    class Reloading(Slots):
        loading = True

        def take(self, adapter):
            if adapter == "rare" and self.loading and not self.uses["busy"]:
                return Take.LOADING
            return super().take(adapter)

    admission, slots = Admission(patience=2), Reloading(1)
    admission.add(0, "busy")
    admission.admit(9, slots)
    admission.add(1, "rare")
    for _ in range(3):
        admission.admit(9, slots)
    assert admission.closed == {"busy"}
    admission.add(2, "young")
    admission.finished("busy")
    slots.release("busy")
    assert admission.admit(9, slots) == []
    slots.loading = False
    assert admission.admit(9, slots) == [Admitted(1, "rare")]
