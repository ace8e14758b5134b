"""Where Megatron-Bridge and NeMo keep an adapter checkpoint's settings, and what they say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bdlora_megatron.convert.adapter import BaseShape
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.hints import unreadable
from bdlora_megatron.convert.megatron.iterations import newest_iteration
from bdlora_megatron.decoder import hybrid_layers, hybrid_numbering
from bdlora_megatron.errors import AdapterFormatError, MissingDependencyError

__all__ = [
    "BRIDGE_SIGNS",
    "RUN_CONFIG_NAME",
    "BridgeSettings",
    "locate",
    "read_settings",
    "write_settings",
]

RUN_CONFIG_NAME = "run_config.yaml"
_NEMO_CONTEXT, _NEMO_WEIGHTS = "context/model.yaml", "weights"
_LARGEST = 4 << 20
#: Files that tell a folder of these formats.
BRIDGE_SIGNS = (RUN_CONFIG_NAME, f"iter_*/{RUN_CONFIG_NAME}", _NEMO_CONTEXT)

_REFUSED = {
    "DoRA": "DoRA rescales whole adapted weights; merge it into its base model, or train LoRA",
}
_READ = ("LoRA", "CanonicalLoRA", "VLMLoRA")
#: The integrations' own class, whose layers save blocks.
_OWN = "BDLoRA"
# YAML 1.2's numbers, which OmegaConf reads too; PyYAML takes those without a point for strings.
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class BridgeSettings:
    """What of a checkpoint its tensors don't tell.

    Attributes:
        dim: The rank of every pair.
        alpha: The numerator of the scale.
        own: The settings of our integration's class, which has a rank for each pair; None of
            others, which have one for all.
        tp: Tensor-parallel ranks that saved it; None where that is not noted.
        base: What is said of the base model.
        metadata: For people.
        layers: The decoder layer of each position of a ``HybridModel``; None for a ``GPTModel``.
    """

    dim: int
    alpha: float
    tp: int | None
    base: BaseShape
    metadata: Mapping[str, str]
    own: Mapping[str, Any] | None = None
    layers: tuple[int, ...] | None = None


def locate(folder: Path) -> tuple[Path, Path]:
    """Find the weights and the settings.

    Args:
        folder: One iteration of Megatron-Bridge (`iter_0000100`), the folder of all iterations (the
            newest complete one is read), or a checkpoint of NeMo 2 (`weights` and `context`).

    Returns:
        The folder of the distributed checkpoint, and the settings' file.

    Raises:
        AdapterFormatError: If there is none of these.
    """
    if (folder / _NEMO_CONTEXT).is_file():
        return folder / _NEMO_WEIGHTS, folder / _NEMO_CONTEXT
    if not (folder / RUN_CONFIG_NAME).is_file():
        newest = newest_iteration(folder, lambda child: (child / RUN_CONFIG_NAME).is_file())
        if newest is None:
            raise AdapterFormatError(
                f"{folder} holds no complete checkpoint with one of {', '.join(BRIDGE_SIGNS)}; "
                "pass an adapter checkpoint of Megatron-Bridge or NeMo 2"
            )
        folder = newest
    return folder, folder / RUN_CONFIG_NAME


def read_settings(path: Path) -> BridgeSettings:
    """Read a checkpoint's settings.

    Returns:
        What they say of the adapter and of its base model.

    Raises:
        AdapterFormatError: If they are broken, or of an adapter that cannot be represented. All
            problems are listed.
    """
    raw = _read_yaml(path)
    problems = Problems()
    nemo = path.name != RUN_CONFIG_NAME
    model = raw.get("config" if nemo else "model")
    peft = raw.get("model_transform" if nemo else "peft")
    model = model if isinstance(model, dict) else {}
    if not isinstance(peft, dict):
        problems.add("it has no settings of an adapter; pass a checkpoint of adapter training")
        problems.raise_if_any(f"cannot read {path}")
        peft = {}
    target = str(peft.get("_target_", ""))
    kind = target.rpartition(".")[2]
    own = peft if kind == _OWN and target.startswith("bdlora_megatron.") else None
    if kind not in _READ and own is None:
        why = _REFUSED.get(kind, f"wanted one of {', '.join(_READ)}")
        problems.add(f"the adapter is a {target or 'thing without a _target_'}; {why}")
    dim, alpha = (1, 1.0) if own is not None else _rank_and_alpha(peft, problems)
    if model.get("gated_linear_unit") is False:
        problems.add(
            "the base model's MLP is not gated, so linear_fc1 is no gate and up projection"
        )
    if model.get("attention_output_gate"):
        problems.add("linear_qkv also holds an output gate, which no other format covers")
    tp = None if nemo else _optional(model, "tensor_model_parallel_size", problems)
    base = _base_shape(model, problems)
    layers = _hybrid_layers(model, problems)
    if layers is not None:
        base = replace(base, num_layers=max(layers) + 1)
    problems.raise_if_any(f"cannot read {path}")
    metadata = {"format": "nemo" if nemo else "bridge", "adapter_class": target}
    if own is not None and isinstance(own.get("base_model"), str):
        metadata["base_model_name_or_path"] = own["base_model"]
    if layers is not None:
        metadata["model_class"] = "HybridModel"
    return BridgeSettings(
        dim=dim, alpha=alpha, tp=tp, base=base, metadata=metadata, own=own, layers=layers
    )


def _rank_and_alpha(peft: Mapping[str, Any], problems: Problems) -> tuple[int, float]:
    alpha = peft.get("alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        problems.add(f"peft alpha is {alpha!r}, wanted a finite number")
        alpha = 1.0
    return _positive(peft, "dim", problems) or 1, float(alpha)


def write_settings(
    path: Path, settings: BridgeSettings, *, fused: bool, targets: list[str]
) -> None:
    """Write a `run_config.yaml` with what Megatron-Bridge looks up when it loads an adapter.

    Args:
        path: The new file.
        settings: What it says.
        fused: Whether the pairs serve whole layers.
        targets: The adapted layers, by the names of that class.
    """
    module, kind = ("lora", "LoRA") if fused else ("canonical_lora", "CanonicalLoRA")
    base = settings.base
    model = {
        "tensor_model_parallel_size": settings.tp,
        "pipeline_model_parallel_size": 1,
        "num_layers": base.num_layers,
        "hidden_size": base.hidden_size,
        "ffn_hidden_size": base.ffn_size,
        "num_attention_heads": base.num_heads,
        "num_query_groups": base.num_kv_heads,
        "kv_channels": base.head_dim,
        "gated_linear_unit": True,
    }
    alpha = settings.alpha
    raw = {
        "model": {key: value for key, value in model.items() if value is not None},
        "peft": {
            "_target_": f"megatron.bridge.peft.{module}.{kind}",
            "dim": settings.dim,
            "alpha": int(alpha) if alpha.is_integer() else alpha,
            "dropout": 0.0,
            "target_modules": targets,
        },
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False},
    }
    # JSON is YAML, and needs no library to write. YAML 1.1 takes 1e-08 for a string.
    text = re.sub(r"(?m)(: -?\d+)(e[-+]?\d+,?)$", r"\1.0\2", json.dumps(raw, indent=2))
    path.write_text(text + "\n", "utf-8")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{path} is YAML, which needs PyYAML to read; pip install 'bdlora-megatron[convert]'"
        ) from error

    class Loader(yaml.SafeLoader):
        """Plain values; what has a type of its own is of no interest here and becomes null."""

    Loader.add_multi_constructor("", lambda *_: None)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
    try:
        if path.stat().st_size > _LARGEST:
            raise AdapterFormatError(f"{path} is larger than {_LARGEST} bytes, as no settings are")
        raw = yaml.load(path.read_text("utf-8"), Loader)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        why = unreadable(path, error, "copy it again")
        raise AdapterFormatError(f"{path} cannot be read{why}") from error
    if not isinstance(raw, dict):
        raise AdapterFormatError(f"{path} holds a {type(raw).__name__}, wanted settings by name")
    return raw


def _hybrid_layers(model: Mapping[str, Any], problems: Problems) -> tuple[int, ...] | None:
    """The layer of each position, which the names of a hybrid model's tensors count instead."""
    pattern = model.get("hybrid_layer_pattern") or model.get("hybrid_override_pattern")
    if pattern is None and "hybrid" not in str(model.get("_target_", "")).lower():
        return None
    numbers = []
    if isinstance(pattern, str) and hybrid_numbering(pattern) == "pairs":
        numbers = hybrid_layers(pattern)
    layers = [number for number in numbers if number is not None]
    if not layers:
        problems.add(
            f"the base model is a hybrid one with hybrid_layer_pattern {pattern!r}; only attention "
            "and MLP in turn, as in '*-*-', are read here: export the adapter from the model with "
            "export_adapter"
        )
        return None
    return tuple(layers)


def _positive(raw: Mapping[str, Any], key: str, problems: Problems) -> int | None:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        problems.add(f"{key} is {value!r}, wanted a positive integer")
        return None
    return value


def _optional(raw: Mapping[str, Any], key: str, problems: Problems) -> int | None:
    return None if raw.get(key) is None else _positive(raw, key, problems)


def _base_shape(model: Mapping[str, Any], problems: Problems) -> BaseShape:
    def size(key: str) -> int | None:
        return _optional(model, key, problems)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    groups, width = size("num_query_groups") or heads, size("kv_channels")
    if width is None and hidden and heads and hidden % heads == 0:
        width = hidden // heads
    if model.get("multi_latent_attention"):
        # Its factors tell the other widths.
        return BaseShape(
            hidden_size=hidden,
            ffn_size=size("ffn_hidden_size"),
            num_heads=heads,
            num_layers=size("num_layers"),
        )
    # Every configuration has a number of these, whether there is a delta net or not.
    pattern = str(model.get("hybrid_layer_pattern") or "")
    return BaseShape(
        delta_heads=size("linear_num_key_heads") if "G" in pattern else None,
        hidden_size=hidden,
        ffn_size=size("ffn_hidden_size"),
        q_size=heads * width if heads and width else None,
        kv_size=groups * width if groups and width else None,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=width,
        num_layers=size("num_layers"),
    )
