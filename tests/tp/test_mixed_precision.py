"""Mixed precision as Megatron-Core and NeMo do it, against the whole model in fp64.

Either the model is sixteen bits wide and the optimizer keeps float32 copies (Megatron-Core's
``Float16Module`` and ``Float16OptimizerWithFloat16Params``), or parameters are float32 and products
run under torch's autocast (NeMo's ``precision=bf16``).
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from bdlora_megatron.config import Layout, LoRAConfig
from bdlora_megatron.layers import apply_lora, collect_adapter, lora_layers
from tests.harness import run_ranks
from tests.tolerances import MODEL_BFLOAT16, TOLERANCES, assert_close
from tests.tp.layer_cases import (
    Case,
    Reference,
    build_base,
    build_layer,
    local_dx,
    local_input,
    local_output,
)
from tests.tp.models import randomize_adapters, tiny_config, tiny_model, tokens
from tests.tp.session import model_parallel

LAYERS = ("linear_qkv", "linear_fc1", "linear_proj", "linear_fc2")
BF16 = torch.bfloat16
LEARNING_RATE = 1e-3


def _autocast_cases():
    """Every layer and layout: with what the base is held in, and what the factors are."""
    types = [(torch.float32, torch.float32), (BF16, torch.float32), (BF16, BF16)]
    for layer, layout, sequence_parallel, (base, factors) in product(
        LAYERS, Layout, (False, True), types
    ):
        case = {"num_blocks": 4 if layout is Layout.BDLORA else 1, "dtype": base}
        case |= {"layer": layer, "layout": layout, "factor_dtype": factors}
        yield Case(**case, sequence_parallel=sequence_parallel)
        if sequence_parallel:
            yield Case(**case, sequence_parallel=True, regather=True)


def _check_autocast(case, rank, world_size):
    reference = Reference.make(case, world_size)
    reference.round_to(BF16)
    expected = reference.run()
    layer, plain = build_layer(reference, rank), build_base(reference, rank)
    x = local_input(reference, rank)
    # As in NeMo and torch: around forward alone.
    with torch.autocast("cpu", dtype=BF16):
        y, _ = layer(x)
        base, _ = plain(x)
    assert y.dtype is base.dtype is BF16
    y.backward(local_output(reference, reference.grad_y, rank).to(y.dtype))
    tolerance = TOLERANCES[BF16]
    assert_close(y, local_output(reference, expected, rank), f"y [{case.label}]", tolerance)
    assert_close(x.grad, local_dx(reference, rank), f"dX [{case.label}]", tolerance)
    for plan in layer.adapter.plans:
        for factor, which in zip(layer.adapter.factors(plan), "AB", strict=True):
            name = plan.projection.name
            gradient, wanted = factor.weight.grad, reference.share(name, which, rank, grad=True)
            assert factor.weight.dtype is gradient.dtype is case.factor_dtype
            assert_close(gradient, wanted, f"d{which} of {name!r} [{case.label}]", tolerance)


def _check_all_autocast(rank, world_size):
    with model_parallel(world_size):
        for case in _autocast_cases():
            _check_autocast(case, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_under_autocast_a_layer_computes_in_its_type(world_size):
    run_ranks(world_size, _check_all_autocast)


def _lora(layout):
    return LoRAConfig(rank=8, layout=layout, num_blocks=4 if layout is Layout.BDLORA else None)


def _model(tp, layout, *, dtype, **changes):
    """The same numbers, all of which bfloat16 holds, in any type and at any size."""
    config = tiny_config(tp, params_dtype=dtype, pipeline_dtype=dtype, **changes)
    model = tiny_model(config).to(dtype)
    apply_lora(model, _lora(layout))
    randomize_adapters(model)
    for _, layer in lora_layers(model):
        for parameter in layer.adapter.parameters():
            # A gentle update: a violent one magnifies rounding from layer to layer.
            parameter.data.mul_(0.2)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(BF16))
    return model


def _batches():
    first = tokens()
    return [first, {**first, "input_ids": first["input_ids"].flip(0, 1)}]


def _loss(model, batch):
    return model(**batch, labels=batch["input_ids"].roll(-1, dims=1)).mean()


def _factors(model):
    return [
        factor
        for _, layer in lora_layers(model)
        for plan in layer.adapter.plans
        for factor in layer.adapter.factors(plan)
    ]


def _collected(model, values):
    """Every factor's value, whole, by name; the factors are what they were afterwards."""
    factors = _factors(model)
    kept = [factor.weight.data for factor in factors]
    for factor in factors:
        factor.weight.data = values(factor.weight)
    whole = collect_adapter(model, "values").modules
    for factor, data in zip(factors, kept, strict=True):
        factor.weight.data = data
    return {f"{key}.{w}": getattr(f, w) for key, f in whole.items() for w in "AB"}


def _reference(rank, world_size, layout):
    """Gradients in fp64, on one rank, of the sum over micro-batches."""
    with model_parallel(1):
        model = _model(1, layout, dtype=torch.float64)
        for batch in _batches():
            _loss(model, batch).backward()
        return _collected(model, lambda weight: weight.grad)


def _float16_module(rank, world_size, layout, sequence_parallel):
    with model_parallel(world_size):
        model = _model(
            world_size, layout, dtype=BF16, bf16=True, sequence_parallel=sequence_parallel
        )
        wrapped = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            Float16Module(model.config, model),
        )
        settings = OptimizerConfig(
            optimizer="sgd", lr=LEARNING_RATE, bf16=True, params_dtype=BF16, clip_grad=0.0,
            sgd_momentum=0.0, weight_decay=0.0,
        )  # fmt: skip
        optimizer = get_megatron_optimizer(settings, [wrapped])
        for batch in _batches():
            loss = _loss(wrapped, batch)
            assert loss.dtype is torch.float32
            loss.backward()
        finalize_model_grads([wrapped])
        weights = [factor.weight for factor in _factors(model)]
        assert {weight.dtype for weight in weights} == {BF16}
        assert {weight.main_grad.dtype for weight in weights} == {torch.float32}
        assert {weight.main_param.dtype for weight in weights} == {torch.float32}
        gradients = _collected(model, lambda weight: weight.main_grad.clone())
        before = _collected(model, lambda weight: weight.main_param.clone())
        optimizer.step()
        after = _collected(model, lambda weight: weight.main_param.clone())
        for name, gradient in gradients.items():
            # Steps that bfloat16 would round away.
            torch.testing.assert_close(before[name] - LEARNING_RATE * gradient, after[name])
        for weight in weights:
            torch.testing.assert_close(weight.data, weight.main_param.to(BF16), rtol=0.0, atol=0.0)
        return gradients


@pytest.mark.parametrize("layout", Layout, ids=lambda layout: layout.value)
def test_float16_module_and_fp32_main_parameters(layout):
    wanted = run_ranks(1, _reference, layout)[0]
    for world_size, sequence_parallel in ((1, False), (2, False), (2, True)):
        for found in run_ranks(world_size, _float16_module, layout, sequence_parallel):
            assert found.keys() == wanted.keys()
            for name, gradient in wanted.items():
                assert_close(found[name], gradient, name, MODEL_BFLOAT16)
