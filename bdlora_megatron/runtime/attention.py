"""Which attention the dynamic inference engine runs on a GPU; settled before a model is loaded.

Megatron-Core's engine calls flash-attention, takes the newest that it can import, and says nothing
where there is none until the first request ends the rank. Here the choice is made at the start,
with a sentence for what cannot work, and this package's Triton kernels where nothing else is there.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch

from bdlora_megatron.errors import ConfigError, MissingDependencyError, UnsupportedError

__all__ = ["Attention", "FlashAttention", "choose_attention", "find_attention", "use_attention"]

logger = logging.getLogger(__name__)

Kernels: TypeAlias = Literal["flash-attn 2", "flash-attn 3", "flash-attn 4", "triton"]

#: The oldest flash-attn that Megatron-Core's dynamic engine takes, and how to get it.
_OLDEST = (2, 7, 3)
_CURE = "pip install 'flash-attn>=2.7.3,<3' --no-build-isolation"
#: Where it was built for another torch, and its symbols are not found.
_REBUILD = f"{_CURE} --no-deps --force-reinstall --no-cache-dir --no-binary flash-attn"
#: flash-attn 2 reads a paged cache in blocks of so many positions, or a multiple.
_FLASH_2_BLOCK = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class FlashAttention:
    """What of flash-attention Megatron-Core has found.

    Attributes:
        two: The version of flash-attn 2; None where there is none, or none that can be imported.
        broken: Which version of it is installed and why it can't be imported, if that is so.
        three: Whether flash-attn 3, for Hopper, can be imported.
        four: Whether flash-attn-4 can be imported, by a Megatron-Core that looks for it.
        can_pin: Whether this Megatron-Core can be told which to take (since 0.19).
    """

    two: str | None = None
    broken: str | None = None
    three: bool = False
    four: bool = False
    can_pin: bool = False

    @classmethod
    def installed(cls) -> FlashAttention:
        """What the installed Megatron-Core has found on import."""
        from megatron.core.transformer import TransformerConfig, attention

        # Megatron-Core takes whatever goes wrong on importing it for its absence.
        there = attention.flash_attn_varlen_func is not None
        return cls(
            two=_flash_2_version() if there else None,
            broken=None if there else _why_broken(),
            three=attention.HAVE_FA3,
            four=getattr(attention, "HAVE_FA4", False),
            can_pin="flash_attention_version" in TransformerConfig.__dataclass_fields__,
        )

    @property
    def two_will_do(self) -> bool:
        """Whether flash-attn 2 is there and new enough."""
        return self.two is not None and _numbers(self.two) >= _OLDEST


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """What the engine will run.

    Attributes:
        kernels: Whose.
        settings: What the model's ``TransformerConfig`` must say so that Megatron-Core takes them.
        note: What whoever starts the server should know.
    """

    kernels: Kernels
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    note: str | None = None


def choose_attention(
    found: FlashAttention, *, capability: tuple[int, int], block_size: int
) -> Attention:
    """Choose among what is installed, for a GPU.

    Args:
        found: What is installed.
        capability: The GPU's compute capability, ``(8, 0)`` for A100.
        block_size: Positions in a block of the key-value cache.

    Returns:
        The choice.

    Raises:
        UnsupportedError: The GPU is older than A100, or flash-attn-4 stands in the way of what
            would run there and this Megatron-Core cannot be told otherwise.
        ConfigError: The cache's blocks are of a size that the kernels do not take.
    """
    if capability < (8, 0):
        major, minor = capability
        raise UnsupportedError(
            f"the GPU has compute capability {major}.{minor}; serving needs 8.0 (A100) or newer"
        )
    choice = _for_ampere(found) if capability < (9, 0) else _newest(found)
    if choice.kernels == "flash-attn 2" and block_size % _FLASH_2_BLOCK:
        raise ConfigError(
            f"block_size={block_size}; flash-attn 2 reads the cache in blocks of a multiple of "
            f"{_FLASH_2_BLOCK}: set block_size={_FLASH_2_BLOCK}"
        )
    return choice


def _newest(found: FlashAttention) -> Attention:
    """What Megatron-Core takes by itself, or Triton's where it would take nothing."""
    if found.four:
        return Attention(kernels="flash-attn 4")
    if found.three:
        return Attention(kernels="flash-attn 3")
    if found.two_will_do:
        return Attention(kernels="flash-attn 2")
    if found.broken is not None:
        wrong, cure = f"flash-attn {found.broken}", _REBUILD
    elif found.two is not None:
        wrong, cure = f"flash-attn is {found.two}, older than 2.7.3", _CURE
    else:
        wrong, cure = "flash-attention is not installed", _CURE
    return Attention(
        kernels="triton",
        note=f"{wrong}; attention runs in this package's own Triton kernels, which are slower. "
        f"To get it: {cure}",
    )


def _for_ampere(found: FlashAttention) -> Attention:
    """As ``_newest``, but flash-attn-4 does not read a paged cache before Hopper.

    Raises:
        UnsupportedError: It is there, and this Megatron-Core cannot be told to leave it.
    """
    if not found.four:
        return _newest(found)
    if not found.can_pin:
        raise UnsupportedError(
            "flash-attn-4 is installed and this Megatron-Core takes it before any other, but on "
            "this GPU it does not read a paged cache; pip uninstall flash-attn-4 and then "
            f"{_CURE}, or install megatron-core 0.19, which can be told to take flash-attn 2"
        )
    if found.two_will_do:
        return Attention(kernels="flash-attn 2", settings={"flash_attention_version": 2})
    return Attention(
        kernels="triton",
        note="flash-attn-4 is installed, which does not read a paged cache on this GPU, and "
        f"flash-attn 2 is not; attention runs in this package's own Triton kernels, which are "
        f"slower. To get it: {_CURE}",
    )


def find_attention(*, block_size: int) -> Attention:
    """Choose for this process's GPU and what is installed, and say so in the log.

    Args:
        block_size: Positions in a block of the key-value cache.

    Returns:
        The choice, for ``use_attention`` once the model is loaded with its settings.

    Raises:
        UnsupportedError: See ``choose_attention``; ConfigError likewise.
    """
    choice = choose_attention(
        FlashAttention.installed(),
        capability=torch.cuda.get_device_capability(),
        block_size=block_size,
    )
    if choice.note is not None:
        logger.warning(choice.note)
    logger.info("attention", extra={"kernels": choice.kernels})
    return choice


def use_attention(choice: Attention, dtype: torch.dtype) -> None:
    """Let Megatron-Core's engine run what was chosen, in this process.

    Args:
        choice: What ``find_attention`` gave.
        dtype: The model's type; flash-attention takes 16 bits only, so Triton's kernels stand in
            for float32.

    Raises:
        ConfigError: ``dtype`` is float64.
        MissingDependencyError: Triton's kernels are needed, and triton is not installed.
    """
    if dtype == torch.float64:
        raise ConfigError("dtype=float64 on a GPU; attention there takes float32 and 16-bit types")
    if choice.kernels != "triton":
        if dtype in (torch.float16, torch.bfloat16):
            return
        logger.warning("%s is for 16-bit types; Triton's kernels serve %s", choice.kernels, dtype)
    try:
        from bdlora_megatron.ops.paged_attention import (
            flash_attn_varlen_func,
            flash_attn_with_kvcache,
        )
    except ImportError as error:
        raise MissingDependencyError(
            f"neither flash-attention nor triton is installed, and attention needs one: {_CURE}"
        ) from error
    from megatron.core.transformer import attention

    for name, value in {
        "HAVE_FA3": False,
        "HAVE_FA4": False,
        "is_fa_min_version": lambda *args, **kwargs: True,
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_with_kvcache": flash_attn_with_kvcache,
    }.items():
        setattr(attention, name, value)


def _flash_2_version() -> str:
    """Of the installed package; its module's, where a build from source left no metadata."""
    try:
        return version("flash-attn")
    except PackageNotFoundError:
        return str(importlib.import_module("flash_attn").__version__)


def _why_broken() -> str | None:
    """The version that is installed and the error on importing it; None where there is none."""
    try:
        installed = version("flash-attn")
    except PackageNotFoundError:
        return None
    try:
        importlib.import_module("flash_attn").flash_attn_varlen_func  # noqa: B018
    except Exception as error:
        return f"{installed} is installed and cannot be imported ({error})"
    return f"{installed} is installed, and Megatron-Core has not found it"


def _numbers(text: str) -> tuple[int, ...]:
    """A version's leading numbers: ``2.7.4.post1`` is (2, 7, 4)."""
    numbers: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
