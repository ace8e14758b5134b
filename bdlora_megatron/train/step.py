"""One step of training on Megatron-Core: its schedule, data parallelism, optimizer and scheduler.

The loss of a step is the mean over every token of the global batch that is to be learnt, however
the tokens are spread over micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from bdlora_megatron.errors import BDLoRAError, ConfigError, MissingDependencyError
from bdlora_megatron.layers import act_on
from bdlora_megatron.runtime import device
from bdlora_megatron.train.attention import packed_seq_params
from bdlora_megatron.train.data import Batch
from bdlora_megatron.train.loss import token_losses
from bdlora_megatron.train.model import model_chunks
from bdlora_megatron.train.schema import TrainConfig

__all__ = ["DivergedError", "StepResult", "Stepper", "forward_backward", "mean_loss"]


class DivergedError(BDLoRAError, ArithmeticError):
    """The loss or the gradient is no longer a finite number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step did; the same on every rank.

    Attributes:
        loss: Mean over the step's tokens to learn, before the update.
        tokens: How many those were.
        grad_norm: Norm of all gradients before clipping; None where clipping is off.
        lr: Learning rate of the update.
    """

    loss: float
    tokens: int
    grad_norm: float | None
    lr: float


class Stepper:
    """A model with adapters, and what trains them.

    Attributes:
        model: The wrapped model, or a ``ModuleList`` of this stage's wrapped chunks.
        optimizer: Megatron-Core's optimizer over the factors.
        scheduler: Megatron-Core's schedule, counted in steps.
    """

    def __init__(self, model: Any, config: TrainConfig) -> None:
        """Wrap a model whose adapters are in place.

        Args:
            model: This rank's part; only adapters require gradients.
            config: The run's settings.

        Raises:
            ConfigError: The optimizer is to be distributed, and a pipeline stage has nothing to
                train; raised on every rank.
            MissingDependencyError: On a GPU it needs a library that is not installed.

        Collectives:
            With the distributed optimizer, one all-reduce of one number over all ranks.
        """
        self._config = config
        if config.optimizer.use_distributed_optimizer:
            _check_split(model)
        chunks = [_wrapped(chunk, config) for chunk in model_chunks(model)]
        several = len(chunks) > 1
        self.model = nn.ModuleList(chunks) if several else chunks[0]
        self.optimizer = get_megatron_optimizer(_optimizer_config(config), chunks)
        self.scheduler = _scheduler(self.optimizer, config)
        no_sync = [chunk.no_sync for chunk in chunks]
        for chunk in chunks:
            settings = chunk.config
            settings.grad_scale_func = self.optimizer.scale_loss
            settings.finalize_model_grads_func = finalize_model_grads
            settings.no_sync_func = no_sync if several else no_sync[0]

    def train_step(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """Compute one step and update the factors.

        Args:
            step: The step's number, from 0. Dropout draws from the seed and this number alone.
            batches: This rank's micro-batches.

        Returns:
            What came of it.

        Raises:
            DivergedError: Loss or gradient is not finite; the factors were not updated.

        Collectives: those of the model, forward and backward; one all-reduce of all factors'
            gradients over data-parallel ranks, in whose place the distributed optimizer has one
            reduce-scatter of them and one all-gather of the factors; a few of one number (tokens,
            norm, loss).
        """
        # Not a state to be saved: a resumed run draws what it would have drawn.
        model_parallel_cuda_manual_seed(self._config.rng.seed + step)
        self.model.train()
        for chunk in model_chunks(self.model):
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, tokens = forward_backward(self.model, batches, self._config)
        if not math.isfinite(loss):
            raise DivergedError(_diverged("loss", loss, step))
        # Not from a parameter group: a pipeline stage may hold no adapter and have none.
        lr = float(self.scheduler.get_lr({}))
        _, norm, _ = self.optimizer.step()
        if norm is not None and not math.isfinite(norm):
            raise DivergedError(_diverged("gradient's norm", norm, step))
        self.scheduler.step(increment=1)
        norm = None if norm is None else float(norm)
        return StepResult(loss=loss, tokens=tokens, grad_norm=norm, lr=lr)


def _wrapped(chunk: Any, config: TrainConfig) -> Any:
    return DistributedDataParallel(
        chunk.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        ),
        Float16Module(chunk.config, chunk) if config.train.precision == "bf16" else chunk,
    )


def mean_loss(model: Any, batches: Sequence[Batch], config: TrainConfig) -> float:
    """The mean loss over tokens to learn, without dropout and without a gradient.

    Args:
        model: The model, wrapped or not.
        batches: This rank's share of the data; the same number on every rank.
        config: The run's settings.

    Returns:
        The mean over all ranks' tokens, on every rank.

    Collectives: those of the model's forward pass; two of two numbers.
    """
    model.eval()
    loss, _ = forward_backward(model, batches, config, forward_only=True)
    return loss


def forward_backward(
    model: Any, batches: Sequence[Batch], config: TrainConfig, *, forward_only: bool = False
) -> tuple[float, int]:
    """Run micro-batches through Megatron-Core's schedule.

    Args:
        model: The model; wrapped, where gradients are wanted.
        batches: This rank's micro-batches, whole; the same number on every rank.
        config: The run's settings.
        forward_only: Leave the backward pass out.

    Returns:
        The mean loss over all ranks' tokens to learn, and how many they are. Gradients, of that
        mean, are left in each parameter's ``main_grad``.

    Collectives: those of the model; one all-reduce of the gradients over data-parallel ranks, or
        one reduce-scatter with the distributed optimizer; some of one or two numbers.
    """
    where, chunks = device(), model_chunks(model)

    def stream() -> Iterator[Batch]:
        return (batch.on_context_rank(*_context()).to(where) for batch in batches)

    outputs = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[stream() for _ in chunks] if len(chunks) > 1 else stream(),
        model=chunks,
        num_microbatches=len(batches),
        seq_length=config.model.seq_length * config.train.micro_batch_size,
        # The rows of a micro-batch stand one after another.
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return _over_ranks(outputs, where)


def _context() -> tuple[int, int]:
    """This rank's number among context-parallel ranks, and how many they are."""
    return (
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
    )


def _forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    batch, inner = next(batches), get_attr_wrapped_model(model, "decoder", return_model_obj=True)
    if batch.acts is not None:
        # A stage of several is refused with recomputing, where this would matter.
        act_on(inner, batch.acts, in_turn=True)
    with _without_logits(inner):
        hidden = model(batch.tokens, None, None, packed_seq_params=packed_seq_params(batch))
    return hidden, partial(_loss, inner, batch)


@contextmanager
def _without_logits(model: Any) -> Iterator[None]:
    """Let a last stage's model return what its decoder gives, as an earlier stage's does."""
    last, model.post_process = model.post_process, False
    try:
        yield
    finally:
        model.post_process = last


def _loss(model: Any, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, number of tokens, and both for the record; Megatron-Core divides when all are known."""
    total = token_losses(model, hidden, batch.labels, batch.learnt).sum()
    tokens = torch.tensor(len(batch.learnt), device=total.device)
    return total, tokens.int(), torch.stack([total.detach(), tokens.to(total.dtype)])


def _over_ranks(outputs: Sequence[Tensor], where: torch.device) -> tuple[float, int]:
    """Mean loss and number of tokens, on every rank."""
    sums = torch.zeros(2, dtype=torch.float64, device=where)
    if parallel_state.is_pipeline_last_stage():
        for output in outputs:
            sums += output
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(sums, group=group)
    torch.distributed.broadcast(
        sums,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    total, tokens = sums.tolist()
    return total / max(tokens, 1.0), int(tokens)


def _optimizer_config(config: TrainConfig) -> OptimizerConfig:
    optimizer, half = config.optimizer, config.train.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
    )


def _check_split(model: Any) -> None:
    if torch.cuda.is_available() and not distrib_optimizer.HAVE_APEX_OR_TE:
        raise MissingDependencyError(
            "optimizer.use_distributed_optimizer is true; on GPUs Megatron-Core loads its state "
            "into Transformer Engine's or Apex's Adam only: pip install 'bdlora-megatron[te]', or "
            "leave the setting out"
        )
    trains = torch.tensor(int(any(p.requires_grad for p in model.parameters())), device=device())
    torch.distributed.all_reduce(trains, op=torch.distributed.ReduceOp.MIN)
    if not trains:
        raise ConfigError(
            "optimizer.use_distributed_optimizer is true, and a pipeline stage has no adapter, for "
            "which Megatron-Core saves no such optimizer; let target_modules reach every stage, or "
            "leave the setting out"
        )


def _scheduler(optimizer: Any, config: TrainConfig) -> OptimizerParamScheduler:
    scheduler, decay = config.scheduler, config.optimizer.weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=scheduler.lr_warmup_iters,
        lr_decay_steps=scheduler.lr_decay_iters or max(config.steps, 1),
        lr_decay_style=scheduler.lr_decay_style,
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # The settings decide; whether they are those of the checkpoint is checked by whoever loads.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _diverged(what: str, value: float, step: int) -> str:
    return (
        f"the {what} of step {step + 1} is {value}; lower optimizer.lr or lengthen "
        "scheduler.lr_warmup_iters, and resume from the last checkpoint"
    )
