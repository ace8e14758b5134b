"""What goes into an adapter store and what comes out: keys, options, counts."""

from __future__ import annotations

from dataclasses import dataclass

from bdlora_megatron.errors import ConfigError

__all__ = ["AdapterKey", "StoreOptions", "StoreStats"]


@dataclass(frozen=True, slots=True, order=True)
class AdapterKey:
    """One version of an adapter.

    Attributes:
        name: What requests call it.
        version: Counted from 1 each time that the name is registered.
    """

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOptions:
    """How much host memory there is, and how loads run."""

    host_cache_bytes: int
    """Bytes of adapters kept in host memory, loads under way included, on each rank."""

    lead_steps: int = 1
    """Steps after which ranks ask each other whether a load is done, and again as many later if it
    is not."""

    timeout_s: float = 60.0
    """A load that takes longer on any rank has failed."""

    threads: int = 2
    """Loads at once, on each rank."""

    def __post_init__(self) -> None:
        if (
            min(self.lead_steps, self.threads) < 1
            or min(self.timeout_s, self.host_cache_bytes) <= 0
        ):
            raise ConfigError(f"{self}: all of them must be positive")


@dataclass(slots=True)
class StoreStats:
    """What has happened since the store was made, in numbers of adapters; equal on every rank.

    Attributes:
        slot_hits: ``acquire`` found the adapter in a slot.
        slot_loads: Adapters copied from host memory into a slot.
        slot_evictions: Adapters that left a slot for another.
        host_hits: ``prefetch`` found the adapter in host memory or in a slot.
        host_loads: Loads from disk that ended well.
        host_evictions: Adapters that left host memory for another.
        failures: Loads that failed.
        agreements: Steps in which ranks asked each other about loads.
    """

    slot_hits: int = 0
    slot_loads: int = 0
    slot_evictions: int = 0
    host_hits: int = 0
    host_loads: int = 0
    host_evictions: int = 0
    failures: int = 0
    agreements: int = 0
