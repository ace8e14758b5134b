"""The store on one and two ranks: what calls do, what they send, and that ranks decide alike."""

from __future__ import annotations

import gc
import random
import threading
import time
from functools import partial

import psutil
import pytest
import torch

from bdlora_megatron.config import Layout
from bdlora_megatron.convert import load_hf_model, read_peft
from bdlora_megatron.errors import (
    AdapterLoadError,
    AdapterNotFoundError,
    CapacityError,
    ConfigError,
    UnsupportedError,
)
from bdlora_megatron.runtime import record_collectives
from bdlora_megatron.serve import AdapterShard, AdapterStore, ModelSlots, SlotCapacity, StoreOptions
from bdlora_megatron.serve.adapter_files import AdapterFiles
from bdlora_megatron.serve.messages import Places
from tests.harness import run_ranks
from tests.tp.serving_cases import make_adapter, serving_model
from tests.tp.session import model_parallel

PROJ = ("o_proj",)
SOON_S = 20.0


def make_store(world_size, *, num_slots=3, max_rank=4, adapters=5, **options):
    """A store over the attention's output layers, with host memory for so many adapters."""
    capacity = SlotCapacity(
        max_loras=num_slots, max_lora_rank=max_rank, target_modules=("linear_proj",)
    )
    slots = ModelSlots(serving_model(world_size), capacity)
    host_cache_bytes = adapters * slots.largest_bytes
    return AdapterStore(slots, StoreOptions(host_cache_bytes=host_cache_bytes, **options))


def source(seed, **changes):
    return partial(make_adapter, seed, **{"rank": 4, "num_blocks": 1, "modules": PROJ, **changes})


def ready(store, key):
    """Load an adapter and take it into use."""
    assert store.acquire(key) is None
    store.advance(wait_s=SOON_S)
    return store.acquire(key)


def held(store, key):
    """What the slots hold of an adapter in the first layer: A below B."""
    slot = store.slots.allocator.slot(key)
    factors = next(iter(store.slots.layers.values()))._own.factors
    return torch.cat([factors.a(slot, 0), factors.b(slot, 0)], dim=1)


# --- names and versions ----------------------------------------------------------------------


def _versions(rank, world_size):
    with model_parallel(world_size):
        store = make_store(world_size)
        with pytest.raises(AdapterNotFoundError, match="no adapter is called 'a'"):
            store.key("a")
        first = store.register("a", source(1))
        assert str(first) == "a@1"
        assert store.key("a") == first
        assert store.places() == Places()
        assert ready(store, first) is not None
        assert store.places() == Places(slot=("a",))
        before = held(store, first).clone()
        second = store.register("a", source(2))
        assert second > first
        assert store.key("a") == second
        assert store.names == ("a",)
        assert store.places() == Places(), "the old version is in a slot, and nobody new gets it"
        # What runs on the old version finishes on it; nothing new begins on it.
        assert ready(store, second) is not None
        assert torch.equal(held(store, first), before)
        assert not torch.equal(held(store, second), before)
        with pytest.raises(AdapterNotFoundError, match="a@1 is not registered any more"):
            store.acquire(first)
        assert store.uses(first) == 1
        store.release(first)
        assert first not in store.slots.allocator
        assert store.host_bytes_used == store._host._entries[second][0]
        # Unloading frees at once what nobody uses, and with the last release what somebody does.
        store.acquire(second)
        assert store.unregister("a") == second
        for _ in range(2):
            assert store.uses(second)
            store.release(second)
        assert not len(store.slots.allocator)
        assert store.host_bytes_used == 0
        assert not store._entries
        with pytest.raises(AdapterNotFoundError):
            store.unregister("a")
        third = store.register("a", source(1))
        assert third.version == 3
        # One that is unregistered while it loads frees what was reserved for it.
        store.prefetch(third)
        assert store.places() == Places(loading=("a",))
        store.unregister("a")
        assert store.places() == Places()
        store.advance(wait_s=SOON_S)
        assert store.host_bytes_used == 0
        assert not store._entries


def test_versions_and_unloading():
    run_ranks(2, _versions)


# --- loads -----------------------------------------------------------------------------------


def _counts(rank, world_size):
    """Only a step with a load that is due communicates: once, and once more if one has failed."""
    with model_parallel(world_size):
        store = make_store(world_size, adapters=9, lead_steps=2)
        keys = [store.register(f"a{i}", source(i)) for i in range(3)]
        bad = store.register("bad", partial(_fails, rank, 1))
        counts = []

        def step(*wanted, wait_s=0.0):
            with record_collectives() as log:
                for key in wanted:
                    store.prefetch(key)
                store.advance(wait_s=wait_s)
                if store.error(bad) is None:
                    for key in wanted:
                        store.acquire(key)
            counts.append(log.counts())

        step(*keys)  # begun, and not due
        for key in keys:
            store._entries[key].load.wait(time.monotonic() + SOON_S)
        step(*keys)  # due: one for all three
        step(*keys)  # in slots
        step(bad, wait_s=SOON_S)
        step(keys[0])
        assert store.stats.agreements == 2
        return counts


def _fails(rank, on):
    if rank == on:
        raise OSError("no space left on device")
    return make_adapter(1, modules=PROJ)


def test_only_steps_with_a_load_that_is_due_communicate():
    for counts in run_ranks(2, _counts):
        assert counts == [{}, {"all_reduce": 1}, {}, {"all_reduce": 1, "all_gather": 2}, {}]


def _failures(rank, world_size):
    with model_parallel(world_size):
        store = make_store(world_size)
        good = store.register("good", source(1))
        bad = store.register("bad", partial(_fails, rank, 1))
        torn = store.register("torn", source(1, rank=1 + rank))
        big = store.register("big", source(1, rank=9))
        for key in (good, bad, torn, big):
            store.prefetch(key)
        store.advance(wait_s=SOON_S)
        assert store.acquire(good) is not None
        with pytest.raises(AdapterLoadError, match="rank 1: OSError: no space left on device"):
            store.acquire(bad)
        with pytest.raises(AdapterLoadError, match="different modules, ranks or scales"):
            store.acquire(torn)
        with pytest.raises(AdapterLoadError, match=r"set max_lora_rank=9"):
            store.acquire(big)
        assert store.stats.failures == 3
        assert store.host_bytes_used == store._host._entries[good][0]
        # A failure is not for ever: prefetch tries again.
        store._entries[bad].source = source(5)
        assert store.error(bad)
        store.prefetch(bad)
        assert store.error(bad) is None
        store.advance(wait_s=SOON_S)
        assert store.acquire(bad) is not None


def test_a_load_that_fails_on_one_rank_fails_on_all_with_its_reason():
    run_ranks(2, _failures)


def _lag(rank, world_size):
    """A slow rank holds nobody up: the others go on without the adapter, all of them."""
    with model_parallel(world_size):
        store = make_store(world_size, threads=1)
        gate = threading.Event()

        def slow():
            if rank == 1:
                gate.wait(SOON_S)
            return make_adapter(1, modules=PROJ)

        slow_key, key = store.register("slow", slow), store.register("a", source(2))
        store.prefetch(slow_key)
        for _ in range(3):
            store.advance()
            assert store.acquire(slow_key) is None
            assert store.is_loading(slow_key)
        gate.set()
        assert ready(store, key) is not None
        store.advance(wait_s=SOON_S)
        assert store.acquire(slow_key) is not None


def test_a_rank_that_lags_is_waited_for_without_stopping_the_others():
    run_ranks(2, _lag)


def _hang(rank, world_size):
    """A read that never ends on one rank fails on all in time, and does not use up the threads."""
    with model_parallel(world_size):
        store = make_store(world_size, threads=1, timeout_s=0.2)

        def hangs():
            if rank == 1:
                threading.Event().wait(60)
            return make_adapter(1, modules=PROJ)

        for number in range(2):
            key = store.register(f"hangs{number}", hangs)
            store.prefetch(key)
            deadline = time.monotonic() + SOON_S
            while store.error(key) is None and time.monotonic() < deadline:
                store.advance(wait_s=0.1)
            with pytest.raises(AdapterLoadError, match=r"rank 1: it was not read within 0\.2 s"):
                store.acquire(key)
        key = store.register("a", source(1))
        store.options = StoreOptions(host_cache_bytes=store.options.host_cache_bytes)
        assert ready(store, key) is not None


def test_a_read_that_hangs_fails_in_time():
    run_ranks(2, _hang)


# --- room ------------------------------------------------------------------------------------


def _capacity(rank, world_size):
    with model_parallel(world_size):
        store = make_store(world_size, num_slots=2, adapters=3)
        keys = [store.register(f"a{i}", source(i)) for i in range(6)]
        for key in keys:
            store.prefetch(key)
        # Three fit the host at once; the others wait their turn.
        assert store.host_bytes_used == 3 * store.slots.largest_bytes
        assert [store._entries[key].waiting for key in keys] == [False] * 3 + [True] * 3
        store.advance(wait_s=SOON_S)
        store.advance(wait_s=SOON_S)
        assert [key in store._host for key in keys] == [False] * 3 + [True] * 3
        assert store.places() == Places(host=tuple(key.name for key in keys[3:]))
        assert store.acquire(keys[3]) is not None
        assert store.places().slot == (keys[3].name,)
        assert store.places().host == tuple(key.name for key in keys[4:])
        store.pin(keys[3])
        assert store.acquire(keys[4]) is not None
        assert store.acquire(keys[5]) is None, "both slots are in use"
        assert store.slots.allocator.available == 0
        store.release(keys[3])
        assert store.acquire(keys[5]) is None, "one is in use and one is pinned"
        store.release(keys[4])
        assert store.acquire(keys[5]) is not None
        assert keys[3] in store.slots.allocator
        for key in (keys[3], keys[4], keys[5]):
            store.pin(key)
        store.prefetch(keys[0])
        with pytest.raises(AdapterLoadError, match="pinned leaves no room"):
            store.acquire(keys[0])
        store.pin(keys[4], pinned=False)
        store.prefetch(keys[0])
        store.advance(wait_s=SOON_S)
        assert keys[0] in store._host
        assert store.stats.host_evictions == 4
        with pytest.raises(ConfigError, match="release once per acquire"):
            store.release(keys[3])


def test_room_on_the_host_and_in_slots():
    run_ranks(1, _capacity)


def _refuse(rank, world_size):
    with model_parallel(world_size):
        slots = ModelSlots(serving_model(world_size), SlotCapacity(max_loras=2, max_lora_rank=4))
        wanted = f"set host_cache_bytes={slots.largest_bytes} or more"
        with pytest.raises(CapacityError, match=wanted):
            AdapterStore(slots, StoreOptions(host_cache_bytes=slots.largest_bytes - 1))
        store = AdapterStore(slots, StoreOptions(host_cache_bytes=slots.largest_bytes))
        with pytest.raises(ConfigError, match=r"add it to SlotCapacity.layouts"):
            store.register("a", source(1), layout=Layout.SLORA)


def _refuse_stages(rank, world_size):
    with model_parallel(1, pp=2), pytest.raises(UnsupportedError, match="pipeline stages"):
        AdapterStore(None, StoreOptions(host_cache_bytes=1))


def test_refusals():
    run_ranks(1, _refuse)
    run_ranks(2, _refuse_stages)
    with pytest.raises(ConfigError, match="all of them must be positive"):
        StoreOptions(host_cache_bytes=1, lead_steps=0)


# --- a thousand adapters ---------------------------------------------------------------------


def _thousand(rank, world_size):
    with model_parallel(world_size):
        # 98 kB each, so that keeping them all would show.
        store = make_store(world_size, num_slots=32, max_rank=160, adapters=200, threads=2)
        keys = [store.register(f"a{i}", source(i, rank=160, name="shared")) for i in range(1000)]
        process, draw, seen = psutil.Process(), random.Random(1), []
        for step in range(1000):
            # Ten requests a step; the i-th adapter is as popular as 1 / i.
            wanted = {keys[int(1000 ** draw.random()) - 1] for _ in range(10)}
            for key in wanted:
                store.prefetch(key)
            for _ in range(20):
                store.advance(wait_s=SOON_S)
                if not any(store.is_loading(key) for key in wanted):
                    break
            for key in wanted:
                assert store.acquire(key) is not None
            assert store.host_bytes_used <= store.options.host_cache_bytes
            assert len(store.slots.allocator) <= 32
            for key in wanted:
                store.release(key)
            if step in (400, 999):
                gc.collect()
                seen.append(process.memory_info().rss)
                shards = sum(isinstance(held, AdapterShard) for held in gc.get_objects())
                assert shards <= 200 + 2
        stats = store.stats
        assert stats.host_evictions > 1000
        assert stats.slot_evictions > 1000
        return seen, store.options.host_cache_bytes, stats.host_loads


def test_memory_stays_in_bounds_over_ten_thousand_requests():
    ((early, late), host_cache_bytes, loads) = run_ranks(1, _thousand)[0]
    assert loads > 5 * 200, "far more was loaded than fits"
    # What the allocator leaves in pieces, and far less than the adapters loaded in between.
    assert late - early < host_cache_bytes


# --- from disk -------------------------------------------------------------------------------


def _overwritten(rank, world_size, root):
    """While one rank reads: the file gets other weights, of which some were read and some not."""
    with model_parallel(world_size):
        model = load_hf_model(root / "base", dtype=torch.float32).eval()
        slots = ModelSlots(model, SlotCapacity(max_loras=2, max_lora_rank=8))
        store = AdapterStore(slots, StoreOptions(host_cache_bytes=2 * slots.largest_bytes))
        folder = root / f"rank{rank}"
        files = AdapterFiles(folder, "busy")
        other = (root / "other" / "adapter_model.safetensors").read_bytes()

        def read():
            adapter = files.read()
            if rank == 1:
                (folder / "adapter_model.safetensors").write_bytes(other)
            return adapter

        key = store.register("busy", read, check=files.check)
        assert store.acquire(key) is None
        store.advance(wait_s=SOON_S)
        with pytest.raises(AdapterLoadError, match=r"rank 1: AdapterFormatError.*changed since"):
            store.acquire(key)
        again = AdapterFiles(folder, "busy")
        assert ready(store, store.register("busy", again.read, check=again.check)) is not None


def test_files_that_change_while_they_are_read_are_refused(tmp_path):
    from tests.golden.peft_cases import KINDS, make_adapter, make_base

    base = make_base(tmp_path / "base")
    for name in ("rank0", "rank1", "other"):
        make_adapter(base, tmp_path / name, **KINDS["bdlora4"])
    run_ranks(2, _overwritten, tmp_path)


def _from_disk(rank, world_size, root):
    with model_parallel(world_size):
        model = load_hf_model(root / "base", dtype=torch.float32).eval()
        slots = ModelSlots(model, SlotCapacity(max_loras=2, max_lora_rank=8))
        store = AdapterStore(slots, StoreOptions(host_cache_bytes=2 * slots.largest_bytes))
        good = store.register("good", partial(read_peft, root / "good"))
        gone = store.register("gone", partial(read_peft, root / "gone"))
        assert ready(store, good) is not None
        assert store.acquire(gone) is None
        store.advance(wait_s=SOON_S)
        with pytest.raises(AdapterLoadError, match=r"rank 0: AdapterFormatError.*rank 1:"):
            store.acquire(gone)


def test_loads_what_readers_read(tmp_path):
    from tests.golden.peft_cases import KINDS, make_adapter, make_base

    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "good", **KINDS["bdlora4"])
    run_ranks(2, _from_disk, tmp_path)
