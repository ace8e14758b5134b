"""Adapters in a whole GPT model: choosing layers, training through recompute, checkpoints."""

from __future__ import annotations

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_tensor_model_parallel_region,
)

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.errors import ConfigError, TargetError, UnsupportedError
from bdlora_megatron.layers import (
    adapters_disabled,
    apply_lora,
    freeze_base,
    lora_layers,
    lora_spec,
    merge_adapters,
    remove_lora,
    unmerge_adapters,
)
from bdlora_megatron.runtime import record_collectives
from bdlora_megatron.runtime.versions.checkpoint import save_distributed
from bdlora_megatron.runtime.versions.layers import shares_kv_heads
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.models import (
    BATCH,
    MODEL_CLASSES,
    SEQUENCE,
    VOCAB,
    randomize_adapters,
    tiny_config,
    tiny_model,
    tokens,
)
from tests.tp.session import model_parallel

LORA = LoRAConfig(rank=8, alpha=16, num_blocks=4)


def logits(model):
    """Logits over the whole vocabulary, ``[BATCH, SEQUENCE, VOCAB]``."""
    return gather_from_tensor_model_parallel_region(model(**tokens()))


def train_step(model):
    """One backward pass; the gradient of each adapter parameter by name."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(BATCH, SEQUENCE, VOCAB, generator=generator, dtype=torch.float64)
    (logits(model) * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


# --- choosing layers -------------------------------------------------------------------------


def _choose(rank, world_size):
    with model_parallel(world_size):
        model = tiny_model(tiny_config(world_size))
        base = logits(model)
        weights = dict(model.named_parameters())
        first = apply_lora(
            model,
            LoRAConfig(
                rank=8,
                num_blocks=4,
                target_modules=["linear_fc2", "*.layers.1.*.linear_qkv"],
                exclude_modules=["*.layers.0.mlp.*"],
            ),
        )
        assert first == [
            "decoder.layers.1.self_attention.linear_qkv",
            "decoder.layers.1.mlp.linear_fc2",
        ]
        assert torch.equal(logits(model), base)
        with pytest.raises(ConfigError, match="already carries adapters"):
            apply_lora(model, LORA)
        remove_lora(model)
        assert {type(m) for n, m in model.named_modules() if n.endswith("linear_qkv")} == {
            ColumnParallelLinear
        }
        names = apply_lora(model, LORA)
        assert len(names) == 8
        for name, parameter in model.named_parameters():
            # The substring that NeMo's and Megatron-Bridge's adapter key filters look for.
            assert parameter.requires_grad == (".adapter." in name)
            if not parameter.requires_grad:
                assert parameter is weights[name], "shared, not copied"
        assert "decoder.layers.0.self_attention.linear_qkv.adapter.adapter_k.linear_out.weight" in (
            dict(model.named_parameters())
        )
        randomize_adapters(model)
        assert not torch.allclose(logits(model), base)
        with adapters_disabled(model):
            assert torch.equal(logits(model), base)
        adapted = logits(model)
        merge_adapters(model)
        assert_close(logits(model), adapted, "merged model")
        unmerge_adapters(model)
        assert torch.equal(logits(model), adapted)


def test_layers_are_chosen_by_name_and_wildcard():
    run_ranks(2, _choose)


def _refuse(rank, world_size):
    with model_parallel(world_size):
        model = tiny_model(tiny_config(world_size))
        before = dict(model.named_modules())
        with pytest.raises(TargetError, match=r"'linear_qvk' \(nearest: 'linear_qkv'\)"):
            apply_lora(model, LoRAConfig(num_blocks=4, target_modules=["linear_fc1", "linear_qvk"]))
        with pytest.raises(TargetError, match=r"\*\.layers\.7"):
            apply_lora(model, LoRAConfig(num_blocks=4, target_modules=["*.layers.7.*.linear_qkv"]))
        with pytest.raises(ConfigError, match="num_blocks=1 is not a multiple"):
            apply_lora(model, LoRAConfig(num_blocks=1))
        assert dict(model.named_modules()) == before, "a refusal leaves the model as it was"
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        config = tiny_config(world_size)
        with pytest.raises(ConfigError, match="in 1 of 2 layers"):
            lora_spec(
                spec, config, LoRAConfig(num_blocks=4, target_modules=["*.layers.0.*.linear_qkv"])
            )
        with pytest.raises(TargetError, match="linear_proj_"):
            lora_spec(spec, config, LoRAConfig(num_blocks=4, target_modules=["linear_proj_"]))


def test_bad_choices_are_refused_before_anything_changes():
    run_ranks(2, _refuse)


def _few_groups(rank, world_size):
    with model_parallel(world_size):
        model = tiny_model(tiny_config(world_size, num_query_groups=2))
        with pytest.raises(UnsupportedError, match="num_query_groups=2 over 4"):
            apply_lora(model, LORA)
        chosen = ["linear_proj", "linear_fc1", "linear_fc2"]
        apply_lora(model, LoRAConfig(rank=8, num_blocks=4, target_modules=chosen))


@pytest.mark.skipif(not shares_kv_heads(), reason="Megatron-Core before 0.16 refuses the model")
def test_fewer_query_groups_than_ranks():
    run_ranks(4, _few_groups)


def _experts(rank, world_size):
    with model_parallel(world_size):
        config = tiny_config(
            world_size,
            num_moe_experts=2,
            moe_ffn_hidden_size=40,
            moe_layer_freq=[0, 1],
            sequence_parallel=world_size > 1,
        )
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm"
        )
        model = tiny_model(config, spec)
        before = dict(model.named_modules())
        with pytest.raises(UnsupportedError, match="mixture-of-experts expert"):
            apply_lora(model, LORA)
        assert dict(model.named_modules()) == before
        lora = LoRAConfig(rank=8, num_blocks=4, exclude_modules=["*.experts.*"])
        dense = [name for name in apply_lora(model, lora) if ".mlp." in name]
        assert dense == ["decoder.layers.0.mlp.linear_fc1", "decoder.layers.0.mlp.linear_fc2"]


def test_experts_are_refused_until_they_are_excluded():
    run_ranks(2, _experts)


def _specs(rank, world_size):
    with model_parallel(world_size):
        config = tiny_config(world_size)
        applied = tiny_model(config)
        apply_lora(applied, LORA)
        randomize_adapters(applied)
        layer_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        model = tiny_model(config, lora_spec(layer_spec, config, LORA))
        model.load_state_dict(applied.state_dict())
        freeze_base(model)
        assert [n for n, _ in lora_layers(model)] == [n for n, _ in lora_layers(applied)]
        assert torch.equal(logits(model), logits(applied))
        for name, grad in train_step(applied).items():
            assert torch.equal(train_step(model)[name], grad)
        block = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm"
        )
        one = LoRAConfig(rank=8, num_blocks=4, target_modules=["*.layers.1.*.linear_fc1"])
        chosen = [n for n, _ in lora_layers(tiny_model(config, lora_spec(block, config, one)))]
        assert chosen == ["decoder.layers.1.mlp.linear_fc1"]
        assert not list(lora_layers(tiny_model(config, block))), "the given spec is unchanged"


def test_a_specification_builds_the_same_model():
    run_ranks(2, _specs)


# --- training --------------------------------------------------------------------------------


def _gradients(rank, world_size, changes):
    with model_parallel(world_size):
        model = tiny_model(tiny_config(world_size, **changes))
        apply_lora(model, LORA)
        randomize_adapters(model)
        model.train()
        grads = train_step(model)
        whole = {}
        for name, layer in lora_layers(model):
            for plan in layer.adapter.plans:
                for which, factor in zip("AB", layer.adapter.factors(plan), strict=True):
                    parts = [torch.empty_like(factor.weight) for _ in range(world_size)]
                    torch.distributed.all_gather(parts, factor.weight.grad.contiguous())
                    key = (name, plan.projection.name, which)
                    whole[key] = torch.cat(parts, dim=factor.shape.shard_dim)
        assert len(grads) == len(whole)
        return whole


VARIANTS = {
    "plain": {},
    "sequence": {"sequence_parallel": True},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "full-sequence": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 2,
        "sequence_parallel": True,
    },
    "selective": {"recompute_granularity": "selective"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_do_not_depend_on_parallelism_or_recompute(variant):
    alone = run_ranks(1, _gradients, {})[0]
    for whole in run_ranks(2, _gradients, VARIANTS[variant]):
        assert whole.keys() == alone.keys()
        for key, grad in whole.items():
            assert_close(grad, alone[key], str(key))


RECOMPUTED = {
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "layernorm": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "both": {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]},
    "later": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}


def _recomputed(rank, world_size):
    """Adapters in the MLP alone, whose recomputed input would need no gradient."""
    lora = LoRAConfig(rank=8, num_blocks=4, target_modules=["linear_fc1", "linear_fc2"])
    with model_parallel(world_size):
        for model_class in MODEL_CLASSES:
            wanted = None
            for kind, changes in {"plain": {}, **RECOMPUTED}.items():
                later = changes if kind == "later" else {}
                now = {} if later else changes
                model = tiny_model(tiny_config(world_size, model_class=model_class, **now))
                apply_lora(model, lora)
                randomize_adapters(model)
                model.train()
                for module in model.modules():
                    if later and hasattr(module, "recompute_mlp"):
                        # As a host that decides after the adapters are in.
                        module.recompute_mlp = True
                vars(model.config).update(later)
                model(**tokens()).square().mean().backward()
                factors = [p for p in model.parameters() if p.requires_grad]
                found = [p.grad for p in factors]
                assert len(found) == 2 * 2 * 3
                assert all(grad is not None for grad in found), (model_class, kind)
                wanted = wanted or found
                for grad, whole in zip(found, wanted, strict=True):
                    assert_close(grad, whole, f"{model_class} {kind}")


def test_every_factor_learns_whatever_is_recomputed():
    run_ranks(1, _recomputed)


def _model_collectives(rank, world_size, sequence_parallel):
    with model_parallel(world_size):
        config = tiny_config(world_size, sequence_parallel=sequence_parallel)

        def step(model):
            with record_collectives() as log:
                model(**tokens()).sum().backward()
            return log.calls

        base = tiny_model(config)
        # A frozen base whose input wants a gradient: what an adapter in the first layer needs.
        base.requires_grad_(False)
        base.embedding.requires_grad_(True)
        adapted = tiny_model(config)
        apply_lora(adapted, LORA)
        adapted.embedding.requires_grad_(True)
        assert step(adapted) == step(base)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_a_whole_training_step_communicates_like_the_base_models(sequence_parallel):
    run_ranks(2, _model_collectives, sequence_parallel)


# --- checkpoints -----------------------------------------------------------------------------


CHECKPOINTED = {
    "bdlora": LORA,
    "fused": LoRAConfig(rank=8, alpha=16, num_blocks=4, fused=True),
    "slora": LoRAConfig(rank=8, alpha=16, layout="slora"),
    "half_sharded": LoRAConfig(rank=8, alpha=16, layout="half_sharded"),
}


def _adapter_shards(model):
    state = model.sharded_state_dict()
    return {key: value for key, value in state.items() if ".adapter." in key}


def _save(rank, world_size, kind, path):
    with model_parallel(world_size):
        model = tiny_model(tiny_config(world_size))
        apply_lora(model, CHECKPOINTED[kind])
        randomize_adapters(model)
        # Without the process that Megatron-Core's own would start, and wait for.
        save_distributed(_adapter_shards(model), path)
        return logits(model).detach()


def _load(rank, world_size, kind, path):
    with model_parallel(world_size):
        model = tiny_model(tiny_config(world_size))
        apply_lora(model, CHECKPOINTED[kind])
        loaded = dist_checkpointing.load(_adapter_shards(model), path)
        missing, unexpected = model.load_state_dict(loaded, strict=False)
        assert not unexpected
        assert not [key for key in missing if ".adapter." in key]
        fresh = tiny_model(tiny_config(world_size))
        apply_lora(fresh, CHECKPOINTED[kind])
        randomize_adapters(fresh)
        for (name, got), (_, wanted) in zip(
            model.named_parameters(), fresh.named_parameters(), strict=True
        ):
            assert torch.equal(got, wanted), name
        return logits(model).detach()


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_saved_at_four_ranks_loaded_at_two_and_one(kind, tmp_path):
    saved = run_ranks(4, _save, kind, str(tmp_path))[0]
    for world_size in (4, 2, 1):
        for loaded in run_ranks(world_size, _load, kind, str(tmp_path)):
            assert_close(loaded, saved, f"logits at {world_size}")
