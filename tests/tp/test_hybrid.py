"""The same adapters on ``HybridModel`` and ``GPTModel``: numbers, names, files and logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.convert import read_adapter
from bdlora_megatron.errors import TargetError
from bdlora_megatron.layers import (
    LoadOptions,
    apply_lora,
    collect_adapter,
    load_adapter,
    lora_layers,
    lora_spec,
    remove_lora,
    save_adapter,
)
from bdlora_megatron.layers.anatomy import num_decoder_layers
from bdlora_megatron.models.build import hybrid_stack_spec
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.models import MODEL_CLASSES, randomize_adapters, tiny_config, tiny_model, tokens
from tests.tp.session import model_parallel

pytestmark = pytest.mark.skipif(
    "hybrid" not in MODEL_CLASSES, reason="HybridModel takes GPTModel's place from 0.19 on"
)
LORA = LoRAConfig(rank=8, alpha=16, num_blocks=4)
SOME = LoRAConfig(
    rank=8, num_blocks=4, target_modules=["*.layers.1.*.linear_fc1", "*.layers.0.*.linear_qkv"]
)
# Ranks, tensor-parallel and pipeline-parallel size.
SIZES = {"one": (1, 1, 1), "tp2": (2, 2, 1), "pp2": (2, 1, 2), "tp2-pp2": (4, 2, 2)}


def _model(tp, pp=1, model_class="hybrid", **changes):
    config = tiny_config(tp, pipeline_model_parallel_size=pp, model_class=model_class, **changes)
    return tiny_model(config)


def _layers(model):
    return sorted({(key.layer, key.name) for key in collect_adapter(model, "a").modules})


def _same(rank, world):
    """Forward and every factor's gradient of both classes, with one adapter."""
    with model_parallel(world):
        outputs, adapters, names, gradients = [], [], [], []
        for model_class in MODEL_CLASSES:
            model = _model(world, model_class=model_class)
            names.append(apply_lora(model, LORA))
            randomize_adapters(model)
            output = model(**tokens(), runtime_gather_output=True)
            output.square().mean().backward()
            outputs.append(output.detach())
            gradients.append(
                {
                    (name, factor): parameter.grad
                    for name, layer in lora_layers(model)
                    for factor, parameter in layer.adapter.named_parameters()
                }
            )
            adapters.append(collect_adapter(model, "a"))
        assert names[0] == names[1]
        assert torch.equal(*outputs)
        assert gradients[0].keys() == gradients[1].keys()
        for key, gradient in gradients[0].items():
            assert gradient.abs().max() > 0
            assert torch.equal(gradients[1][key], gradient), key
        gpt, hybrid = adapters
        assert list(hybrid.modules) == list(gpt.modules)
        for key, factors in gpt.modules.items():
            assert torch.equal(hybrid.modules[key].A, factors.A)
            assert torch.equal(hybrid.modules[key].B, factors.B)
        assert (gpt.metadata, hybrid.metadata) == (
            {"model_class": "GPTModel"},
            {"model_class": "HybridModel"},
        )


@pytest.mark.parametrize("world", [1, 2])
def test_both_classes_compute_and_name_the_same(world):
    run_ranks(world, _same)


def _save(rank, world, tp, pp, folder):
    with model_parallel(tp, pp=pp):
        for model_class in MODEL_CLASSES:
            for kind, lora in {"all": LORA, "some": SOME}.items():
                model = _model(tp, pp, model_class)
                apply_lora(model, lora)
                randomize_adapters(model, seed=4 + model.decoder.layers[0].layer_number // (pp + 1))
                assert num_decoder_layers(model) == 2
                save_adapter(model, f"{folder}/{model_class}-{kind}", name=kind)


def _load(rank, world, tp, pp, folder):
    """Each file into each class, by resharding and by Megatron-Core's own loader."""
    from megatron.core import dist_checkpointing

    from bdlora_megatron.export import adapter_state

    found = {}
    with model_parallel(tp, pp=pp):
        for path in sorted(Path(folder).glob("*/*")):
            for model_class in MODEL_CLASSES:
                model = _model(tp, pp, model_class)
                load_adapter(model, read_adapter(path), LoadOptions())
                found[path, model_class] = collect_adapter(model, "a").modules
                weights = path / "weights"
                metadata = dist_checkpointing.load_content_metadata(str(weights))
                for _, layer in lora_layers(model):
                    for parameter in layer.adapter.parameters() if layer.adapter else ():
                        parameter.data.zero_()
                state = dist_checkpointing.load(adapter_state(model, metadata), str(weights))
                model.load_state_dict(state, strict=False)
                again = collect_adapter(model, "a").modules
                for key, factors in found[path, model_class].items():
                    assert torch.equal(again[key].A, factors.A), key
                    assert torch.equal(again[key].B, factors.B), key
    return found


def test_what_one_class_saves_the_other_loads(tmp_path):
    for size, (ranks, tp, pp) in SIZES.items():
        folder = tmp_path / size
        folder.mkdir()
        run_ranks(ranks, _save, tp, pp, str(folder))
        for kind in ("all", "some"):
            gpt, hybrid = (read_adapter(folder / f"{name}-{kind}") for name in MODEL_CLASSES)
            assert gpt.base == hybrid.base
            assert gpt.base.num_layers == 2
            assert list(gpt.modules) == list(hybrid.modules)
            assert hybrid.metadata["model_class"] == "HybridModel"
            if pp == 1:
                # Stages of the two classes draw from other streams.
                for key, factors in gpt.modules.items():
                    assert torch.equal(hybrid.modules[key].A, factors.A)
        assert {str(key) for key in read_adapter(folder / "hybrid-some").modules} == {
            "layers.1.mlp.gate_proj",
            "layers.1.mlp.up_proj",
            "layers.0.self_attn.q_proj",
            "layers.0.self_attn.k_proj",
            "layers.0.self_attn.v_proj",
        }
    for size in ("one", "tp2-pp2"):
        ranks, tp, pp = SIZES[size]
        for found in run_ranks(ranks, _load, tp, pp, str(tmp_path)):
            assert len(found) == 4 * 4 * 2
            for (path, _), modules in found.items():
                wanted = read_adapter(path).modules
                assert modules.keys() == wanted.keys()
                for key, factors in wanted.items():
                    assert torch.equal(modules[key].A, factors.A), (path, key)
                    assert torch.equal(modules[key].B, factors.B), (path, key)


def _refuse(rank, world):
    with model_parallel(world):
        config = tiny_config(world, model_class="hybrid")
        for pattern in ("*--*", "-*-*", "**--"):
            model = tiny_model(config, pattern=pattern)
            before = [name for name, _ in model.named_parameters()]
            with pytest.raises(TargetError, match=r"position\d.*hybrid_layer_pattern"):
                apply_lora(model, LORA)
            assert [name for name, _ in model.named_parameters()] == before
            assert not list(lora_layers(model))
        model = _model(world)
        with pytest.raises(TargetError, match=r"output_layer is none of .*exclude_modules"):
            apply_lora(model, LoRAConfig(rank=8, num_blocks=4, target_modules=["output_layer"]))


def test_a_position_without_a_layer_is_refused_before_training():
    run_ranks(1, _refuse)


def _specification(rank, world):
    """Adapters that the specification brings are those that are put in afterwards."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    with model_parallel(world):
        config = tiny_config(world, model_class="hybrid")
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec, stack = lora_spec(layer, config, LORA), hybrid_stack_spec(layer)
        # The stack's own specification does as well.
        changed = lora_spec(stack, config, LORA).submodules
        for part, linears in {"attention_layer": 2, "mlp_layer": 2}.items():
            text = repr(getattr(changed, part))
            assert text.count("LoRAColumnParallelLinear'>") == linears // 2, text
            assert text.count("LoRARowParallelLinear'>") == linears // 2, text
            assert "LoRA" not in repr(getattr(stack.submodules, part))
        made, applied = tiny_model(config, spec), tiny_model(config)
        assert [name for name, _ in lora_layers(made)] == apply_lora(applied, LORA)
        # The one drew its adapters before the rest of its weights.
        weights = dict(made.named_parameters())
        for name, parameter in applied.named_parameters():
            parameter.data.copy_(weights[name].data)
        for model in (made, applied):
            randomize_adapters(model)
        batch = tokens()
        assert_close(made(**batch), applied(**batch), "with the specification's adapters")
        remove_lora(made)
        assert not list(lora_layers(made))


def test_a_layers_specification_brings_its_adapters_along():
    run_ranks(1, _specification)


def _recompute(rank, world):
    """Recomputed layers leave every factor with the gradient that it has without."""
    with model_parallel(world):
        gradients = []
        full = {"recompute_granularity": "full", "recompute_method": "uniform"}
        for settings in ({}, {**full, "recompute_num_layers": 1}):
            model = _model(world, **settings)
            apply_lora(model, LORA)
            randomize_adapters(model)
            model(**tokens()).square().mean().backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        for name, gradient in gradients[0].items():
            assert_close(gradients[1][name], gradient, name)


def test_recomputed_positions_train_every_factor():
    run_ranks(1, _recompute)
