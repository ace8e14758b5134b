"""The tables of several layers in one piece of memory."""

from __future__ import annotations

import pytest
import torch

from bdlora_megatron.errors import ShapeError
from bdlora_megatron.ops import SlotTable, SlotTables, add_grouped
from tests.unit.ops.cases import (
    LAYERS,
    POPULARITY,
    RANKS,
    implementations,
    make_batch,
    make_inputs,
    make_slots,
)

TENSORS = ("a_start", "b_start", "a_rank", "b_rank", "scale")


def contents(table):
    return [getattr(table, name).clone() for name in TENSORS]


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("by", ["token", "segment"])
def test_kernels_read_the_same_from_tables_that_lie_together(implementation, by):
    name, device = implementation
    token_slot = POPULARITY["zipf_shuffled"]
    slots = {layer: make_slots(layer, device=device) for layer in LAYERS}

    def products():
        made = {}
        for layer, factors in slots.items():
            out, x = make_inputs(layer, len(token_slot), device=device)
            batch = make_batch(token_slot, factors, by=by)
            made[layer] = add_grouped(out, x, factors, batch, implementation=name)
        return made

    before = products()
    SlotTables([factors.table for factors in slots.values()])
    after = products()
    assert (
        len({factors.table.scale.untyped_storage().data_ptr() for factors in slots.values()}) == 1
    )
    for layer in LAYERS:
        assert torch.equal(after[layer], before[layer]), layer


def test_one_upload_writes_a_slot_of_every_table_and_no_other():
    tables = [make_slots(layer).table for layer in LAYERS]
    alone = [make_slots(layer).table for layer in LAYERS]
    together = SlotTables(tables)
    for table, wanted in zip(tables, alone, strict=True):
        columns = range(table.num_slices)
        row = {
            "a_rows": [(3 + j, 2) for j in columns],
            "b_rows": [(5 + j, 4) for j in columns],
            "scale": [0.1 * (j + 1) for j in columns],
        }
        before = contents(table)
        table.note(1, **row)
        wanted.note(1, **row)
        wanted.upload(1)
        assert table.held[1] is wanted.held[1]
        assert all(map(torch.equal, contents(table), before))
        assert not any(map(torch.equal, before, contents(wanted)))
    together.upload(1)
    for table, wanted in zip(tables, alone, strict=True):
        assert all(map(torch.equal, contents(table), contents(wanted)))
        table.note_empty(2)
        wanted.note_empty(2)
        wanted.upload(2)
    together.upload(2)
    for table, wanted in zip(tables, alone, strict=True):
        assert all(map(torch.equal, contents(table), contents(wanted)))


def test_a_table_has_one_distance_between_slots():
    table = SlotTable.empty(len(RANKS), 2, max_rank=4)
    wide = torch.zeros(len(RANKS), 5, dtype=torch.int32)
    with pytest.raises(ShapeError, match="strides"):
        SlotTable(
            a_start=wide[:, :2],
            b_start=table.b_start,
            a_rank=table.a_rank,
            b_rank=table.b_rank,
            scale=table.scale,
            max_rank=4,
        )
