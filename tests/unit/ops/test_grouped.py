"""Every implementation of the grouped product against one dense fp64 matrix per token."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlora_megatron.errors import UnsupportedError
from bdlora_megatron.ops import GroupedBatch, add_grouped, expand, shrink
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.unit.ops.cases import (
    HAS_TRITON,
    LAYERS,
    POPULARITY,
    RANKS,
    expected,
    implementations,
    make_batch,
    make_inputs,
    make_slots,
)

every_implementation = pytest.mark.parametrize("implementation", implementations())
every_walk = pytest.mark.parametrize("by", ["token", "segment"])


@every_implementation
@every_walk
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_equals_one_dense_matrix_per_token(implementation, by, layer, popularity):
    name, device = implementation
    token_slot = POPULARITY[popularity]
    slots = make_slots(layer, device=device)
    out, x = make_inputs(layer, len(token_slot), device=device)
    before = out.clone()
    wanted = expected(out, x, slots, token_slot)
    made = add_grouped(out, x, slots, make_batch(token_slot, slots, by=by), implementation=name)
    assert made is out
    if token_slot:
        assert_close(made.cpu(), wanted, "output")
    without = [slot < 0 for slot in token_slot]
    assert torch.equal(made[without], before[without])


@every_implementation
@every_walk
@pytest.mark.parametrize(
    ("data", "factors"),
    [
        pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
        pytest.param(torch.float32, torch.bfloat16, id="fp32-over-bf16"),
        pytest.param(torch.bfloat16, torch.float32, id="bf16-over-fp32"),
        pytest.param(torch.float16, torch.float16, id="fp16"),
    ],
)
@pytest.mark.parametrize("layer", ["gate_up", "qkv"])
def test_types(implementation, by, data, factors, layer):
    name, device = implementation
    token_slot = POPULARITY["zipf_shuffled"]
    slots = make_slots(layer, dtype=factors, device=device)
    out, x = make_inputs(layer, len(token_slot), dtype=data, device=device)
    wanted = expected(out, x, slots, token_slot)
    made = add_grouped(out, x, slots, make_batch(token_slot, slots, by=by), implementation=name)
    assert made.dtype == data
    # The coarsest type that takes part decides; fp16 is finer than bf16's bound.
    assert_close(made.cpu().to(torch.bfloat16), wanted, "output")


def test_reference_and_cpu_keep_fp64():
    token_slot = POPULARITY["zipf"]
    slots = make_slots("qkv", dtype=torch.float64)
    for name in ("reference", "cpu"):
        out, x = make_inputs("qkv", len(token_slot), dtype=torch.float64)
        wanted = expected(out, x, slots, token_slot)
        add_grouped(out, x, slots, make_batch(token_slot, slots), implementation=name)
        assert_close(out, wanted, name)


@every_implementation
def test_long_segments_and_views(implementation):
    """Many tokens of an adapter, in tensors with a row stride of their own."""
    name, device = implementation
    token_slot = [4] * 70 + [-1] * 3 + [8] * 33 + [0] * 2 + [4] * 20
    slots = make_slots("wide", device=device)
    wide_out, wide_x = make_inputs("wide", len(token_slot), device=device)
    out = torch.cat([wide_out, wide_out], dim=1)[:, :400]
    x = torch.cat([wide_x, wide_x], dim=1)[:, 200:]
    wanted = expected(out, x, slots, token_slot)
    batch = make_batch(token_slot, slots, by="segment")
    add_grouped(out, x, slots, batch, implementation=name)
    assert_close(out.cpu(), wanted, "output")


@every_implementation
@every_walk
def test_halves_give_the_whole(implementation, by):
    name, device = implementation
    token_slot = POPULARITY["zipf_shuffled"]
    slots = make_slots("qkv", device=device)
    batch = make_batch(token_slot, slots, by=by)
    out, x = make_inputs("qkv", len(token_slot), device=device)
    whole = add_grouped(out.clone(), x, slots, batch, implementation=name)
    z = shrink(x, slots, batch, implementation=name)
    for t, slot in enumerate(token_slot):
        for j in range(3):
            rank = int(slots.table.a_rank[slot, j]) if slot >= 0 else 0
            assert torch.all(z[t, j, rank:] == 0)
            z[t, j, rank:] = float("nan")
    made = expand(out, z, slots, batch, implementation=name)
    assert made is out
    assert_close(made, whole, "halves")


@every_implementation
@every_walk
def test_ranks_of_a_and_b_may_differ(implementation, by):
    """As in the S-LoRA layout: a share of A's rows makes a share of the z that all of B reads."""
    name, device = implementation
    token_slot = POPULARITY["zipf_shuffled"]
    full = make_slots("one", device=device, ranks=[2 * rank for rank in RANKS])
    out, x = make_inputs("one", len(token_slot), device=device)
    wanted = expected(out, x, full, token_slot)
    total = torch.zeros(len(token_slot), 1, full.table.max_rank, device=device)
    for share in range(2):
        half = full.table.a_rank // 2
        table = dataclasses.replace(
            full.table, a_rank=half, a_start=full.table.a_start + share * half
        )
        slots = dataclasses.replace(full, table=table)
        batch = make_batch(token_slot, slots, by=by)
        z = shrink(x, slots, batch, implementation=name)
        for t, slot in enumerate(token_slot):
            rank = int(half[slot, 0]) if slot >= 0 else 0
            total[t, 0, share * rank : (share + 1) * rank] = z[t, 0, :rank]
    expand(out, total, slots, batch, implementation=name)
    assert_close(out.cpu(), wanted, "output")


@pytest.mark.parametrize("wanted_by", ["x", "out", "A", "B"])
def test_gradients_are_refused_rather_than_lost(wanted_by):
    token_slot = POPULARITY["zipf"]
    slots = make_slots("one")
    out, x = make_inputs("one", len(token_slot))
    before = out.clone()
    {"x": x, "out": out, "A": slots.A, "B": slots.B[0]}[wanted_by].requires_grad_()
    batch = make_batch(token_slot, slots)
    for implementation in ("reference", "cpu"):
        with pytest.raises(UnsupportedError, match=r"inference_mode\(\).*apply_lora"):
            add_grouped(out, x, slots, batch, implementation=implementation)
    assert torch.equal(out, before)
    with torch.no_grad():
        add_grouped(out, x, slots, batch)
    assert not torch.equal(out, before)


@settings(max_examples=30, deadline=None)
@given(
    token_slot=st.lists(st.integers(-1, len(RANKS) - 1), min_size=1, max_size=40),
    layer=st.sampled_from(sorted(LAYERS)),
    data=st.data(),
)
def test_permuted_batch_gives_the_permuted_result(token_slot, layer, data):
    order = data.draw(st.permutations(range(len(token_slot))))
    slots = make_slots(layer)
    out, x = make_inputs(layer, len(token_slot))
    wanted = add_grouped(out.clone(), x, slots, make_batch(token_slot, slots))
    shuffled = make_batch([token_slot[t] for t in order], slots)
    made = add_grouped(out[order], x[order], slots, shuffled)
    assert_close(made, wanted[order].double(), "permuted")


@pytest.mark.parametrize("function", [shrink, expand, add_grouped], ids=lambda f: f.__name__)
def test_the_semantics_in_the_docstring(function):
    lines = inspect.getdoc(function).split("```")[1]
    token_slot = POPULARITY["zipf_shuffled"]
    slots = make_slots("qkv", dtype=torch.float64)
    batch = make_batch(token_slot, slots)
    out, x = make_inputs("qkv", len(token_slot), dtype=torch.float64)
    z = shrink(x, slots, batch)
    arguments = {"shrink": (x,), "expand": (out.clone(), z), "add_grouped": (out.clone(), x)}
    made = function(*arguments[function.__name__], slots, batch)
    names = {"out": out, "x": x, "slots": slots, "batch": batch, "z": z}
    if function is shrink:
        names["z"] = torch.zeros_like(z)
    exec(textwrap.dedent(lines), names)
    assert_close(made, names["z" if function is shrink else "out"], "semantics")


def _tf32(rank, world_size, switch):
    from bdlora_megatron.ops.gpu import tf32_is_allowed

    exec(switch)
    slots = make_slots("one")
    out, x = make_inputs("one", 4)
    batch = GroupedBatch(torch.zeros(4, dtype=torch.int32), num_slots=slots.table.num_slots)
    add_grouped(out, x, slots, batch, implementation="triton")
    return tf32_is_allowed()


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton's interpreter")
@pytest.mark.parametrize(
    ("switch", "allowed"),
    [
        ("pass", False),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.set_float32_matmul_precision('high')", True),
    ],
)
def test_either_of_torchs_switches_for_tf32_is_heard(switch, allowed):
    """Reading the older switch raises once anybody has set the newer."""
    assert run_ranks(1, _tf32, switch) == [allowed]
