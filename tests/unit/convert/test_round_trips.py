"""Any format to any other through the neutral adapter, bit for bit, where both can hold it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdlora_megatron.convert import (
    LazyModules,
    ModuleKey,
    WriteOptions,
    detect_format,
    open_adapter,
    read_adapter,
    write_adapter,
)
from tests.reference import dense_update
from tests.unit.convert.random_adapters import DTYPES, adapter, adapters, assert_same, factors

FORMATS = ["peft", "megatron", "bridge", "slora"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SETTINGS = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@st.composite
def plain(draw, *, names, layers=2, kv_heads=(8, 4, 2), tp=1):
    """One rank and one scale for all modules, no blocks: what every format can hold."""
    dtype, heads = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(kv_heads))
    rank = tp * draw(st.integers(1, 3))
    scale = draw(st.integers(1, 64)) / rank
    modules = {}
    for layer in range(layers):
        for name in names:
            settings = {"rank": rank, "scale": scale, "dtype": dtype, "seed": len(modules)}
            modules[ModuleKey(layer=layer, name=name)] = factors(name, kv_heads=heads, **settings)
    return adapter(modules, kv_heads=heads, layers=layers)


def chain(wanted, folder, formats, options):
    """Write and read again, format after format, one module in memory at a time."""
    path = write_adapter(wanted, folder / "0", formats[0], options=options)
    for number, name in enumerate(formats[1:], 1):
        assert detect_format(path) == formats[number - 1]
        with open_adapter(path) as opened:
            assert isinstance(opened.modules, LazyModules)
            path = write_adapter(opened, folder / str(number), name, options=options)
    return read_adapter(path)


#: A tensor-parallel size, and an adapter whose rank it divides.
SIZED_ATTENTION, SIZED_SEVEN = (
    st.sampled_from([1, 2, 4, 8]).flatmap(
        lambda tp, more=more: st.tuples(st.just(tp), plain(tp=tp, **more))
    )
    for more in (
        {"names": ATTENTION, "kv_heads": (8,)},
        {"names": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
    )
)


@pytest.mark.parametrize("pair", list(itertools.permutations(FORMATS, 2)), ids="-".join)
def test_plain_adapters_pass_through_every_pair_of_formats(pair, tmp_path_factory):
    @given(sized=SIZED_ATTENTION)
    @settings(SETTINGS, max_examples=6)
    def check(sized):
        tp, wanted = sized
        folder = tmp_path_factory.mktemp("pair")
        assert_same(chain(wanted, folder, [*pair, pair[0]], WriteOptions(tp=tp)), wanted)

    check()


@given(sized=SIZED_SEVEN)
@SETTINGS
def test_all_seven_projections_with_grouped_queries(sized, tmp_path_factory):
    tp, made = sized
    folder = tmp_path_factory.mktemp("seven")
    formats = ["bridge", "peft", "megatron", "bridge", "megatron", "peft", "bridge"]
    assert_same(chain(made, folder, formats, WriteOptions(tp=tp)), made)


@given(wanted=adapters(mixed_blocks=False))
@SETTINGS
def test_blocks_ranks_and_scales_by_module_pass_between_peft_and_megatron(wanted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    assert_same(chain(wanted, folder, ["peft", "megatron", "peft"], WriteOptions()), wanted)


@given(wanted=adapters(mixed_blocks=True))
@SETTINGS
def test_the_megatron_format_holds_any_adapter(wanted, tmp_path_factory):
    got = chain(wanted, tmp_path_factory.mktemp("any"), ["megatron", "megatron"], WriteOptions())
    assert_same(got, wanted)
    assert (got.name, got.base) == (wanted.name, wanted.base)


@given(wanted=adapters(mixed_blocks=True))
@SETTINGS
def test_dense_forms_are_the_same_updates(wanted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    got = chain(wanted, folder, ["peft", "megatron"], WriteOptions(dense=True))
    for key, factor in wanted.modules.items():
        assert got.modules[key].num_blocks == 1
        assert got.modules[key].scale == factor.scale
        both = (dense_update(f, dtype=torch.float64) for f in (got.modules[key], factor))
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
