"""Rotary embeddings as ``config.json`` describes them. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

__all__ = ["RopeSettings", "read_rope"]

RopeKind: TypeAlias = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSettings:
    """Rotary embedding.

    Attributes:
        kind: ``default``; ``linear``, where positions are divided by ``factor``; ``llama3`` and
            ``yarn``, where low frequencies are; or ``longrope``, where each frequency is by a
            number of its own.
        theta: Base of the frequencies.
        factor: How much the context was stretched; 1 for ``default`` and ``longrope``.
        partial: The part of each head that is rotated.
        original_positions: The context before it was stretched.
        low: Turns within that, below which a frequency is divided: ``low_freq_factor`` of
            ``llama3``, ``beta_slow`` of ``yarn``.
        high: Turns above which it is kept: ``high_freq_factor``, ``beta_fast``.
        truncate: ``yarn`` counts in whole dimensions.
        short_factor: ``longrope``'s numbers for sequences within ``original_positions``.
        attention_factor: What cosines and sines are multiplied by.
    """

    kind: RopeKind
    theta: float
    factor: float
    partial: float = 1.0
    original_positions: int = 0
    low: float = 0.0
    high: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """How many features of a head are rotated."""
        return int(head_dim * self.partial)


def read_rope(
    raw: Mapping[str, Any],
    malformed: list[str],
    unsupported: list[str],
    *,
    family: str = "llama",
    head_dim: int,
) -> RopeSettings:
    """Read the rotary settings of transformers 4 (``rope_theta``, ``rope_scaling``) or 5.

    Transformers 5 writes one ``rope_parameters`` instead.

    Args:
        raw: The object in ``config.json``.
        malformed: Impossible values are told by appending to it.
        unsupported: What is not computed here is told by appending to it.
        family: The file's ``model_type``.
        head_dim: Width of a head.

    Returns:
        The settings; meaningless if a problem was appended.
    """
    settings = _merged(raw, malformed)
    nested = [key for key, value in settings.items() if isinstance(value, Mapping)]
    if nested:
        unsupported.append(f"rope_parameters differ by layer type ({', '.join(nested)})")
        return RopeSettings(kind="default", theta=1.0, factor=1.0)
    reader = _Settings(raw, settings, malformed)
    theta = reader.positive("rope_theta", 10000.0)
    partial = reader.positive("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0)
    if partial != 1 and family != "phi3":
        unsupported.append(
            f"partial_rotary_factor={partial}; models of this family rotate whole heads"
        )
    kind = settings.get("rope_type", settings.get("type", "default"))
    if family == "phi3" and kind in {"su", "yarn"}:
        # What early Phi-3 files called it.
        kind = "longrope"
    if kind not in get_args(RopeKind):
        known = ", ".join(map(repr, get_args(RopeKind)))
        unsupported.append(f"rope_type={kind!r} is not supported; supported are {known}")
        kind = "default"
    found = RopeSettings(kind=kind, theta=theta, partial=partial, **reader.scaling(kind))
    rotated = found.rotary_dim(head_dim)
    if partial != 1 and (partial > 1 or rotated < 2 or rotated % 2):
        malformed.append(
            f"partial_rotary_factor={partial} of head_dim={head_dim} rotates {rotated} features; "
            "an even number of them, at most the head, is needed"
        )
    if kind == "longrope" and len(found.short_factor) != rotated // 2:
        malformed.append(
            f"short_factor of the rotary embedding has {len(found.short_factor)} numbers; "
            f"{rotated // 2} are needed"
        )
    return found


class _Settings:
    """Typed look-ups that note a problem and go on with a harmless value."""

    def __init__(
        self, raw: Mapping[str, Any], settings: Mapping[str, Any], malformed: list[str]
    ) -> None:
        self._raw = raw
        self._settings = settings
        self._malformed = malformed

    def positive(self, key: str, default: float | None = None) -> float:
        value = self._settings.get(key)
        return _positive(key, default if value is None else value, self._malformed)

    def scaling(self, kind: RopeKind) -> dict[str, Any]:
        """The fields that stretch the context."""
        if kind == "default":
            return {"factor": 1.0}
        if kind == "linear":
            return {"factor": self.positive("factor")}
        if kind == "longrope":
            return self._longrope()
        factor = self.positive("factor")
        if kind == "llama3":
            low, high = self.positive("low_freq_factor"), self.positive("high_freq_factor")
            return {"factor": factor, "low": low, "high": high, **self._original()}
        more = {"low": self.positive("beta_slow", 1.0), "high": self.positive("beta_fast", 32.0)}
        truncate = self._settings.get("truncate", True) is not False
        return {
            "factor": factor,
            "truncate": truncate,
            "attention_factor": self._attention_factor(self._yarn_scale(factor)),
            **more,
            **self._original(),
        }

    def _original(self) -> dict[str, int]:
        key = "original_max_position_embeddings"
        # A file's own outermost value counts, as in transformers.
        value = self._raw.get(key) or self._settings.get(key)
        value = value or self._raw.get("max_position_embeddings")
        return {"original_positions": int(_positive(key, value, self._malformed))}

    def _attention_factor(self, computed: float) -> float:
        return self.positive("attention_factor", computed)

    def _yarn_scale(self, factor: float) -> float:
        def scale(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        over, under = self._settings.get("mscale"), self._settings.get("mscale_all_dim")
        if over and under:
            return scale(self.positive("mscale")) / scale(self.positive("mscale_all_dim"))
        return scale(1.0)

    def _longrope(self) -> dict[str, Any]:
        numbers = self._settings.get("short_factor")
        if not isinstance(numbers, list):
            self._malformed.append(
                f"short_factor={numbers!r} of the rotary embedding; a list is needed"
            )
            numbers = []
        short = tuple(_positive("short_factor", number, self._malformed) for number in numbers)
        original = self._original()
        before = max(original["original_positions"], 2)
        longest = _positive(
            "max_position_embeddings", self._raw.get("max_position_embeddings"), self._malformed
        )
        factor = self.positive("factor", longest / before)
        computed = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(before))
        return {
            "factor": 1.0,
            "short_factor": short,
            "attention_factor": self._attention_factor(computed),
            **original,
        }


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
