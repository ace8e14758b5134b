"""Timing layouts on real ranks: what waits, what is counted, and the command from end to end."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

from bdlora_megatron.bench.contenders import Contenders
from bdlora_megatron.bench.latency import link_latency
from bdlora_megatron.bench.plan import BenchPlan, Variant
from bdlora_megatron.cli.main import main
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.runtime import record_collectives
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.session import model_parallel


def _communicate(rank):
    summed = reduce_from_tensor_model_parallel_region(torch.full((4, 2), rank + 1.0))
    gathered = gather_from_sequence_parallel_region(torch.full((2, 2), float(rank)))
    return summed, gathered


def _wait(rank, world_size):
    with model_parallel(world_size):
        plain = _communicate(rank)
        waits = []
        alone = torch.distributed.new_group([rank], use_local_synchronization=True)
        with link_latency(0.25, wait=waits.append), record_collectives() as log:
            delayed = _communicate(rank)
            torch.distributed.barrier()
            torch.distributed.all_reduce(torch.ones(1), group=alone)
        assert log.counts() == {"all_reduce": 2, "all_gather": 1, "barrier": 1}
        assert waits == [0.25, 0.25], "not for a barrier, nor in a group of one"
        for got, wanted in zip(delayed, plain, strict=True):
            assert torch.equal(got, wanted)
        with pytest.raises(ValueError, match="inside"), link_latency(0.25, wait=waits.append):
            raise ValueError("inside")
        with link_latency(0.0, wait=waits.append):
            _communicate(rank)
        _communicate(rank)
        assert len(waits) == 2, "the link is as fast as before"
        with pytest.raises(ConfigError, match="wanted 0 or more"), link_latency(-1.0):
            pass


def test_every_collective_waits_and_nothing_else():
    run_ranks(2, _wait)


def test_the_command_measures_counts_and_writes(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws a picture")
    options = ["--layers", "1", "--lora-ranks", "4", "--latency-ms", "0", "--repeats", "2"]
    steps = ["--decode", "2x8", "--mixed", "3x8", "--prefill", "1x8", "--train", "1x8"]
    options += ["--adapters", "1,3"]
    stem = tmp_path / "new" / "layouts"
    assert main(["bench", *options, *steps, "--out", str(stem)]) == 0
    page = stem.with_suffix(".md").read_text("utf-8")
    printed = capsys.readouterr().out
    assert "](layouts.png)" in page
    assert page.splitlines()[-1] in printed.splitlines()
    assert stem.with_suffix(".png").stat().st_size > 1000
    data = json.loads(stem.with_suffix(".json").read_text("utf-8"))
    said = "--lora-ranks 4 --decode 2x8 --mixed 3x8 --prefill 1x8 --train 1x8 --adapters 1,3"
    command = f"bdlora bench --tp 2 --model small --layers 1 {said} --latency-ms 0 --repeats 2"
    assert data["command"] == command
    found = {(cell["phase"], cell["variant"]): cell for cell in data["cells"]}
    assert len(found) == 4 * 5
    assert len(data["cells"]) == 5 * 5
    for cell in found.values():
        assert len(cell["seconds"]) == 2
        assert min(cell["seconds"]) > 0
    for phase in ("decode", "mixed", "prefill"):
        base = found[phase, "base"]["collectives"]
        # Embedding, proj and fc2; the logits.
        assert base == {"all_reduce": 3, "all_gather": 1}
        for variant in ("bdlora 8", "bdlora 16", "half_sharded 4"):
            assert found[phase, variant]["collectives"] == base
        assert found[phase, "slora 4"]["collectives"] == {"all_reduce": 5, "all_gather": 3}
    base, extra = (found["train", variant]["collectives"] for variant in ("base", "half_sharded 4"))
    assert found["train", "bdlora 8"]["collectives"] == base
    assert extra["all_reduce"] == base["all_reduce"] + 4


def test_the_command_measures_adapters_of_attention_alone(capsys):
    options = ["--layers", "1", "--lora-ranks", "4", "--latency-ms", "0", "--repeats", "1"]
    steps = ["--decode", "2x8", "--mixed", "2x8", "--prefill", "none", "--train", "none"]
    only = ["--adapters", "2", "--target-modules", "linear_qkv,linear_proj"]
    assert main(["bench", *options, *steps, *only, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert " --target-modules linear_qkv,linear_proj " in data["command"]
    assert data["plan"]["target_modules"] == ["linear_qkv", "linear_proj"]
    assert {cell["phase"] for cell in data["cells"]} == {"decode", "mixed"}
    for cell in data["cells"]:
        extra = 1 if cell["variant"] == "slora 4" else 0
        # One layer: S-LoRA gathers for qkv, reduces for proj, and sends nothing for the MLP.
        assert cell["collectives"] == {"all_reduce": 3 + extra, "all_gather": 1 + extra}


def _same(rank, world_size):
    """Slots compute what the layers do: a mixed step's times are of the contender's own adapter."""
    plan = BenchPlan(
        tp=world_size,
        layers=2,
        ranks=(4,),
        mixed=((3, 8),),
        adapters=(1, 2),
        latencies_s=(0.0,),
    )
    single = next(s for s in plan.settings() if s.adapters is None)
    with model_parallel(world_size), torch.no_grad():
        contenders = Contenders(plan)
        inputs = contenders._inputs(3, 8, 0)
        outcomes = {}
        for variant in plan.variants():
            contenders.choose(variant, single)
            outcomes[variant] = alone = contenders.model(*inputs)
            for mixed in (s for s in plan.settings() if s.adapters):
                contenders.choose(variant, mixed)
                if variant.layout is None:
                    assert torch.equal(contenders.model(*inputs), alone)
                    continue
                slots = contenders._slots._slots[variant]
                assert slots.capacity.layouts == (variant.layout,)
                per_row = torch.arange(3) % mixed.adapters
                with slots.serving(slots.batch(per_row.expand(8, -1).flatten())):
                    assert_close(
                        contenders.model(*inputs), alone, f"{variant.label}, {mixed.label}"
                    )
        base = outcomes.pop(Variant())
        for variant, outcome in outcomes.items():
            assert (outcome - base).abs().max() > 1e-3, variant.label


def test_slots_hold_the_contenders_own_adapters():
    run_ranks(2, _same)


def test_a_picture_that_cannot_be_drawn_is_told_before_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "--out", str(tmp_path / "new" / "layouts")]) == 2
    told = capsys.readouterr().err
    assert "install the extra: pip install 'bdlora-megatron[bench]'" in told
    assert "round" not in told
    assert not list(tmp_path.iterdir())


def test_impossible_options_are_told(capsys):
    assert main(["bench", "--tp", "5", "--lora-ranks", "5"]) == 2
    assert "tp=5 does not divide 12 heads" in capsys.readouterr().err
    assert main(["bench", "--target-modules", "o_proj"]) == 2
    assert "o_proj is in linear_proj" in capsys.readouterr().err
    assert main(["bench", "--adapters", "64"]) == 2
    assert "adapters=(64,) in mixed steps of 32 requests" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--decode", "8"])
    assert "wanted batch and length, such as 8x128" in capsys.readouterr().err
