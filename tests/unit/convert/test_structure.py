"""Whole adapters of another structure, against fp64 dense algebra."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bdlora_megatron.blocks import BlockFactors, pad_rank, reshard
from bdlora_megatron.convert import Adapter, LazyModules, ModuleKey, module_facts
from bdlora_megatron.convert.structure import Structure, restructure
from bdlora_megatron.errors import AdapterFormatError, ConfigError
from tests.reference import dense_update
from tests.unit.convert.random_adapters import adapter, adapters, factors

quick = settings(max_examples=40, deadline=None)
NAMES = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")


def vanilla(rank=6, layers=2, names=NAMES, **more):
    modules = {
        ModuleKey(layer=layer, name=name): factors(
            name, rank=rank, seed=10 * layer + number, kv_heads=8, **more
        )
        for layer in range(layers)
        for number, name in enumerate(names)
    }
    return adapter(modules, kv_heads=8, layers=layers)


def dense(source):
    return {key: dense_update(f, dtype=torch.float64) for key, f in source.modules.items()}


def assert_same_function(result, source):
    for key, expected in dense(source).items():
        # Exact structures copy numbers; only the order of fp64 additions may differ.
        actual = dense_update(result.modules[key], dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=str(key))


def assert_facts_are_true(result):
    for key, fact in module_facts(result).items():
        loaded = result.modules[key]
        assert fact.A.is_meta
        assert fact.B.is_meta
        for one, two in ((fact.A, loaded.A), (fact.B, loaded.B)):
            assert (one.shape, one.dtype) == (two.shape, two.dtype)
        assert (fact.num_blocks, fact.blocked, fact.scale) == (
            loaded.num_blocks,
            loaded.blocked,
            loaded.scale,
        )


@quick
@given(adapters(mixed_blocks=True), st.sampled_from(["exact", "reshard"]), st.sampled_from([2, 4]))
def test_exact_structures_fit_the_ranks_and_keep_the_function(source, mode, tp):
    assume(source.base.num_kv_heads % tp == 0)
    result = restructure(source, Structure(mode=mode, num_blocks=tp)).adapter
    assert list(result.modules) == list(source.modules)
    assert_facts_are_true(result)
    assert_same_function(result, source)
    for key, module in result.modules.items():
        assert module.num_blocks % tp == 0
        assert mode == "exact" or module.num_blocks == tp
        assert module.dtype == source.modules[key].dtype


@quick
@given(adapters(mixed_blocks=True), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_truncation_is_the_best_of_its_rank_and_its_error_is_told(source, tp, block_rank):
    assume(source.base.num_kv_heads % tp == 0)
    rank = block_rank * tp
    restructured = restructure(source, Structure(mode="truncate", num_blocks=tp, rank=rank))
    assert_facts_are_true(restructured.adapter)
    report = restructured.report()
    lost = whole = 0.0
    for change in report.modules:
        before = dense_update(source.modules[change.key], dtype=torch.float64)
        written = restructured.adapter.modules[change.key]
        assert written.rank <= rank
        assert written.num_blocks % tp == 0
        after = dense_update(written, dtype=torch.float64)
        error = (before - after).norm() / before.norm()
        assert change.error == pytest.approx(error.item(), rel=1e-6, abs=1e-12)
        # Eckart and Young, block by block; rounding to the file's type comes on top.
        best = _best_error(before, written, tp, rank)
        assert change.error <= best + 4 * torch.finfo(written.dtype).eps
        lost += (before - after).norm().item() ** 2
        whole += before.norm().item() ** 2
    assert report.error == pytest.approx(math.sqrt(lost / whole), rel=1e-6, abs=1e-12)


def _best_error(update, written, tp, rank):
    pieces = update.chunk(tp, dim=0 if written.blocked == "B" else 1)
    tails = [torch.linalg.svdvals(piece)[rank // tp :] for piece in pieces]
    return (torch.cat(tails).norm() / update.norm()).item()


def test_vanilla_becomes_blocks_of_the_whole_rank():
    source = vanilla(rank=6)
    restructured = restructure(source, Structure(mode="exact", num_blocks=4))
    report = restructured.report()
    assert {(change.rank_before, change.rank, change.num_blocks) for change in report.modules} == {
        (6, 24, 4)
    }
    assert report.error == 0.0
    assert report.bytes == sum(
        4 * restructured.adapter.modules[key].num_parameters for key in source.modules
    )


def test_exact_takes_out_what_a_reshard_added():
    source = vanilla(rank=4)
    modules = {key: pad_rank(reshard(f, 8), 48) for key, f in source.modules.items()}
    padded = Adapter(name="padded", modules=modules)
    result = restructure(padded, Structure(mode="exact", num_blocks=1)).adapter
    # Coarser ranks fit blocks already; only the padding goes.
    assert {f.rank for f in result.modules.values()} == {32}
    assert_facts_are_true(result)
    assert_same_function(result, source)


def test_a_module_that_fits_is_not_truncated():
    source = vanilla(rank=2)
    report = restructure(source, Structure(mode="truncate", num_blocks=2, rank=4)).report()
    assert {(change.rank, change.error) for change in report.modules} == {(4, 0.0)}


def test_a_budget_is_that_of_a_vanilla_lora():
    source = vanilla(rank=8)
    structure = Structure(mode="truncate", num_blocks=4, budget_of_rank=8)
    restructured = restructure(source, structure)
    ranks = {module.rank for module in restructured.adapter.modules.values()}
    assert len(ranks) == 1
    parameters = sum(m.num_parameters for m in restructured.adapter.modules.values())
    step = parameters * 4 // ranks.pop()
    budget = sum(m.num_parameters for m in source.modules.values())
    assert budget - step < parameters <= budget
    with pytest.raises(ConfigError, match="the smallest with num_blocks=8"):
        restructure(source, Structure(mode="truncate", num_blocks=8, budget_of_rank=1))


def test_one_module_is_in_memory_at_a_time():
    source = vanilla(rank=4)
    alive, most = set(), 0

    class Tracked:
        def __init__(self, key):
            self.key = key
            alive.add(key)

        def __del__(self):
            alive.discard(self.key)

    def load(key):
        nonlocal most
        loaded = source.modules[key]
        A = loaded.A.clone()
        A.tracked = Tracked(key)
        most = max(most, len(alive))
        return BlockFactors(
            A=A, B=loaded.B, num_blocks=1, blocked=loaded.blocked, scale=loaded.scale
        )

    lazy = Adapter(name="lazy", modules=LazyModules(module_facts(source), load, subject="lazy"))
    result = restructure(lazy, Structure(mode="truncate", num_blocks=2, rank=4))
    assert not alive, "nothing is loaded before it is looked up"
    for key in result.adapter.modules:
        result.adapter.modules[key]
    result.report()
    assert most == 1


def test_the_type_that_is_written_counts_in_the_error():
    source = vanilla(rank=4)
    structure = Structure(mode="keep")
    assert restructure(source, structure, dtype=torch.float64).report().error == 0.0
    report = restructure(source, structure, dtype=torch.bfloat16).report()
    lost, whole = [], []
    for module in source.modules.values():
        A, B = (t.to(torch.bfloat16).double() for t in (module.A, module.B))
        before = dense_update(module, dtype=torch.float64)
        lost.append((before - module.scale * B @ A).norm())
        whole.append(before.norm())
    expected = (torch.stack(lost).norm() / torch.stack(whole).norm()).item()
    assert report.error == pytest.approx(expected, rel=1e-6)
    assert report.bytes * 2 == report.bytes_before


def test_all_modules_that_cannot_be_cut_are_named():
    source = vanilla(names=("q_proj", "gate_proj"))
    with pytest.raises(AdapterFormatError, match="structure 'reshard'") as caught:
        restructure(source, Structure(mode="reshard", num_blocks=32))
    assert "out_features=80 is not a multiple of num_blocks=32" in str(caught.value)
    assert "layers.0.mlp.gate_proj, layers.1.mlp.gate_proj" in str(caught.value)
    heads = "8 query heads and 8 key-value heads, of which each of 32 ranks would hold part of one"
    assert heads in str(caught.value)
    assert "use a tensor-parallel size of 1, 2, 4, 8 (in layers.0.self_attn.q" in str(caught.value)


@pytest.mark.parametrize("names", [("q_proj", "o_proj"), ("v_proj",), ("k_proj", "up_proj")])
@pytest.mark.parametrize("mode", ["exact", "reshard", "truncate"])
def test_ranks_may_share_key_value_heads_and_no_query_heads(mode, names):
    modules = {ModuleKey(layer=0, name=name): factors(name, rank=16, kv_heads=2) for name in names}
    source = adapter(modules, kv_heads=2)
    rank = 16 if mode == "truncate" else None
    for tp in (2, 4, 8):
        structure = Structure(mode=mode, num_blocks=tp, rank=rank)
        for made in restructure(source, structure).adapter.modules.values():
            assert made.num_blocks % tp == 0
    with pytest.raises(AdapterFormatError) as caught:
        restructure(source, Structure(mode=mode, num_blocks=16, rank=rank))
    assert "8 query heads and 2 key-value heads, of which each of 16 ranks" in str(caught.value)
    assert "use a tensor-parallel size of 1, 2, 4, 8" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "best"}, "mode='best'; wanted one of"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"mode": "exact", "rank": 8}, "'exact', which loses nothing"),
        ({"mode": "truncate"}, "needs either a rank or"),
        ({"mode": "truncate", "rank": 8, "budget_of_rank": 8}, "needs either a rank or"),
        ({"mode": "truncate", "rank": 6, "num_blocks": 4}, "rank=6 is not a positive multiple"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Structure(**settings)


def test_a_report_reads_as_a_table_and_as_json():
    source = vanilla(rank=4, layers=1, names=("q_proj", "o_proj"))
    report = restructure(source, Structure(mode="truncate", num_blocks=2, rank=4)).report()
    lines = [" ".join(line.split()) for line in report.table().splitlines()]
    assert lines[0] == "module rank / blocks before after size relative error"
    assert lines[2].startswith("layers.0.self_attn.o_proj 4 / 1 4 / 2")
    assert lines[-1].startswith("whole adapter")
    assert json.loads(json.dumps(report.to_dict()))["modules"][1]["rank_before"] == 4
    assert report.to_dict()["error"] == report.error > 0.01
