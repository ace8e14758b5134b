"""What a fresh adapter looks like: one validated dataclass, free of Megatron and of devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, cast

import torch

from bdlora_megatron.decoder import DEFAULT_TARGETS
from bdlora_megatron.errors import ConfigError, nearest

__all__ = ["DEFAULT_TARGETS", "Layout", "LoRAConfig", "resolve"]

_DEFAULT_RANK = 16


def resolve(
    *, rank: int | None = None, alpha: float | None = None, num_blocks: int | None = None
) -> tuple[int, float]:
    """The rank and alpha that are meant where one of them is not set: the one rule for both.

    Args:
        rank: Total rank; when None 16, rounded up to a multiple of ``num_blocks``.
        alpha: Numerator of the scale; when None twice the rank.
        num_blocks: Diagonal blocks N; 1 when None.

    Returns:
        Rank and alpha, not checked yet.
    """
    blocks = max(num_blocks or 1, 1)
    known = -(-_DEFAULT_RANK // blocks) * blocks if rank is None else rank
    return known, 2.0 * known if alpha is None else alpha


class Layout(str, Enum):
    """How an adapter's two factors are split over tensor-parallel ranks."""

    BDLORA = "bdlora"
    """Block-diagonal along the sharded dimension: no collective of its own, 1/P of everything."""

    SLORA = "slora"
    """Vanilla LoRA, both factors split: one all-gather or all-reduce of the rank per layer."""

    HALF_SHARDED = "half_sharded"
    """Vanilla LoRA, one factor replicated: no forward collective, but a whole factor per rank."""

    @classmethod
    def _missing_(cls, value: object) -> Layout:
        choices = [layout.value for layout in cls]
        raise ConfigError(f"layout={value!r}; wanted one of {choices}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """The shape, scale and placement of a fresh adapter.

    Raises:
        ConfigError: A value is out of range, or two values disagree.
    """

    # ``resolve`` replaces None when the object is made, so that whoever reads them finds numbers.
    rank: int = cast("int", None)
    """Total rank r of one projection's update, over all blocks; when unset 16, rounded up to a
    multiple of ``num_blocks``."""

    alpha: float = cast("float", None)
    """Numerator of the scale, twice the rank when unset; the denominator is the *total* rank (see
    ``use_rslora``)."""

    use_rslora: bool = False
    """Scale by ``alpha / sqrt(rank)`` instead of ``alpha / rank``."""

    layout: Layout = Layout.BDLORA
    """How the factors are split over ranks."""

    num_blocks: int | None = None
    """Diagonal blocks N; the serving tensor-parallel size, or a multiple of it.

    Required for ``bdlora``; must stay unset for the vanilla layouts, whose N is 1.
    """

    dropout: float = 0.0
    """Probability of zeroing an input element on the adapter's path, in training."""

    target_modules: tuple[str, ...] = DEFAULT_TARGETS
    """Layer names, or wildcards over full names, such as ``*.layers.0.*.linear_qkv``."""

    exclude_modules: tuple[str, ...] = ()
    """Names or wildcards that are left out of what ``target_modules`` selects."""

    fused: bool = False
    """One A for a whole fused layer (q, k, v or gate, up), as NeMo's LoRA trains it."""

    regather_input: bool = False
    """Under sequence parallelism, gather the input again in backward instead of keeping it.

    Costs one all-gather per column layer in backward and saves the gathered activation.
    """

    dtype: torch.dtype | None = None
    """Type of the factors; the base layer's when unset."""

    invocation_tokens: tuple[int, ...] | None = None
    """Token ids from whose last occurrence in a text on the adapter acts (Activated LoRA); every
    token when unset. ``layers.act_on`` then tells the layers which tokens of a batch those are."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", Layout(self.layout))
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        rank, alpha = resolve(rank=self.rank, alpha=self.alpha, num_blocks=self.num_blocks)
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "alpha", alpha)
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank}; the rank must be at least 1")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"alpha={self.alpha}; alpha must be a finite number")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout}; wanted a probability in [0, 1)")
        if not self.target_modules:
            raise ConfigError(f"target_modules is empty; name layers such as {DEFAULT_TARGETS}")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ConfigError(f"dtype={self.dtype}; factors need a floating-point type")
        self._check_blocks()
        if self.invocation_tokens is not None:
            object.__setattr__(self, "invocation_tokens", tuple(self.invocation_tokens))
            self._check_invocation(self.invocation_tokens)

    def _check_invocation(self, tokens: tuple[Any, ...]) -> None:
        if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
            raise ConfigError(
                f"invocation_tokens={list(tokens)}; wanted token ids, at least one: what the base "
                "model's tokenizer makes of the invocation text"
            )

    def _check_blocks(self) -> None:
        if self.layout is not Layout.BDLORA:
            if self.num_blocks not in (None, 1):
                raise ConfigError(
                    f"num_blocks={self.num_blocks} with layout={self.layout.value!r}; only "
                    "'bdlora' has blocks: leave num_blocks unset or choose layout='bdlora'"
                )
            return
        if self.num_blocks is None or self.num_blocks < 1:
            raise ConfigError(
                f"num_blocks={self.num_blocks} with layout='bdlora'; set it to the tensor-parallel "
                "size you will serve at, or to a multiple of it"
            )
        if self.rank % self.num_blocks:
            lower = self.rank - self.rank % self.num_blocks
            choice = f"{lower} or " if lower else ""
            raise ConfigError(
                f"rank={self.rank} is not a multiple of num_blocks={self.num_blocks}; use rank "
                f"{choice}{lower + self.num_blocks}"
            )

    @property
    def blocks(self) -> int:
        """Diagonal blocks N; 1 for the vanilla layouts."""
        return self.num_blocks or 1

    @property
    def scale(self) -> float:
        """The factor s in ``s * B A``, from the total rank, as PEFT computes it."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """Build a config from plain values, refusing keys that do not exist.

        Args:
            values: Field names to values; ``layout`` may be a string, and a tuple may be a list.

        Returns:
            The validated config.

        Raises:
            ConfigError: A key is unknown (the nearest known one is named), or a value is wrong.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"unknown key {key!r} in the LoRA settings; {nearest(key, known)}"
                )
        return cls(**values)


def _names(field: str, value: Any) -> tuple[str, ...]:
    # A bare string is iterable too, and would silently become a tuple of letters.
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{field}={value!r}; wanted a list of names")
    return tuple(value)
