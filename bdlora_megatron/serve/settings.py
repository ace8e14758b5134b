"""All settings of a server, validated once; free of torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from bdlora_megatron.decoder import ModelClass
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.settings import (
    FORBID_UNKNOWN,
    Count,
    Flag,
    Names,
    Natural,
    Number,
    Seconds,
    Section,
    read_settings,
)

__all__ = ["ApiKey", "ServeSettings", "check_adapter_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:-]{0,127}")
#: Names of settings until 0.1, with what they are called now: as vLLM calls them.
_RENAMED = {
    "block_tokens": "block_size",
    "cache_bytes": "kv_cache_memory_bytes",
    "max_length": "max_model_len",
    "max_rank": "max_lora_rank",
    "max_requests": "max_num_seqs",
    "num_slots": "max_loras",
    "served_name": "served_model_name",
    "step_tokens": "max_num_batched_tokens",
    "tp": "tensor_parallel_size",
}


def check_adapter_name(name: str) -> str:
    """An adapter's name, if it can be one.

    Raises:
        ConfigError: It is empty, too long, or holds strange characters.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"adapter name {name[:140]!r}; wanted 1 to 128 letters, digits and . _ / @ : - that "
            "begin with a letter or digit"
        )
    return name


Secret = Annotated[str, Field(min_length=8)]


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class ApiKey:
    """A key that clients send as ``Authorization: Bearer KEY``."""

    key: Secret = field(repr=False)
    """The secret, of at least 8 characters."""

    models: Names | None = None
    """The models that it may use, the base model's name among them; all when unset."""


_Key = Annotated[ApiKey, BeforeValidator(lambda v: {"key": v} if isinstance(v, str) else v)]


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class ServeSettings:
    """A server: model, adapters, ranks, sizes, keys."""

    model: str
    """Folder of the base model in Hugging Face's form."""

    served_model_name: str | None = None
    """What requests call the base model; the folder's name when unset."""

    adapters: Annotated[dict[str, str], Section] = field(default_factory=dict)
    """Folders of adapters by name, registered at the start."""

    strict_adapters: Flag = False
    """End where one of ``adapters`` is refused at the start, instead of serving the others."""

    adapter_tokenizers: Flag = False
    """Use the tokenizer and the chat template beside an adapter for its requests, where they are
    not the base model's."""

    adapter_dirs: Names = ()
    """Folders below which ``/v1/load_lora_adapter`` may find adapters; without any it is off."""

    tool_call_parser: Literal["hermes", "llama3_json", "mistral"] | None = None
    """How models write tool calls down; when unset, as the chat template writes them."""

    tensor_parallel_size: Count = 1
    """Tensor-parallel ranks."""

    cpu: Flag = False
    """Run on this machine's CPU, with gloo."""

    interface: str | None = None
    """Network interface of the ranks' control messages (gloo's); loopback when unset, or under
    torchrun what ``GLOO_SOCKET_IFNAME`` says."""

    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """The model's type; as stored when unset."""

    model_class: ModelClass = "auto"
    """Megatron-Core's class of models: ``hybrid``, ``gpt``, or the first where 0.19 has it."""

    layers: Literal["megatron", "transformer_engine"] = "megatron"
    """Whose linear layers the model has: ``megatron``, or on GPUs ``transformer_engine``."""

    cuda_graphs: Flag = False
    """Capture decoding steps in CUDA graphs. This has never run on a GPU."""

    layout: Literal["bdlora", "half_sharded", "slora"] = "bdlora"
    """How ranks hold adapters: ``bdlora`` (serves any), ``half_sharded`` or ``slora``."""

    max_loras: Count = 32
    """Adapters on the device at once."""

    max_lora_rank: Count = 64
    """The largest rank, per tensor-parallel rank, that a slot holds."""

    lora_memory_bytes: Count | None = None
    """Device memory on each rank for adapters, which share it: one of low rank takes little. When
    unset, room for ``max_loras`` of ``max_lora_rank``."""

    host_cache_bytes: Count = 2**32
    """Memory of each rank's host for adapters that are in no slot."""

    max_num_seqs: Count = 64
    """Requests that run at once."""

    max_num_batched_tokens: Count = 2048
    """Tokens of one step; longer prompts are read in chunks."""

    max_model_len: Count = 4096
    """The longest prompt and answer together, in tokens."""

    kv_cache_memory_bytes: Count = 2**30
    """Key-value cache on each rank."""

    block_size: Count = 256
    """Positions of a block of the cache."""

    enable_prefix_caching: Flag | None = None
    """Keep whole blocks of prompts for requests of the same adapter that begin alike; on when
    unset, where Megatron-Core has it (0.17 and later)."""

    max_queue: Natural = 256
    """Requests that may wait beside those that run; further ones get status 429."""

    max_per_adapter: Count | None = None
    """Requests of one adapter that run at once; no limit of its own when unset."""

    max_queue_per_adapter: Count | None = None
    """Requests of one adapter that are waiting or running; further ones get status 429."""

    patience_steps: Count = 64
    """Steps that a request waits for a slot before one is cleared for it."""

    host: str = "127.0.0.1"
    """Address to listen on."""

    port: Natural = 8000
    """Port to listen on; 0 takes a free one."""

    cors_origins: Names = ()
    """Origins whose pages may ask this server from a browser; ``*`` for all."""

    api_keys: tuple[_Key, ...] = field(default=(), repr=False)
    """Keys of clients; without any, all requests are served."""

    admin_key: Secret | None = field(default=None, repr=False)
    """The key that may load and unload adapters and see the metrics."""

    max_body_bytes: Count = 2**22
    """The largest request body."""

    request_timeout_s: Seconds = 600.0
    """A request that takes longer is cancelled."""

    client_timeout_s: Seconds = 60.0
    """How long a client may take to send a whole request, and to read on when its answer is more
    than the connection holds; then the connection is closed."""

    drain_s: Number = 30.0
    """How long requests in flight may go on after SIGTERM."""

    rank_timeout_s: Seconds = 120.0
    """A rank that hears nothing from its peers for so long gives up."""

    restarts: Natural = 0
    """How often ranks are started again after one has died, before the server ends."""

    log_prompts: Flag = False
    """Write prompts and answers to the log."""

    def __post_init__(self) -> None:
        if self.cpu and self.layers == "transformer_engine":
            raise ConfigError(
                "layers='transformer_engine' on a CPU; Transformer Engine runs on GPUs: leave "
                "layers out, or cpu"
            )
        if self.cpu and self.cuda_graphs:
            raise ConfigError("cuda_graphs on a CPU; there are none: leave one of the two out")
        for name in self.adapters:
            if check_adapter_name(name) == self.base_name:
                raise ConfigError(
                    f"an adapter is called {name!r}, as the base model is; name it otherwise, or "
                    "set served_model_name"
                )

    @property
    def base_name(self) -> str:
        """What requests call the base model."""
        return self.served_model_name or Path(self.model).resolve().name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ServeSettings:
        """Settings from plain values, as a file gives them.

        Args:
            values: Names to values; ``api_keys`` are texts or ``{key: ..., models: [...]}``.

        Returns:
            The settings.

        Raises:
            ConfigError: Names are unknown (the nearest known one is named) or were changed (the new
                one is named), or values are wrong; every problem is listed.
        """
        return read_settings(cls, dict(values), "the server's settings", _RENAMED)

    def adapter_path(self, path: str) -> Path:
        """The folder that a client named, if it may be read.

        Args:
            path: What was sent.

        Returns:
            Its real path, links resolved.

        Raises:
            ConfigError: It lies below none of ``adapter_dirs``.
        """
        real = Path(os.path.realpath(path))
        for allowed in self.adapter_dirs:
            if real.is_relative_to(os.path.realpath(allowed)):
                return real
        raise ConfigError(
            f"adapter path {path!r} is below none of the folders that this server may load from"
        )
