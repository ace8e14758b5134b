"""Rotary embeddings as ``config.json`` describes them, and which of them Megatron-Core has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["RopeSettings", "read_rope"]

#: Megatron-Core writes these into its code; every Llama from 3.1 on has them.
_LLAMA3_FIXED = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSettings:
    """Rotary embedding.

    Attributes:
        kind: ``default``; ``linear``, where positions are divided by ``factor``; or ``llama3``,
            where low frequencies are.
        theta: Base of the frequencies.
        factor: How much the context was stretched; 1 for ``default``.
    """

    kind: Literal["default", "linear", "llama3"]
    theta: float
    factor: float


def read_rope(raw: Mapping[str, Any], malformed: list[str], unsupported: list[str]) -> RopeSettings:
    """Read the rotary settings of transformers 4 (``rope_theta``, ``rope_scaling``) or 5.

    Transformers 5 writes one ``rope_parameters`` instead.

    Args:
        raw: The object in ``config.json``.
        malformed: Impossible values are told by appending to it.
        unsupported: What Megatron-Core cannot do is told by appending to it.

    Returns:
        The settings; meaningless if a problem was appended.
    """
    settings = _merged(raw, malformed)
    nested = [key for key, value in settings.items() if isinstance(value, Mapping)]
    if nested:
        unsupported.append(f"rope_parameters differ by layer type ({', '.join(nested)})")
        return RopeSettings(kind="default", theta=1.0, factor=1.0)
    theta = _positive("rope_theta", settings.get("rope_theta", 10000.0), malformed)
    partial = settings.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in {None, 1.0}:
        unsupported.append(f"partial_rotary_factor={partial}; only whole heads are rotated here")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return RopeSettings(kind="default", theta=theta, factor=1.0)
    factor = _positive("factor", settings.get("factor"), malformed)
    if kind == "linear":
        return RopeSettings(kind="linear", theta=theta, factor=factor)
    if kind != "llama3":
        unsupported.append(
            f"rope_type={kind!r} is not supported; supported are 'default', 'linear' and 'llama3'"
        )
    for key, wanted in _LLAMA3_FIXED.items() if kind == "llama3" else ():
        if settings.get(key) != wanted:
            unsupported.append(
                f"rope_type='llama3' with {key}={settings.get(key)!r}; Megatron-Core has {wanted} "
                "built in"
            )
    return RopeSettings(kind="llama3", theta=theta, factor=factor)


def _merged(raw: Mapping[str, Any], malformed: list[str]) -> dict[str, Any]:
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, Mapping):
            malformed.append(f"{key}={value!r}; an object is needed")
            return {}
    # Both are there where a file was written for both versions, and then they agree.
    differing = [key for key, value in (old or {}).items() if new and new.get(key) != value]
    if differing:
        malformed.append(
            f"rope_parameters and rope_scaling differ in {', '.join(differing)}; remove one of them"
        )
    flat = {"rope_theta": raw["rope_theta"]} if raw.get("rope_theta") is not None else {}
    return {**flat, **(old or {}), **(new or {})}


def _positive(key: str, value: Any, malformed: list[str]) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
        return float(value)
    malformed.append(f"{key}={value!r} of the rotary embedding; a positive number is needed")
    return 1.0
