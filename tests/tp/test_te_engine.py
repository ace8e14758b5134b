"""The serving engine on Megatron-Core's Transformer Engine layers, over the stand-ins.

Engines on either kind of layer, with the same weights, serve the same requests: base model, block
counts and vanilla adapters in one batch, chunked prompts, preemption.
"""

from __future__ import annotations

import importlib

import pytest

from tests.harness import run_ranks


def _serve(rank, world):
    from tests.fakes import transformer_engine

    transformer_engine.forget_megatron()
    transformer_engine.install()
    importlib.import_module("bdlora_megatron.runtime.cpu_inference").enable_cpu_inference()
    from bdlora_megatron import runtime

    with runtime.model_parallel(world):
        import torch
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_with_transformer_engine_spec,
        )

        from bdlora_megatron.layers import lora_layers
        from tests.tp import engine_cases, te_cases
        from tests.tp.models import tiny_config, tiny_model

        local = engine_cases.wide_model(world)
        # What a server builds where it is told to. The engine computes attention by itself.
        spec = get_gpt_layer_with_transformer_engine_spec()
        te = tiny_model(tiny_config(world), spec, seed=8).double().eval()
        te_cases.copy_weights(local, te)
        outcomes = []
        for model in (local, te):
            made = engine_cases.requests(24, seed=5)
            arrivals = {2 * n: made[3 * n : 3 * n + 3] for n in range(8)}
            engine = engine_cases.engine_for(world, blocks=12, model=model)
            with torch.inference_mode():
                outcomes.append((*engine_cases.run(engine, arrivals, {}), engine.snapshot()))
            names = {type(layer).__name__ for _, layer in lora_layers(model)}
            outcomes[-1] += (names,)
        (got, ends, after, names), (te_got, te_ends, te_after, te_names) = outcomes
        assert all("TE" not in name for name in names)
        assert te_names == {"LoRATELayerNormColumnParallelLinear", "LoRATERowParallelLinear"}
        assert len({request.adapter for request in made}) == 5
        # How often depends on how fast adapters are read.
        for seen in (after, te_after):
            assert seen.preemptions > 0
            assert seen.slot_evictions > 0
        assert te_ends == ends
        for request_id, choices in got.items():
            tokens = [choice.token for choice in choices]
            assert [choice.token for choice in te_got[request_id]] == tokens
            for mine, theirs in zip(te_got[request_id], choices, strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-9)


@pytest.mark.engine
@pytest.mark.parametrize("world", [1, 2])
def test_the_engine_gives_the_same_tokens_on_either_kind_of_layer(world):
    run_ranks(world, _serve)
