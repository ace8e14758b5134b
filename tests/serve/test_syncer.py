"""The LoRA syncer of the Gateway API inference extension: what its release 1.4.0 asks for.

It takes any status below 400 for success, and tries again a few seconds later otherwise.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import httpx2 as httpx
import pytest
import yaml

from tests.serve.soak import ask, text

pytestmark = pytest.mark.engine
MANIFEST = Path(__file__).parents[2] / "examples" / "deploy" / "kubernetes" / "server.yaml"


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def config(folder):
    """The example's, with adapters that are there; its old one is a name that is loaded."""
    maps = yaml.safe_load_all(MANIFEST.read_text())
    (found,) = (o for o in maps if o["metadata"]["name"] == "bdlora-adapters")
    config = yaml.safe_load(found["data"]["configmap.yaml"])["vLLMLoRAConfig"]
    made = []
    for wish in ("ensureExist", "ensureNotExist"):
        for adapter in config[wish]["models"]:
            path = folder / "adapters" / Path(adapter["source"]).name
            shutil.copytree(folder / "adapters" / "vanilla", path)
            made.append(path)
            adapter["source"] = str(path)
    yield config
    for path in made:
        shutil.rmtree(path)


def reconcile(http, config):
    """One round; returns what was asked, and the statuses of those that were no success."""
    assert http.get("/health").status_code == 200
    exist, gone = (
        {a["id"]: a for a in config[w]["models"]} for w in ("ensureExist", "ensureNotExist")
    )
    asked, failed = [], []
    for name in exist.keys() - gone.keys():
        if name not in registered(http):
            adapter = exist[name]
            body = {"lora_name": name, "lora_path": adapter["source"]}
            body["base_model_name"] = adapter.get("base-model", config.get("defaultBaseModel", ""))
            asked.append(("load", name))
            answer = http.post("/v1/load_lora_adapter", json=body)
            failed += [answer.status_code] if answer.status_code >= 400 else []
    for name in gone.keys() - exist.keys():
        if name in registered(http):
            asked.append(("unload", name))
            answer = http.post("/v1/unload_lora_adapter", json={"lora_name": name})
            failed += [answer.status_code] if answer.status_code >= 400 else []
    return sorted(asked), failed


def registered(http):
    assert http.get("/health").status_code == 200
    return {model["id"] for model in http.get("/v1/models").json()["data"]}


def test_a_rollout_goes_through_and_then_nothing_is_left_to_do(http, config):
    names = {adapter["id"] for adapter in config["ensureExist"]["models"]}
    (old,) = (adapter["id"] for adapter in config["ensureNotExist"]["models"])
    before = copy.deepcopy(config)
    before["ensureExist"]["models"] += before["ensureNotExist"].pop("models")
    before["ensureNotExist"]["models"] = []
    asked, failed = reconcile(http, before)
    assert (asked, failed) == ([("load", name) for name in sorted({*names, old})], [])
    assert reconcile(http, before) == ([], [])
    assert text(ask(http, old)) == text(ask(http, "vanilla"))
    # The new version comes, the old one goes.
    assert reconcile(http, config) == ([("unload", old)], [])
    assert reconcile(http, config) == ([], [])
    assert names <= registered(http)
    assert old not in registered(http)
    assert ask(http, old).status_code == 404
    for adapter in config["ensureExist"]["models"]:
        adapter["base-model"] = ""
    config["ensureExist"], config["ensureNotExist"] = {"models": []}, config["ensureExist"]
    assert reconcile(http, config) == ([("unload", name) for name in sorted(names)], [])


@pytest.mark.parametrize("base", ["", "model", "other/model", None])
def test_the_base_model_that_it_names_with_an_adapter_is_no_matter(http, config, base):
    """It names one with every adapter, often with nothing; what has no effect is told."""
    adapter = config["ensureExist"]["models"][0]
    body = {"lora_name": "synced", "lora_path": adapter["source"], "base_model_name": base}
    loaded = http.post("/v1/load_lora_adapter", json=body)
    assert loaded.status_code == 200, loaded.text
    ignored = "base_model_name" if base == "other/model" else None
    assert loaded.headers.get("x-ignored-fields") == ignored
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "synced"}).status_code == 200


def test_an_adapter_that_is_not_there_yet_is_tried_again(http, config):
    config["ensureNotExist"]["models"] = []
    config["ensureExist"]["models"] = config["ensureExist"]["models"][:1]
    (adapter,) = config["ensureExist"]["models"]
    there, away = Path(adapter["source"]), Path(adapter["source"] + "-away")
    there.rename(away)
    try:
        assert reconcile(http, config) == ([("load", adapter["id"])], [400])
        assert adapter["id"] not in registered(http)
    finally:
        away.rename(there)
    assert reconcile(http, config) == ([("load", adapter["id"])], [])
    assert (
        http.post("/v1/unload_lora_adapter", json={"lora_name": adapter["id"]}).status_code == 200
    )
