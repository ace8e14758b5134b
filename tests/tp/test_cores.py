"""Adapters that share a basis: each token's own core between the halves, and nothing sent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.compress import (
    CompressOptions,
    FolderSource,
    compress_adapters,
    read_collection,
)
from bdlora_megatron.convert import Adapter, ModuleKey, write_adapter
from bdlora_megatron.errors import CapacityError, ConfigError, ShapeError, TargetError
from bdlora_megatron.layers import LoadOptions, load_adapter, remove_lora
from bdlora_megatron.runtime import record_collectives
from bdlora_megatron.serve import CoreSlots, ModelSlots, SlotCapacity, open_basis
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.models import tokens
from tests.tp.serving_cases import SIDES, make_adapter, serving_model
from tests.tp.session import model_parallel
from tests.tp.test_slots import logits, slots_of_rows

K = 8


def basis(seed, *, blocks=1):
    """A basis for every module: what a BD-LoRA of rank K is, or a LoRA, of scale 1."""
    return make_adapter(100 + seed, rank=K, num_blocks=blocks, scale=1.0)


def cores_of(seed, *, blocks=1, modules=tuple(SIDES), layers=(0, 1)):
    generator = torch.Generator().manual_seed(seed)
    size = K // blocks
    return {
        ModuleKey(layer=layer, name=name): torch.randn(blocks, size, size, generator=generator)
        * 0.2
        for layer in layers
        for name in modules
    }


def whole(shared, cores):
    """The same function as an adapter by itself: the core goes into the second half."""
    modules = {}
    for key, core in cores.items():
        pair = shared.modules[key]
        if pair.blocked == "B":
            B = torch.cat([b @ s for b, s in zip(pair.B.chunk(len(core)), core, strict=True)])
        else:
            B = pair.B @ torch.block_diag(*core)
        modules[key] = BlockFactors(
            A=pair.A, B=B, num_blocks=pair.num_blocks, blocked=pair.blocked, scale=1.0
        )
    return Adapter(name="whole", modules=modules)


def _rows(rank, world_size, blocks):
    """Rows of a batch with cores of two bases, plain adapters and none, each as it is alone."""
    with model_parallel(world_size):
        model = serving_model(world_size)
        some = {"modules": ("q_proj", "v_proj", "down_proj"), "layers": (1,)}
        shared = [basis(number, blocks=blocks) for number in range(2)]
        kinds = {
            "a": (0, cores_of(1, blocks=blocks)),
            "b": (0, cores_of(2, blocks=blocks)),
            "c": (1, cores_of(3, blocks=blocks)),
            # A core for some of the modules: in the others nothing is added.
            "d": (1, cores_of(4, blocks=blocks, **some)),
        }
        plain = {"vanilla": make_adapter(1, rank=3), "bd": make_adapter(2, rank=8, num_blocks=4)}
        expected = {None: logits(model)}
        for name, (number, cores) in kinds.items():
            load_adapter(model, whole(shared[number], cores), LoadOptions())
            expected[name] = logits(model)
        for name, adapter in plain.items():
            load_adapter(model, adapter, LoadOptions())
            expected[name] = logits(model)
        remove_lora(model)
        assert all(
            (expected[a] - expected[b]).abs().max() > 1e-2
            for a in expected for b in expected if a != b
        )  # fmt: skip
        slots = ModelSlots(model, SlotCapacity(max_loras=5, max_lora_rank=8))
        room = CoreSlots(slots, max_cores=3, max_rank=K // blocks if blocks == world_size else K)
        slot_of = {None: (-1, -1)}
        for name, adapter in plain.items():
            slot_of[name] = (slots.load(name, slots.shard(adapter)), -1)
        bases = [slots.load(("basis", i), slots.shard(pair)) for i, pair in enumerate(shared)]
        # Four adapters for three places: the first is loaded again over another one.
        for name in ("d", "a", "b", "c", "a"):
            number, cores = kinds[name]
            if name not in room.allocator:
                slot_of[name] = (bases[number], room.load(name, room.shard(cores)))
        pairs = [("a", "b"), ("c", "a"), ("b", "vanilla"), ("bd", "c"), (None, "b"), ("a", None)]
        _hold(model, slots, room, slot_of, expected, pairs)
        number, cores = kinds["d"]
        slot_of["d"] = (bases[number], room.load("d", room.shard(cores)))
        _hold(model, slots, room, slot_of, expected, [("d", "d"), ("vanilla", "d")])
        assert torch.equal(logits(model), expected[None])


def _hold(model, slots, room, slot_of, expected, pairs):
    for first, second in pairs:
        batch = slots.batch(slots_of_rows(slot_of[first][0], slot_of[second][0]))
        cores = room.batch(slots_of_rows(slot_of[first][1], slot_of[second][1]))
        with slots.serving(batch, cores=cores):
            made = logits(model)
        for row, name in enumerate((first, second)):
            assert_close(made[row], expected[name][row], f"row {row} of {first}, {second}")


@pytest.mark.parametrize(
    ("world_size", "blocks"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 4), (2, 4), (1, 4)]
)
def test_rows_of_a_batch_run_their_own_cores(world_size, blocks):
    run_ranks(world_size, _rows, blocks)


def _calls(rank, world_size):
    with model_parallel(world_size):
        model = serving_model(world_size)

        def calls():
            with torch.no_grad(), record_collectives() as log:
                model(**tokens())
            return log.calls

        base = calls()
        slots = ModelSlots(model, SlotCapacity(max_loras=2, max_lora_rank=8))
        room = CoreSlots(slots, max_cores=2, max_rank=8)
        slot = slots.load("basis", slots.shard(basis(0)))
        core = room.load("a", room.shard(cores_of(1)))
        cores = room.batch(slots_of_rows(core, -1))
        with slots.serving(slots.batch(slots_of_rows(slot, -1)), cores=cores):
            own = calls()
        assert base
        assert own == base


@pytest.mark.parametrize("world_size", [2, 4])
def test_cores_send_nothing(world_size):
    run_ranks(world_size, _calls)


def _many(rank, world_size):
    """64 tokens of 64 adapters from eight bases in one layer, each as its dense update."""
    with model_parallel(world_size):
        model = serving_model(world_size)
        slots = ModelSlots(model, SlotCapacity(max_loras=8, max_lora_rank=K))
        room = CoreSlots(slots, max_cores=64, max_rank=K)
        shared = [basis(number) for number in range(8)]
        bases = [slots.load(i, slots.shard(pair)) for i, pair in enumerate(shared)]
        cores = [cores_of(1000 + i) for i in range(64)]
        held = [room.load(i, room.shard(each)) for i, each in enumerate(cores)]
        draw = torch.Generator().manual_seed(3)
        order = torch.randperm(64, generator=draw)
        batch = slots.batch(torch.tensor([bases[i % 8] for i in order.tolist()]))
        own = room.batch(torch.tensor([held[i] for i in order.tolist()]))
        for name, layer in model.named_modules():
            if not name.endswith(
                ("layers.0.self_attention.linear_proj", "layers.1.mlp.linear_fc2")
            ):
                continue
            number = int(name.split(".")[2])
            key = ModuleKey(layer=number, name="o_proj" if "proj" in name else "down_proj")
            size = SIDES[key.name][0] // world_size
            x = torch.randn(64, 1, SIDES[key.name][0], generator=draw)
            mine = x[..., rank * size : (rank + 1) * size]
            with torch.no_grad():
                plain = layer(mine)[0]
                with slots.serving(batch, cores=own):
                    made = layer(mine)[0]
            for t, i in enumerate(order.tolist()):
                pair = shared[i % 8].modules[key]
                dense = pair.B.double() @ cores[i][key][0].double() @ pair.A.double()
                wanted = plain[t, 0].double() + dense @ x[t, 0].double()
                assert_close(made[t, 0], wanted.float(), f"token {t} in {name}")


@pytest.mark.parametrize("world_size", [1, 2])
def test_sixty_four_adapters_of_eight_bases_in_one_batch(world_size):
    run_ranks(world_size, _many)


def _collection(rank, world_size, folder):
    """What ``bdlora compress`` wrote, in slots, is each adapter as it reads expanded."""
    with model_parallel(world_size):
        model = serving_model(world_size)
        collection = read_collection(folder)
        expected, names = {}, ("a", "b", "c", "d")
        for name in names:
            with collection.adapter(name) as adapter:
                load_adapter(model, adapter, LoadOptions())
            expected[name] = logits(model)
        remove_lora(model)
        slots = ModelSlots(model, SlotCapacity(max_loras=2, max_lora_rank=8))
        room = CoreSlots(slots, max_cores=4, max_rank=8)
        bases = []
        for cluster in range(collection.manifest.clusters):
            with open_basis(collection, cluster) as basis:
                bases.append(slots.load(cluster, slots.shard(basis)))
        slot_of = {}
        for name in names:
            with collection.cores(name) as cores:
                core = room.load(name, room.shard(cores))
            slot_of[name] = (bases[collection.entry(name).cluster], core)
        assert len({basis for basis, _ in slot_of.values()}) == 2
        _hold(model, slots, room, slot_of, expected, [("a", "b"), ("c", "a"), ("d", "c")])


@pytest.mark.parametrize("kind", ["shared", "diagonal", "blocked"])
def test_a_compressed_collection_runs_as_its_adapters_do(tmp_path, kind):
    for number, name in enumerate("abcd"):
        # Two that are alike and two others.
        shared = basis(number // 2)
        adapter = whole(shared, {key: core / 4 for key, core in cores_of(number).items()})
        write_adapter(replace(adapter, name=name), tmp_path / name, "peft")
    blocked = {"form": "blocked", "tp": 2} if kind == "blocked" else {}
    core = {"core": "diagonal"} if kind == "diagonal" else {}
    options = CompressOptions(clusters=2, rank=K, **blocked, **core)
    sources = [FolderSource(name=name, path=tmp_path / name) for name in "abcd"]
    compress_adapters(sources, tmp_path / "out", options)
    run_ranks(2, _collection, tmp_path / "out")


def _refusals(rank, world_size):
    with model_parallel(world_size):
        model = serving_model(world_size)
        slots = ModelSlots(
            model, SlotCapacity(max_loras=2, max_lora_rank=4, target_modules=("linear_qkv",))
        )
        with pytest.raises(ConfigError, match="cores of rank 5 for bases of at most max_lora_rank"):
            CoreSlots(slots, max_cores=2, max_rank=5)
        room = CoreSlots(slots, max_cores=1, max_rank=4)
        # A projection has a matrix of rank K for each core, in float32.
        assert room.memory_bytes == 2 * 3 * 4 * 4 * 4
        with pytest.raises(ConfigError, match="have cores already"):
            CoreSlots(slots, max_cores=1, max_rank=4)
        key = ModuleKey(layer=0, name="q_proj")
        for core, error, match in [
            (torch.zeros(1, 5, 5), CapacityError, "a core of rank 5 on each rank"),
            (torch.zeros(3, 2, 2), ShapeError, "3 blocks over 2 tensor-parallel ranks"),
            (torch.zeros(4), ShapeError, r"a core of shape \[4\]"),
            (torch.zeros(1, 3, 4), ShapeError, r"a core of shape \[1, 3, 4\]"),
        ]:
            with pytest.raises(error, match=match):
                room.shard({key: core})
        with pytest.raises(TargetError, match=r"1 modules without slots, layers\.0\.mlp\.up_proj"):
            room.shard({ModuleKey(layer=0, name="up_proj"): torch.zeros(1, 2, 2)})
        shard = room.shard({key: torch.ones(1, 2, 2)})
        assert shard.num_bytes == 16
        assert room.load("a", shard) == 0
        room.allocator.acquire("a")
        assert room.load("b", shard) is None
        room.allocator.release("a")
        assert room.load("b", shard) == 0


def test_what_has_no_room_is_refused():
    run_ranks(2, _refusals)
