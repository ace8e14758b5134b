"""Adapters by name and version, from disk to host memory to slots on the device.

Many more adapters can be registered than host memory holds, and host memory holds many more than
there are slots. Every rank makes the same calls in the same order, and what the store decides (what
is loaded when, what goes, which slot) follows from those calls alone; so ranks decide alike without
asking. The one thing that calls do not tell is whether a load has ended, well or badly.
``advance``, called once per step, asks all ranks that at once, and only if a load is due.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state

from bdlora_megatron.config import Layout
from bdlora_megatron.convert.adapter import Adapter
from bdlora_megatron.errors import (
    AdapterLoadError,
    AdapterNotFoundError,
    CapacityError,
    ConfigError,
    UnsupportedError,
)
from bdlora_megatron.serve.capacity import AdapterShard
from bdlora_megatron.serve.host_cache import HostCache
from bdlora_megatron.serve.loader import Load, Outcome, Threads, agree
from bdlora_megatron.serve.messages import Places
from bdlora_megatron.serve.slots import ModelSlots
from bdlora_megatron.serve.store_types import AdapterKey, StoreOptions, StoreStats

__all__ = ["AdapterStore"]

#: Steps for which host memory keeps an adapter that `acquire` asked for and did not get. Without
#: that, two adapters that are waited for would push each other out for ever where one has room.
_KEPT_STEPS = 64


@dataclass(slots=True)
class _Entry:
    """What the store knows of one version.

    ``due`` is the step in which ranks ask about its load; ``load`` is this rank's own. ``asked`` is
    the step of the last ``acquire`` in vain, until one succeeds. ``invocation_tokens`` are known
    with the first load.
    """

    source: Callable[[], Adapter]
    check: Callable[[], None]
    layout: Layout
    num_bytes: int | None = None
    invocation_tokens: tuple[int, ...] | None = None
    load: Load[AdapterShard] | None = None
    due: int = 0
    asked: int | None = None
    error: str | None = None
    current: bool = True
    waiting: bool = False


class AdapterStore:
    """Adapters by name, loaded when they are asked for, and the slots that they run in.

    Not for several threads: the engine's own thread calls everything. Every rank makes the same
    calls, in the same order, with the same arguments; files may lie elsewhere.

    Collectives: only ``advance`` communicates, and only in a step in which a load is due: one
    all-reduce of 24 bytes per load; if a load has failed, one exchange of the reasons.
    """

    def __init__(self, slots: ModelSlots, options: StoreOptions, *, group: Any = None) -> None:
        """Make an empty store.

        Args:
            slots: Where adapters run.
            options: Host memory and loading.
            group: The ranks that serve together; the tensor-parallel group when None. One over gloo
                spares the GPU a wait when loads are due.

        Raises:
            CapacityError: Host memory does not hold one adapter of the largest rank.
            UnsupportedError: There are several pipeline stages, which hold different layers and so
                would not decide alike.
        """
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            raise UnsupportedError(
                "the adapter store needs ranks that hold like shares, and pipeline stages do not; "
                "use tensor parallelism alone"
            )
        if options.host_cache_bytes < slots.largest_bytes:
            raise CapacityError(
                f"host_cache_bytes={options.host_cache_bytes} is less than one adapter may take; "
                f"set host_cache_bytes={slots.largest_bytes} or more, or a smaller max_lora_rank"
            )
        self.slots = slots
        self.options = options
        self.stats = StoreStats()
        self._group = group or parallel_state.get_tensor_model_parallel_group()
        nccl = torch.distributed.get_backend(self._group) == "nccl"
        self._agree_on = slots.device if nccl else torch.device("cpu")
        self._host: HostCache[AdapterShard] = HostCache(options.host_cache_bytes)
        self._threads = Threads(options.threads)
        self._entries: dict[AdapterKey, _Entry] = {}
        self._current: dict[str, AdapterKey] = {}
        self._versions: dict[str, int] = {}
        # In the order in which they were asked for; those without room yet wait.
        self._loading: list[AdapterKey] = []
        self._waiting: list[AdapterKey] = []
        self._step = 0

    # --- names -------------------------------------------------------------------------------

    def register(
        self,
        name: str,
        source: Callable[[], Adapter],
        *,
        layout: Layout = Layout.BDLORA,
        check: Callable[[], None] = lambda: None,
    ) -> AdapterKey:
        """Make an adapter known; nothing is read yet.

        A name that is known already gets a new version. Requests that run on the old one finish on
        it, and new ones get the new one.

        Args:
            name: What requests call it.
            source: Reads it, in a thread, whenever it is needed: ``partial(read_peft, folder)``.
            layout: How ranks hold it.
            check: Called in the same thread once all is read, since modules may be read from files
                as they are looked up; raises where those have changed meanwhile.

        Returns:
            The version to ask for.

        Raises:
            ConfigError: The slots have no room for the layout.
        """
        layout = Layout(layout)
        if layout not in self.slots.capacity.layouts:
            raise ConfigError(
                f"adapter {name!r} in layout {layout.value!r}; add it to SlotCapacity.layouts"
            )
        if name in self._current:
            self.unregister(name)
        self._versions[name] = self._versions.get(name, 0) + 1
        key = AdapterKey(name, self._versions[name])
        self._entries[key] = _Entry(source=source, check=check, layout=layout)
        self._current[name] = key
        return key

    def unregister(self, name: str) -> AdapterKey:
        """Forget an adapter.

        No new use can begin. Its memory is free at once, or with the last ``release``.

        Args:
            name: What requests call it.

        Returns:
            The version that is going; ``uses`` tells when it is gone.
        """
        key = self.key(name)
        del self._current[name]
        self._entries[key].current, self._entries[key].asked = False, None
        self.pin(key, pinned=False)
        self._drop_if_unused(key)
        return key

    def key(self, name: str) -> AdapterKey:
        """The version that new requests for a name get.

        Raises:
            AdapterNotFoundError: There is no such adapter.
        """
        key = self._current.get(name)
        if key is None:
            raise AdapterNotFoundError(
                f"no adapter is called {name!r}; register it first ({len(self._current)} are)"
            )
        return key

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that is registered, in order of registration."""
        return tuple(self._current)

    def places(self) -> Places:
        """Where each name's adapter is."""
        found: dict[str, list[str]] = {"slot": [], "host": [], "loading": []}
        for name, key in self._current.items():
            entry = self._entries[key]
            if key in self.slots.allocator:
                found["slot"].append(name)
            elif key in self._host:
                found["host"].append(name)
            elif entry.load is not None or entry.waiting:
                found["loading"].append(name)
        return Places(**{place: tuple(names) for place, names in found.items()})

    def uses(self, key: AdapterKey) -> int:
        """How often a version is in use now."""
        return self.slots.allocator.uses(key)

    # --- loading -----------------------------------------------------------------------------

    def prefetch(self, key: AdapterKey) -> None:
        """Say that an adapter is wanted soon; load it if it is neither in a slot nor on the host.

        Returns at once. What is there counts as just used. After a load that failed, this begins
        another.

        Args:
            key: What ``register`` or ``key`` gave.
        """
        entry = self._entry(key)
        in_slot, on_host = key in self.slots.allocator, self._host.get(key) is not None
        if in_slot:
            self.slots.allocator.touch(key)
        if in_slot or on_host:
            self.stats.host_hits += 1
        elif entry.load is None and not entry.waiting:
            entry.error = None
            entry.waiting = True
            self._waiting.append(key)
            self._start_waiting()

    def advance(self, *, wait_s: float = 0.0) -> None:
        """Begin a step: take in the loads that are due and have ended on every rank.

        Args:
            wait_s: Where there is nothing else to do, how long to wait for loads; all of them are
                due then. The same on every rank.

        Collectives: none if no load is due, else one all-reduce (see the class).
        """
        self._step += 1
        due = [key for key in self._loading if wait_s > 0 or self._entries[key].due <= self._step]
        if due:
            deadline_s = time.monotonic() + wait_s
            loads = [self._load_of(key) for key in due]
            for load in loads:
                load.wait(deadline_s)
            states = [self._state(load) for load in loads]
            self.stats.agreements += 1
            outcomes = agree(states, group=self._group, device=self._agree_on)
            for key, outcome in zip(due, outcomes, strict=True):
                self._settle(key, outcome)
        self._start_waiting()

    def error(self, key: AdapterKey) -> str | None:
        """Why an adapter's last load failed, if it did; the same on every rank."""
        return self._entry(key).error

    def forget_error(self, key: AdapterKey) -> None:
        """Let the next ``acquire`` load an adapter whose last load failed, as if it were new."""
        self._entry(key).error = None

    def invocation_tokens(self, key: AdapterKey) -> tuple[int, ...] | None:
        """From which tokens on an adapter acts that has been loaded; None for every token."""
        return self._entry(key).invocation_tokens

    def is_loading(self, key: AdapterKey) -> bool:
        """Whether an adapter is being loaded or waits for room in host memory."""
        entry = self._entry(key)
        return entry.load is not None or entry.waiting

    # --- using -------------------------------------------------------------------------------

    def acquire(self, key: AdapterKey) -> int | None:
        """Take an adapter into use, if it can run in the coming step.

        Args:
            key: What ``register`` or ``key`` gave.

        Returns:
            Its slot, which it keeps until ``release``. None if it is still being loaded (that is
            begun here if it was not), or if all slots are in use; ask again in later steps. What
            has been loaded stays in host memory for those who do.

        Raises:
            AdapterLoadError: It could not be loaded; ``prefetch`` tries again, and so does
                ``acquire`` after ``forget_error``.
        """
        entry = self._entry(key)
        if entry.error is not None:
            raise AdapterLoadError(f"adapter {key} could not be loaded: {entry.error}")
        if key in self.slots.allocator:
            self.stats.slot_hits += 1
        elif not self._move_in(key):
            entry.asked = self._step
            return None
        entry.asked = None
        return self.slots.acquire(key)

    def release(self, key: AdapterKey) -> None:
        """Give back one use.

        Args:
            key: What was acquired.
        """
        self.slots.release(key)
        self._drop_if_unused(key)

    def pin(self, key: AdapterKey, *, pinned: bool = True) -> None:
        """Keep an adapter where it is, in host memory and in its slot, or let it go again.

        Args:
            key: An adapter that was acquired at least once, for its slot to be kept.
            pinned: Whether to keep it.
        """
        self._host.pin(key, pinned=pinned)
        if key in self.slots.allocator:
            self.slots.allocator.pin(key, pinned=pinned)

    @property
    def host_bytes_used(self) -> int:
        """Bytes of host memory taken, reservations of loads under way included."""
        return self._host.used_bytes

    @property
    def host_capacity(self) -> int:
        """Adapters of the largest rank that host memory holds; at least one."""
        return self.options.host_cache_bytes // self.slots.largest_bytes

    def close(self) -> None:
        """End the threads that load; one that hangs ends with the process."""
        self._threads.close()

    def _entry(self, key: AdapterKey) -> _Entry:
        entry = self._entries.get(key)
        if entry is None or not entry.current:
            raise AdapterNotFoundError(
                f"adapter {key} is not registered any more, or never was; ask for it by name"
            )
        return entry

    def _move_in(self, key: AdapterKey) -> bool:
        """Whether an adapter could be copied into a slot now; one not on the host is loaded."""
        shard = self._host.get(key)
        if shard is None:
            self.prefetch(key)
            return False
        before = len(self.slots.allocator)
        if self.slots.load(key, shard) is None:
            return False
        self.stats.slot_loads += 1
        self.stats.slot_evictions += before + 1 - len(self.slots.allocator)
        return True

    def _is_awaited(self, key: Hashable) -> bool:
        """Whether somebody wants an adapter that is on the host and could not have a slot yet."""
        asked = self._entries[key].asked  # type: ignore[index]
        return asked is not None and self._step - asked < _KEPT_STEPS

    def _start_waiting(self) -> None:
        """Start loads in order, as far as host memory reaches."""
        while self._waiting:
            key = self._waiting[0]
            entry = self._entries[key]
            num_bytes = entry.num_bytes or self.slots.largest_bytes
            capacity = self._host.reserve(key, num_bytes, keep=self._is_awaited)
            self.stats.host_evictions = self._host.evictions
            if not capacity and (self._loading or self._host.could_hold(num_bytes)):
                return
            self._waiting.pop(0)
            entry.waiting = False
            if not capacity:
                entry.error = "what is pinned leaves no room for it in host memory; unpin some"
                self.stats.failures += 1
                continue
            entry.due = self._step + self.options.lead_steps
            entry.load = self._threads.start(partial(self._read, entry))
            self._loading.append(key)

    def _read(self, entry: _Entry) -> AdapterShard:
        shard = self.slots.shard(entry.source(), entry.layout)
        entry.check()
        return shard

    def _load_of(self, key: AdapterKey) -> Load[AdapterShard]:
        load = self._entries[key].load
        assert load is not None
        return load

    def _state(self, load: Load[AdapterShard]) -> tuple[bool, str | None, int]:
        error = load.error(self.options.timeout_s)
        done = error is None and load.future.done()
        return done, error, load.future.result().digest if done else 0

    def _settle(self, key: AdapterKey, outcome: Outcome) -> None:
        entry = self._entries[key]
        if not outcome.done and outcome.error is None:
            entry.due = self._step + self.options.lead_steps
            return
        load, entry.load = self._load_of(key), None
        self._loading.remove(key)
        self._threads.give_up(load)
        if outcome.error is not None:
            self.stats.failures += 1
            entry.error = outcome.error
            self._host.drop(key)
        else:
            shard = load.future.result()
            self.stats.host_loads += 1
            entry.num_bytes = shard.num_bytes
            entry.invocation_tokens = shard.invocation_tokens
            self._host.fill(key, shard.num_bytes, shard)
        self._drop_if_unused(key)

    def _drop_if_unused(self, key: AdapterKey) -> None:
        """Free what an unregistered adapter holds, once nothing uses it."""
        entry = self._entries[key]
        if entry.current or self.uses(key):
            return
        if entry.waiting:
            self._waiting.remove(key)
            entry.waiting = False
        if entry.load is not None:
            return
        if key in self.slots.allocator:
            self.slots.evict(key)
        self._host.drop(key)
        del self._entries[key]
