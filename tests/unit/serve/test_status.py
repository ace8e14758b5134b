"""What the status page is told: history, errors, and the app in process with numbers from ranks."""

from __future__ import annotations

import asyncio
import json
import re

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bdlora_megatron.serve.api.app import make_app
from bdlora_megatron.serve.api.history import Faults, History
from bdlora_megatron.serve.api.state import APIServer
from bdlora_megatron.serve.api.text import Tokenizer
from bdlora_megatron.serve.messages import Places, Snapshot
from bdlora_megatron.serve.settings import ApiKey, ServeSettings
from tests.serve.models import make_tokenizer

SECRET = "Xyzzy-of-the-prompt"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer(str(folder))


@pytest.fixture
def api(tokenizer):
    keys = (ApiKey(key="all-of-them"), ApiKey(key="only-a-key", models=("a", "gone")))
    settings = ServeSettings(
        model="/m/base", adapters={"a": "/a", "b": "/b"}, adapter_dirs=("/tmp",), api_keys=keys
    )
    api = APIServer(settings, tokenizer)
    api.client.snapshot = Snapshot(
        running=3, queued=2, running_adapters={"a": 1, "b": 1}, waiting_adapters={"b": 2}
    )
    api.client.places = Places(slot=("a",), host=("b",))
    return api


def ask(api, *requests, key="all-of-them"):
    """The answers to (method, path, body) in order, in one connection."""

    async def all_of_them():
        transport = httpx.ASGITransport(app=make_app(api), raise_app_exceptions=False)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers=headers
        ) as client:
            return [await client.request(m, path, json=body) for m, path, body in requests]

    return asyncio.run(all_of_them())


def status(api, key="all-of-them"):
    (answer,) = ask(api, ("GET", "/status.json", None), key=key)
    assert answer.status_code == 200
    return answer.json()


def rows(told):
    return {model["name"]: model for model in told["models"]}


def test_history_is_of_whole_pieces_and_forgets_old_ones():
    now = [100.0]
    history = History(piece_s=5.0, pieces=4, clock=lambda: now[0])
    history.add("a", tokens=10, first_s=0.5, prompt=8, cached=2)
    history.add("a", tokens=5, first_s=1.5, prompt=8, cached=6)
    history.add("b", tokens=100)
    # What goes on is left out, and what was before the start is no zero.
    assert history.series({"a"})["tokens_s"] == [None] * 4
    now[0] = 105.0
    told = history.series({"a"})
    assert told["tokens_s"] == [None, None, None, 3.0]
    assert told["first_s"] == [None, None, None, 1.0]
    assert told["cached"] == [None, None, None, 0.5]
    assert history.series({"a", "b"})["tokens_s"][-1] == 23.0
    assert history.series({"b"})["first_s"] == history.series({"b"})["cached"] == [None] * 4
    history.forget("b")
    assert history.series({"b"})["tokens_s"][-1] == 0.0
    assert history.tokens == {"a": 15}
    now[0] = 115.0
    assert history.series({"a"})["tokens_s"] == [None, 3.0, 0.0, 0.0]
    now[0] = 1000.0
    history.add("a", tokens=1)
    assert len(history._served) == 1, "old pieces go"


def test_errors_are_counted_by_kind_and_bounded():
    faults = Faults(most=3)
    for number in range(5):
        faults.add(429, f"{number} are waiting", kind="rate", model="a")
    faults.add(404, "x" * 5000, kind="", model="z")
    first, second = faults.told(None)
    assert (first["status"], len(first["message"])) == (404, 300)
    assert (second["count"], second["message"]) == (5, "4 are waiting")
    assert [fault["model"] for fault in faults.told(["a"])] == ["a"]
    for number in range(9):
        faults.add(500, "broken", kind="", model=f"m{number}")
    assert [fault["model"] for fault in faults.told(None)] == ["m8", "m7", "m6"]
    assert faults.total == {429: 5, 404: 1, 500: 9}


def test_models_say_where_they_are_and_what_they_do(api):
    api.refuse({"worn": "its rank is too large"})
    api.changing = {"b": "loading", "new": "loading"}
    told = rows(status(api))
    assert list(told) == ["base", "a", "b", "worn", "new"]
    assert [told[name]["state"] for name in told] == [
        "base model", "in a slot", "loading", "refused", "loading",
    ]  # fmt: skip
    assert told["worn"]["reason"] == "its rank is too large"
    assert [(told[n]["running"], told[n]["waiting"]) for n in ("base", "a", "b")] == [
        (1, 0), (1, 0), (1, 2),
    ]  # fmt: skip
    assert (told["a"]["version"], told["base"]["version"]) == (1, None)
    api.changing["worn"] = "loading"
    assert rows(status(api))["worn"] == {"name": "worn", "state": "loading", "reason": None}
    api.changing.clear()
    assert rows(status(api))["b"]["state"] == "in host memory"
    api.client.places = Places()
    assert rows(status(api))["b"]["state"] == "on disk"


def test_a_limited_key_learns_nothing_of_other_models(api):
    api.refuse({"gone": "broken", "other": "broken too"})
    api.changing = {"hidden": "loading"}
    now = [0.0]
    api.history = History(clock=lambda: now[0])
    api.history.add("b", tokens=7)
    now[0] = api.history.piece_s
    ask(api, ("POST", "/v1/completions", {"model": "b", "prompt": "x"}))
    ask(api, ("POST", "/v1/completions", {"model": "a", "prompt": "x"}))
    ask(api, ("POST", "/v1/completions", {"model": "b", "prompt": "x"}), key="only-a-key")
    told = status(api, "only-a-key")
    assert set(rows(told)) == {"a", "gone"}
    assert told["history"]["tokens_s"][-1] == 0
    assert [(fault["status"], fault["model"]) for fault in told["errors"]] == [(503, "a")]
    for name in ("base", "b", "other", "hidden"):
        assert f'"{name}"' not in json.dumps(told)
    (answer,) = ask(api, ("GET", "/status.json", None), key=None)
    assert answer.status_code == 401
    everything = status(api)
    assert everything["history"]["tokens_s"][-1] * api.history.piece_s == 7
    assert {(fault["status"], fault["model"]) for fault in everything["errors"]} == {
        (503, "a"), (503, "b"), (404, "b"), (401, None),
    }  # fmt: skip


def test_errors_are_shown_without_what_was_sent(api):
    """Whatever is wrong with a body, and wherever in it."""
    chat = [{"role": "user", "content": SECRET}]
    faulty = [
        ("/v1/completions", {"model": "a", "prompt": SECRET, "max_tokens": 100_000}),
        ("/v1/completions", {"model": "a", "prompt": {SECRET: SECRET}}),
        ("/v1/completions", {"model": "a", "prompt": SECRET, "suffix": SECRET}),
        ("/v1/completions", {"model": "a", "prompt": SECRET, "stop": [SECRET] * 999}),
        ("/v1/completions", {"model": "a", "prompt": SECRET, "logit_bias": {SECRET: 1}}),
        ("/v1/completions", {"model": "a", "prompt": SECRET, "structured_outputs": {SECRET: 1}}),
        ("/v1/chat/completions", {"model": "a", "messages": [{"role": SECRET}]}),
        ("/v1/chat/completions", {"model": "a", "messages": [{"role": "user", "content": 3}]}),
        ("/v1/chat/completions",
         {"model": "a", "messages": chat, "response_format": {"type": SECRET}}),
        ("/v1/chat/completions",
         {"model": "a", "messages": chat, "structured_outputs": {"regex": f"(?={SECRET})"}}),
        ("/v1/chat/completions",
         {"model": "a", "messages": chat, "structured_outputs": {"grammar": SECRET}}),
        ("/v1/chat/completions",
         {"model": "a", "messages": chat, "tools": [{"type": SECRET, "function": SECRET}]}),
    ]  # fmt: skip
    answers = ask(api, *(("POST", path, body) for path, body in faulty))
    assert {answer.status_code for answer in answers} == {400}
    told = status(api)
    assert sum(fault["count"] for fault in told["errors"]) == len(faulty)
    assert SECRET not in json.dumps(told)
    assert any("in max_tokens: /v1/completions" in fault["message"] for fault in told["errors"])


def test_errors_of_every_layer_are_shown_once(api):
    """A route, a method, a body that is too large, a load that is not allowed."""
    large = {"model": "a", "prompt": "x" * 2**22}
    ask(
        api,
        ("GET", "/v1/nothing", None),
        ("DELETE", "/v1/models", None),
        ("POST", "/v1/completions", large),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "c", "lora_path": "/etc"}),
    )
    told = status(api)["errors"]
    assert [(fault["status"], fault["count"]) for fault in told] == [
        (403, 1), (413, 1), (405, 1), (404, 1),
    ]  # fmt: skip


def test_metrics_tell_of_adapters_and_errors(api):
    ask(api, ("GET", "/v1/nothing", None), ("GET", "/v1/nothing", None))
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(api.metrics.text().decode())
        for sample in family.samples
    }
    assert found["bdlora_adapters", "slot"] == found["bdlora_adapters", "host"] == 1
    assert found["bdlora_adapters", "loading"] == 0
    assert found["bdlora_running_requests", "base"] == found["bdlora_running_requests", "a"] == 1
    assert found["bdlora_waiting_requests", "b"] == 2
    assert ("bdlora_waiting_requests", "base") not in found
    assert found["bdlora_errors_total", "404"] == 2


def test_the_page_needs_no_other_host_and_names_what_it_uses(api):
    (answer,) = ask(api, ("GET", "/", None), key=None)
    page = answer.text
    # Every element that the script looks for is there, and every path it asks is a route.
    ids = set(re.findall(r'at\("([\w-]+)"\)', page))
    assert len(ids) > 8
    declared = re.findall(r'\bid="?([\w-]+)', page)
    assert ids <= set(declared)
    assert len(declared) == len(set(declared))
    asked = re.findall(r'fetch\("([^"]+)"', page)
    assert asked == ["status.json", "v1/completions"]
    statuses = {
        answer.status_code for answer in ask(api, *(("HEAD", f"/{p}", None) for p in asked))
    }
    assert statuses == {200, 405}
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(?!data:)", page)
