"""Reading the ``config.json`` of a Llama-family model, without the transformers library.

Only what changes the weights or the mathematics is read. What Megatron-Core cannot compute the same
way is refused here, before any weight is touched, and all of a file's problems are told at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bdlora_megatron.errors import ConfigError, UnsupportedError
from bdlora_megatron.models.quantization import read_quantization
from bdlora_megatron.models.rope import RopeSettings, read_rope
from bdlora_megatron.models.shape import ModelShape

__all__ = ["HFConfig", "parse_hf_config", "read_hf_config", "stop_ids"]

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
_GEMMA = (
    "its norms multiply by 1 + weight and a second norm follows attention and MLP, and its "
    "embedding is scaled, for which Megatron-Core's layers here have no place"
)
#: Why families that people ask for are not read.
_WHY_NOT = {
    "gemma": _GEMMA,
    "gemma2": f"{_GEMMA}; nor do they cap attention's scores and logits",
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HFConfig(ModelShape):
    """What a Llama-family model is made of: its sizes, and what else changes the mathematics.

    Attributes:
        model_type: ``llama`` (SmolLM2 too), ``mistral``, ``phi3`` (Phi-4 too), ``qwen2`` or
            ``qwen3``.
        max_positions: Longest sequence the model was made for.
        norm_eps: Epsilon of every RMSNorm.
        rope: Rotary embedding.
        qkv_bias: ``q_proj``, ``k_proj`` and ``v_proj`` have biases.
        proj_bias: ``o_proj`` has one.
        mlp_bias: ``gate_proj``, ``up_proj`` and ``down_proj`` have biases.
        fused_projections: Files and adapters have ``qkv_proj`` and ``gate_up_proj``.
        qk_norm: Queries and keys are normalised, head by head.
        fp8_block: Weights are stored in FP8, with a scale for each block of so many rows and
            columns, or (0, 0) for scales of rows or whole tensors; None where they are not.
        sliding_window: Positions that attention sees, where any layer limits them.
        eos_token_ids: Tokens that end a sequence.
    """

    model_type: str
    max_positions: int
    norm_eps: float
    rope: RopeSettings
    qkv_bias: bool
    proj_bias: bool
    mlp_bias: bool
    fused_projections: bool = False
    fp8_block: tuple[int, int] | None = None
    qk_norm: bool
    sliding_window: int | None
    eos_token_ids: tuple[int, ...]


def read_hf_config(folder: str | Path) -> HFConfig:
    """Read ``config.json`` of a model folder.

    Args:
        folder: A folder as ``save_pretrained`` writes it. Nothing is downloaded.

    Returns:
        The model's facts.

    Raises:
        ConfigError: There is no such file, or it is malformed.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist; pass the folder of a downloaded Hugging Face model, which "
            "holds config.json and *.safetensors"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; a JSON object was expected")
    return parse_hf_config(raw, where=str(path))


def parse_hf_config(raw: Mapping[str, Any], *, where: str = "config.json") -> HFConfig:
    """Check a model's configuration and keep what matters.

    Args:
        raw: The object in ``config.json``, as transformers 4 or 5 writes it.
        where: Its name in messages.

    Returns:
        The model's facts.

    Raises:
        ConfigError: A value is missing or impossible.
        UnsupportedError: The model is of a kind that is not supported.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        why = f": {_WHY_NOT[family]}" if family in _WHY_NOT else ""
        raise UnsupportedError(
            f"{where}: model_type={family!r} is not supported{why}; supported are "
            f"{', '.join(FAMILIES)}"
        )
    reader = _Reader(raw)
    config = _read(reader, family)
    problems = [*reader.malformed, *reader.unsupported]
    if problems:
        kind = ConfigError if reader.malformed else UnsupportedError
        raise kind(f"{where} ({family}):" + "".join(f"\n- {line}" for line in problems))
    return config


class _Reader:
    """Typed look-ups that note a problem and go on with a harmless value."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.malformed: list[str] = []
        self.unsupported: list[str] = []

    def positive(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        kind = "a positive integer" if least else "an integer from 0 up"
        self.malformed.append(f"{key}={value!r}; {kind} is needed")
        return 1

    def flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            self.malformed.append(f"{key}={value!r}; true or false is needed")
        return bool(value)


def _read(reader: _Reader, family: str) -> HFConfig:
    raw = reader.raw
    num_heads = reader.positive("num_attention_heads")
    hidden_size = reader.positive("hidden_size")
    # Llama 1 and Phi-3 may have none of their own; the other families always name theirs.
    own = num_heads if family in {"llama", "phi3"} else None
    num_kv_heads = reader.positive("num_key_value_heads", own)
    if num_heads % num_kv_heads:
        reader.malformed.append(
            f"num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    if raw.get("hidden_act") != "silu":
        reader.unsupported.append(f"hidden_act={raw.get('hidden_act')!r}; only 'silu' is supported")
    num_layers = reader.positive("num_hidden_layers")
    qkv_bias, proj_bias, mlp_bias = _biases(reader, family)
    head_dim = _head_dim(reader, family, hidden_size, num_heads)
    return HFConfig(
        model_type=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=reader.positive("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=reader.positive("vocab_size"),
        max_positions=reader.positive("max_position_embeddings"),
        norm_eps=_norm_eps(reader),
        rope=read_rope(raw, reader.malformed, reader.unsupported, family=family, head_dim=head_dim),
        qkv_bias=qkv_bias,
        proj_bias=proj_bias,
        mlp_bias=mlp_bias,
        fused_projections=family == "phi3",
        qk_norm=family == "qwen3",
        tied=reader.flag("tie_word_embeddings"),
        sliding_window=_sliding_window(reader, family, num_layers),
        eos_token_ids=_eos(reader),
        fp8_block=read_quantization(raw.get("quantization_config"), reader.unsupported),
    )


def _head_dim(reader: _Reader, family: str, hidden_size: int, num_heads: int) -> int:
    # Qwen3's class says 128 where its file says nothing.
    unsaid = 128 if family == "qwen3" and "head_dim" not in reader.raw else None
    if unsaid is None and reader.raw.get("head_dim") is None and hidden_size % num_heads:
        reader.malformed.append(
            f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}, and "
            "there is no head_dim"
        )
    head_dim = reader.positive("head_dim", unsaid or max(hidden_size // num_heads, 1))
    if head_dim % 2:
        reader.malformed.append(f"head_dim={head_dim} is odd; rotary embeddings need pairs")
    return head_dim


def _norm_eps(reader: _Reader) -> float:
    value = reader.raw.get("rms_norm_eps")
    if isinstance(value, (int, float)) and value > 0:
        return float(value)
    reader.malformed.append(f"rms_norm_eps={value!r}; a positive number is needed")
    return 1e-6


def _biases(reader: _Reader, family: str) -> tuple[bool, bool, bool]:
    """Whether q, k, v have biases, whether ``o_proj`` has one, and whether the MLP has."""
    if family == "qwen2":
        return True, False, False
    if family in {"mistral", "phi3"}:
        return False, False, False
    attention = reader.flag("attention_bias")
    return attention, attention, reader.flag("mlp_bias") if family == "llama" else False


def _sliding_window(reader: _Reader, family: str, num_layers: int) -> Literal[None] | int:
    """The window of the layers that have one, by each family's own rule."""
    raw = reader.raw
    if family == "llama":
        return None
    kinds = raw.get("layer_types")
    if kinds is not None:
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown:
            reader.unsupported.append(f"layer_types {', '.join(unknown)} are not supported")
        limited = "sliding_attention" in kinds
    else:
        limited = raw.get("sliding_window", None if family == "phi3" else 4096) is not None
        if family.startswith("qwen"):
            # Full attention comes first; 0 leaves none of it.
            full = reader.positive("max_window_layers", 28, least=0)
            limited = reader.flag("use_sliding_window") and full < num_layers and limited
    return reader.positive("sliding_window", 4096) if limited else None


def _eos(reader: _Reader) -> tuple[int, ...]:
    value = reader.raw.get("eos_token_id")
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) for item in values):
        reader.malformed.append(f"eos_token_id={value!r}; a number or a list of them is needed")
        return ()
    return tuple(values)


def stop_ids(folder: Path, own: int | None) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and those of ``generation_config.json``.

    Raises:
        ConfigError: The file can't be read.
    """
    path = folder / "generation_config.json"
    listed: Any = None
    if path.is_file():
        try:
            listed = json.loads(path.read_text("utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is not a JSON object: {error}; mend or remove it") from error
    ids = listed if isinstance(listed, list) else [listed]
    return frozenset(token for token in [*ids, own] if isinstance(token, int))
