"""Adapters of the families that only a ``HybridModel`` mixes, against the whole model in fp64.

The kernels are stand-ins in torch (``tests.fakes.hybrid_kernels``); the layers, their ranks and all
that communicates are Megatron-Core's own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from bdlora_megatron import runtime
from bdlora_megatron.blocks import reshard
from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.convert import read_adapter
from bdlora_megatron.errors import ConfigError, TargetError, UnsupportedError
from bdlora_megatron.export import adapter_state, export_adapter
from bdlora_megatron.layers import (
    LoadOptions,
    adapters_disabled,
    apply_lora,
    collect_adapter,
    freeze_base,
    load_adapter,
    lora_layers,
    lora_spec,
    merge_adapters,
    number_layers,
    save_adapter,
    unmerge_adapters,
)
from bdlora_megatron.layers.anatomy import named_modules_global
from bdlora_megatron.layers.apply import replace_module
from bdlora_megatron.layers.classes import lora_layer
from bdlora_megatron.runtime.collectives import record_collectives
from bdlora_megatron.serve import ModelSlots, SlotCapacity
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.models import MODEL_CLASSES, randomize_adapters
from tests.tp.session import model_parallel

pytestmark = pytest.mark.skipif(
    "hybrid" not in MODEL_CLASSES, reason="HybridModel takes GPTModel's place from 0.19 on"
)
FAMILIES = ("nemotron_h", "qwen3_next", "deepseek", "deepseek_lite")
BLOCKS, RANK, ALPHA = 4, 8, 12.0
SCALE = ALPHA / RANK


def _lora(family, blocks=BLOCKS, **changes):
    from tests.tp.family_models import TARGETS

    settings = {"rank": RANK, "alpha": ALPHA, "num_blocks": blocks}
    return LoRAConfig(**{**settings, "target_modules": TARGETS[family], **changes})


def _adapt(model, family, blocks=BLOCKS):
    """Apply adapters, also where the model's own backward pass forbids training it.

    There, what is before the last latent attention gets a part of its gradient, adapters or not.
    """
    own = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    lora = _lora(family, blocks)
    lora = replace(lora, target_modules=[name for name in lora.target_modules if name in own])
    config = model.config
    if config.tensor_model_parallel_size == 1 or config.sequence_parallel or "deep" not in family:
        return apply_lora(model, lora)
    with pytest.raises(UnsupportedError, match="the keys' rotary part"):
        apply_lora(model, lora)
    names = []
    for name, module in list(named_modules_global(model)):
        if name.rpartition(".")[2] in lora.target_modules:
            layer = lora_layer(module)
            layer.attach_config(lora, name)
            replace_module(model, module, layer)
            names.append(name)
    freeze_base(model)
    return names


def _loss(output):
    generator = torch.Generator().manual_seed(2)
    return (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()


# The reference: the whole model on one rank with plain layers, whose weights are W + s B A.


def _stretches(config, name, part):
    """Rows of each stretch of a pair's B, as the model's configuration tells them."""
    if name.endswith("mixer.in_proj"):
        inner = config.mamba_num_heads * config.mamba_head_dim
        state = config.mamba_num_groups * config.mamba_state_dim
        return [inner, inner, state, state, config.mamba_num_heads]
    if name.endswith("self_attention.in_proj"):
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        heads = config.linear_num_value_heads
        return [keys, keys, values, values] if part == "qkvz" else [heads, heads]
    return None


def _dense(packed, stretches, blocks):
    """A packed B as a matrix: each stretch's blocks on a diagonal."""
    parts = packed.split(stretches) if stretches else [packed]
    return torch.cat([torch.block_diag(*part.chunk(blocks)) for part in parts])


def _update(config, name, pairs, blocks=BLOCKS):
    """``s B A`` of a layer on one rank, rows in its own order; pairs of A and B by projection."""
    if name.endswith(("out_proj", "linear_proj", "linear_fc2")):
        A, B = pairs[""]
        return SCALE * B @ torch.block_diag(*A.chunk(blocks))
    rows = {
        part: _dense(B, _stretches(config, name, part), blocks) @ A
        for part, (A, B) in pairs.items()
    }
    if name.endswith("linear_qkv"):
        grouped = [part.unflatten(0, (config.num_query_groups, -1)) for part in rows.values()]
        return SCALE * torch.cat(grouped, dim=1).flatten(0, 1)
    return SCALE * torch.cat(list(rows.values()))


def _reference(rank, world, family, pattern=None, **settings):
    """The output, and every factor with its gradient, by layer and projection."""
    from tests.tp.family_models import batch, family_model

    with model_parallel(world):
        adapted = family_model(family, world, pattern=pattern, **settings)
        names = _adapt(adapted, family)
        randomize_adapters(adapted)
        factors = {
            (name, plan.projection.name): [
                factor().detach().clone().requires_grad_() for factor in layer.adapter.factors(plan)
            ]
            for name, layer in lora_layers(adapted)
            for plan in layer.adapter.plans
        }
        plain = family_model(family, world, pattern=pattern, **settings)
        weights = dict(plain.named_parameters())
        for name, path in zip(names, _paths(adapted), strict=True):
            pairs = {part: pair for (layer, part), pair in factors.items() if layer == name}
            key = f"{path}.weight"
            weights[key] = weights[key].detach() + _update(plain.config, name, pairs)
        output = torch.func.functional_call(plain, weights, kwargs=batch())
        _loss(output).backward()
        return output.detach(), {
            key: [(factor.detach(), factor.grad) for factor in pair]
            for key, pair in factors.items()
        }


def _paths(model):
    """The adapted layers' names on this rank, which count positions."""
    return [name for name, module in model.named_modules() if getattr(module, "adapter", None)]


def _share(name, which, whole, stretches, world, rank):
    """One rank's share of a whole factor or gradient."""
    row = name.endswith(("out_proj", "linear_proj", "linear_fc2"))
    if which == "B" and row:
        return whole.chunk(world, dim=1)[rank]
    if which == "B" and stretches:
        return torch.cat([part.chunk(world)[rank] for part in whole.split(stretches)])
    return whole.chunk(world)[rank]


def _sharded(rank, world, family, reference, pattern=None, **settings):
    from tests.tp.family_models import batch, family_model

    expected, factors = reference
    with model_parallel(world):
        model = family_model(family, world, pattern=pattern, **settings)
        before = model(**batch(), runtime_gather_output=True).detach()
        assert set(_adapt(model, family)) == {name for name, _ in factors}
        randomize_adapters(model)
        output = model(**batch(), runtime_gather_output=True)
        assert_close(output.detach(), expected, f"{family}: output")
        _loss(output).backward()
        for name, layer in lora_layers(model):
            for plan in layer.adapter.plans:
                stretches = _stretches(model.config, name, plan.projection.name)
                for which, factor, (value, gradient) in zip(
                    "AB",
                    layer.adapter.factors(plan),
                    factors[name, plan.projection.name],
                    strict=True,
                ):
                    args = (stretches, world, rank)
                    assert torch.equal(factor.weight, _share(name, which, value, *args))
                    wanted = _share(name, which, gradient, *args)
                    assert_close(factor.weight.grad, wanted, f"{name} {plan.projection} {which}")
        with adapters_disabled(model):
            assert torch.equal(model(**batch(), runtime_gather_output=True), before)
        merge_adapters(model)
        merged = model(**batch(), runtime_gather_output=True)
        assert_close(merged.detach(), expected, f"{family}: merged")
        unmerge_adapters(model)
        assert torch.equal(model(**batch(), runtime_gather_output=True), output)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_all_gradients_are_the_whole_models(family):
    (reference,) = run_ranks(1, _reference, family)
    run_ranks(1, _sharded, family, reference)
    run_ranks(2, _sharded_both, family, reference)


def _sharded_both(rank, world, family, reference):
    _sharded(rank, world, family, reference, sequence_parallel=True)
    if family != "deepseek":
        _sharded(rank, world, family, reference)


def test_latent_attention_alone_is_right_without_sequence_parallelism():
    """In one layer, before which nothing trains; whether down-projections are split or whole."""
    (reference,) = run_ranks(1, _reference, "deepseek", "+-")
    run_ranks(2, _alone, reference)


def _alone(rank, world, reference):
    from tests.tp.family_models import family_spec

    for gathered in (False, True):
        spec = family_spec("deepseek", gathered=gathered)
        _sharded(rank, world, "deepseek", reference, "+-", spec=spec)


def _record(model):
    from tests.tp.family_models import batch

    for name, parameter in model.named_parameters():
        # Every layer has an input gradient to reduce, as it has in training after the first one.
        if "embedding" in name:
            parameter.requires_grad_(True)
    with record_collectives() as forward:
        loss = _loss(model(**batch()))
    with record_collectives() as backward:
        loss.backward()
    return forward.calls, backward.calls


def _count(family, world):
    from tests.tp.family_models import family_model

    for sequence_parallel in (False, True):
        calls = []
        for adapted in (False, True):
            model = family_model(family, world, sequence_parallel=sequence_parallel)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            if adapted:
                _adapt(model, family, blocks=8)
            calls.append(_record(model))
        assert calls[0] == calls[1], (family, sequence_parallel)
        # The comparison would be empty if the base communicated nothing.
        assert all(len(part) >= len(model.decoder.layers) for part in calls[0])


def _count_two(rank, world):
    with model_parallel(world):
        for family in FAMILIES:
            _count(family, world)


def _count_eight(rank, world):
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    runtime.enable_cpu()
    parallel_state.initialize_model_parallel(8, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    for family in FAMILIES:
        _count(family, 8)


def test_they_communicate_what_the_base_does():
    run_ranks(2, _count_two)
    run_ranks(1, _count_eight)


# --- files -----------------------------------------------------------------------------------


def _adapted(family, world, **settings):
    from tests.tp.family_models import family_model

    model = family_model(family, world, sequence_parallel=world > 1, **settings)
    apply_lora(model, _lora(family))
    randomize_adapters(model)
    return model


def _logits(model):
    from tests.tp.family_models import batch

    with torch.no_grad():
        return model(**batch(), runtime_gather_output=True)


def _write(rank, world, family, folder):
    """Save, export and collect; the logits with the adapter."""
    with model_parallel(world):
        model = _adapted(family, world)
        save_adapter(model, f"{folder}/megatron", name="a")
        export_adapter(model, f"{folder}/peft")
        adapter = collect_adapter(model, "a")
        modules = {str(key): factors for key, factors in adapter.modules.items()}
        return _logits(model), modules


def _read(rank, world, family, folder, expected):
    """Each file into a fresh model, by resharding and by Megatron-Core's own loader."""
    from megatron.core import dist_checkpointing

    from tests.tp.family_models import family_model

    with model_parallel(world):
        settings = {"sequence_parallel": world > 1}
        for form in ("megatron", "peft"):
            adapter = read_adapter(Path(folder) / form)
            for layout in ("bdlora", "slora", "half_sharded"):
                model = family_model(family, world, **settings)
                load_adapter(model, adapter, LoadOptions(layout=layout))
                assert_close(_logits(model), expected, f"{form} as {layout}")
            served = family_model(family, world, **settings)
            _serve(served, family, adapter, expected)
        model = family_model(family, world, **settings)
        apply_lora(model, _lora(family))
        weights = f"{folder}/megatron/weights"
        metadata = dist_checkpointing.load_content_metadata(weights)
        state = dist_checkpointing.load(adapter_state(model, metadata), weights)
        state.pop("content_metadata", None)
        model.load_state_dict(state, strict=False)
        assert_close(_logits(model), expected, "by Megatron-Core's loader")


def _serve(model, family, adapter, expected):
    """One row of a batch with the adapter in a slot, and one without."""
    from tests.tp.family_models import BATCH, SEQUENCE, TARGETS

    base = _logits(model)
    capacity = SlotCapacity(
        max_loras=2, max_lora_rank=2 * RANK, target_modules=tuple(TARGETS[family])
    )
    slots = ModelSlots(model, capacity)
    slot = slots.load("a", slots.shard(adapter))
    rows = torch.tensor([slot, -1]).expand(SEQUENCE, BATCH).flatten()
    with slots.serving(slots.batch(rows)):
        made = _logits(model)
    assert_close(made[0], expected[0], "the row with the adapter")
    assert_close(made[1], base[1], "the row without")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_two_ranks_write_any_number_reads(family, tmp_path):
    (expected, modules), (other, _) = run_ranks(2, _write, family, str(tmp_path))
    assert torch.equal(expected, other)
    for form in ("megatron", "peft"):
        adapter = read_adapter(tmp_path / form)
        found = {str(key): factors for key, factors in adapter.modules.items()}
        assert found.keys() == modules.keys()
        for name, factors in modules.items():
            if form == "peft" and name.endswith("mixer.in_proj"):
                # PEFT's blocks are stretches of rows, and these take a piece of each of five.
                factors = reshard(factors, 1)
            assert torch.equal(found[name].A, factors.A), name
            assert torch.equal(found[name].B, factors.B), name
            for fact in ("num_blocks", "scale", "parts"):
                assert getattr(found[name], fact) == getattr(factors, fact), (name, fact)
    for world in (1, 2):
        run_ranks(world, _read, family, str(tmp_path), expected)


def _pipeline(rank, world, folder):
    """Positions are counted over the stages, and what they save is one adapter."""
    from tests.tp.family_models import family_model

    with model_parallel(1, pp=2):
        model = family_model("nemotron_h", 1, pattern="M*|-M", pipeline_model_parallel_size=2)
        adapter = read_adapter(Path(folder) / "megatron")
        names = load_adapter(model, adapter)
        assert {int(name.split(".")[2]) for name in names} == ({0, 1} if rank == 0 else {2, 3})
        save_adapter(model, f"{folder}/stages", name="a")
        again = collect_adapter(model, "a").modules
        assert list(again) == list(adapter.modules)
        for key, factors in adapter.modules.items():
            assert torch.equal(again[key].A, factors.A)
            assert torch.equal(again[key].B, factors.B)


def test_positions_are_counted_over_pipeline_stages(tmp_path):
    run_ranks(2, _write, "nemotron_h", str(tmp_path))
    run_ranks(2, _pipeline, str(tmp_path))
    first, second = (read_adapter(tmp_path / name) for name in ("megatron", "stages"))
    assert second.base == first.base
    assert list(second.modules) == list(first.modules)
    for key, factors in first.modules.items():
        assert torch.equal(second.modules[key].B, factors.B)


# --- numbers and refusals --------------------------------------------------------------------


def _layers(model):
    return [str(key) for key in collect_adapter(model, "a").modules]


def _numbers(rank, world):
    from tests.tp.family_models import family_model
    from tests.tp.models import tiny_config, tiny_model

    with model_parallel(world):
        some = LoRAConfig(rank=8, num_blocks=4, target_modules=["in_proj", "linear_fc2"])
        # Both numberings exist for this pattern, so somebody has to say which is meant.
        model = family_model("nemotron_h", world, pattern="M-M-")
        with pytest.raises(TargetError, match=r"position0.*number_layers\(model, \"positions\"\)"):
            apply_lora(model, some)
        with pytest.raises(TargetError, match=r"no numbers.*number_layers"):
            load_adapter(model, collect_adapter(_adapted("nemotron_h", world), "a"))
        number_layers(model, "positions")
        assert [name.split(".")[2] for name in apply_lora(model, some)] == ["0", "1", "2", "3"]
        mixers = ["in_proj", "down_proj", "in_proj", "down_proj"]
        assert _layers(model) == [f"layers.{i}.mixer.{name}" for i, name in enumerate(mixers)]
        model = family_model("nemotron_h", world, pattern="M-M-")
        number_layers([model], "pairs")
        with pytest.raises(TargetError, match="Mamba has a name where each position is a layer"):
            apply_lora(model, some)
        # Without Mamba the pattern tells, and may still be said to be a family's of positions.
        model = tiny_model(tiny_config(world, model_class="hybrid"))
        number_layers(model, "positions")
        apply_lora(model, LoRAConfig(rank=8, num_blocks=4, target_modules=["linear_fc2"]))
        assert _layers(model) == ["layers.1.mixer.down_proj", "layers.3.mixer.down_proj"]
        for other, message in {
            "pairs": "'M\\*-M' cannot be numbered by pairs",
            "depth": "wanted one of pairs, positions",
        }.items():
            with pytest.raises(TargetError, match=message):
                number_layers(family_model("nemotron_h", world), other)
        with pytest.raises(TargetError, match="no HybridModel"):
            number_layers(tiny_model(tiny_config(world)), "pairs")


def _refusals(rank, world):
    from tests.tp.family_models import family_model, family_spec

    with model_parallel(world):
        lora = {"rank": 8, "num_blocks": 4}
        # A gated MLP has a name in pairs alone.
        gated: Any = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
        model = family_model("nemotron_h", world, **gated)
        with pytest.raises(TargetError, match=r"holds gate, up.*mixer\.up_proj"):
            apply_lora(model, _lora("nemotron_h"))
        with pytest.raises(ConfigError, match=r"B rows=16 is not a multiple of num_blocks=32"):
            apply_lora(family_model("nemotron_h", world), _lora("nemotron_h", 32, rank=32))
        with pytest.raises(UnsupportedError, match="no adapter format has one pair for both"):
            apply_lora(family_model("qwen3_next", world), _lora("qwen3_next", fused=True))
        for gathered in (False, True):
            spec = family_spec("deepseek", gathered=gathered)
            model = family_model("deepseek", world, spec=spec)
            for targets in (["linear_kv_down_proj"], ["*.self_attention.*"]):
                with pytest.raises(TargetError, match="is a down-projection of latent attention"):
                    apply_lora(model, LoRAConfig(target_modules=targets, **lora))
            assert not list(lora_layers(model))
            kept = LoRAConfig(
                target_modules=["*.self_attention.*"],
                exclude_modules=["linear_q_down_proj", "linear_kv_down_proj"],
                **lora,
            )
            names = {name.rpartition(".")[2] for name in apply_lora(model, kept)}
            assert names == {"linear_q_up_proj", "linear_kv_up_proj", "linear_proj"}
        down = LoRAConfig(target_modules=["*linear_q_down_proj"], **lora)
        with pytest.raises(TargetError, match="is a down-projection of latent attention"):
            lora_spec(family_spec("deepseek", gathered=True), model.config, down)
        # Targets that the pattern does not have.
        with pytest.raises(TargetError, match=r"'linear_qkv' \(nearest"):
            apply_lora(
                family_model("deepseek", world), LoRAConfig(target_modules=["linear_qkv"], **lora)
            )


def _loads(rank, world, folder):
    from tests.tp.family_models import batch, family_model

    with model_parallel(world):
        # A q_proj alone may be any attention's.
        model = _adapted("deepseek_lite", world)
        adapter = collect_adapter(model, "a")
        keys = {key: f for key, f in adapter.modules.items() if key.name == "latent.q_proj"}
        plain = {replace(key, name="q_proj"): factors for key, factors in keys.items()}
        logits = []
        for modules in (keys, plain):
            model = family_model("deepseek_lite", world)
            assert load_adapter(model, replace(adapter, modules=modules))
            logits.append(model(**batch()))
        assert torch.equal(*logits)
        # Blocks of rows as PEFT cuts them are no blocks of Mamba's ranks, and mean what they say.
        other = read_adapter(Path(folder) / "megatron")
        key = next(key for key in other.modules if key.name == "mixer.in_proj")
        cut = replace(other.modules[key], parts=())
        logits = []
        for factors in (cut, reshard(cut, 1), other.modules[key]):
            model = family_model("nemotron_h", world)
            load_adapter(model, replace(other, modules={key: factors}))
            logits.append(model(**batch()))
        assert_close(logits[0], logits[1], "PEFT's blocks of in_proj")
        assert (logits[2] - logits[1]).abs().max() > 1e-3
        # Another family's adapter has other names, whatever its sizes.
        with pytest.raises(TargetError, match=r"does not have: layers\.0\.mixer\.in_proj"):
            load_adapter(family_model("qwen3_next", world), other)


def _specification(rank, world):
    """Adapters that a stack's specification brings are those that are put in afterwards."""
    from tests.tp.family_models import family_config, family_model, family_spec

    with model_parallel(world):
        for family in FAMILIES:
            config = family_config(family, world)
            spec = lora_spec(family_spec(family), config, _lora(family))
            made, applied = family_model(family, world, spec=spec), family_model(family, world)
            assert [name for name, _ in lora_layers(made)] == apply_lora(applied, _lora(family))
            for model in (made, applied):
                randomize_adapters(model)
            assert_close(_logits(made), _logits(applied), family)


def test_numbers_are_told_by_the_pattern_or_by_somebody():
    run_ranks(1, _numbers)


def test_what_cannot_be_adapted_is_refused_by_name():
    run_ranks(1, _refusals)


def test_names_that_a_file_leaves_open(tmp_path):
    run_ranks(2, _write, "nemotron_h", str(tmp_path))
    run_ranks(1, _loads, str(tmp_path))


def test_a_stacks_specification_brings_its_adapters_along():
    run_ranks(1, _specification)
