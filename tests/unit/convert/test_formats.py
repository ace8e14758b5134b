"""Folders of every format: told apart, opened lazily, written whole or not at all."""

from __future__ import annotations

import fcntl
import os

import pytest
import torch

from bdlora_megatron.blocks import all_finite, reshard
from bdlora_megatron.convert import (
    LazyModules,
    ModuleKey,
    WriteOptions,
    detect_format,
    in_memory,
    map_modules,
    module_facts,
    open_adapter,
    read_adapter,
    write_adapter,
)
from bdlora_megatron.errors import AdapterFormatError, ConfigError
from tests.unit.convert.random_adapters import adapter, assert_same, factors

Q, DOWN = ModuleKey(layer=0, name="q_proj"), ModuleKey(layer=1, name="down_proj")


def two_modules(**changes):
    return adapter(
        {Q: factors("q_proj", rank=8, num_blocks=2, **changes), DOWN: factors("down_proj", rank=4)}
    )


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_of_no_format_is_told_what_was_looked_for(tmp_path):
    with pytest.raises(AdapterFormatError, match=r"looked for adapter_config\.json \(peft\)"):
        detect_format(tmp_path)
    with pytest.raises(AdapterFormatError, match="is no folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="format='gguf' is unknown; wanted one of peft"):
        read_adapter(tmp_path, format="gguf")


# --- lazy modules -------------------------------------------------------------------------------


def test_modules_are_read_when_looked_up_and_never_kept(tmp_path):
    wanted = two_modules()
    path = write_adapter(wanted, tmp_path / "lazy", "peft")
    with open_adapter(path) as opened:
        assert isinstance(opened.modules, LazyModules)
        assert DOWN in opened.modules
        assert ModuleKey(layer=7, name="q_proj") not in opened.modules
        facts = module_facts(opened)
        assert {f.A.device.type for f in facts.values()} == {"meta"}
        assert (facts[Q].rank, facts[Q].num_blocks) == (8, 2)
        first = opened.modules[Q].A
        assert opened.modules[Q].A is not first
        assert_same(in_memory(opened), wanted)
    assert torch.equal(first, wanted.modules[Q].A), "what was read outlives the file"
    with pytest.raises(ValueError, match="closed file"):
        opened.modules[Q]
    assert module_facts(wanted)[Q].A.is_meta
    assert in_memory(wanted) is wanted


def test_a_module_with_broken_numbers_hides_no_other(tmp_path):
    wanted = two_modules()
    path = write_adapter(wanted, tmp_path / "nan", "peft")
    file = path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = b"\xff" * 4  # the last number of the last module
    file.write_bytes(content)
    with open_adapter(path) as opened:
        assert torch.equal(opened.modules[Q].A, wanted.modules[Q].A)
        with pytest.raises(AdapterFormatError, match=r"NaN or infinity.*\(in layers\.1\.mlp"):
            opened.modules[DOWN]
    with pytest.raises(AdapterFormatError, match="NaN or infinity"):
        read_adapter(path)


def test_a_file_cut_short_while_open_is_an_error_and_no_crash(tmp_path):
    path = write_adapter(two_modules(), tmp_path / "cut", "peft")
    with open_adapter(path) as opened:
        os.truncate(path / "adapter_model.safetensors", 2000)
        with pytest.raises(AdapterFormatError, match="became shorter while it was read"):
            opened.modules[DOWN]


def test_modules_can_be_changed_on_the_way(tmp_path):
    wanted = two_modules()
    path = write_adapter(wanted, tmp_path / "source", "peft")
    with open_adapter(path) as opened:
        doubled = map_modules(opened, lambda _, f: reshard(f, 4), subject="cannot reshard")
        assert module_facts(doubled)[DOWN].num_blocks == 4
        assert torch.equal(doubled.modules[Q].A, reshard(wanted.modules[Q], 4).A)
        with pytest.raises(AdapterFormatError, match=r"^cannot reshard:\n- out.*=64.*\n- in"):
            map_modules(opened, lambda _, f: reshard(f, 7), subject="cannot reshard")


# --- writing ------------------------------------------------------------------------------------


def test_a_failed_write_leaves_nothing(tmp_path):
    broken = two_modules()
    broken.modules[DOWN].B[1, 2] = float("nan")
    with pytest.raises(AdapterFormatError, match=r"cannot write adapter 'random':\n- factors hold"):
        write_adapter(broken, tmp_path / "deep" / "er", "peft")
    assert names(tmp_path / "deep") == []
    with pytest.raises(AdapterFormatError, match="has no modules"):
        write_adapter(adapter({}), tmp_path / "empty", "peft")
    assert names(tmp_path) == ["deep"]


def test_what_is_there_is_replaced_only_on_request(tmp_path):
    first, second = two_modules(seed=1), two_modules(seed=2)
    path = write_adapter(first, tmp_path / "out", "peft")
    with pytest.raises(ConfigError, match=r"is there already.*overwrite=True"):
        write_adapter(second, path, "peft")
    assert_same(read_adapter(path), first)
    write_adapter(second, path, "peft", options=WriteOptions(overwrite=True))
    assert_same(read_adapter(path), second)
    assert names(tmp_path) == ["out"]


def test_only_adapters_are_ever_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(home)
    file = tmp_path / "file"
    file.write_text("x")
    for path, why in ((home, "holds no adapter"), (tmp_path / "link", "no folder"), (file, "no f")):
        with pytest.raises(ConfigError, match=why):
            write_adapter(two_modules(), path, "peft", options=WriteOptions(overwrite=True))
        with pytest.raises(ConfigError, match="is there already"):
            write_adapter(two_modules(), path, "peft")
    assert (home / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert_same(
        read_adapter(write_adapter(two_modules(), tmp_path / "empty", "peft")), two_modules()
    )


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_kept(tmp_path):
    for name in (".out.dead.partial", ".out.live.partial", ".other.dead.partial"):
        (tmp_path / name).mkdir()
    handle = os.open(tmp_path / ".out.live.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write_adapter(two_modules(), tmp_path / "out", "peft")
    os.close(handle)
    assert names(tmp_path) == [".other.dead.partial", ".out.live.partial", "out"]


def test_a_folder_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").mkdir()
    path = write_adapter(two_modules(), tmp_path / "out", "peft")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_factors_are_cast_on_request_and_overflow_is_refused(tmp_path):
    wanted = two_modules()
    options = WriteOptions(dtype=torch.bfloat16)
    got = read_adapter(write_adapter(wanted, tmp_path / "half", "peft", options=options))
    assert torch.equal(got.modules[Q].A, wanted.modules[Q].A.bfloat16())
    wanted.modules[Q].A[0, 0] = 1e5
    with pytest.raises(AdapterFormatError, match=r"factors exceed 65504, .*torch\.float16"):
        write_adapter(wanted, tmp_path / "f16", "peft", options=WriteOptions(dtype=torch.float16))
    assert names(tmp_path) == ["half"]


@pytest.mark.parametrize(
    ("options", "why"), [({"tp": 0}, "tp=0"), ({"dtype": torch.int8}, "dtype=torch.int8; wanted")]
)
def test_options_out_of_range_are_refused(options, why):
    with pytest.raises(ConfigError, match=why):
        WriteOptions(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(dtype, value):
    tensor = torch.randn(37, 29).to(dtype)
    assert all_finite(tensor)
    for place in (0, 15, 16, 31, 512, 37 * 29 - 1):
        broken = tensor.clone()
        broken.view(-1)[place] = value
        assert not all_finite(broken)
