"""Choosing layers by name."""

import pytest

from bdlora_megatron.errors import TargetError
from bdlora_megatron.layers.targets import TargetMatcher

NAMES = [
    f"decoder.layers.{index}.{name}"
    for index in (0, 1, 10)
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1")
]


def chosen(targets, exclude=()):
    matcher = TargetMatcher(targets, exclude)
    found = [name for name in NAMES if matcher.matches(name)]
    matcher.check_all_used(NAMES)
    return found


def test_a_bare_name_matches_in_every_layer():
    assert chosen(["linear_proj"]) == [name for name in NAMES if name.endswith("linear_proj")]


def test_a_wildcard_matches_the_whole_name():
    assert chosen(["*.layers.1.*"]) == [name for name in NAMES if ".layers.1." in name]
    assert chosen(["*.layers.0.*.linear_qkv"]) == [NAMES[0]]


def test_a_full_name_matches_itself():
    assert chosen([NAMES[3]]) == [NAMES[3]]


def test_a_dot_is_a_dot():
    with pytest.raises(TargetError):
        chosen(["*xlayers*"])


def test_exclusion_wins():
    assert chosen(["linear_fc1"], ["*.layers.10.*"]) == [NAMES[2], NAMES[5]]


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name():
    with pytest.raises(TargetError, match=r"'linear_fc3' \(nearest: 'linear_fc1'\)"):
        chosen(["linear_qkv", "linear_fc3"])


def test_an_exclusion_that_matches_nothing_is_an_error_too():
    with pytest.raises(TargetError, match=r"\*\.layers\.2\.\*"):
        chosen(["linear_qkv"], ["*.layers.2.*"])


def test_a_prefix_is_no_match():
    with pytest.raises(TargetError, match="'qkv'"):
        chosen(["qkv"])
