"""Adapters whose files are broken at the start, or break between it and their first use."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import httpx2 as httpx
import pytest
import safetensors.torch
import torch

from tests.serve.conftest import SIZES
from tests.serve.servers import RunningServer
from tests.serve.soak import ask, load, text

pytestmark = pytest.mark.engine

WEIGHTS = "adapter_model.safetensors"


def _truncate(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100])


def _alter(folder):
    """As long as before, and still a file that could be read."""
    whole = bytearray((folder / WEIGHTS).read_bytes())
    whole[-64:] = bytes(64)
    (folder / WEIGHTS).write_bytes(whole)


def _scramble_header(folder):
    whole = bytearray((folder / WEIGHTS).read_bytes())
    whole[8:40] = b"\xff" * 32
    (folder / WEIGHTS).write_bytes(whole)


def _pickle(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps({"base_model.model.x": [1.0]}))


def _pickle_beside(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"base_model.model.x": [1.0]}))


def _vanish(folder):
    (folder / WEIGHTS).unlink()


#: What happens to each adapter, and what loading it then says; None where it can be loaded.
BREAKS = {
    "truncated": (_truncate, WEIGHTS),
    "altered": (_alter, None),
    "scrambled": (_scramble_header, WEIGHTS),
    "pickled": (_pickle, WEIGHTS),
    "replaced": (_pickle_beside, "pickle"),
    "vanished": (_vanish, "safetensors"),
    "gone": (shutil.rmtree, "no adapter's folder"),
}


def _configure(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def _widen(folder):
    """A rank that no slot has room for."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    wide = {
        name: tensor.repeat(8, 1) if "lora_A" in name else tensor.repeat(1, 8)
        for name, tensor in tensors.items()
    }
    safetensors.torch.save_file(wide, folder / WEIGHTS)
    _configure(folder, r=32)


def _retarget(folder):
    """For a base model of another width."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name] = torch.zeros(len(tensors[name]), 40)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


#: What is wrong with an adapter that is given at the start, and what the server then says.
REFUSED = {
    "refused-dora": (lambda folder: _configure(folder, use_dora=True), "dora"),
    "refused-cut": (_truncate, WEIGHTS),
    "refused-wide": (_widen, "set max_lora_rank=32 or more"),
    "refused-base": (_retarget, "40"),
    "refused-config": (lambda folder: (folder / "adapter_config.json").write_text("{"), "JSON"),
    "refused-gone": (_vanish, "safetensors"),
    "refused-text": (lambda f: (f / "tokenizer_config.json").write_text("{"), "chat template"),
}


def _break_some(folder, into):
    for name, (break_it, _) in REFUSED.items():
        shutil.copytree(folder / "adapters" / "vanilla", into / name)
        break_it(into / name)


@pytest.fixture(scope="module", params=[1, 2])
def broken(request, folder, tmp_path_factory):
    """A server and the folder of its adapters, all of them broken since it is ready."""
    root = tmp_path_factory.mktemp("broken")
    for name in (*BREAKS, "touched", "whole"):
        # With their times: what is put back later is what was there.
        shutil.copytree(folder / "adapters" / "blocks", root / "adapters" / name)
        shutil.copytree(root / "adapters" / name, root / "kept" / name)
    _break_some(folder, root / "adapters")
    with RunningServer(
        folder, root / "log", "--tp", str(request.param), "--adapters", str(root / "adapters"),
        "--set", *SIZES, f"adapter_dirs=[{root / 'adapters'}]",
    ) as server:  # fmt: skip
        for name, (break_it, _) in BREAKS.items():
            break_it(root / "adapters" / name)
        with httpx.Client(base_url=server.url, timeout=60) as http:
            yield http, root, server


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_cannot_be_served_is_refused_when_the_server_starts(broken, name):
    http, _, server = broken
    says = REFUSED[name][1]
    listed = http.get("/v1/models").json()
    assert name not in [card["id"] for card in listed["data"]]
    (reason,) = [card["reason"] for card in listed["refused"] if card["id"] == name]
    assert says.lower() in reason.lower()
    (shown,) = [m for m in http.get("/status.json").json()["models"] if m["name"] == name]
    assert (shown["state"], shown["reason"]) == ("refused", reason)
    logged = [json.loads(line) for line in server.log.read_text().splitlines() if "refused" in line]
    assert f"adapter '{name}' is refused: {reason}" in [line["message"] for line in logged]
    (ready,) = [line for line in logged if line["message"] == "ready"]
    assert name in ready["refused"]
    answer = ask(http, name)
    assert answer.status_code == 404
    assert reason in answer.json()["error"]["message"]


def test_a_refused_adapter_can_be_loaded_once_it_is_mended(broken, folder):
    http, root, _ = broken
    name = "refused-cut"
    path = root / "adapters" / name
    shutil.copy(folder / "adapters" / "vanilla" / WEIGHTS, path)
    assert load(http, name, path).status_code == 200
    assert text(ask(http, name))
    assert name not in [card["id"] for card in http.get("/v1/models").json()["refused"]]


def test_a_strict_server_ends_with_all_that_is_wrong(folder, tmp_path):
    _break_some(folder, tmp_path / "adapters")
    del_text = tmp_path / "adapters" / "refused-text" / "tokenizer_config.json"
    del_text.unlink()
    with pytest.raises(AssertionError, match="did not start") as caught:
        RunningServer(
            folder, tmp_path / "log", "--strict-adapters", "--adapters", str(tmp_path / "adapters"),
            "--set", *SIZES,
        )  # fmt: skip
    for name, (_, says) in REFUSED.items():
        assert (name in str(caught.value)) == (name != "refused-text")
        assert says.lower() in (tmp_path / "log").read_text().lower() or name == "refused-text"


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_adapter_is_refused_others_are_served_and_mended_it_serves(broken, name):
    http, root, server = broken
    right, base = text(ask(http, "whole")), text(ask(http, "model"))
    for more in ({}, {"stream": True}, {"n": 3}):
        refused = ask(http, name, **more)
        assert refused.status_code == 500, refused.text
        error = refused.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "server_error"
        assert f"adapter {name}@1 could not be loaded" in error["message"]
        assert "changed" in error["message"] or "not a folder" in error["message"]
        assert text(ask(http, "whole")) == right
        assert text(ask(http, "model")) == base
    says = BREAKS[name][1]
    if says is not None:
        # What is wrong with the file itself is told to who loads it; nothing changes by that.
        refused = load(http, name, root / "adapters" / name)
        assert refused.status_code == 400
        assert says in refused.json()["error"]["message"], refused.text
        assert ask(http, name).status_code == 500
    shutil.rmtree(root / "adapters" / name, ignore_errors=True)
    shutil.copytree(root / "kept" / name, root / "adapters" / name)
    assert text(ask(http, name)) == right
    assert server.metric("bdlora_used_blocks") == 0


def test_files_with_new_times_serve_once_they_are_loaded_again(broken):
    """Nobody can tell that they are the same without having read them before."""
    http, root, _ = broken
    path = root / "adapters" / "touched"
    os.utime(path / WEIGHTS)
    refused = ask(http, "touched")
    assert refused.status_code == 500
    assert "load it again" in refused.json()["error"]["message"]
    assert load(http, "touched", path).status_code == 200
    assert text(ask(http, "touched")) == text(ask(http, "whole"))
