"""Activated LoRA (PEFT's aLoRA): its invocation tokens are read, kept, told and never dropped."""

from __future__ import annotations

import json
import logging
import random
import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.variants import calculate_alora_offsets
from safetensors.torch import load_file

from bdlora_megatron.convert import WriteOptions, open_adapter, read_adapter, write_adapter
from bdlora_megatron.convert.merge import merge_adapter
from bdlora_megatron.convert.structure import Structure, restructure
from bdlora_megatron.errors import AdapterFormatError, BDLoRAError, UnsupportedError
from bdlora_megatron.invocation import active_from
from tests.unit.cli.adapters import run, run_json
from tests.unit.convert.peft_files import peft_model, save, tiny_llama, write
from tests.unit.convert.random_adapters import seven
from tests.unit.convert.test_training_checkpoints import swift

TOKENS = [7, 8]
IDS = torch.tensor([[1, 7, 8, 2, 7, 3, 7, 8, 4, 5, 6], [3, 4, 5, 6, 9, 8, 7, 1, 2, 3, 4]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = peft_model(alora_invocation_tokens=TOKENS, task_type="CAUSAL_LM")
    return save(model, tmp_path_factory.mktemp("activated") / "alora")


@torch.no_grad()
def logits(folder):
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    return model.eval()(IDS).logits


def change(source, target, **options):
    """A copy of an adapter with other options; None takes one out."""
    target.mkdir()
    config = json.loads((source / "adapter_config.json").read_text()) | options
    (target / "adapter_config.json").write_text(json.dumps(config))
    (target / "adapter_model.safetensors").write_bytes(
        (source / "adapter_model.safetensors").read_bytes()
    )
    return target


def test_an_adapter_begins_where_pefts_does():
    """At the last occurrence's first token, or nowhere; few tokens, so that many overlap."""
    rng = random.Random(3)
    found = 0
    for _ in range(400):
        tokens = [rng.randrange(3) for _ in range(rng.randint(1, 12))]
        wanted = [rng.randrange(3) for _ in range(rng.randint(1, 4))]
        config = {"a": type("Config", (), {"alora_invocation_tokens": wanted})}
        (offset,) = calculate_alora_offsets(config, "a", torch.tensor([tokens]))
        start = active_from(tokens, wanted)
        assert start == (None if offset is None else len(tokens) - offset)
        found += start is not None
    assert 50 < found < 350


@pytest.mark.parametrize("by_way_of", ["peft", "megatron"])
def test_peft_computes_the_same_after_a_round_trip(folder, tmp_path, by_way_of):
    adapter = read_adapter(folder)
    assert adapter.invocation_tokens == tuple(TOKENS)
    middle = write_adapter(adapter, tmp_path / "middle", by_way_of)
    back = write_adapter(read_adapter(middle), tmp_path / "back", "peft")
    assert torch.equal(logits(back), logits(folder))
    # The second row does not invoke it, and the first one does.
    with torch.no_grad():
        base = tiny_llama().eval()(IDS).logits
    assert torch.equal(logits(folder)[1], base[1])
    assert torch.equal(logits(folder)[0, :6], base[0, :6])
    assert (logits(folder)[0, 6:] - base[0, 6:]).abs().amax(dim=-1).min() > 0.01


def test_blocks_and_invocation_go_together(folder, tmp_path, caplog):
    """In our layouts; of PEFT's variants a module has one, so PEFT wants the dense form."""
    with open_adapter(folder) as adapter:
        blocked = restructure(adapter, Structure(mode="reshard", num_blocks=2)).adapter
        with caplog.at_level(logging.WARNING):
            path = write_adapter(blocked, tmp_path / "blocked", "peft")
        dense = write_adapter(blocked, tmp_path / "d", "peft", options=WriteOptions(dense=True))
    assert "PEFT loads no Activated LoRA with blocks" in caplog.text
    again = read_adapter(path)
    assert again.invocation_tokens == tuple(TOKENS)
    assert {factors.num_blocks for factors in again.modules.values()} == {2}
    with pytest.raises(ValueError, match="unsupported variant"):
        PeftModel.from_pretrained(tiny_llama(), path)
    torch.testing.assert_close(logits(dense), logits(folder))


def test_a_plain_adapter_says_nothing_of_it(tmp_path):
    adapter = seven()
    for kind, file in (("peft", "adapter_config.json"), ("megatron", "adapter.json")):
        path = write_adapter(adapter, tmp_path / kind, kind)
        assert "invocation" not in (path / file).read_text()
        assert read_adapter(path).invocation_tokens is None


def test_no_tokens_are_a_plain_adapter_as_in_peft(folder, tmp_path):
    empty = change(folder, tmp_path / "empty", alora_invocation_tokens=[])
    assert read_adapter(empty).invocation_tokens is None
    plain = change(folder, tmp_path / "plain", alora_invocation_tokens=None)
    assert torch.equal(logits(empty), logits(plain))


@pytest.mark.parametrize("tokens", ["7 8", [7, "8"], [7, -1], [True], [7.0], {"ids": [7]}])
def test_what_are_no_token_ids_is_refused(folder, tmp_path, tokens):
    with pytest.raises(AdapterFormatError, match="wanted a list of token ids"):
        read_adapter(change(folder, tmp_path / "bad", alora_invocation_tokens=tokens))


def test_a_task_for_which_peft_never_looks_is_refused(folder, tmp_path):
    other = change(folder, tmp_path / "other", task_type=None)
    with pytest.raises(AdapterFormatError, match='set task_type to "CAUSAL_LM"'):
        read_adapter(other)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(logits(other), tiny_llama().eval()(IDS).logits)


@pytest.mark.parametrize("option", ["invocation_string", "alora_invocation_string"])
def test_a_text_without_tokens_is_refused_and_cannot_be_ignored(folder, tmp_path, option):
    text = {option: "<|start_of_role|>check<|end_of_role|>"}
    old = change(folder, tmp_path / "old", alora_invocation_tokens=None, **text)
    with pytest.raises(AdapterFormatError, match="set alora_invocation_tokens to the tokens"):
        read_adapter(old)
    with pytest.raises(BDLoRAError, match="cannot be ignored"):
        read_adapter(old, ignore_unknown=(option,))


def test_a_manifest_with_what_are_no_token_ids_is_refused(folder, tmp_path):
    path = write_adapter(read_adapter(folder), tmp_path / "a", "megatron")
    raw = json.loads((path / "adapter.json").read_text())
    (path / "adapter.json").write_text(json.dumps({**raw, "invocation_tokens": [1, None]}))
    with pytest.raises(AdapterFormatError, match="wanted a list of token ids"):
        read_adapter(path)


@pytest.mark.parametrize("kind", ["bridge", "slora"])
def test_formats_that_cannot_say_it_refuse(tmp_path, kind):
    adapter = replace(seven(layers=2), invocation_tokens=(7, 8))
    with pytest.raises(UnsupportedError, match="which the format cannot say"):
        write_adapter(adapter, tmp_path / "a", kind)
    assert not (tmp_path / "a").exists()


def test_swift_with_tokens_is_refused(tmp_path):
    source = seven(shared=True, layers=2)
    path = swift(tmp_path / "a", source, alora_invocation_tokens=[7], task_type="CAUSAL_LM")
    with pytest.raises(AdapterFormatError, match="do not heed"):
        read_adapter(path)


def test_merging_is_refused(folder, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedError, match=r"acts from its invocation tokens \[7, 8\] on"):
        merge_adapter(tmp_path / "base", read_adapter(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands_tell_it(folder, tmp_path, capsys):
    status, told = run_json(capsys, "inspect", folder)
    assert (status, told["invocation_tokens"]) == (0, TOKENS)
    assert "acts from the invocation tokens [7, 8] on" in run(capsys, "inspect", folder)[1]
    convert = ["convert", folder, "--to", "megatron", "--out", tmp_path / "out", "--workers", "1"]
    status, out, _ = run(capsys, *convert)
    assert status == 0
    assert "alora acts from the invocation tokens [7, 8] on" in out
    converted = tmp_path / "out" / "alora"
    assert run(capsys, "verify", folder, converted)[0] == 0
    plain = write(
        tmp_path / "plain", load_file(folder / "adapter_model.safetensors"), lora_alpha=12
    )
    status, told = run_json(capsys, "verify", converted, plain)
    assert (status, told["same"], told["largest_relative"]) == (1, False, 0.0)
    assert told["invocation_tokens"] == [TOKENS, None]
    text = run(capsys, "verify", converted, plain)[1]
    assert "DIFFERENT: one acts from [7, 8] on, the other on every token" in text
