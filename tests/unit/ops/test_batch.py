"""A batch that outlives what it was made for: new tokens, slots that hold something else."""

from __future__ import annotations

import pytest
import torch

from bdlora_megatron.errors import ShapeError
from bdlora_megatron.ops import GroupedBatch, add_grouped
from tests.tolerances import assert_close
from tests.unit.ops.cases import POPULARITY, expected, implementations, make_batch, make_inputs
from tests.unit.ops.cases import make_slots as make

every_implementation = pytest.mark.parametrize("implementation", implementations())


@every_implementation
@pytest.mark.parametrize("by", ["token", "segment"])
def test_refilled_in_place(implementation, by):
    name, device = implementation
    slots = make("gate_up", device=device)
    first, second = POPULARITY["zipf"], POPULARITY["zipf_shuffled"]
    batch = make_batch(first, slots, by=by)
    places = [batch.token_slot.data_ptr()]
    for token_slot in (first, second, [-1] * len(first), first):
        batch.refill(torch.tensor(token_slot, device=device))
        out, x = make_inputs("gate_up", len(first), device=device)
        wanted = expected(out, x, slots, token_slot)
        assert_close(
            add_grouped(out, x, slots, batch, implementation=name).cpu(), wanted, "refilled"
        )
        places.append(batch.token_slot.data_ptr())
    assert len(set(places)) == 1, "a captured graph keeps reading the same memory"


@every_implementation
def test_follows_what_its_slots_hold(implementation):
    name, device = implementation
    slots = make("gate_up", device=device)
    token_slot = [0, 4, 1, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    batch = make_batch(token_slot, slots)
    for _ in range(2):
        out, x = make_inputs("gate_up", len(token_slot), device=device)
        wanted = expected(out, x, slots, token_slot)
        assert_close(add_grouped(out, x, slots, batch, implementation=name).cpu(), wanted, "held")
        # Slot 4 now holds what slot 6 holds, and slot 1 nothing.
        other = slots.table.held[6]
        slots.table.note(
            4,
            a_rows=list(zip(other.a_start, other.a_rank, strict=True)),
            b_rows=list(zip(other.b_start, other.b_rank, strict=True)),
            scale=[0.3, 0.7],
        )
        slots.table.note_empty(1)
        for slot in (4, 1):
            slots.table.upload(slot)


def test_layers_that_hold_alike_share_a_plan():
    batch = make_batch([0, 1, 0, 5, -1], make("gate_up"))
    for layer in ("gate_up", "wide"):  # two slices each
        slots = make(layer)
        out, x = make_inputs(layer, 5)
        add_grouped(out, x, slots, batch)
    assert len(batch._plans) == 1
    slots = make("one")
    out, x = make_inputs("one", 5)
    add_grouped(out, x, slots, batch)
    assert len(batch._plans) == 2


def test_refusals():
    with pytest.raises(ShapeError, match="wanted integers"):
        GroupedBatch(torch.zeros(3), num_slots=2)
    with pytest.raises(ShapeError, match="holds 0 to 2, wanted -1"):
        GroupedBatch(torch.tensor([0, 2]), num_slots=2)
    with pytest.raises(ShapeError, match="at least one slot"):
        GroupedBatch(torch.tensor([0]), num_slots=0)
    batch = GroupedBatch(torch.tensor([0, 1]), num_slots=2)
    with pytest.raises(ShapeError, match="pad with slot -1"):
        batch.refill(torch.tensor([0]))
    with pytest.raises(ShapeError, match="holds 0 to 5"):
        batch.refill(torch.tensor([0, 5]))
    assert batch.token_slot.tolist() == [0, 1], "a refusal changes nothing"
