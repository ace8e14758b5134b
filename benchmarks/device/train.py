"""A training step through Megatron-Core's schedule, held to PEFT's gradients of every factor.

The reference is transformers and PEFT in fp64, on the same device. In bfloat16, PEFT's gradients in
that type say how far off they may be. Then the optimizer takes a step, which changes every factor.
"""

from __future__ import annotations

import math
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from bdlora_megatron.config import Layout
from bdlora_megatron.convert import read_peft
from bdlora_megatron.layers import LoadOptions, collect_adapter, load_adapter, lora_layers
from bdlora_megatron.train.config import from_mapping
from bdlora_megatron.train.data import Batch
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.schema import TrainConfig
from bdlora_megatron.train.step import Stepper, forward_backward
from benchmarks.device.models import ADAPTERS, VOCAB, make_adapter, make_base
from benchmarks.device.session import one_rank
from benchmarks.device.task import Outcome, Task, judged
from tests.tolerances import MODEL_GRADIENTS

__all__ = ["run"]

#: In float32, of the root mean square of the error and of the largest, over that of the gradient:
#: as the tests have it, of products that sum seven times as many terms.
_FLOAT32 = tuple(3 * allowed for allowed in MODEL_GRADIENTS)
#: In bfloat16, over the errors of PEFT's own.
_BFLOAT16 = 2.0
_INFINITE = (math.inf, math.inf)
_MICRO_BATCHES, _ROWS, _LENGTH = 3, 2, 48


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """An adapter, trained in one precision."""

    adapter: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.adapter}, {self.precision}"


_VARIANTS = tuple(
    _Variant(adapter=adapter, precision=precision)
    for precision in ("fp32", "bf16")
    for adapter in ("blocks4", "vanilla4")
)


def run(task: Task) -> Outcome:
    """Take a step with each variant; one that fails leaves the others their turn.

    Args:
        task: The part's time box.

    Returns:
        The loss and the largest errors by variant.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_base(root / "base")
        for variant in _VARIANTS:
            if task.is_short:
                break
            adapter = root / variant.adapter
            if not adapter.exists():
                make_adapter(root / "base", adapter, seed=1, **ADAPTERS[variant.adapter])
            try:
                found[variant.name] = _check(variant, root)
            except Exception:
                traceback.print_exc()
                found[variant.name] = {"wrong": traceback.format_exc()}
            task.keep(_outcome(found, unfinished=True))
    return _outcome(found)


def _check(variant: _Variant, root: Path) -> dict[str, Any]:
    batches = [_batch(seed) for seed in range(_MICRO_BATCHES)]
    config = _config(variant, root)
    with one_rank() as device:
        loss, gradients, changed = _step(variant, config, batches, root)
    wanted_loss, wanted = _reference(variant, batches, root, device=device)
    rms, largest = _worst(gradients, wanted)
    off = abs(loss - wanted_loss) / wanted_loss
    allowed = _FLOAT32
    if variant.precision == "bf16":
        _, rounded = _reference(variant, batches, root, device=device, dtype=torch.bfloat16)
        allowed = tuple(_BFLOAT16 * error for error in _worst(rounded, wanted))
    problems = {
        "not the factors that PEFT has": gradients.keys() != wanted.keys(),
        f"gradients are off by {rms:.1e}, {largest:.1e} at most": not (
            rms <= allowed[0] and largest <= allowed[1]
        ),
        f"the loss is {loss}, PEFT's {wanted_loss}": not off <= allowed[0],
        "the optimizer left some factors as they were": not changed,
    }
    return {
        "loss": loss,
        "factors": len(wanted),
        "gradients_off": rms,
        "gradients_off_at_most": largest,
        "allowed": allowed,
        "wrong": "; ".join(problem for problem, here in problems.items() if here) or None,
    }


def _config(variant: _Variant, root: Path) -> TrainConfig:
    settings = ADAPTERS[variant.adapter]
    if variant.adapter.startswith("blocks"):
        section = {"num_blocks": settings["use_bdlora"].nblocks, "rank": settings["r"]}
        peft = {"scheme": "bdlora", "bdlora": section}
    else:
        peft = {"scheme": "lora", "lora": {"rank": settings["r"]}}
    return from_mapping(
        {
            "model": {"hf_path": str(root / "base"), "seq_length": _LENGTH},
            "peft": peft,
            "dataset": {"train": "none"},
            "train": {
                "train_iters": 1,
                "global_batch_size": _MICRO_BATCHES * _ROWS,
                "micro_batch_size": _ROWS,
                "precision": variant.precision,
            },
            "optimizer": {"lr": 1e-3},
            "scheduler": {"lr_decay_style": "constant"},
            "checkpoint": {"save": str(root / "save")},
        }
    )


def _batch(seed: int) -> Batch:
    """Two rows of random tokens, the first of two examples; some tokens are not to be learnt."""
    generator = torch.Generator().manual_seed(seed)
    count, cut = _ROWS * _LENGTH, 11 + 7 * seed
    drawn = torch.randint(VOCAB, (count + 1,), generator=generator)
    learnt = torch.rand(count, generator=generator) < 0.3 + 0.2 * seed
    return Batch(
        tokens=drawn[None, :-1],
        labels=drawn[1:],
        learnt=learnt.nonzero()[:, 0],
        starts=torch.tensor([0, cut, _LENGTH, count], dtype=torch.int32),
        longest=_LENGTH,
    )


def _step(
    variant: _Variant, config: TrainConfig, batches: Sequence[Batch], root: Path
) -> tuple[float, dict[str, Tensor], bool]:
    """The loss, every factor's gradient, and whether a step then changes every factor."""
    model, _ = build_model(config)
    layout = Layout.BDLORA if config.peft.scheme == "bdlora" else Layout.HALF_SHARDED
    options = LoadOptions(layout=layout, trainable=True, dtype=torch.float32)
    load_adapter(model, read_peft(root / variant.adapter), options)
    stepper = Stepper(model, config)
    loss, _ = forward_backward(stepper.model, batches, config)
    factors = [
        factor.weight
        for _, layer in lora_layers(model)
        for plan in layer.adapter.plans
        for factor in layer.adapter.factors(plan)
    ]
    kept = [weight.main_grad.clone() for weight in factors]
    before = _named(model)
    stepper.train_step(0, batches)
    after = _named(model)
    changed = all(not torch.equal(after[name], weight) for name, weight in before.items())
    # Last: in another type, they would cost the factors the hooks by which gradients come.
    for weight, gradient in zip(factors, kept, strict=True):
        weight.data = gradient
    return loss, _named(model), changed


def _named(model: Any) -> dict[str, Tensor]:
    """What the factors hold, by PEFT's names."""
    return {
        f"base_model.model.model.{key}.lora_{letter}.default.weight": getattr(factors, letter)
        for key, factors in collect_adapter(model, "factors").modules.items()
        for letter in "AB"
    }


def _reference(
    variant: _Variant,
    batches: Sequence[Batch],
    root: Path,
    *,
    device: str,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, dict[str, Tensor]]:
    """PEFT's loss and gradients, of weights as rounded as the trained ones."""
    base: Any = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, root / variant.adapter, is_trainable=True)
    if variant.precision == "bf16":
        model = model.to(torch.bfloat16)
    model = model.to(device=device, dtype=dtype)
    total = sum(len(batch.learnt) for batch in batches)
    loss = sum(_losses(model, batches, device)) / total
    loss.backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads


def _losses(model: Any, batches: Sequence[Batch], device: str) -> Iterator[Any]:
    """Of each example by itself."""
    for batch in batches:
        on = batch.to(torch.device(device))
        learnt = torch.zeros_like(on.labels, dtype=torch.bool).index_fill_(0, on.learnt, True)
        for start, stop in pairwise(batch.starts.tolist()):
            logits = model(input_ids=on.tokens[:, start:stop]).logits[0]
            losses = torch.nn.functional.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)),
                on.labels[start:stop],
                reduction="none",
            )
            yield losses[learnt[start:stop]].sum()


def _worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, float]:
    """Over all factors; NaN, or a factor that is not there, counts as infinite."""
    errors = [_errors(found[name], wanted[name]) if name in found else _INFINITE for name in wanted]
    return max(error for error, _ in errors), max(largest for _, largest in errors)


def _errors(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    if not found.isfinite().all():
        return _INFINITE
    size = wanted.square().mean().sqrt()
    difference = found.double() - wanted
    return float(difference.square().mean().sqrt() / size), float(difference.abs().max() / size)


def _outcome(found: dict[str, Any], *, unfinished: bool = False) -> Outcome:
    wrong = {name: result for name, result in found.items() if result["wrong"]}
    device = "GPU" if torch.cuda.is_available() else "CPU"
    line = f"{len(found)} of {len(_VARIANTS)} variants ran on the {device}, {len(wrong)} wrong"
    for name, result in found.items():
        if name not in wrong:
            line += f"; {name}: gradients off by {result['gradients_off']:.1e}"
    state = judged(unfinished=unfinished, wrong=bool(wrong) or not found)
    notes = [
        f"- {name} is wrong: {result['wrong'].strip().splitlines()[-1]}"
        for name, result in wrong.items()
    ]
    return Outcome(state=state, line=line, found=found, notes=notes)
