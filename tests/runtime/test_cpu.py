"""The switch that lets Megatron-Core run on a CPU, and what it must keep true."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    checkpoint,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from bdlora_megatron import runtime
from bdlora_megatron.errors import ConfigError
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.models import tiny_config, tiny_model, tokens
from tests.tp.session import model_parallel

OWN, SHARED = "model-parallel-rng", "data-parallel-rng"


def _switch(rank, world_size):
    original = torch.cuda.current_device, megatron_random.CudaRNGStatesTracker
    assert not runtime.cpu_is_enabled()
    with pytest.raises(ConfigError, match=r"call bdlora_megatron\.runtime\.enable_cpu\(\)"):
        runtime.device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ConfigError, match=r"on a machine with CUDA.*CUDA_VISIBLE_DEVICES=''"):
            runtime.enable_cpu()
    assert not runtime.cpu_is_enabled()
    assert original == (torch.cuda.current_device, megatron_random.CudaRNGStatesTracker)
    # Made before the switch: it asks for CUDA's generator.
    get_cuda_rng_tracker()
    runtime.enable_cpu()
    assert runtime.cpu_is_enabled()
    assert runtime.device() == torch.device("cpu")
    patched = torch.cuda.current_device, WrappedTorchNorm.__new__, torch.Tensor.cuda
    runtime.enable_cpu()
    assert patched == (torch.cuda.current_device, WrappedTorchNorm.__new__, torch.Tensor.cuda)
    with model_parallel(1):
        assert set(get_cuda_rng_tracker().get_states()) >= {OWN, SHARED}


def test_the_switch_is_refused_with_cuda_and_idempotent_without():
    run_ranks(1, _switch)


def _draw(name):
    with get_cuda_rng_tracker().fork(name):
        return torch.rand(5)


def _streams(rank, world_size):
    with model_parallel(world_size, seed=77):
        before = torch.get_rng_state()
        drawn = {name: [_draw(name), _draw(name)] for name in (OWN, SHARED)}
        assert torch.equal(torch.get_rng_state(), before), "a fork leaves the outside alone"
        model_parallel_cuda_manual_seed(77)
        again = {name: [_draw(name), _draw(name)] for name in (OWN, SHARED)}
        for name, values in drawn.items():
            assert not torch.equal(*values), "a stream goes on where it stopped"
            assert torch.equal(torch.stack(values), torch.stack(again[name]))
        return {name: values[0] for name, values in drawn.items()}


def test_ranks_have_a_random_stream_of_their_own_and_a_shared_one():
    first, second = run_ranks(2, _streams)
    assert not torch.equal(first[OWN], second[OWN])
    assert torch.equal(first[SHARED], second[SHARED])


def _forks(rank, world_size):
    with model_parallel(world_size):
        tracker = get_cuda_rng_tracker()
        states = tracker.get_states()
        straight = {OWN: torch.cat([_draw(OWN), _draw(OWN)]), SHARED: _draw(SHARED)}
        tracker.set_states(dict(states))
        with tracker.fork(OWN):
            first = torch.rand(5)
            with tracker.fork(SHARED):
                inner = torch.rand(5)
            rest = torch.rand(5)
        assert torch.equal(torch.cat([first, rest]), straight[OWN])
        assert torch.equal(inner, straight[SHARED])
        tracker.set_states(dict(states))
        with tracker.fork(OWN):
            first = torch.rand(5)
            second = _draw(OWN)
            assert not torch.equal(torch.rand(5), second), "the inner draw is not repeated"
        assert torch.equal(torch.cat([first, second]), straight[OWN])
        outside = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="inside"), tracker.fork(OWN):
            raise RuntimeError(f"inside, after {torch.rand(1)}")
        assert torch.equal(torch.get_rng_state(), outside)
        with pytest.raises(KeyError, match="'nobody' was not added; call"), tracker.fork("nobody"):
            pass


def test_forks_nest_and_survive_errors():
    run_ranks(1, _forks)


def _train(config):
    """Every gradient of one step whose dropout is seeded."""
    model = tiny_model(config).train()
    model_parallel_cuda_manual_seed(5)
    logits = model(**tokens())
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    (logits * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _recompute(rank, world_size, changes):
    dropout = {"attention_dropout": 0.4, "hidden_dropout": 0.3}
    with model_parallel(world_size):
        parallel = {"sequence_parallel": changes.pop("sequence_parallel", False)}
        wanted = _train(tiny_config(world_size, **dropout, **parallel))
        found = _train(tiny_config(world_size, **dropout, **parallel, **changes))
        assert found.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert_close(found[name], grad, name)
        without = _train(tiny_config(world_size, **parallel))
        assert not any(torch.allclose(without[name], grad) for name, grad in wanted.items())


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTE = {
    "full": FULL,
    "full-sequence": {**FULL, "sequence_parallel": True},
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mlp-and-norms": {
        "recompute_granularity": "selective",
        "recompute_modules": ["mlp", "layernorm"],
    },
}


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recomputed_activations_draw_the_same_dropout(kind):
    run_ranks(2, _recompute, RECOMPUTE[kind])


def _checkpoint(rank, world_size):
    with model_parallel(world_size):
        x = torch.ones(50, dtype=torch.float64, requires_grad=True)

        def body(value):
            with get_cuda_rng_tracker().fork(OWN):
                return value * torch.rand(50, dtype=torch.float64)

        y = checkpoint(body, False, x)
        after = _draw(OWN)
        y.sum().backward()
        assert torch.equal(x.grad, y.detach()), "the same numbers, drawn again"
        assert not torch.equal(_draw(OWN), after), "the stream goes on after the backward pass"


def test_a_checkpoint_restores_the_streams():
    run_ranks(1, _checkpoint)


def _norms(rank, world_size, sequence_parallel):
    with model_parallel(world_size):
        config = tiny_config(world_size, sequence_parallel=sequence_parallel, qk_layernorm=True)
        norm = WrappedTorchNorm(config, hidden_size=24, eps=1e-3)
        assert isinstance(norm, torch.nn.RMSNorm)
        assert norm.eps == 1e-3
        # What Megatron-Core's finalize_model_grads looks for to sum gradients over ranks.
        assert norm.weight.sequence_parallel is sequence_parallel
        assert config.sequence_parallel is sequence_parallel
        with pytest.raises(AssertionError, match="persist_layer_norm not supported"):
            WrappedTorchNorm(tiny_config(world_size, persist_layer_norm=True), hidden_size=24)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_norms_are_marked_under_sequence_parallelism(sequence_parallel):
    run_ranks(2, _norms, sequence_parallel)


def _maskless(rank, world_size):
    with model_parallel(world_size):
        model: GPTModel = tiny_model(tiny_config(world_size)).eval()
        inputs = tokens()
        masked = model(**inputs)
        inputs["attention_mask"] = None
        assert torch.equal(model(**inputs), masked)


def test_a_call_without_a_mask_is_causal():
    run_ranks(1, _maskless)
