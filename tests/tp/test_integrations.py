"""The hosts' settings on a real model: the matching rank, and which layers it counts."""

from __future__ import annotations

import pytest

from bdlora_megatron.integrations import BlockDiagonalSettings
from bdlora_megatron.layers import apply_lora
from tests.harness import run_ranks
from tests.tp.models import tiny_config, tiny_model
from tests.tp.session import model_parallel

#: (in, out) of each projection of `tiny_config`'s two decoder layers.
ATTENTION = [(24, 48), (24, 24), (24, 24), (48, 24)]
MLP = [(24, 40), (24, 40), (40, 24)]
FUSED = [(24, 48 + 24 + 24), (48, 24), (24, 40 + 40), (40, 24)]
#: Large, so that counting other layers, or other blocks, gives another rank.
LORA_RANK = 200
CHOICES = [
    ({}, 2 * (ATTENTION + MLP)),
    ({"exclude_modules": ["linear_fc1", "linear_fc2"]}, 2 * ATTENTION),
    ({"target_modules": ["*.layers.1.mlp.*"]}, MLP),
    ({"fused": True}, 2 * FUSED),
]


def _parameters(rank, world_size, blocks, lora_rank, choice):
    """How many the matching rank gives, and the next that the blocks allow."""
    settings = {"num_blocks": blocks, **choice}
    found = []
    with model_parallel(world_size):
        model = tiny_model(tiny_config(world_size))
        matched = BlockDiagonalSettings(match_params_of_lora_rank=lora_rank, **settings)
        dim = matched.lora_config([model]).rank
        for given in (matched, BlockDiagonalSettings(dim=dim + blocks, **settings)):
            model = tiny_model(tiny_config(world_size))
            apply_lora(model, given.lora_config([model]))
            mine = [p for name, p in model.named_parameters() if ".adapter." in name]
            # Each rank holds its blocks and no more.
            found.append(world_size * sum(parameter.numel() for parameter in mine))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("choice", "projections"), CHOICES, ids=["all", "excluded", "chosen", "fused"]
)
def test_the_matching_rank_is_the_largest_with_no_more_parameters(choice, projections, world_size):
    budget = sum(LORA_RANK * (wide + high) for wide, high in projections)
    for matched, larger in run_ranks(world_size, _parameters, 2, LORA_RANK, choice):
        assert matched <= budget < larger


def _matching_ranks(rank, world_size, choices):
    """Of every choice, with each rank a pipeline stage."""
    with model_parallel(1, pp=world_size):
        model = tiny_model(tiny_config(1, pipeline_model_parallel_size=world_size))
        matched = {"match_params_of_lora_rank": LORA_RANK, "num_blocks": 2}
        return [
            BlockDiagonalSettings(**matched, **choice).lora_config([model]).rank
            for choice in choices
        ]


def test_pipeline_stages_of_other_layers_match_the_same_rank():
    # On one stage nothing, or what would match another rank.
    uneven = [
        {"target_modules": ["*.layers.1.mlp.*"]},
        {"target_modules": ["*.layers.0.*.linear_qkv", "*.layers.1.*.linear_fc2"]},
    ]
    (wanted,) = run_ranks(1, _matching_ranks, uneven)
    assert run_ranks(2, _matching_ranks, uneven) == [wanted, wanted]
    alone = [{"target_modules": [name]} for name in uneven[1]["target_modules"]]
    assert len({*run_ranks(1, _matching_ranks, alone)[0], wanted[1]}) == 3


def _layers_apart(rank, world_size, choices):
    """Whether layers' factors would be saved apart, with each rank a pipeline stage."""
    found = []
    with model_parallel(1, pp=world_size):
        for choice in choices:
            model = tiny_model(tiny_config(1, pipeline_model_parallel_size=world_size))
            BlockDiagonalSettings(num_blocks=2, **choice).put_into([model])
            state = model.sharded_state_dict()
            keys = {value.key for key, value in state.items() if ".adapter." in key}
            found.append({".layers." in key and key.split(".")[2].isdigit() for key in keys})
    return found


def test_layers_are_saved_apart_where_not_all_have_the_same_adapters():
    choices = [{}, {"exclude_modules": ["linear_fc2"]}, {"target_modules": ["*.layers.1.mlp.*"]}]
    assert run_ranks(1, _layers_apart, choices) == [[{False}, {False}, {True}]]
    first, last = run_ranks(2, _layers_apart, choices)
    # The first stage adapts nothing of the last choice.
    assert first == [{False}, {False}, set()]
    assert last == [{False}, {False}, {True}]
