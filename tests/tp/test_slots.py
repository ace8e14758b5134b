"""Slots of a model on several ranks: what a mixed batch computes, sends, and leaves alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch.utils._python_dispatch import TorchDispatchMode

from bdlora_megatron.config import Layout, LoRAConfig
from bdlora_megatron.errors import BDLoRAError, CapacityError, ConfigError, ShapeError, TargetError
from bdlora_megatron.layers import LoadOptions, apply_lora, load_adapter, lora_layers, remove_lora
from bdlora_megatron.layers import slots as layer_slots
from bdlora_megatron.runtime import record_collectives
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from bdlora_megatron.serve import ModelSlots, SlotCapacity
from bdlora_megatron.serve.engine.rank import build_engine
from bdlora_megatron.serve.settings import ServeSettings
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.models import BATCH, SEQUENCE, tokens
from tests.tp.serving_cases import make_adapter, serving_model
from tests.tp.session import model_parallel
from tests.train.runs import make_base

ADAPTERS = {
    "vanilla": make_adapter(1, rank=3),
    "bd4": make_adapter(2, rank=8, num_blocks=4),
    "bd8": make_adapter(3, rank=16, num_blocks=8, modules=("q_proj", "up_proj", "down_proj")),
    "one_layer": make_adapter(4, rank=5, layers=(1,), scale=0.7),
}


def logits(model):
    with torch.no_grad():
        return gather_from_tensor_model_parallel_region(model(**tokens()))


def slots_of_rows(first, second):
    return torch.tensor([first, second]).expand(SEQUENCE, BATCH).flatten()


# --- sequence parallelism, types -------------------------------------------------------------


def _rows(rank, world_size, sequence_parallel):
    """Each row of a batch is what the model gives with that row's adapter in every layer."""
    with model_parallel(world_size):
        model = serving_model(world_size, sequence_parallel=sequence_parallel)
        # The layers' own path is held to fp64 and to PEFT elsewhere.
        expected = {None: logits(model)}
        for name, adapter in ADAPTERS.items():
            load_adapter(model, adapter, LoadOptions())
            expected[name] = logits(model)
        remove_lora(model)
        slots = ModelSlots(model, SlotCapacity(max_loras=5, max_lora_rank=16))
        slot_of = {None: -1}
        for name, adapter in ADAPTERS.items():
            slot_of[name] = slots.load(name, slots.shard(adapter))
        for first, second in [
            ("vanilla", "bd4"),
            ("bd8", None),
            ("one_layer", "one_layer"),
            (None, "bd4"),
        ]:
            with slots.serving(slots.batch(slots_of_rows(slot_of[first], slot_of[second]))):
                made = logits(model)
            for row, name in enumerate((first, second)):
                assert_close(made[row], expected[name][row], f"row {row} of {first}, {second}")
        assert torch.equal(logits(model), expected[None])


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_of_a_batch_run_their_own_adapters(world_size, sequence_parallel):
    run_ranks(world_size, _rows, sequence_parallel)


def _bfloat16(rank, world_size):
    """Slots are no further from float32 than an adapter that is alone in its layers."""
    with model_parallel(world_size):
        narrow = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
        wide_model, model = serving_model(world_size), serving_model(world_size, **narrow)
        for narrow_weight, weight in zip(model.parameters(), wide_model.parameters(), strict=True):
            weight.data.copy_(narrow_weight)
        adapter = ADAPTERS["bd4"]
        load_adapter(wide_model, adapter)
        load_adapter(model, adapter)
        wanted, alone = logits(wide_model), logits(model)
        remove_lora(model)
        slots = ModelSlots(model, SlotCapacity(max_loras=1, max_lora_rank=8))
        slot = slots.load("bd4", slots.shard(adapter))
        with slots.serving(slots.batch(slots_of_rows(slot, slot))):
            made = logits(model)
        assert made.dtype == torch.bfloat16
        own, others = ((got.float() - wanted).square().mean().sqrt() for got in (made, alone))
        assert 0 < own < 1.2 * others


def test_bfloat16_is_as_close_as_in_the_layers():
    run_ranks(2, _bfloat16)


# --- collectives -----------------------------------------------------------------------------


def _record(model):
    with torch.no_grad(), record_collectives() as log:
        model(**tokens())
    return log.calls


def _used(rank, world_size):
    """Told which slots a step uses, it runs their pools alone and computes the same."""
    with model_parallel(world_size):
        model = serving_model(world_size)
        slots = ModelSlots(model, SlotCapacity(max_loras=3, max_lora_rank=8, layouts=tuple(Layout)))
        bd = slots.load("bd", slots.shard(make_adapter(2, rank=8, num_blocks=4)))
        vanilla = slots.load("v", slots.shard(make_adapter(1, rank=3), Layout.HALF_SHARDED))
        slora = slots.load("s", slots.shard(make_adapter(5, rank=4), Layout.SLORA))
        for used, own, exchange in [
            ((bd, vanilla), True, False),
            ((bd, slora), True, True),
            ((slora, slora), False, True),
        ]:
            batch = slots.batch(slots_of_rows(*used))
            with slots.serving(batch):
                assert (slots.step.own, slots.step.exchange) == (True, True)
                wanted = logits(model)
            with slots.serving(batch, used):
                assert (slots.step.own, slots.step.exchange) == (own, exchange)
                assert torch.equal(logits(model), wanted)
        slots.set_captured_batch(slots_of_rows(slora, slora))
        assert slots.step.own, "what a graph captures is replayed for other adapters"


def test_a_step_runs_the_pools_that_its_slots_are_in():
    run_ranks(2, _used)


def _count(rank, world_size, sequence_parallel):
    with model_parallel(world_size):
        model = serving_model(world_size, sequence_parallel=sequence_parallel)
        base = _record(model)
        slots = ModelSlots(model, SlotCapacity(max_loras=3, max_lora_rank=8, layouts=tuple(Layout)))
        bd = slots.load("bd", slots.shard(make_adapter(2, rank=8, num_blocks=4)))
        vanilla = slots.load("v", slots.shard(make_adapter(1, rank=3), Layout.HALF_SHARDED))
        with slots.serving(slots.batch(slots_of_rows(bd, vanilla))):
            mixed = _record(model)
        slora = slots.load("s", slots.shard(make_adapter(5, rank=4), Layout.SLORA))
        with slots.serving(slots.batch(slots_of_rows(bd, slora))):
            exchanged = _record(model)
        slots.evict("s")
        with slots.serving(slots.batch(slots_of_rows(bd, vanilla))):
            after = _record(model)
        return base, mixed, exchanged, after


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_only_the_slora_layout_communicates(sequence_parallel):
    for base, mixed, exchanged, after in run_ranks(2, _count, sequence_parallel):
        assert base, "the comparison would be empty if the base model communicated nothing"
        assert mixed == base
        assert after == base
        for call in base:
            exchanged.remove(call)
        # Two layers: qkv and fc1 gather their rank, proj and fc2 sum it; float32.
        T, layers = SEQUENCE * BATCH, 2
        gathers = [call for call in exchanged if call.kind == "all_gather"]
        sums = [call for call in exchanged if call.kind == "all_reduce"]
        assert len(exchanged) == len(gathers) + len(sums) == 4 * layers
        by_bytes = sorted(call.payload_bytes for call in gathers)
        assert by_bytes == sorted([4 * T * slices * 8 for slices in (2, 3)] * layers)
        assert [call.payload_bytes for call in sums] == [4 * T * 8] * 2 * layers


# --- slots -----------------------------------------------------------------------------------


def _memory(rank, world_size):
    """A BD-LoRA slot holds 1 / P of an adapter; room is given in adapters or in bytes."""
    with model_parallel(world_size):
        bd, vanilla = make_adapter(2, rank=8, num_blocks=4), make_adapter(1, rank=8)
        whole = sum(4 * factors.num_parameters for factors in bd.modules.values())
        model = serving_model(world_size)
        slots = ModelSlots(model, SlotCapacity(max_loras=4, max_lora_rank=8))
        shard = slots.shard(bd)
        blocks = 4 // world_size
        stored = sum(
            4 * (f.A.numel() * (blocks if f.blocked == "A" else 1) + f.B.numel())
            if f.blocked == "A"
            else 4 * (f.A.numel() + f.B.numel() * blocks)
            for f in bd.modules.values()
        )
        assert shard.num_bytes * world_size == stored
        assert world_size < 4 or shard.num_bytes * 4 == whole
        assert shard.rows == 8 // world_size
        assert slots.shard(vanilla).rows == 8
        pools = {
            id(pool): pool
            for _, layer in lora_layers(model)
            for pool in (layer.slots._own.factors.A, *layer.slots._own.factors.B)
        }
        assert sum(4 * pool.numel() for pool in pools.values()) == slots.memory_bytes
        slots.detach()
        # Rows for two vanilla adapters hold two of them, or as many BD-LoRAs as there are slots.
        capacity = SlotCapacity(
            max_loras=8, max_lora_rank=8, lora_memory_bytes=2 * slots.largest_bytes
        )
        slots = ModelSlots(model, capacity)
        assert slots.memory_bytes == capacity.lora_memory_bytes
        for name in "ab":
            assert slots.load(name, slots.shard(vanilla)) is not None
            slots.acquire(name)
        assert slots.load("c", slots.shard(bd)) is None
        slots.release("a")
        for number in range(world_size):
            assert slots.load(number, shard) is not None
            slots.acquire(number)
        assert "b" in slots.allocator
        assert "a" not in slots.allocator
        assert slots.load("one more", shard) is None


def _one_kind(rank, world_size):
    """The S-LoRA layout without the others takes no memory for them, and computes the same."""
    with model_parallel(world_size):
        model = serving_model(world_size)
        adapter = make_adapter(5, rank=4)
        taken, made = {}, {}
        for layouts in (tuple(Layout), (Layout.SLORA,), (Layout.BDLORA,)):
            slots = ModelSlots(model, SlotCapacity(max_loras=2, max_lora_rank=8, layouts=layouts))
            layout = Layout.SLORA if Layout.SLORA in layouts else Layout.BDLORA
            slot = slots.load("s", slots.shard(adapter, layout))
            pools = {
                id(pool): pool.numel() * pool.element_size()
                for _, layer in lora_layers(model)
                for kind in (layer.slots._own, layer.slots._exchanged)
                for factors in ([kind.factors] if kind is not None else [])
                for pool in (factors.A, *factors.B)
            }
            taken[layouts] = sum(pools.values())
            assert taken[layouts] == slots.memory_bytes
            batch = slots.batch(slots_of_rows(slot, -1))
            for used in (None, (slot,)):
                with slots.serving(batch, used):
                    made[layouts, used] = logits(model)
            if layouts == (Layout.SLORA,):
                slots.set_captured_batch(slots_of_rows(slot, -1))
                assert (slots.step.own, slots.step.exchange) == (False, True)
                assert torch.equal(logits(model), made[layouts, None])
            slots.detach()
        both, slora, own = taken.values()
        assert 0 < slora < both
        assert slora + own == both
        first = next(iter(made.values()))
        for where, outcome in made.items():
            assert_close(outcome, first, where)
        # Room for one is no more than each rank's share of it.
        one = SlotCapacity(max_loras=1, max_lora_rank=4, layouts=(Layout.SLORA,))
        slots = ModelSlots(model, one)
        assert slots.memory_bytes == slots.shard(adapter, Layout.SLORA).num_bytes
        whole = sum(4 * (f.A.numel() + f.B.numel()) for f in adapter.modules.values())
        assert slots.memory_bytes * world_size == whole
        slots.detach()


def _products(rank, world_size):
    """What every layer asks of the grouped product in a step of S-LoRA adapters alone."""
    with model_parallel(world_size):
        model = serving_model(world_size)
        slots = ModelSlots(
            model, SlotCapacity(max_loras=3, max_lora_rank=8, layouts=(Layout.SLORA,))
        )
        slora = slots.load("s", slots.shard(make_adapter(5, rank=4), Layout.SLORA))
        calls = Counter()
        for name in ("shrink", "expand"):
            own = getattr(layer_slots, name)

            def counted(*args, name=name, own=own, **kwargs):
                calls[name] += 1
                return own(*args, **kwargs)

            setattr(layer_slots, name, counted)
        # Less rank than there is room for, and a rank of its own in some of the layers.
        other = make_adapter(6, rank=8, modules=("q_proj", "v_proj", "up_proj"))
        wide = slots.load("w", slots.shard(other, Layout.SLORA))
        used = (slora, wide)
        with slots.serving(slots.batch(slots_of_rows(*used)), used):
            made = logits(model)
        counted_calls = dict(calls)
        slots.detach()
        for row, adapter in enumerate((make_adapter(5, rank=4), other)):
            load_adapter(model, adapter, LoadOptions())
            assert_close(made[row], logits(model)[row], f"row {row}")
        return counted_calls


def test_slora_layers_run_one_product_each_however_many_ranks_share_it():
    # Four layers in each of two decoder layers.
    assert run_ranks(4, _products) == [{"shrink": 8, "expand": 8}] * 4


def test_room_is_made_for_the_layouts_that_are_held():
    run_ranks(2, _one_kind)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_slots_hold_a_share_and_room_is_in_adapters_or_bytes(world_size):
    run_ranks(world_size, _memory)


def _untouched(rank, world_size):
    with model_parallel(world_size):
        model = serving_model(world_size)
        slots = ModelSlots(model, SlotCapacity(max_loras=3, max_lora_rank=8))
        used = slots.load("used", slots.shard(ADAPTERS["bd4"]))
        slots.acquire("used")
        batch = slots.batch(slots_of_rows(used, -1))
        with slots.serving(batch):
            before = logits(model)
        for number in range(7):
            shard = slots.shard(make_adapter(10 + number, rank=1 + number))
            assert slots.load(number, shard) not in (used, None)
        with pytest.raises(CapacityError, match="in use 1 times"):
            slots.evict("used")
        with slots.serving(batch):
            assert torch.equal(logits(model), before)
        # The same batch follows what its slot holds once that is given up.
        slots.release("used")
        slots.evict("used")
        with slots.serving(batch):
            empty = logits(model)
        assert torch.equal(empty, logits(model))
        shard = slots.shard(ADAPTERS["vanilla"])
        assert slots.load("other", shard) == used
        with slots.serving(batch):
            assert not torch.equal(logits(model)[0], empty[0])


def test_a_slot_in_use_is_never_touched():
    run_ranks(2, _untouched)


class _Copies(TorchDispatchMode):
    """Counts what is copied into memory that is there already."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def _copies(rank, world_size):
    with model_parallel(world_size):
        model = serving_model(world_size)
        slots = ModelSlots(model, SlotCapacity(max_loras=1, max_lora_rank=8))
        shards = [slots.shard(ADAPTERS[name]) for name in ("bd4", "vanilla")]
        found = []
        for number, shard in enumerate(shards):
            with _Copies() as copies:
                assert slots.load(number, shard) == 0
            found.append(copies.count)
        return found


def test_an_adapter_moves_in_by_its_factors_and_one_copy_more():
    """Per layer qkv has one A and three B, fc1 one and two, proj and fc2 one each."""
    for found in run_ranks(2, _copies):
        assert found == [2 * (4 + 2 + 3 + 2) + 1] * 2


# --- refusals --------------------------------------------------------------------------------


def _refuse(rank, world_size):
    with model_parallel(world_size):
        model = serving_model(world_size)
        with pytest.raises(CapacityError, match="set lora_memory_bytes=120000 or more"):
            ModelSlots(model, SlotCapacity(max_lora_rank=50, lora_memory_bytes=1000))
        assert not list(lora_layers(model)), "a refusal leaves the model as it was"
        slots = ModelSlots(
            model, SlotCapacity(max_loras=2, max_lora_rank=4, target_modules=("linear_qkv",))
        )
        attention = ("q_proj", "k_proj", "v_proj")
        big = make_adapter(1, rank=6, modules=attention)
        with pytest.raises(CapacityError, match=r"takes 6 rank rows.*set max_lora_rank=6"):
            slots.shard(big)
        with pytest.raises(
            TargetError, match=r"no slots; add them to SlotCapacity\.target_modules"
        ):
            slots.shard(make_adapter(1, rank=2))
        with pytest.raises(TargetError, match="does not have"):
            slots.shard(make_adapter(1, rank=2, modules=attention, layers=(5,)))
        with pytest.raises(ConfigError, match=r"'slora'.*add it to SlotCapacity.layouts"):
            slots.shard(big, Layout.SLORA)
        small = make_adapter(1, rank=2, modules=attention)
        key = next(iter(small.modules))
        narrow = replace(small.modules[key], A=small.modules[key].A[:, :-1])
        torn = replace(small, modules={**small.modules, key: narrow})
        with pytest.raises(ShapeError, match=r"q_proj.*got \[4, 23\], wanted \[4, 24\]"):
            slots.shard(torn)
        with pytest.raises(ConfigError, match="carry an adapter or slots already"):
            ModelSlots(model)
        with pytest.raises(ConfigError, match="serves several adapters from slots"):
            load_adapter(model, small)
        with (
            slots.serving(slots.batch(torch.zeros(3, dtype=torch.int32))),
            pytest.raises(ShapeError, match=r"wanted \[3, 24\]"),
        ):
            logits(model)
        slots.detach()
        assert not list(lora_layers(model))
        apply_lora(model, LoRAConfig(rank=4, alpha=4, num_blocks=2))
        with pytest.raises(ConfigError, match="carry an adapter or slots already"):
            ModelSlots(model)


def test_what_does_not_fit_is_refused_with_what_to_set():
    run_ranks(2, _refuse)


def _outcome(work, adapter, layout):
    try:
        work(adapter, layout)
    except BDLoRAError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _check(rank, world_size):
    with model_parallel(world_size):
        model = serving_model(world_size)
        capacity = SlotCapacity(
            max_loras=2,
            max_lora_rank=8,
            layouts=(Layout.BDLORA, Layout.SLORA),
            target_modules=("linear_qkv", "linear_proj", "linear_fc1"),
        )
        slots = ModelSlots(model, capacity)
        wide = make_adapter(5, rank=4, modules=("q_proj",))
        key = next(iter(wide.modules))
        factors = wide.modules[key]
        stretched = replace(factors, A=torch.zeros(4, 40))
        attention = ("q_proj", "o_proj")
        adapters = [
            *(make_adapter(1, rank=r, num_blocks=n, modules=attention)
              for r, n in ((3, 1), (8, 1), (9, 1), (16, 2), (16, 4), (16, 8), (64, 4))),
            make_adapter(1, rank=4, modules=("down_proj",)),
            make_adapter(1, rank=4, modules=attention, layers=(0, 5)),
            replace(wide, modules={**wide.modules, key: stretched}),
        ]  # fmt: skip
        refused = 0
        for adapter in adapters:
            for layout in Layout:
                expected = _outcome(slots.shard, adapter, layout)
                assert _outcome(slots.check, adapter, layout) == expected
                refused += expected is not None
        assert 10 < refused < len(adapters) * len(Layout), "all of one kind show little"


@pytest.mark.parametrize("world_size", [1, 4])
def test_shapes_alone_tell_whether_an_adapter_could_be_held(world_size):
    run_ranks(world_size, _check)


def test_settings():
    with pytest.raises(ConfigError, match="max_loras=0"):
        SlotCapacity(max_loras=0)
    with pytest.raises(ConfigError, match="target_modules"):
        SlotCapacity(target_modules=("linear_qkv", "q_proj"))
    with pytest.raises(ConfigError, match="wanted one at least"):
        SlotCapacity(layouts=())


# --- what was in a slot before, ranks that do not divide --------------------------------------


def _reused(rank, world_size):
    """An adapter of fewer modules and layers than the one whose slot it takes."""
    with model_parallel(world_size):
        small = make_adapter(6, rank=2, modules=("q_proj",), layers=(1,))
        outputs = []
        for before in (None, make_adapter(5, rank=8)):
            model = serving_model(world_size)
            slots = ModelSlots(model, SlotCapacity(max_loras=1))
            if before is not None:
                slots.load("before", slots.shard(before))
            slot = slots.load("small", slots.shard(small))
            assert slot == 0
            with slots.serving(slots.batch(slots_of_rows(slot, slot))):
                outputs.append(logits(model))
        assert torch.equal(*outputs)


def test_nothing_of_the_adapter_before_is_left_in_a_slot():
    run_ranks(2, _reused)


def _odd_rank(rank, world_size):
    """Three ranks' rows on two ranks: S-LoRA's layout pads, and computes the same."""
    with model_parallel(world_size):
        made = []
        for layout in (Layout.HALF_SHARDED, Layout.SLORA):
            model = serving_model(world_size)
            load_adapter(model, make_adapter(7, rank=3), LoadOptions(layout=layout))
            made.append(logits(model))
        assert_close(made[1], made[0].double(), "S-LoRA's layout of an odd rank")


def test_a_rank_that_the_ranks_do_not_divide_is_padded_in_the_layout_of_slora():
    run_ranks(2, _odd_rank)


def _servers(rank, world_size, base):
    """The pools of a server in each layout, given the same memory on each rank."""
    held = {}
    with model_parallel(world_size):
        enable_cpu_inference()
        for layout in Layout:
            sizes = {"max_loras": 50, "max_lora_rank": 12, "lora_memory_bytes": 10**6}
            cache = {"kv_cache_memory_bytes": 10**6, "max_model_len": 64, "block_size": 16}
            settings = ServeSettings.from_dict(
                {
                    "model": str(base),
                    "cpu": True,
                    "tensor_parallel_size": world_size,
                    "layout": layout.value,
                    **sizes,
                    **cache,
                }
            )
            engine, _ = build_engine(settings, torch.distributed.group.WORLD)
            slots = engine.store.slots
            held[layout] = slots.memory_bytes, slots.allocator.rows
            with pytest.raises(CapacityError, match="one adapter may take max_lora_rank=12; set"):
                build_engine(
                    replace(settings, lora_memory_bytes=1000), torch.distributed.group.WORLD
                )
    return held


@pytest.mark.engine
def test_a_server_fills_the_memory_that_it_is_given_with_what_its_layout_needs(tmp_path):
    base = make_base(tmp_path / "base")
    first, second = run_ranks(2, _servers, base)
    assert first == second
    for taken, rows in first.values():
        assert rows < 50 * 12
        # No room for one row more in all layers.
        assert 0.99 * 10**6 < taken <= 10**6
    own, exchanged, shared = (first[layout][1] for layout in Layout)
    assert own == shared
    # A rank holds R / P rows of a BD-LoRA of rank R; of a vanilla LoRA in S-LoRA's layout it holds
    # the same part, in more rows that are narrower.
    assert own < exchanged < 2 * own
