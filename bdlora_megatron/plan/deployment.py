"""The answer to "which layout, what rank, how much memory, how fast" for one deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bdlora_megatron.blocks import matching_rank
from bdlora_megatron.config import DEFAULT_TARGETS, Layout
from bdlora_megatron.convert.adapter.tables import format_bytes, format_table
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.models.shape import ModelShape
from bdlora_megatron.plan.hardware import Hardware
from bdlora_megatron.plan.memory import MemoryPlan, memory_plan
from bdlora_megatron.plan.model import check_targets
from bdlora_megatron.plan.predict import StepTime, predict_step
from bdlora_megatron.plan.training import TrainStep, predict_training
from bdlora_megatron.plan.work import AdapterLoad, Step

__all__ = ["Deployment", "LayoutPlan", "Plan", "Sweep", "make_plan", "make_sweep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """What is to be served, and on what.

    Attributes:
        model: The base model's name, for the report.
        shape: Its sizes.
        hardware: The machine.
        tp: Tensor-parallel ranks.
        lora_rank: Rank of the vanilla LoRA whose quality is wanted.
        adapters: Different adapters in one batch.
        requests: Requests that decode at once.
        context: Tokens of each, prompt and answer.
        prompt: Tokens of a prompt, for the prefill step.
        sequences: Sequences of a training step.
        sequence: Tokens of each.
        sequence_parallel: In training, norms and residuals are split along the sequence.
        target_modules: The layers that adapters change, by Megatron-Core's names.
    """

    model: str
    shape: ModelShape
    hardware: Hardware
    tp: int
    lora_rank: int = 16
    adapters: int = 8
    requests: int = 8
    context: int = 1024
    prompt: int = 512
    sequences: int = 1
    sequence: int = 2048
    sequence_parallel: bool = False
    target_modules: tuple[str, ...] = DEFAULT_TARGETS


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutPlan:
    """One layout in that deployment.

    Attributes:
        layout: How ranks hold the adapters.
        rank: Each adapter's total rank.
        memory: Bytes on one rank.
        decode: One step of all requests.
        prefill: One prompt.
        train: Forward, backward and AdamW over one adapter; None where the ranks share key-value
            heads, as training does not.
    """

    layout: Layout
    rank: int
    memory: MemoryPlan
    decode: StepTime
    prefill: StepTime
    train: StepTime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All layouts, and which to take.

    Attributes:
        deployment: What was asked.
        base_decode: The decoding step without adapters.
        base_prefill: The prefill step without adapters.
        base_train: Forward and backward of the frozen base model; None as for the layouts.
        layouts: BD-LoRA at the LoRA's parameters, then the layouts of unconverted adapters.
        unconverted: The faster of these, for adapters that are trained already.
    """

    deployment: Deployment
    base_decode: StepTime
    base_prefill: StepTime
    base_train: StepTime | None
    layouts: tuple[LayoutPlan, ...]
    unconverted: Layout

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it; times in seconds."""
        data = asdict(self)
        for layout in data["layouts"]:
            layout["layout"] = layout["layout"].value
        return {**data, "unconverted": self.unconverted.value}

    def table(self) -> str:
        """The report for people."""
        asked, slora = self.deployment, self._of(Layout.SLORA)
        header = (
            "layout",
            "rank",
            "adapter per rank",
            "adapters that fit",
            "decode ms",
            "of it sent for adapters",
            "prefill ms",
            "decode vs S-LoRA",
        )
        rows = [
            (
                plan.layout.value,
                str(plan.rank),
                format_bytes(plan.memory.adapter),
                f"{plan.memory.adapters_that_fit:,}",
                f"{1e3 * plan.decode.total:.2f}",
                f"{1e3 * plan.decode.adapter_communication:.2f}",
                f"{1e3 * plan.prefill.total:.1f}",
                f"{slora.decode.total / plan.decode.total:.2f}x",
            )
            for plan in self.layouts
        ]
        first = self.layouts[0].memory
        chosen = asked.target_modules
        some = "" if set(chosen) == set(DEFAULT_TARGETS) else f", on {', '.join(chosen)}"
        return (
            f"{asked.model} on {asked.tp} x {asked.hardware.name}; {asked.requests} requests of "
            f"{asked.context} tokens, {asked.adapters} adapters in a batch{some}\n"
            f"each rank: weights {format_bytes(first.weights)}, cache {format_bytes(first.cache)}; "
            f"base model alone: decode {1e3 * self.base_decode.total:.2f} ms, prefill of "
            f"{asked.prompt} tokens {1e3 * self.base_prefill.total:.1f} ms\n\n"
            f"{format_table(header, rows)}\n\n{self._training()}\n\n{self._advice()}"
        )

    def _training(self) -> str:
        asked, base, slora = self.deployment, self.base_train, self._of(Layout.SLORA).train
        if base is None or slora is None:
            own = [size for size in range(1, asked.tp) if _trains(asked.shape, size)]
            return (
                f"training: not on {asked.tp} ranks, which share {asked.shape.num_kv_heads} "
                f"key-value heads; on {', '.join(map(str, own))}"
            )
        header = ("layout", "rank", "train ms", "sent for adapters", "AdamW", "train vs S-LoRA")
        rows = [
            (
                plan.layout.value,
                str(plan.rank),
                f"{1e3 * train.total:.1f}",
                f"{1e3 * train.adapter_communication:.2f}",
                f"{1e3 * train.optimizer:.2f}",
                f"{slora.total / train.total:.2f}x",
            )
            for plan in self.layouts
            if (train := plan.train) is not None
        ]
        split = "on" if asked.sequence_parallel else "off"
        return (
            f"a training step of {asked.sequences} x {asked.sequence} tokens, one adapter, nothing "
            f"recomputed, sequence parallelism {split}; frozen base model alone: "
            f"{1e3 * base.total:.1f} ms\n\n{format_table(header, rows)}"
        )

    def _of(self, layout: Layout) -> LayoutPlan:
        return next(plan for plan in self.layouts if plan.layout is layout)

    def _advice(self) -> str:
        asked, blocked = self.deployment, self.layouts[0]
        if blocked.memory.free == 0:
            return (
                "The base model and its cache do not leave room for adapters: use more ranks, "
                "fewer requests or a shorter context."
            )
        return (
            f"New adapters: train BD-LoRA with num_blocks={asked.tp}, rank={blocked.rank} (about "
            f"the parameters of a LoRA of rank {asked.lora_rank}).\n"
            f"Adapters that exist: serve them as they are in layout {self.unconverted.value}, or "
            f"see what `bdlora convert SRC --for-tp {asked.tp}` says of theirs.\n"
            "Times are predictions of a model, not measurements; kernels and collectives are "
            "taken not to overlap."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """One deployment under several numbers of requests.

    Attributes:
        plans: One for each number, in increasing order.
    """

    plans: tuple[Plan, ...]

    def to_dict(self) -> dict[str, Any]:
        """Each plan as JSON takes it."""
        return {"plans": [plan.to_dict() for plan in self.plans]}

    def table(self) -> str:
        """The plan of the most requests, and a table over all numbers before it."""
        most = self.plans[-1]
        header = (
            "requests",
            "adapters among them",
            "base ms",
            *(f"{plan.layout.value} {plan.rank} ms" for plan in most.layouts),
            "BD-LoRA vs S-LoRA",
            "unconverted: use",
            "BD-LoRA that fit",
        )
        rows = [
            (
                str(plan.deployment.requests),
                str(min(plan.deployment.adapters, plan.deployment.requests)),
                *(
                    f"{1e3 * step.total:.2f}"
                    for step in (plan.base_decode, *(found.decode for found in plan.layouts))
                ),
                f"{plan.layouts[-1].decode.total / plan.layouts[0].decode.total:.2f}x",
                plan.unconverted.value,
                f"{plan.layouts[0].memory.adapters_that_fit:,}",
            )
            for plan in self.plans
        ]
        return f"a decoding step by requests\n\n{format_table(header, rows)}\n\n{most.table()}"


def make_sweep(deployment: Deployment, requests: Sequence[int]) -> Sweep:
    """Predict every layout of a deployment under several numbers of requests.

    Args:
        deployment: What is to be served, and on what; its own number of requests is not used.
        requests: The numbers; each counts once.

    Raises:
        ConfigError: As of ``make_plan``, or there is no number.
    """
    if not requests:
        raise ConfigError("requests=(); wanted one number at least")
    asked = [replace(deployment, requests=number) for number in sorted(set(requests))]
    return Sweep(plans=tuple(make_plan(one) for one in asked))


def make_plan(deployment: Deployment) -> Plan:
    """Predict every layout of a deployment.

    Args:
        deployment: What is to be served, and on what.

    Raises:
        ConfigError: A number is not positive, a target is not known, or layers and ranks do not
            divide.
    """
    asked = deployment
    _check(asked)
    served, trains = asked.shape.for_serving(asked.tp), _trains(asked.shape, asked.tp)
    decode = Step(tokens=asked.requests, context=asked.context)
    # A prompt's tokens see half of it on average.
    prefill = Step(tokens=asked.prompt, context=asked.prompt // 2, reads_cache=False)
    train = TrainStep(
        sequences=asked.sequences,
        length=asked.sequence,
        sequence_parallel=asked.sequence_parallel,
    )
    targets = asked.target_modules
    blocked_rank = matching_rank(
        asked.shape.module_shapes(targets), lora_rank=asked.lora_rank, num_blocks=asked.tp
    )
    layouts = []
    for layout in (Layout.BDLORA, Layout.HALF_SHARDED, Layout.SLORA):
        rank = blocked_rank if layout is Layout.BDLORA else asked.lora_rank
        one = AdapterLoad(layout=layout, rank=rank, target_modules=targets)
        many = replace(one, distinct=min(asked.adapters, asked.requests))
        layouts.append(
            LayoutPlan(
                layout=layout,
                rank=rank,
                memory=memory_plan(
                    served,
                    one,
                    asked.hardware.device,
                    asked.tp,
                    requests=asked.requests,
                    context=asked.context,
                ),
                decode=predict_step(served, decode, asked.hardware, asked.tp, many),
                prefill=predict_step(served, prefill, asked.hardware, asked.tp, one),
                train=(
                    predict_training(asked.shape, train, asked.hardware, asked.tp, one)
                    if trains
                    else None
                ),
            )
        )
    return Plan(
        deployment=asked,
        base_decode=predict_step(served, decode, asked.hardware, asked.tp),
        base_prefill=predict_step(served, prefill, asked.hardware, asked.tp),
        base_train=(
            predict_training(asked.shape, train, asked.hardware, asked.tp) if trains else None
        ),
        layouts=tuple(layouts),
        unconverted=min(layouts[1:], key=lambda plan: plan.decode.total).layout,
    )


def _trains(shape: ModelShape, tp: int) -> bool:
    try:
        shape.check_tp(tp)
    except ConfigError:
        return False
    return True


def _check(asked: Deployment) -> None:
    names = (
        "tp",
        "lora_rank",
        "adapters",
        "requests",
        "context",
        "prompt",
        "sequences",
        "sequence",
    )
    wrong = [f"{name}={getattr(asked, name)}" for name in names if getattr(asked, name) < 1]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}; all must be positive")
    check_targets(asked.target_modules)
