"""Adapters in Megatron-Core's Transformer Engine layers, over stand-ins for Transformer Engine.

The wrappers are Megatron-Core's real ones; only ``te.pytorch.Linear`` and its like are ours, in
``tests.fakes``. On a machine with a GPU and Transformer Engine the last test runs the real ones.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from tests.harness import run_ranks


def stand_ins(world_size):
    """Megatron's process groups, with a Transformer Engine that Megatron-Core finds."""
    from tests.fakes import transformer_engine

    transformer_engine.forget_megatron()
    transformer_engine.install()
    session = importlib.import_module("tests.tp.session")
    return session.model_parallel(world_size)


def every_kind(**settings):
    """Each kind of layer with a BD-LoRA, its projections apart and fused."""
    from bdlora_megatron.config import Layout
    from tests.tp.layer_cases import Case
    from tests.tp.te_cases import TECase

    settings = {"layout": Layout.BDLORA, "num_blocks": 12, **settings}
    for layer, fused in product(("linear_qkv", "linear_fc1"), (False, True)):
        for norm in ("", "RMSNorm", "LayerNorm"):
            yield TECase(case=Case(layer=layer, fused=fused, **settings), norm=norm)
    for layer in ("linear_proj", "linear_fc2"):
        yield TECase(case=Case(layer=layer, **settings))


def _check_all(rank, world_size):
    with stand_ins(world_size):
        from tests.tp.te_cases import check

        for sequence_parallel in (False, True):
            for te in every_kind(sequence_parallel=sequence_parallel):
                check(te, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_outputs_gradients_and_collectives(world_size):
    run_ranks(world_size, _check_all)


def _check_variants(rank, world_size):
    with stand_ins(world_size):
        from bdlora_megatron.config import Layout
        from tests.tp.te_cases import check

        for te in every_kind(sequence_parallel=True):
            check(replace(te, bias=True), rank, world_size)
            check(replace(te, bias=True, skip_bias_add=True), rank, world_size)
            check(replace(te, from_base=False), rank, world_size)
        for te in every_kind(base_trainable=True):
            check(te, rank, world_size)
        for layout in (Layout.SLORA, Layout.HALF_SHARDED):
            for te in every_kind(layout=layout, num_blocks=1):
                check(te, rank, world_size)
        for te in every_kind(regather=True, sequence_parallel=True):
            if te.case.column:
                with pytest.raises(AssertionError, match="all_gather"):
                    # All numbers are right; the one gather more is what the option costs.
                    check(te, rank, world_size)


def test_biases_constructors_layouts_and_a_trainable_base():
    run_ranks(2, _check_variants)


def _fused_accumulation(rank, world_size):
    """dW of a trainable base goes into main_grad, once; a frozen one needs no main_grad."""
    with stand_ins(world_size):
        from bdlora_megatron.config import Layout
        from tests.tolerances import assert_close
        from tests.tp.layer_cases import Case, Reference, in_layer_order
        from tests.tp.te_cases import TECase, build, expected, run

        for layer, norm in (("linear_qkv", ""), ("linear_fc1", "RMSNorm"), ("linear_fc2", "")):
            case = Case(layer=layer, layout=Layout.BDLORA, num_blocks=2, base_trainable=True)
            te = TECase(case=case, norm=norm)
            reference = Reference.make(case, world_size)
            expected(te, reference)
            built = build(te, reference, rank)
            built.fuse_wgrad_accumulation = True
            built.config.gradient_accumulation_fusion = True
            built.weight.main_grad = torch.zeros_like(built.weight)
            run(built, reference, rank)
            grads = {name: weight.grad for name, weight in reference.W.items()}
            whole = in_layer_order(case, grads, world_size)
            share = whole.chunk(world_size, dim=0 if case.column else 1)[rank]
            assert_close(built.weight.main_grad, share, f"main_grad of {layer}")
            assert built.weight.grad_added_to_main_grad
            frozen = build(replace(te, case=replace(case, base_trainable=False)), reference, rank)
            frozen.fuse_wgrad_accumulation = True
            run(frozen, reference, rank)
            assert frozen.weight.grad is None


def test_fused_gradient_accumulation():
    run_ranks(2, _fused_accumulation)


def _overlap(rank, world_size):
    """Overlapped communication is off while the adapter computes, and on again afterwards."""
    with stand_ins(world_size):
        from bdlora_megatron.config import Layout
        from tests.tp.layer_cases import Case, Reference
        from tests.tp.te_cases import TECase, build, run

        case = Case(layer="linear_fc2", layout=Layout.BDLORA, num_blocks=2)
        reference = Reference.make(case, world_size)
        layer = build(TECase(case=case), reference, rank)
        layer.ub_overlap_rs_fprop = True
        seen = []
        layer._product = lambda x: (
            seen.append((layer.ub_overlap_rs_fprop, layer.parallel_mode, layer.tp_size)),
            type(layer)._product(layer, x),
        )[1]
        run(layer, reference, rank)
        assert seen == [(False, None, 1)]
        after = (layer.ub_overlap_rs_fprop, layer.parallel_mode, layer.tp_size)
        assert after == (True, "row", world_size)
        layer.adapter_enabled = False
        layer.ub_overlap_rs_fprop = False
        y = run(layer, reference, rank)[0]
        plain = build(TECase(case=case, adapter=False), reference, rank)
        torch.testing.assert_close(y, run(plain, reference, rank)[0], rtol=0, atol=0)
        assert seen[1:] == [(False, "row", world_size)]


def test_communication_is_switched_off_only_for_the_product():
    run_ranks(2, _overlap)


def _refusals(rank, world_size):
    with stand_ins(world_size):
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TERowParallelLinear,
        )

        from bdlora_megatron.config import Layout
        from bdlora_megatron.errors import UnsupportedError
        from bdlora_megatron.layers.classes import lora_layer
        from tests.tp.layer_cases import Case, Reference, transformer_config
        from tests.tp.te_cases import TECase, build, run

        case = Case(layer="linear_fc1", layout=Layout.BDLORA, num_blocks=2)
        common = {"config": transformer_config(case, world_size), "bias": False}
        common |= {"init_method": torch.nn.init.zeros_, "skip_bias_add": False}
        common |= {"is_expert": True, "tp_comm_buffer_name": "fc1"}
        for kind, own in (
            (TEColumnParallelLinear, {"gather_output": False}),
            (TERowParallelLinear, {"input_is_parallel": True}),
        ):
            with pytest.raises(UnsupportedError, match="mixture-of-experts expert"):
                lora_layer(kind(24, 48, **common, **own))
        reference = Reference.make(case, world_size)
        layer = build(TECase(case=case), reference, rank)
        layer.parallel_mode = None  # as moe_shared_expert_overlap does
        with pytest.raises(UnsupportedError, match="dispatcher"):
            run(layer, reference, rank)

        class Changed(TEColumnParallelLinear):
            pass

        common["is_expert"] = False
        with pytest.raises(UnsupportedError, match="exactly TEColumnParallelLinear"):
            lora_layer(Changed(24, 48, gather_output=False, **common))


def test_what_cannot_be_computed_is_refused():
    run_ranks(2, _refusals)


def _whole_models(rank, world_size, sequence_parallel):
    """Local and Transformer Engine models with equal weights and adapters: equal in all numbers."""
    with stand_ins(world_size):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        from bdlora_megatron import layers
        from bdlora_megatron.config import LoRAConfig
        from tests.tp import te_cases
        from tests.tp.models import randomize_adapters, tiny_config, tiny_model, tokens

        lora = LoRAConfig(rank=8, alpha=16, num_blocks=4)
        config = tiny_config(world_size, sequence_parallel=sequence_parallel)
        local = tiny_model(config, get_gpt_layer_local_spec(normalization="RMSNorm"))
        applied = tiny_model(config, te_cases.te_spec(), seed=8)
        built = tiny_model(config, layers.lora_spec(te_cases.te_spec(), config, lora), seed=9)
        te_cases.copy_weights(local, applied)
        chosen = layers.apply_lora(local, lora)
        assert layers.apply_lora(applied, lora) == chosen
        assert len(chosen) == 4 * config.num_layers
        state = {k: v for k, v in applied.state_dict().items() if ".adapter." not in k}
        built.load_state_dict(state, strict=False)
        layers.freeze_base(built)
        results = []
        for model in (local, applied, built):
            randomize_adapters(model)
            y = model(**tokens())
            y.square().sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            results.append(SimpleNamespace(y=y.detach(), grads=grads))
        for other in results[1:]:
            torch.testing.assert_close(other.y, results[0].y, rtol=1e-10, atol=1e-10)
            assert other.grads.keys() == results[0].grads.keys()
            for name, grad in other.grads.items():
                torch.testing.assert_close(grad, results[0].grads[name], rtol=1e-9, atol=1e-9)
        layers.remove_lora(applied)
        assert type(applied.decoder.layers[0].mlp.linear_fc1).__name__ == (
            "TELayerNormColumnParallelLinear"
        )


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_whole_models_choose_these_layers_by_themselves(sequence_parallel):
    run_ranks(2, _whole_models, sequence_parallel)


def _load(rank, world_size):
    with stand_ins(world_size):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        from bdlora_megatron import layers
        from bdlora_megatron.blocks import BlockFactors
        from bdlora_megatron.convert.adapter import Adapter, ModuleKey
        from tests.tp import te_cases
        from tests.tp.models import tiny_config, tiny_model, tokens

        generator = torch.Generator().manual_seed(1)
        sizes = {"q_proj": (24, 48), "v_proj": (24, 24), "down_proj": (40, 24)}
        modules = {
            ModuleKey(layer=1, name=name): BlockFactors(
                A=torch.randn(6, i, generator=generator, dtype=torch.float64),
                B=torch.randn(o, 6, generator=generator, dtype=torch.float64),
                num_blocks=1,
                blocked="A" if name == "down_proj" else "B",
                scale=0.5,
            )
            for name, (i, o) in sizes.items()
        }
        adapter = Adapter(name="some", modules=modules)
        config = tiny_config(world_size)
        local = tiny_model(config, get_gpt_layer_local_spec(normalization="RMSNorm"))
        te = tiny_model(config, te_cases.te_spec(), seed=8)
        te_cases.copy_weights(local, te)
        before = te(**tokens())
        loaded = [layers.load_adapter(model, adapter) for model in (local, te)]
        assert loaded[0] == loaded[1]
        assert len(loaded[0]) == 2
        wanted, y = local(**tokens()), te(**tokens())
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
        assert (y - before).abs().max() > 1e-3
        layers.merge_adapters(te)
        torch.testing.assert_close(te(**tokens()), wanted, rtol=1e-9, atol=1e-9)


def test_loading_and_merging_an_adapter():
    run_ranks(2, _load)


def _serve(rank, world_size, sequence_parallel):
    with stand_ins(world_size):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        from bdlora_megatron import runtime
        from bdlora_megatron.config import Layout
        from bdlora_megatron.serve import ModelSlots, SlotCapacity
        from tests.tp import te_cases
        from tests.tp.models import tiny_config, tiny_model, tokens
        from tests.tp.serving_cases import make_adapter

        config = tiny_config(world_size, sequence_parallel=sequence_parallel)
        local = tiny_model(config, get_gpt_layer_local_spec(normalization="RMSNorm"))
        te = tiny_model(config, te_cases.te_spec(), seed=8)
        te_cases.copy_weights(local, te)
        adapters = [make_adapter(0), make_adapter(1, rank=8, num_blocks=4), make_adapter(2)]
        layouts = [Layout.HALF_SHARDED, Layout.BDLORA, Layout.BDLORA]
        results = []
        for model in (local, te):
            slots = ModelSlots(model.eval(), SlotCapacity(max_loras=4, max_lora_rank=8))
            for name, (adapter, layout) in enumerate(zip(adapters, layouts, strict=True)):
                slots.load(name, slots.shard(adapter, layout))
            count = tokens()["input_ids"].numel()
            batch = slots.batch(torch.arange(count) % 4 - 1)
            with torch.no_grad(), runtime.record_collectives() as plain_log:
                plain = model(**tokens())
            with torch.no_grad(), runtime.record_collectives() as log, slots.serving(batch):
                results.append(model(**tokens()))
            assert [call.kind for call in log.calls] == [call.kind for call in plain_log.calls]
            assert (results[-1] - plain).abs().max() > 1e-3
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_slots_serve_as_in_the_local_layers(sequence_parallel):
    run_ranks(2, _serve, sequence_parallel)


def _real(rank, world_size):
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    from bdlora_megatron import runtime
    from bdlora_megatron.config import LoRAConfig
    from bdlora_megatron.layers.classes import lora_layer
    from tests.tolerances import assert_close
    from tests.tp.models import tiny_config

    lora = LoRAConfig(rank=16, num_blocks=4, fused=True)
    with runtime.model_parallel(world_size):
        config = tiny_config(
            world_size,
            hidden_size=64,
            kv_channels=8,
            ffn_hidden_size=128,
            params_dtype=torch.bfloat16,
            use_cpu_initialization=False,
        )
        common = {"config": config, "init_method": torch.nn.init.normal_, "bias": False}
        common |= {"skip_bias_add": False, "is_expert": False}
        for kind, own, out in (
            (TELayerNormColumnParallelLinear, {"gather_output": False}, 256),
            (TERowParallelLinear, {"input_is_parallel": True}, 64),
        ):
            layer = lora_layer(kind(64, out, **common, **own))
            adapter = layer.attach_config(lora, "linear_fc1" if out == 256 else "linear_fc2")
            for parameter in adapter.parameters():
                torch.nn.init.normal_(parameter)
            x = torch.randn(8, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            y = layer(x)[0]
            normed = x.double()
            if out == 256:
                gain = layer.layer_norm_weight.double()
                normed = torch.nn.functional.rms_norm(normed, (64,), gain, config.layernorm_epsilon)
            weight = layer.weight.double() + adapter.delta_weight(torch.float64)
            assert_close(y, normed @ weight.t(), kind.__name__)


@pytest.mark.gpu
def test_the_real_transformer_engine_computes_the_same():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs transformer-engine: pip install 'bdlora-megatron[te]'")
    run_ranks(1, _real)


# --- the stack that Megatron-Core ships -------------------------------------------------------


def _families(rank, world):
    """Mamba's and the delta net's layers, with the norm inside ``in_proj``."""
    stand_ins(world)
    cases = importlib.import_module("tests.tp.test_families")
    for family, pattern in {"nemotron_h": "MM-", "qwen3_next": "G-"}.items():
        settings = {"spec": "shipped", "pattern": pattern}
        reference = cases._reference(rank, 1, family, **settings)
        for sequence_parallel in (False, True):
            settings["sequence_parallel"] = sequence_parallel
            cases._sharded(rank, world, family, reference, **settings)


def test_the_shipped_hybrid_stack():
    from bdlora_megatron.runtime.versions.layers import has_hybrid_model

    if not has_hybrid_model():
        pytest.skip("HybridModel takes GPTModel's place from 0.19 on")
    run_ranks(2, _families)
