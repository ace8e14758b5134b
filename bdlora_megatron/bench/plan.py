"""What is measured: base and layouts, at several sizes of step, on links of several latencies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from bdlora_megatron.config import DEFAULT_TARGETS, Layout
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.models.shape import ModelShape
from bdlora_megatron.plan.model import PRESETS, check_targets

__all__ = ["MODELS", "BenchPlan", "Phase", "Setting", "Variant"]

Phase = Literal["decode", "mixed", "prefill", "train"]

#: Sizes for random weights. ``small`` divides by 2, 3 and 4 ranks.
MODELS = {
    "small": ModelShape(
        num_layers=4,
        hidden_size=768,
        ffn_size=2304,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        vocab_size=4092,
        tied=True,
    ),
    **PRESETS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One contender.

    Attributes:
        layout: The adapter's; None for the base model alone.
        rank: The adapter's total rank.
        bridge: Megatron-Bridge's own ``LoRA``, in its own layers.
    """

    layout: Layout | None = None
    rank: int = 0
    bridge: bool = False

    @property
    def label(self) -> str:
        """What a table calls it."""
        if self.bridge:
            return f"bridge {self.rank}"
        return "base" if self.layout is None else f"{self.layout.value} {self.rank}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One step on one link.

    Attributes:
        phase: ``decode`` a token for each of ``batch`` requests that have ``length`` before it,
            ``mixed`` the same with adapters from slots, ``prefill`` ``batch`` prompts of
            ``length``, or ``train`` on ``batch`` sequences of ``length``: forward, backward and
            the adapter's AdamW.
        batch: Requests.
        length: Tokens.
        latency_s: Added to every collective.
        adapters: Different adapters in a mixed step, which the requests take in turn; None in all
            other steps, where there is one.
    """

    phase: Phase
    batch: int
    length: int
    latency_s: float = 0.0
    adapters: int | None = None

    @property
    def step(self) -> tuple[Phase, int, int, int | None]:
        """The step, without the link."""
        return self.phase, self.batch, self.length, self.adapters

    @property
    def decodes(self) -> bool:
        """Each request has ``length`` tokens in the cache and gets one more."""
        return self.phase in ("decode", "mixed")

    @property
    def new(self) -> int:
        """Tokens of each request that the step runs."""
        return 1 if self.decodes else self.length

    @property
    def cached(self) -> int:
        """Tokens of each request that lie in the cache before it."""
        return self.length if self.decodes else 0

    @property
    def label(self) -> str:
        """What a table calls the step, without the link."""
        label = f"{self.phase} {self.batch} x {self.length}"
        return label if self.adapters is None else f"{label}, U = {self.adapters}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchPlan:
    """A whole run.

    Attributes:
        model: A name in ``MODELS``.
        layers: Decoder layers instead of the model's own number.
        tp: Tensor-parallel ranks.
        ranks: Ranks r of vanilla LoRA. BD-LoRA runs at 2r and at 4r, as the paper pairs them.
        decode: Batch and context of decoding steps.
        mixed: Batch and context of decoding steps with adapters from slots.
        adapters: How many different ones; a mixed step runs with each number that it has requests
            for.
        prefill: Batch and length of prompts.
        train: Batch and length of training steps.
        latencies_s: Added to every collective.
        repeats: Times that each step is measured.
        warmup: Rounds before them.
        bridge: Whether Megatron-Bridge's LoRA takes part.
        target_modules: The layers that every contender's adapters change, of ``DEFAULT_TARGETS``.
    """

    model: str = "small"
    layers: int | None = None
    tp: int = 2
    ranks: tuple[int, ...] = (16, 64)
    decode: tuple[tuple[int, int], ...] = ((1, 128), (8, 128), (32, 128))
    mixed: tuple[tuple[int, int], ...] = ((32, 128),)
    adapters: tuple[int, ...] = (1, 8, 32)
    prefill: tuple[tuple[int, int], ...] = ((1, 64), (1, 256))
    train: tuple[tuple[int, int], ...] = ((1, 64), (2, 128))
    latencies_s: tuple[float, ...] = (0.0, 2e-4, 1e-3)
    repeats: int = 7
    warmup: int = 1
    bridge: bool = False
    target_modules: tuple[str, ...] = DEFAULT_TARGETS

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError(f"model={self.model!r}; known models: {', '.join(MODELS)}")
        if self.tp < 2:
            raise ConfigError(f"tp={self.tp}; layouts differ from two ranks on")
        if self.repeats < 1 or self.warmup < 0 or (self.layers is not None and self.layers < 1):
            raise ConfigError("repeats and layers must be at least 1, and warmup at least 0")
        sizes = self.sizes()
        wrong = [size for size in sizes if min(size) < 1]
        if wrong or not sizes:
            raise ConfigError(f"steps of {wrong or 'no size'}; wanted batch and length of each")
        most = max((batch for batch, _ in self.mixed), default=0)
        off = [number for number in self.adapters if not 1 <= number <= most]
        if most and (off or not self.adapters):
            raise ConfigError(
                f"adapters={self.adapters} in mixed steps of {most} requests; wanted some numbers "
                f"from 1 to {most}"
            )
        if min(self.latencies_s, default=-1.0) < 0:
            raise ConfigError(f"latencies {self.latencies_s}; wanted at least one, none negative")
        bad = [rank for rank in self.ranks if rank < 1 or rank % self.tp]
        if bad or not self.ranks:
            raise ConfigError(
                f"ranks {bad or 'none'} with tp={self.tp}; each must be a multiple of {self.tp}"
            )
        check_targets(self.target_modules)
        self.shape.check_tp(self.tp)

    @property
    def shape(self) -> ModelShape:
        """The model's sizes, with the chosen number of layers."""
        shape = MODELS[self.model]
        layers = self.layers or shape.num_layers
        fields = {name: getattr(shape, name) for name in shape.__slots__}
        return ModelShape(**{**fields, "num_layers": layers})

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Batch and length of every step."""
        return (*self.decode, *self.mixed, *self.prefill, *self.train)

    def variants(self) -> tuple[Variant, ...]:
        """The base model, and each layout at each rank."""
        variants = [Variant()]
        for rank in self.ranks:
            variants += [
                Variant(layout=Layout.BDLORA, rank=2 * rank),
                Variant(layout=Layout.BDLORA, rank=4 * rank),
                Variant(layout=Layout.HALF_SHARDED, rank=rank),
                Variant(layout=Layout.SLORA, rank=rank),
            ]
            if self.bridge:
                variants.append(Variant(rank=rank, bridge=True))
        return tuple(dict.fromkeys(variants))

    def settings(self) -> tuple[Setting, ...]:
        """Every step on every link."""
        steps = tuple(self._steps())
        return tuple(
            replace(step, latency_s=latency)
            for latency, step in itertools.product(self.latencies_s, steps)
        )

    def pairs(self) -> Iterator[tuple[Setting, Variant]]:
        """Every setting with each contender that can take its step.

        Megatron-Bridge's layers hold one adapter, so that they take no mixed step.
        """
        for setting, variant in itertools.product(self.settings(), self.variants()):
            if not (variant.bridge and setting.adapters):
                yield setting, variant

    def _steps(self) -> Iterator[Setting]:
        for batch, length in self.decode:
            yield Setting(phase="decode", batch=batch, length=length)
        for (batch, length), number in itertools.product(self.mixed, self.adapters):
            if number <= batch:
                yield Setting(phase="mixed", batch=batch, length=length, adapters=number)
        for batch, length in self.prefill:
            yield Setting(phase="prefill", batch=batch, length=length)
        for batch, length in self.train:
            yield Setting(phase="train", batch=batch, length=length)
