"""All settings of a server, validated once; free of torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bdlora_megatron.decoder import MODEL_CLASSES
from bdlora_megatron.errors import ConfigError, nearest

__all__ = ["ApiKey", "ServeSettings", "check_adapter_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:-]{0,127}")
_LAYOUTS = ("bdlora", "half_sharded", "slora")
_LAYERS = ("megatron", "transformer_engine")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """A key that clients send as ``Authorization: Bearer KEY``."""

    key: str = field(repr=False)
    """The secret."""

    models: tuple[str, ...] | None = None
    """The models that it may use, the base model's name among them; all when unset."""

    def __post_init__(self) -> None:
        if len(self.key) < 8:
            raise ConfigError("an API key has fewer than 8 characters; make a longer one")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """A server: model, adapters, ranks, sizes, keys."""

    model: str
    """Folder of the base model in Hugging Face's form."""

    served_model_name: str | None = None
    """What requests call the base model; the folder's name when unset."""

    adapters: Mapping[str, str] = field(default_factory=dict)
    """Folders of adapters by name, registered at the start."""

    strict_adapters: bool = False
    """End where one of ``adapters`` is refused at the start, instead of serving the others."""

    adapter_tokenizers: bool = False
    """Use the tokenizer and the chat template beside an adapter for its requests, where they are
    not the base model's."""

    adapter_dirs: tuple[str, ...] = ()
    """Folders below which ``/v1/load_lora_adapter`` may find adapters; without any it is off."""

    tensor_parallel_size: int = 1
    """Tensor-parallel ranks."""

    cpu: bool = False
    """Run on this machine's CPU, with gloo."""

    interface: str | None = None
    """Network interface of the ranks' control messages (gloo's); loopback when unset, or under
    torchrun what ``GLOO_SOCKET_IFNAME`` says."""

    dtype: str | None = None
    """The model's type; as stored when unset."""

    model_class: str = "auto"
    """Megatron-Core's class of models: ``hybrid``, ``gpt``, or the first where 0.19 has it."""

    layers: str = "megatron"
    """Whose linear layers the model has: ``megatron``, or on GPUs ``transformer_engine``."""

    cuda_graphs: bool = False
    """Capture decoding steps in CUDA graphs. This has never run on a GPU."""

    layout: str = "bdlora"
    """How ranks hold adapters: ``bdlora`` (serves any), ``half_sharded`` or ``slora``."""

    max_loras: int = 32
    """Adapters on the device at once."""

    max_lora_rank: int = 64
    """The largest rank, per tensor-parallel rank, that a slot holds."""

    host_cache_bytes: int = 2**32
    """Memory of each rank's host for adapters that are in no slot."""

    max_num_seqs: int = 64
    """Requests that run at once."""

    max_num_batched_tokens: int = 2048
    """Tokens of one step; longer prompts are read in chunks."""

    max_model_len: int = 4096
    """The longest prompt and answer together, in tokens."""

    kv_cache_memory_bytes: int = 2**30
    """Key-value cache on each rank."""

    block_size: int = 256
    """Positions of a block of the cache."""

    max_queue: int = 256
    """Requests that may wait beside those that run; further ones get status 429."""

    max_per_adapter: int | None = None
    """Requests of one adapter that run at once; no limit of its own when unset."""

    max_queue_per_adapter: int | None = None
    """Requests of one adapter that are waiting or running; further ones get status 429."""

    patience_steps: int = 64
    """Steps that a request waits for a slot before one is cleared for it."""

    host: str = "127.0.0.1"
    """Address to listen on."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask this server from a browser; ``*`` for all."""

    api_keys: tuple[ApiKey, ...] = ()
    """Keys of clients; without any, all requests are served."""

    admin_key: str | None = field(default=None, repr=False)
    """The key that may load and unload adapters and see the metrics."""

    max_body_bytes: int = 2**22
    """The largest request body."""

    request_timeout_s: float = 600.0
    """A request that takes longer is cancelled."""

    client_timeout_s: float = 60.0
    """How long a client may take to send a whole request, and to read on when its answer is more
    than the connection holds; then the connection is closed."""

    drain_s: float = 30.0
    """How long requests in flight may go on after SIGTERM."""

    rank_timeout_s: float = 120.0
    """A rank that hears nothing from its peers for so long gives up."""

    restarts: int = 0
    """How often ranks are started again after one has died, before the server ends."""

    log_prompts: bool = False
    """Write prompts and answers to the log."""

    def __post_init__(self) -> None:
        positive = (
            "tensor_parallel_size", "max_loras", "max_lora_rank", "host_cache_bytes",
            "max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_memory_bytes",
            "block_size", "patience_steps", "max_body_bytes", "request_timeout_s",
            "client_timeout_s", "rank_timeout_s",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}; wanted more than 0")
        for name in ("port", "max_queue", "drain_s", "restarts"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}; wanted 0 or more")
        self._check_choices()
        if self.cpu and self.layers == "transformer_engine":
            raise ConfigError(
                "layers='transformer_engine' on a CPU; Transformer Engine runs on GPUs: leave "
                "layers out, or cpu"
            )
        if self.cpu and self.cuda_graphs:
            raise ConfigError("cuda_graphs on a CPU; there are none: leave one of the two out")
        if self.admin_key is not None and len(self.admin_key) < 8:
            raise ConfigError("admin_key has fewer than 8 characters; make a longer one")
        for name in self.adapters:
            if check_adapter_name(name) == self.base_name:
                raise ConfigError(
                    f"an adapter is called {name!r}, as the base model is; name it otherwise, or "
                    "set served_model_name"
                )

    def _check_choices(self) -> None:
        """Refuse words that mean nothing here.

        Raises:
            ConfigError: There is one.
        """
        choices = {
            "model_class": MODEL_CLASSES,
            "layout": _LAYOUTS,
            "layers": _LAYERS,
            "dtype": _DTYPES,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known and not (name == "dtype" and value is None):
                raise ConfigError(f"{name}={value!r}; wanted one of {known}")

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
            ConfigError: A name is unknown (the nearest known one is named) or was changed (the new
                one is named), or a value is wrong.
        """
        known = {f.name: f for f in fields(cls)}
        for name in values:
            if name in _RENAMED:
                raise ConfigError(
                    f"setting {name!r} is now called {_RENAMED[name]!r}; rename it, its meaning "
                    "is the same"
                )
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; {nearest(name, known)}")
        made = {name: _plain(name, value, str(known[name].type)) for name, value in values.items()}
        if "model" not in made:
            raise ConfigError("no model is given; name the folder of the base model")
        return cls(**made)

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


def _plain(name: str, value: Any, kind: str) -> Any:
    """One value of a file in the type that its field has.

    Raises:
        ConfigError: It is of another type.
    """
    if name == "api_keys":
        return tuple(_api_key(item) for item in _list(name, value))
    if name in {"adapter_dirs", "cors_origins"}:
        return tuple(str(item) for item in _list(name, value))
    if name == "adapters":
        if not isinstance(value, Mapping):
            raise ConfigError(f"adapters={value!r}; wanted names with their folders")
        return {str(key): str(path) for key, path in value.items()}
    wanted: tuple[type, ...] = {"int": (int,), "float": (int, float), "bool": (bool,)}.get(
        kind.removesuffix(" | None"), (str,)
    )
    nothing = value is None and kind.endswith("None")
    if not nothing and (
        not isinstance(value, wanted) or (isinstance(value, bool) != (bool in wanted))
    ):
        raise ConfigError(f"{name}={value!r}; wanted {kind}")
    return value


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name}={value!r}; wanted a list")
    return list(value)


def _api_key(item: Any) -> ApiKey:
    if isinstance(item, ApiKey):
        return item
    if isinstance(item, str):
        return ApiKey(key=item)
    if isinstance(item, Mapping) and set(item) <= {"key", "models"} and "key" in item:
        models = item.get("models")
        return ApiKey(key=str(item["key"]), models=None if models is None else tuple(models))
    raise ConfigError("an entry of api_keys is neither a text nor {key: ..., models: [...]}")
