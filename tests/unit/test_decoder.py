"""A hybrid model's positions counted as Hugging Face counts layers, and the anatomy itself."""

from __future__ import annotations

import pytest

from bdlora_megatron.decoder import (
    ALL_LINEARS,
    ALL_MODULE_NAMES,
    FUSED_PARTS,
    LINEARS,
    MODULE_NAMES,
    facts_of,
    hybrid_layers,
    parts_of,
)

PATTERNS = {
    "*-*-": [0, 0, 1, 1],
    # Pipeline boundaries do not count, wherever they fall.
    "*-|*-": [0, 0, 1, 1],
    "*|-*|-": [0, 0, 1, 1],
    # What predicts further tokens has no layer.
    "*-*-/*-/*-": [0, 0, 1, 1],
    # Experts, delta nets and latent attention pair likewise.
    "*E*-": [0, 0, 1, 1],
    "GEGE*E": [0, 0, 1, 1, 2, 2],
    "+-+E": [0, 0, 1, 1],
    "DE|DE": [0, 0, 1, 1],
    # A group is one position.
    "[*-][*-]": [0, 1],
    "[*-]*-|[GE]": [0, 1, 1, 2],
    "": [],
    # Mamba that makes no pairs: each position is a layer, across pipeline boundaries too.
    "M*-": [0, 1, 2],
    "M-M|*-/M*": [0, 1, 2, 3, 4],
    "MEM*E": [0, 1, 2, 3, 4],
    "MM": [0, 1],
}
#: No layer of Hugging Face's has these parts, or more than one numbering is in use.
WITHOUT = ["M-M-", "M-*-", "**--", "-*-*", "*-*", "*", "-", "[*-*-]", "*[-*]-", "*--*", "[M-]M*"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_layers_are_counted_by_occurrence(pattern):
    assert hybrid_layers(pattern) == PATTERNS[pattern]


@pytest.mark.parametrize("pattern", WITHOUT)
def test_a_position_that_would_be_a_guess_has_no_layer(pattern):
    assert set(hybrid_layers(pattern)) == {None}


def test_a_numbering_that_somebody_states_counts():
    assert hybrid_layers("M-M-*-", "positions") == list(range(6))
    assert hybrid_layers("M-M-|*-", "pairs") == [0, 0, 1, 1, 2, 2]
    assert hybrid_layers("*-*-", "positions") == list(range(4))
    # What cannot be numbered so has no numbers.
    assert set(hybrid_layers("M-M*-", "pairs")) == {None}
    assert set(hybrid_layers("[M-][*-]", "positions")) == {None}


def test_every_projection_has_one_place():
    assert [p.name for linear in LINEARS for p in linear.projections] == list(MODULE_NAMES)
    every = [p.name for linear in ALL_LINEARS for p in linear.projections]
    assert sorted([*every, *FUSED_PARTS]) == sorted(ALL_MODULE_NAMES)
    for name in every:
        linear, projection = facts_of(name)
        assert parts_of(linear.path, linear.numbering)[projection.part] == name
    for name in MODULE_NAMES:
        linear, projection = facts_of(name)
        assert linear.parts[projection.part] == name
        # Column-parallel layers read the residual stream, row-parallel ones write it.
        assert (projection.out_size if linear.splits_input else linear.in_size) == "hidden_size"
