"""`peft.scheme` and the settings below it."""

from __future__ import annotations

import pytest

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.integrations import BlockDiagonalSettings, make_peft, read_scheme


def test_both_nestings_and_both_spellings():
    section = {"scheme": "bdlora", "bdlora": {"rank": 8, "num_blocks": 2}}
    wanted = ("bdlora", {"dim": 8, "num_blocks": 2})
    for config in (section, {"peft": section}, {"model": {"peft": section}}):
        choice = read_scheme(config)
        assert (choice.scheme, dict(choice.arguments)) == wanted
    old = {"peft_scheme": "bdlora", "bdlora": {"dim": 8, "num_blocks": 2}}
    assert dict(read_scheme(old).arguments) == wanted[1]


@pytest.mark.parametrize("value", [None, "none"])
def test_none_asks_for_nothing(value):
    assert read_scheme({"scheme": value}).scheme == "none"


def test_the_section_of_another_scheme_is_not_read():
    section = {"scheme": "lora", "bdlora": {"num_blocks": 2}, "lora": {"dim": 4}}
    assert read_scheme(section).arguments == {"dim": 4}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"scheme": "bdlroa"}, "did you mean 'bdlora'"),
        ({}, "neither of scheme"),
        ({"scheme": "lora", "peft_scheme": "lora"}, "both of scheme"),
        ({"scheme": "bdlora", "bdlora": {"num_block": 2}}, "did you mean 'num_blocks'"),
        ({"scheme": "bdlora", "rank": 8}, "unknown key peft.rank"),
        ({"scheme": "bdlora", "bdlora": {"rank": 8, "dim": 8}}, "two names of one setting"),
        ({"scheme": "bdlora", "bdlora": 8}, "wanted a section"),
        ("bdlora", "wanted a section"),
    ],
)
def test_mistakes_are_refused_with_the_nearest_name(section, message):
    with pytest.raises(ConfigError, match=message):
        read_scheme(section)


def test_defaults_of_the_settings():
    made = BlockDiagonalSettings(num_blocks=3).lora_config([])
    assert made == LoRAConfig(rank=18, alpha=36, num_blocks=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "num_blocks is None"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": 2, "dim": 5}, "not a multiple"),
        ({"num_blocks": 2, "dim": 4, "match_params_of_lora_rank": 4}, "leave one out"),
        ({"num_blocks": 2, "dropout": 1.0}, "dropout"),
    ],
)
def test_settings_are_checked_when_made(settings, message):
    with pytest.raises(ConfigError, match=message):
        BlockDiagonalSettings(**settings)


def test_a_field_that_a_host_changed_is_checked_again():
    settings = BlockDiagonalSettings(num_blocks=2, dim=4)
    settings.dim = 5
    with pytest.raises(ConfigError, match="not a multiple"):
        settings.lora_config([])
    # This one the layers' own config knows nothing of.
    settings.dim, settings.match_params_of_lora_rank = 4, 4
    with pytest.raises(ConfigError, match="leave one out"):
        settings.lora_config([])


def test_a_fused_adapter_is_exported_only_by_mistake():
    assert BlockDiagonalSettings(num_blocks=2).exports_peft
    assert not BlockDiagonalSettings(num_blocks=2, fused=True).exports_peft
    for asked in ({"export_peft": True}, {"export_dense": True}):
        with pytest.raises(ConfigError, match="fused=True trains one A"):
            BlockDiagonalSettings(num_blocks=2, fused=True, **asked)


def test_the_object_of_the_scheme_is_made():
    section = {"scheme": "bdlora", "bdlora": {"rank": 8, "num_blocks": 2}, "lora": {"dim": 4}}
    made = make_peft(section, BlockDiagonalSettings, dict)
    assert (made.dim, made.num_blocks) == (8, 2)
    assert make_peft({**section, "scheme": "lora"}, BlockDiagonalSettings, dict) == {"dim": 4}
    assert make_peft({**section, "scheme": "none"}, BlockDiagonalSettings, dict) is None
