"""What ``quantization_config`` of a ``config.json`` says, and which of it is read. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["read_quantization"]

_BITSANDBYTES = (
    "load it with transformers, call model.dequantize() and save_pretrained() a new folder, or "
    "take the model that it was made from"
)
_MADE_FROM = "take the unquantised model that it was made from, or its FP8 version"
_WAYS = {"bitsandbytes": _BITSANDBYTES, "awq": _MADE_FROM, "gptq": _MADE_FROM}


def read_quantization(raw: Any, unsupported: list[str]) -> tuple[int, int] | None:
    """What a config's ``quantization_config`` says.

    Args:
        raw: The object, or None.
        unsupported: What cannot be dequantised here is told by appending to it.

    Returns:
        Rows and columns of a block that has a scale; (0, 0) where scales are for rows or the whole
        tensor; None where nothing is quantised.
    """
    if raw is None:
        return None
    settings: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    method = settings.get("quant_method")
    if method == "fp8":
        return _block(settings.get("weight_block_size"), unsupported)
    if method == "fbgemm_fp8":
        return (0, 0)
    if method == "compressed-tensors":
        return _compressed(settings, unsupported)
    way = _WAYS.get(str(method), "use the model's unquantised weights")
    unsupported.append(
        f"quantization_config has quant_method={method!r}; of quantised weights only FP8 is read "
        f"('fp8', 'compressed-tensors', 'fbgemm_fp8'): {way}"
    )
    return None


def _compressed(settings: Mapping[str, Any], unsupported: list[str]) -> tuple[int, int]:
    groups = settings.get("config_groups") or {}
    found = {(0, 0)}
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = (group or {}).get("weights") or {}
        kind = (weights.get("type"), weights.get("num_bits"))
        if kind != ("float", 8) or weights.get("strategy") not in ("tensor", "channel", "block"):
            unsupported.append(
                f"quantization_config (compressed-tensors) has weights of type {kind[0]!r} with "
                f"{kind[1]!r} bits and strategy {weights.get('strategy')!r}; only 8-bit floats "
                f"with a scale for the tensor, each channel or each block are read: {_MADE_FROM}"
            )
        elif weights["strategy"] == "block":
            found.add(_block(weights.get("block_structure"), unsupported))
    if len(found) > 2:
        unsupported.append(f"quantization_config has blocks of several sizes; {_MADE_FROM}")
    return max(found)


def _block(value: Any, unsupported: list[str]) -> tuple[int, int]:
    if value is None:
        return (0, 0)
    if isinstance(value, list) and len(value) == 2 and all(
        isinstance(size, int) and size > 0 for size in value
    ):  # fmt: skip
        return (value[0], value[1])
    unsupported.append(
        f"quantization_config has blocks of {value!r}; two positive numbers are needed, such as "
        "[128, 128]"
    )
    return (0, 0)
