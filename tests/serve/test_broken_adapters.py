"""Adapters whose files break after the start and before their first use."""

from __future__ import annotations

import os
import pickle
import shutil

import httpx2 as httpx
import pytest

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


@pytest.fixture(scope="module", params=[1, 2])
def broken(request, folder, tmp_path_factory):
    """A server and the folder of its adapters, all of them broken since it is ready."""
    root = tmp_path_factory.mktemp("broken")
    for name in (*BREAKS, "touched", "whole"):
        # With their times: what is put back later is what was there.
        shutil.copytree(folder / "adapters" / "blocks", root / "adapters" / name)
        shutil.copytree(root / "adapters" / name, root / "kept" / name)
    with RunningServer(
        folder, root / "log", "--tp", str(request.param), "--adapters", str(root / "adapters"),
        "--set", *SIZES, f"adapter_dirs=[{root / 'adapters'}]",
    ) as server:  # fmt: skip
        for name, (break_it, _) in BREAKS.items():
            break_it(root / "adapters" / name)
        with httpx.Client(base_url=server.url, timeout=60) as http:
            yield http, root, server


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
