"""Random schedules of registering, loading, failing, running and unloading on two ranks.

Hypothesis runs on both ranks at once with the same choices, which depend on nothing but a seed; a
rank that decided otherwise would be found by the comparison after each step. Each rank's reads wait
at a gate until the schedule opens it, so that it is the schedule that says which rank is ahead.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bdlora_megatron.convert import Adapter
from bdlora_megatron.errors import AdapterLoadError, AdapterNotFoundError
from bdlora_megatron.serve import AdapterStore, ModelSlots, SlotCapacity, StoreOptions
from bdlora_megatron.serve.engine.admission import Admission, Take
from tests.harness import run_ranks
from tests.tp.serving_cases import make_adapter, serving_model
from tests.tp.session import model_parallel

NAMES = ("a", "b", "c", "d", "e")
PROJ = ("o_proj",)
SLOTS, HOST = 2, 3
WAIT_S = 30.0


class _HalfWay(Mapping):
    """Modules that load on access, the last of which cannot be read."""

    def __init__(self, modules):
        self._modules = modules

    def __getitem__(self, key):
        if key == list(self._modules)[-1]:
            raise OSError("the disk went away")
        return self._modules[key]

    def __iter__(self):
        return iter(self._modules)

    def __len__(self):
        return len(self._modules)


def _source(gate, here, seed, adapter_rank, trouble):
    """Reads an adapter once its gate is open, with trouble on one rank alone."""

    def read():
        gate.wait(WAIT_S)
        adapter = make_adapter(seed, rank=adapter_rank, modules=PROJ)
        if not here or trouble == "none":
            return adapter
        if trouble == "other":
            return make_adapter(seed, rank=adapter_rank % 4 + 1, modules=PROJ)
        return Adapter(name=adapter.name, modules=_HalfWay(adapter.modules))

    return read


class Schedule(RuleBasedStateMachine):
    rank: int
    model: torch.nn.Module

    def __init__(self):
        super().__init__()
        capacity = SlotCapacity(
            max_loras=SLOTS,
            max_lora_rank=4,
            target_modules=("linear_proj",),
            lora_memory_bytes=4800,
        )
        self.slots = ModelSlots(self.model, capacity)
        # A thread for every load that host memory could have under way.
        options = StoreOptions(host_cache_bytes=HOST * self.slots.largest_bytes, threads=4 * HOST)
        self.store = AdapterStore(self.slots, options)
        self.seed = 0
        self.made = {}  # key -> (seed, rank, whether it will fail)
        self.gates = {}
        self.used = []  # one entry per use

    def teardown(self):
        self.open_all()
        self.store.close()
        self.slots.detach()

    @rule(
        name=st.sampled_from(NAMES),
        adapter_rank=st.integers(1, 4),
        trouble=st.sampled_from(["none", "none", "half", "other"]),
        on_rank=st.integers(0, 1),
    )
    def register(self, name, adapter_rank, trouble, on_rank):
        self.seed += 1
        gate = threading.Event()
        read = _source(gate, self.rank == on_rank, self.seed, adapter_rank, trouble)
        key = self.store.register(name, read)
        self.gates[key] = gate
        self.made[key] = (self.seed, adapter_rank, trouble in ("half", "other"))

    @precondition(lambda self: self.store.names)
    @rule(data=st.data())
    def unregister(self, data):
        self.store.unregister(data.draw(st.sampled_from(self.store.names)))

    @precondition(lambda self: self.store.names)
    @rule(data=st.data())
    def prefetch(self, data):
        self.store.prefetch(self.store.key(data.draw(st.sampled_from(self.store.names))))

    @precondition(lambda self: self.store._loading)
    @rule(data=st.data(), on_rank=st.integers(0, 1))
    def read_on_one_rank(self, data, on_rank):
        key = data.draw(st.sampled_from(self.store._loading))
        if self.rank == on_rank:
            self.gates[key].set()
            self.store._entries[key].load.wait(time.monotonic() + WAIT_S)

    @rule()
    def advance(self):
        self.store.advance()

    @rule()
    def wait_for_all(self):
        loading = list(self.store._loading)
        self.open_all()
        self.store.advance(wait_s=WAIT_S)
        assert not set(loading) & set(self.store._loading)

    def open_all(self):
        for key in self.store._loading:
            self.gates[key].set()
            self.store._entries[key].load.wait(time.monotonic() + WAIT_S)

    @invariant()
    def gates_close_behind_a_load(self):
        for key in set(self.gates) - set(self.store._loading):
            self.gates[key].clear()

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def acquire(self, data):
        key = data.draw(st.sampled_from(sorted(self.made)))
        if key.name not in self.store.names or self.store.key(key.name) != key:
            with pytest.raises(AdapterNotFoundError):
                self.store.acquire(key)
        elif self.store.error(key):
            assert self.made[key][2], "an adapter that can be read was loaded"
            with pytest.raises(AdapterLoadError, match="rank"):
                self.store.acquire(key)
        elif self.store.acquire(key) is not None:
            assert not self.made[key][2], "an adapter that cannot be read was not"
            self.used.append(key)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data):
        place = data.draw(st.integers(0, len(self.used) - 1))
        self.store.release(self.used.pop(place))

    @invariant()
    def ranks_decide_alike(self):
        store = self.store
        state = (
            [
                (k, self.slots.allocator.slot(k), *self.slots.allocator.rows_of(k))
                for k in self.keys()
            ],
            [(k, size, held is None) for k, (size, held) in store._host._entries.items()],
            store.host_bytes_used,
            store._loading,
            store._waiting,
            [(k, e.error, e.due, e.waiting, e.load is None) for k, e in store._entries.items()],
            store.stats,
        )
        every = [None, None]
        torch.distributed.all_gather_object(every, state)
        assert every[0] == every[1]
        assert store.host_bytes_used <= store.options.host_cache_bytes

    def keys(self):
        return self.slots.allocator.keys

    @invariant()
    def slots_in_use_hold_their_adapters(self):
        for key in set(self.used):
            assert self.store.uses(key) == self.used.count(key)
            seed, adapter_rank, _ = self.made[key]
            shard = self.slots.shard(make_adapter(seed, rank=adapter_rank, modules=PROJ))
            slot = self.slots.allocator.slot(key)
            for name, part in shard.layers.items():
                factors = self.slots.layers[name]._own.factors
                assert torch.equal(factors.a(slot, 0), part.A)
                assert torch.equal(factors.b(slot, 0), part.B[0])

    @invariant()
    def what_is_not_registered_is_gone(self):
        for key in self.keys():
            assert key in self.store._entries
        for key, entry in self.store._entries.items():
            assert entry.current or self.store.uses(key) or entry.load is not None


def _schedules(rank, world_size):
    with model_parallel(world_size):
        Schedule.rank, Schedule.model = rank, serving_model(world_size)
        run_state_machine_as_test(
            Schedule,
            settings=settings(
                max_examples=20,
                stateful_step_count=30,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_ranks_decide_alike_whatever_happens_on_one_of_them():
    run_ranks(2, _schedules)


# --- nobody starves --------------------------------------------------------------------------


class _Waiter:
    """Asks for one adapter in every step until it has it, then keeps it for some steps."""

    def __init__(self, key, arrives, runs):
        self.key, self.arrives, self.left = key, arrives, runs
        self.has_it = False

    def step(self, store, step):
        if step < self.arrives or not self.left:
            return
        if not self.has_it:
            self.has_it = store.acquire(self.key) is not None
            return
        self.left -= 1
        if not self.left:
            store.release(self.key)


def _serve_all(model, *, num_slots, capacity, adapter_ranks, seed):
    slots = ModelSlots(
        model, SlotCapacity(max_loras=num_slots, max_lora_rank=4, target_modules=("linear_proj",))
    )
    store = AdapterStore(slots, StoreOptions(host_cache_bytes=int(capacity * slots.largest_bytes)))
    keys = [
        store.register(f"a{i}", partial(make_adapter, i, rank=adapter_rank, modules=PROJ))
        for i, adapter_rank in enumerate(adapter_ranks)
    ]
    rng = random.Random(seed)
    waiters = [_Waiter(rng.choice(keys), rng.randint(0, 6), runs=2) for _ in range(8)]
    try:
        for step in range(600):
            store.advance(wait_s=WAIT_S if rng.random() < 0.5 else 0.0)
            if step % 3 == 0:
                # Nobody comes for what is only fetched ahead; it must not stand in the way.
                store.prefetch(keys[step % len(keys)])
            for waiter in rng.sample(waiters, len(waiters)):
                waiter.step(store, step)
            if not any(waiter.left for waiter in waiters):
                return
        raise AssertionError(f"{[str(w.key) for w in waiters if w.left]} starved")
    finally:
        store.close()
        slots.detach()


class _Queue:
    """What the engine's queue asks about adapters, answered by a store as the engine does."""

    def __init__(self, store):
        self.store = store

    def is_resident(self, adapter):
        return self.store.key(adapter) in self.store.slots.allocator

    def take(self, adapter):
        key = self.store.key(adapter)
        if self.store.acquire(key) is not None:
            return Take.TAKEN
        return Take.LOADING if self.store.is_loading(key) else Take.NO_SLOT


def _disturb(step, rng, store, admission, asked, sources):
    """What a step may bring: a request, one that leaves, a load ahead of need, a new version."""
    name = rng.choice(list(sources))
    if rng.random() < 0.5:
        asked[step] = name
        admission.add(step, name)
    if rng.random() < 0.2 and asked:
        left = rng.choice(list(asked))
        admission.remove(left)
        del asked[left]
    if rng.random() < 0.15:
        store.prefetch(store.key(rng.choice(list(sources))))
    if rng.random() < 0.1:
        name = rng.choice(list(sources))
        store.register(name, sources[name])


def _serve_queue(model, *, num_slots, capacity, adapter_ranks, seed):
    """Requests come, leave, run and end; adapters are loaded anew and ahead of need meanwhile."""
    slots = ModelSlots(
        model, SlotCapacity(max_loras=num_slots, max_lora_rank=4, target_modules=("linear_proj",))
    )
    store = AdapterStore(slots, StoreOptions(host_cache_bytes=int(capacity * slots.largest_bytes)))
    sources = {
        f"a{i}": partial(make_adapter, i, rank=adapter_rank, modules=PROJ)
        for i, adapter_rank in enumerate(adapter_ranks)
    }
    for name, source in sources.items():
        store.register(name, source)
    rng, queue = random.Random(seed), _Queue(store)
    admission = Admission(
        patience=rng.choice([2, 8, 64]),
        lookahead=min(num_slots, store.host_capacity),
        per_adapter=rng.choice([None, 1]),
    )
    asked, running = {}, {}
    try:
        for step in range(1500):
            store.advance(wait_s=0.0 if running or rng.random() < 0.2 else WAIT_S)
            if step < 60:
                _disturb(step, rng, store, admission, asked, sources)
            for admitted in admission.admit(max(rng.choice([1, 4]) - len(running), 0), queue):
                name = asked.pop(admitted.request_id)
                running[admitted.request_id] = (store.key(name), step + rng.randint(1, 6))
            for request_id, (key, ends) in list(running.items()):
                if ends <= step:
                    del running[request_id]
                    store.release(key)
                    admission.finished(key.name)
            if step >= 60 and not asked and not running:
                return
        raise AssertionError(f"{asked} starved")
    finally:
        store.close()
        slots.detach()


def _nobody_starves(rank, world_size, serve):
    with model_parallel(world_size):
        model = serving_model(world_size)

        @settings(
            max_examples=40,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(
            num_slots=st.integers(1, 3),
            # From exactly one adapter of the largest rank on, also between whole numbers of them.
            capacity=st.sampled_from([1.0, 1.5, 1.99, 2.0, 3.0]),
            adapter_ranks=st.lists(st.integers(1, 4), min_size=2, max_size=6),
            seed=st.integers(0, 2**16),
        )
        def check(**schedule):
            serve(model, **schedule)

        check()


@pytest.mark.parametrize("serve", [_serve_all, _serve_queue])
def test_no_schedule_starves_whatever_host_memory_holds(serve):
    """From one adapter's room on: what was loaded for somebody stays until it was had."""
    run_ranks(1, _nobody_starves, serve)
