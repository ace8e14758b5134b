"""How much an engine does at once."""

from __future__ import annotations

from dataclasses import dataclass

from bdlora_megatron.errors import ConfigError

__all__ = ["EngineOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How much the engine does at once."""

    max_num_seqs: int = 64
    """Requests that run at once, at most."""

    max_num_batched_tokens: int = 2048
    """Tokens of one step, at most; longer prompts are read in chunks."""

    max_model_len: int = 4096
    """The longest prompt and answer together."""

    kv_cache_memory_bytes: int = 2**30
    """Memory of the key-value cache on one rank."""

    block_size: int = 256
    """Positions of a block of the cache; flash-attention wants a multiple of 256."""

    enable_prefix_caching: bool | None = None
    """Keep whole blocks of prompts for requests of the same adapter that begin alike; on when
    unset, where Megatron-Core has it (0.17 and later)."""

    patience_steps: int = 64
    """Steps that a request waits before it closes an adapter to get its slot."""

    cuda_graphs: bool = False
    """Capture decoding steps in CUDA graphs; a model wants ``cuda_graph_impl="local"`` for that."""

    max_per_adapter: int | None = None
    """Requests of one adapter that run at once, at most."""

    def __post_init__(self) -> None:
        sizes = (
            "max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_memory_bytes",
            "block_size",
        )  # fmt: skip
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; wanted at least 1")
        tokens, rows = self.max_num_batched_tokens, self.max_num_seqs
        if tokens < rows:
            raise ConfigError(
                f"max_num_batched_tokens={tokens} is less than max_num_seqs={rows}: a step has a "
                f"token of every request; set max_num_batched_tokens={rows} or more"
            )
