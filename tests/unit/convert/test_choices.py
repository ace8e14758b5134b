"""What each choice for a tensor-parallel size is said to cost, against what it does cost."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bdlora_megatron.blocks import pad_rank, reshard
from bdlora_megatron.config import Layout
from bdlora_megatron.convert import Adapter, ModuleKey
from bdlora_megatron.convert.structure import Structure, choices_for_tp, plot_choices, restructure
from bdlora_megatron.errors import AdapterFormatError, ConfigError, MissingDependencyError
from tests.reference import shard
from tests.unit.convert.random_adapters import adapter, factors
from tests.unit.convert.test_structure import vanilla


def by_name(report):
    return {choice.name: choice for choice in report.choices}


def bytes_on_one_rank(modules, tp):
    return sum(
        part.numel() * part.itemsize
        for module in modules
        for part in shard(module, tp_rank=tp - 1, tp_size=tp)
    )


def test_a_vanilla_adapter_has_five_choices():
    source = vanilla(rank=8)
    report = choices_for_tp(source, 4)
    assert list(by_name(report)) == [
        "keep, S-LoRA layout",
        "keep, half sharded",
        "exact",
        "truncate, equal parameters",
        "truncate, equal rank",
    ]
    assert {choice.rank for choice in report.choices[:2]} == {8}
    assert by_name(report)["exact"].rank == 32
    assert report.recommended == "exact"
    assert "no truncation stays within" in report.reason
    sent = {choice.name for choice in report.choices if choice.collectives != "none"}
    assert sent == {"keep, S-LoRA layout"}


@pytest.mark.parametrize("name", ["exact", "truncate, equal parameters", "truncate, equal rank"])
def test_a_choice_costs_what_converting_to_it_costs(name):
    source = vanilla(rank=8, dtype=torch.bfloat16)
    choice = by_name(choices_for_tp(source, 4))[name]
    rank = choice.rank if choice.mode == "truncate" else None
    assert choice.options == f"--structure {choice.mode} --tp 4" + (
        f" --rank {rank}" if rank else ""
    )
    done = restructure(source, Structure(mode=choice.mode, num_blocks=4, rank=rank))
    modules = list(done.adapter.modules.values())
    assert max(module.rank for module in modules) == choice.rank
    assert bytes_on_one_rank(modules, 4) == choice.bytes_per_rank
    # bfloat16 rounds what the truncation leaves.
    assert done.report().error == pytest.approx(choice.error, rel=1e-3)


def test_layouts_of_vanilla_hold_a_share_or_a_whole_factor():
    source = vanilla(rank=6, layers=1, names=("up_proj", "down_proj"))
    choices = by_name(choices_for_tp(source, 4))
    # S-LoRA splits the rank too, padded to 8; half sharded keeps the hidden side's factor whole.
    assert choices["keep, S-LoRA layout"].bytes_per_rank == 4 * 2 * 8 * (48 + 80) // 4
    assert choices["keep, half sharded"].bytes_per_rank == 4 * 2 * 6 * (48 + 80 // 4)
    assert choices["keep, half sharded"].layout is Layout.HALF_SHARDED


def test_blocks_that_line_up_are_kept():
    modules = {
        ModuleKey(layer=0, name=name): factors(name, rank=16, num_blocks=8, kv_heads=8)
        for name in ("q_proj", "down_proj")
    }
    source = adapter(modules, kv_heads=8)
    report = choices_for_tp(source, 4)
    assert report.recommended == "keep"
    kept = by_name(report)["keep"]
    assert (kept.rank, kept.error, kept.collectives) == (16, 0.0, "none")
    assert kept.bytes_per_rank == bytes_on_one_rank(modules.values(), 4)


def test_a_small_loss_is_recommended_where_it_is_tolerated():
    # Of rank 8 by its shape and of rank 2 by its numbers, but for a millionth.
    exact = vanilla(rank=2)
    modules = {}
    for key, module in exact.modules.items():
        wide = pad_rank(module, 8)
        modules[key] = type(wide)(
            A=wide.A + 1e-6 * torch.randn(wide.A.shape, generator=torch.Generator().manual_seed(0)),
            B=wide.B + 1e-6 * torch.randn(wide.B.shape, generator=torch.Generator().manual_seed(1)),
            num_blocks=1,
            blocked=wide.blocked,
            scale=wide.scale,
        )
    source = Adapter(name="nearly", modules=modules)
    report = choices_for_tp(source, 4)
    assert report.recommended == "truncate, equal rank"
    assert "within the tolerance of 0.01" in report.reason
    assert choices_for_tp(source, 4, tolerance=0.0).recommended == "exact"


def test_the_curve_falls_to_zero_at_the_exact_rank():
    report = choices_for_tp(vanilla(rank=6), 2)
    ranks, errors = zip(*report.curve, strict=True)
    assert ranks == (2, 4, 6, 8, 10, 12)
    assert list(errors) == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12 < errors[-2]


def test_choices_read_as_a_table_and_as_json():
    report = choices_for_tp(vanilla(rank=4), 2)
    assert json.loads(json.dumps(report.to_dict()))["choices"][0]["layout"] == "slora"
    text = report.table()
    assert "exact *" in text
    assert "* recommended (--structure exact --tp 2)" in text


def test_wrong_requests_are_refused():
    with pytest.raises(ConfigError, match="tp=0"):
        choices_for_tp(vanilla(), 0)
    with pytest.raises(ConfigError, match="0 modules"):
        choices_for_tp(Adapter(name="empty", modules={}), 2)
    with pytest.raises(AdapterFormatError, match="is not a multiple of num_blocks=7"):
        choices_for_tp(vanilla(), 7)


def test_exact_counts_what_compacting_takes_out():
    source = vanilla(rank=4, layers=1)
    modules = {key: reshard(reshard(f, 4), 1) for key, f in source.modules.items()}
    report = choices_for_tp(Adapter(name="wide", modules=modules), 4)
    exact = by_name(report)["exact"]
    assert exact.rank == 16
    done = restructure(Adapter(name="wide", modules=modules), Structure(mode="exact", num_blocks=4))
    assert bytes_on_one_rank(done.adapter.modules.values(), 4) == exact.bytes_per_rank


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    path = plot_choices(choices_for_tp(vanilla(rank=4), 2), tmp_path / "error.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"bdlora-megatron\[plot\]"):
        plot_choices(choices_for_tp(vanilla(rank=4), 2), tmp_path / "error.png")
    assert not list(tmp_path.iterdir())
