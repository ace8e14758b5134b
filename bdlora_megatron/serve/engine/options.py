"""How much an engine does at once."""

from __future__ import annotations

from dataclasses import dataclass

from bdlora_megatron.errors import ConfigError

__all__ = ["EngineOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How much the engine does at once."""

    max_requests: int = 64
    """Requests that run at once, at most."""

    max_tokens: int = 2048
    """Tokens of one step, at most; longer prompts are read in chunks."""

    max_length: int = 4096
    """The longest prompt and answer together."""

    cache_bytes: int = 2**30
    """Memory of the key-value cache on one rank."""

    block_tokens: int = 256
    """Positions of a block of the cache; flash-attention wants a multiple of 256."""

    patience: int = 64
    """Steps that a request waits before it closes an adapter to get its slot."""

    cuda_graphs: bool = False
    """Capture decoding steps in CUDA graphs; a model wants ``cuda_graph_impl="local"`` for that."""

    per_adapter: int | None = None
    """Requests of one adapter that run at once, at most."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_tokens", "max_length", "cache_bytes", "block_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; wanted at least 1")
        if self.max_tokens < self.max_requests:
            raise ConfigError(
                f"max_tokens={self.max_tokens} is less than max_requests={self.max_requests}: a "
                f"step has a token of every request; set max_tokens={self.max_requests} or more"
            )
