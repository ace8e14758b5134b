"""The cost model's counts of a training step against the real layers, kernel by kernel."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bdlora_megatron import runtime
from bdlora_megatron.config import DEFAULT_TARGETS, Layout, LoRAConfig
from bdlora_megatron.layers import adapters_disabled, apply_lora, lora_layers
from bdlora_megatron.plan import AdapterLoad, ModelShape, TrainStep
from bdlora_megatron.plan.training import (
    adapter_training_work,
    base_training_work,
    optimizer_work,
    outer_training_work,
    training_work,
)
from tests.harness import run_ranks
from tests.tp.models import (
    BATCH,
    SEQUENCE,
    VOCAB,
    randomize_adapters,
    tiny_config,
    tiny_model,
    tokens,
)
from tests.tp.session import model_parallel

FLOAT = 4
#: Attention alone, as in a part of the paper's evaluation; and layers of either kind alone.
SOME_TARGETS = (("linear_qkv", "linear_proj"), ("linear_proj", "linear_fc1"))
SHAPE = ModelShape(
    num_layers=2,
    hidden_size=24,
    ffn_size=40,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    vocab_size=VOCAB,
)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
#: Sums over chosen rows of a pool, and where the pool stands among the tensors that they are given.
BAGS = {"_embedding_bag_forward_only": 0, "_embedding_bag_per_sample_weights_backward": 1}
#: They move nothing, or tell the host a number.
FREE = ("_unsafe_view", "_local_scalar_dense", "detach", "lift_fresh")
#: They write what they return and read nothing of what they are given.
FACTORIES = ("new_zeros", "zeros_like", "ones_like")


class Kernels(TorchDispatchMode):
    """Operations and bytes of every kernel that torch starts on this rank."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()
        self._scattered = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._opname
        if func.namespace == "c10d":
            self._scattered = "reduce_scatter" in name
            return out
        moves = not (func.is_view or name in FREE or "empty" in name or func.namespace != "aten")
        # gloo scatters by an all-reduce, out of which it copies: part of the collective.
        if moves and not (self._scattered and name == "copy_"):
            self.seen[self._measure(name, args, kwargs, out)] += 1
        self._scattered = self._scattered and not moves
        return out

    def _measure(self, name, args, kwargs, out):
        given = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        flops, read = 0.0, 0
        if name in BAGS:
            # Of the pool, only the rows that the indices name.
            pool, rows = given[BAGS[name]], given[BAGS[name] + 1]
            flops = 2.0 * rows.numel() * pool.size(1)
            read = rows.numel() * pool.size(1) * pool.element_size()
            given.pop(BAGS[name])
        elif name in ("copy_", "embedding"):
            # The tensor that is overwritten; the table, of which a few rows are read.
            given = given[1:]
        elif name in ("index", "index_select"):
            read = written[0].numel() * written[0].element_size()
            given = given[1:]
        elif name == "index_put_":
            # The chosen elements are written, the others left alone.
            given, written = given[1:], [given[-1]]
        elif name in FACTORIES:
            given = []
        if name.rstrip("_") in PRODUCTS:
            flops = 2.0 * written[0].numel() * given[-1].size(-2)
        return flops, read + sum(x.numel() * x.element_size() for x in (*given, *written))


def kernels_of(products):
    return Counter((product.flops, product.bytes) for product in products)


def messages_of(messages):
    return Counter((message.kind, message.payload_bytes) for message in messages)


def build(world_size, sequence_parallel, lora=None):
    config = tiny_config(
        world_size, params_dtype=torch.float32, sequence_parallel=sequence_parallel
    )
    model = tiny_model(config)
    model.requires_grad_(False)
    model.decoder.register_forward_pre_hook(_want_gradient, with_kwargs=True)
    if lora is not None:
        apply_lora(model, lora)
        randomize_adapters(model)
    return model


def _want_gradient(module, args, kwargs):
    kwargs["hidden_states"] = kwargs["hidden_states"].detach().requires_grad_(True)
    return args, kwargs


def record(step):
    with runtime.record_collectives() as log, Kernels() as kernels:
        result = step()
    calls = Counter((call.kind, call.payload_bytes) for call in log.calls if call.wire_bytes)
    return result, kernels.seen, calls


def record_step(model):
    """Kernels and collectives forward, and those backward."""
    ids = tokens()
    losses, *forward = record(lambda: model(**ids, labels=ids["input_ids"]))
    _, *backward = record(lambda: losses.mean().backward())
    return forward, backward


def _loads(targets):
    ranks = {Layout.BDLORA: 8, Layout.HALF_SHARDED: 6, Layout.SLORA: 8}
    return [
        AdapterLoad(layout=layout, rank=rank, target_modules=targets)
        for layout, rank in ranks.items()
    ]


def _config(load, tp):
    blocks = tp if load.layout is Layout.BDLORA else None
    return LoRAConfig(
        rank=load.rank,
        alpha=float(load.rank),
        layout=load.layout,
        num_blocks=blocks,
        target_modules=load.target_modules,
    )


def _step(sequence_parallel):
    return TrainStep(
        sequences=BATCH,
        length=SEQUENCE,
        bytes_per_element=FLOAT,
        sequence_parallel=sequence_parallel,
        fused=False,
    )


def _compare_adapters(rank, world_size, sequence_parallel, targets):
    at = _step(sequence_parallel)
    with model_parallel(world_size):
        for load in _loads(targets):
            model = build(world_size, sequence_parallel, _config(load, world_size))
            counted = adapter_training_work(SHAPE, at, load, world_size)
            with adapters_disabled(model):
                # The first step also fills the table of rotary angles.
                record_step(model)
                plain = record_step(model)
            parameters = [p for _, layer in lora_layers(model) for p in layer.adapter.parameters()]
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            whole = record_step(model)
            for (kernels, calls), (base_kernels, base_calls), work in zip(
                whole, plain, counted, strict=True
            ):
                where = f"{load.layout} {'backward' if work is counted[1] else 'forward'}"
                wanted = kernels_of(work.products * SHAPE.num_layers)
                if work is counted[1]:
                    # A gradient is added to one that is there already: autograd takes over or
                    # copies a first one, as it happens.
                    wanted.update((0.0, 3 * FLOAT * p.numel()) for p in parameters)
                assert kernels - base_kernels == wanted, (
                    where,
                    kernels - base_kernels - wanted,
                    wanted - (kernels - base_kernels),
                )
                assert not base_kernels - kernels, (where, base_kernels - kernels)
                assert calls - base_calls == messages_of(work.messages * SHAPE.num_layers), where
                assert not base_calls - calls, where
            _compare_optimizer(model, at, load, world_size)


def _compare_optimizer(model, at, load, world_size):
    parameters = [p for _, layer in lora_layers(model) for p in layer.adapter.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    _, kernels, calls = record(optimizer.step)
    work = optimizer_work(SHAPE, at, load, world_size)
    assert kernels == kernels_of(work.products * SHAPE.num_layers), load.layout
    assert not calls


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_adapters_kernels_and_messages_are_those_of_the_layers(world_size, sequence_parallel):
    run_ranks(world_size, _compare_adapters, sequence_parallel, DEFAULT_TARGETS)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("targets", SOME_TARGETS, ids=" ".join)
def test_adapters_of_some_layers_are_counted(targets, sequence_parallel):
    run_ranks(2, _compare_adapters, sequence_parallel, targets)


def _compare_base(rank, world_size, sequence_parallel):
    at = _step(sequence_parallel)
    with model_parallel(world_size):
        model = build(world_size, sequence_parallel)
        record_step(model)
        found = record_step(model)
        layer, outer = (f(SHAPE, at, world_size) for f in (base_training_work, outer_training_work))
        for way, (kernels, calls) in enumerate(found):
            messages = (*layer[way].messages * SHAPE.num_layers, *outer[way].messages)
            assert calls == messages_of(messages), way
            products = (*layer[way].products * SHAPE.num_layers, *outer[way].products)
            _compare_kernels(kernels, products)
        both = training_work(SHAPE, at, world_size)
        for way, work in enumerate(both):
            assert messages_of(work.messages) == found[way][1]


def _compare_kernels(found, products):
    """Products one by one; of what else runs, the bytes, nearly."""
    wanted = kernels_of(products)
    assert _multiplying(found) == _multiplying(wanted)
    recorded, counted = (
        sum(size * number for (flops, size), number in kernels.items() if not flops)
        for kernels in (found, wanted)
    )
    assert 0.85 < counted / recorded < 1.15, counted / recorded


def _multiplying(kernels):
    return {kernel: number for kernel, number in kernels.items() if kernel[0]}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_base_models_products_and_messages_are_those_of_megatron(world_size, sequence_parallel):
    run_ranks(world_size, _compare_base, sequence_parallel)
