"""Megatron-Core's data parallelism and optimizer on the CPU."""

from __future__ import annotations

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from tests.harness import run_ranks
from tests.tp.models import tiny_config, tiny_model, tokens
from tests.tp.session import model_parallel

STEPS, LEARNING_RATE, CLIP = 3, 1e-2, 0.05


def _loss(model):
    inputs = tokens()
    return model(**inputs, labels=inputs["input_ids"].roll(-1, dims=1)).mean()


def _model(tp, sequence_parallel):
    config = tiny_config(tp, params_dtype=torch.float32, sequence_parallel=sequence_parallel)
    return tiny_model(config).float()


def _logits(model):
    return gather_from_tensor_model_parallel_region(model(**tokens())).detach()


def _megatron(rank, world_size, tp, sequence_parallel):
    with model_parallel(tp):
        model = _model(tp, sequence_parallel)
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        settings = OptimizerConfig(
            optimizer="adam", lr=LEARNING_RATE, weight_decay=0.0, clip_grad=CLIP
        )
        optimizer = get_megatron_optimizer(settings, [wrapped])
        norms = []
        for _ in range(STEPS):
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            _loss(wrapped).backward()
            finalize_model_grads([wrapped])
            stepped, norm, _ = optimizer.step()
            assert stepped
            norms.append(float(norm))
        return torch.tensor(norms), _logits(model)


def _torch(rank, world_size):
    with model_parallel(1):
        model = _model(1, sequence_parallel=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        norms = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            _loss(model).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
            optimizer.step()
        return torch.tensor(norms), _logits(model)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_megatrons_optimizer_trains_like_torchs(sequence_parallel):
    wanted_norms, wanted = run_ranks(1, _torch)[0]
    assert (wanted_norms > CLIP).all(), "clipping is exercised"
    # Two tensor-parallel ranks, twice, with the same data.
    for norms, logits in run_ranks(4, _megatron, 2, sequence_parallel):
        torch.testing.assert_close(norms, wanted_norms, rtol=1e-4, atol=0.0)
        # Adam divides by gradients that are almost zero, which magnifies their rounding.
        torch.testing.assert_close(logits, wanted, rtol=0.0, atol=2e-3)


def _untrained(rank, world_size):
    with model_parallel(1):
        return _logits(_model(1, sequence_parallel=False))


def test_training_moves_the_logits_by_more_than_the_tolerance():
    before, (_, after) = run_ranks(1, _untrained)[0], run_ranks(1, _torch)[0]
    assert (before - after).abs().max() > 0.1
