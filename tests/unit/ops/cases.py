"""Slots, batches and the dense fp64 answer that every implementation is held to."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

from bdlora_megatron.ops import Columns, GroupedBatch, SlotFactors, SlotTable

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available()

LAYERS = {
    # name: (in features, columns of the slices, output columns)
    "one": (37, (Columns(width=29),), 29),
    "gate_up": (48, (Columns(width=40), Columns(width=40, offset=40)), 80),
    # Two query groups of [q q q k v] with heads of 5.
    "qkv": (
        33,
        (
            Columns(width=15, groups=2, stride=25),
            Columns(width=5, groups=2, stride=25, offset=15),
            Columns(width=5, groups=2, stride=25, offset=20),
        ),
        50,
    ),
    # Several blocks of every kind in the kernels.
    "wide": (200, (Columns(width=144, groups=2, stride=200), Columns(width=40, offset=150)), 400),
}

POPULARITY = {
    "empty": [],
    "no_adapters": [-1] * 7,
    "one_token": [3],
    "identical": [4] * 19,
    "distinct": list(range(11)),
    "some_without": [-1, 4, -1, 0, 4, 1, -1],
    "zipf": [0] * 19 + [5] * 5 + [1, 1, 2, 7, -1, 9],
    "zipf_shuffled": random.Random(3).sample([0] * 19 + [5] * 5 + [1, 1, 2, 7, -1, 9], 30),
    "empty_slot": [10, 0, 10, 6],
}

#: Ranks by slot; slot 10 holds nothing at all. The largest takes more than one block of every
#: kernel, and no more: Triton's interpreter steps through every program of the room.
RANKS = [8, 16, 3, 1, 32, 8, 64, 5, 72, 17, 0]


def implementations():
    """Every implementation, with what it needs and the device it runs on."""
    interpreted = pytest.mark.skipif(
        not HAS_TRITON or HAS_GPU, reason="needs triton, and no GPU to run the kernels on instead"
    )
    on_gpu = pytest.mark.skipif(not (HAS_TRITON and HAS_GPU), reason="needs triton and a GPU")
    return [
        pytest.param(("reference", "cpu"), id="reference"),
        pytest.param(("cpu", "cpu"), id="cpu"),
        pytest.param(("triton", "cpu"), id="triton-interpreted", marks=interpreted),
        pytest.param(("triton", "cuda"), id="triton-gpu", marks=[pytest.mark.gpu, on_gpu]),
    ]


def _geometry(layer):
    """In features, columns and output columns of a layer, which may be given by its name."""
    return LAYERS[layer] if isinstance(layer, str) else layer


def make_slots(layer="one", *, ranks=RANKS, dtype=torch.float32, device="cpu", seed=0):
    """Slots of those ranks in shuffled pools, with NaN in every row that no slot holds."""
    generator = torch.Generator().manual_seed(seed)
    in_features, columns, _ = _geometry(layer)
    table = SlotTable.empty(len(ranks), len(columns), max_rank=max(max(ranks), 1), device=device)
    # A slot that holds anything leaves out its last slice if its rank is odd.
    held = [[rank if rank % 2 == 0 or j == 0 else 0 for j in range(len(columns))] for rank in ranks]
    capacities = [[rank + 1 for rank in row] for row in held]
    A = torch.full((sum(map(sum, capacities)) + 3, in_features), float("nan"), dtype=torch.float64)
    B = [
        torch.full((sum(row[j] for row in capacities) + 2, part.features), float("nan")).double()
        for j, part in enumerate(columns)
    ]
    slots = list(range(len(ranks)))
    random.Random(seed).shuffle(slots)
    next_a, next_b = 1, [2] * len(columns)
    for slot in slots:
        a_rows, b_rows = [], []
        # Some slots' slices lie one after another in A, some do not.
        gap = slot % 2
        for j, rank in enumerate(held[slot]):
            a_rows.append((next_a, rank))
            b_rows.append((next_b[j], rank))
            A[next_a : next_a + rank] = torch.randn(rank, in_features, generator=generator).double()
            B[j][next_b[j] : next_b[j] + rank] = torch.randn(
                rank, columns[j].features, generator=generator
            ).double()
            next_a += rank + gap
            next_b[j] += rank + gap
        # Outputs of every slot and slice are of one size, and no two scales are alike.
        scale = [
            (1 + 0.1 * slot + 0.03 * j) / max(rank, 1) ** 0.5 for j, rank in enumerate(held[slot])
        ]
        table.note(slot, a_rows=a_rows, b_rows=b_rows, scale=scale)
        table.upload(slot)
    return SlotFactors(
        A=A.to(dtype).to(device),
        B=tuple(pool.to(dtype).to(device) for pool in B),
        columns=columns,
        table=table,
    )


def make_inputs(layer, num_tokens, *, dtype=torch.float32, device="cpu", seed=0):
    """Base outputs and inputs of so many tokens."""
    generator = torch.Generator().manual_seed(seed + 100)
    in_features, _, out_features = _geometry(layer)
    x = torch.randn(num_tokens, in_features, generator=generator).to(dtype).to(device)
    out = torch.randn(num_tokens, out_features, generator=generator).to(dtype).to(device)
    return out, x


def make_batch(token_slot, slots, *, by=None):
    """A batch over the slots."""
    device = slots.A.device
    token_slot = torch.tensor(token_slot, dtype=torch.int32, device=device)
    return GroupedBatch(token_slot, num_slots=slots.table.num_slots, by=by)


def dense_update(slots, slot):
    """One slot's whole update ``[O, I]`` in fp64, column by column."""
    end = max(part.end for part in slots.columns)
    update = torch.zeros(end, slots.in_features, dtype=torch.float64)
    for j, part in enumerate(slots.columns):
        A, B = slots.a(slot, j).double().cpu(), slots.b(slot, j).double().cpu()
        product = slots.table.scale[slot, j].double().cpu() * (B.t() @ A)
        for feature in range(part.features):
            group, within = divmod(feature, part.width)
            update[part.offset + group * part.stride + within] = product[feature]
    return update


def expected(out, x, slots, token_slot):
    """The answer in fp64, one dense matrix per token, with no rounding on the way."""
    total = out.double().cpu().clone()
    for t, slot in enumerate(token_slot):
        if slot >= 0:
            update = dense_update(slots, slot)
            total[t, : len(update)] += update @ x[t].double().cpu()
    return total
