"""Who may do what: the app in process, before any engine has come up."""

from __future__ import annotations

import asyncio

import httpx2 as httpx
import pytest

from bdlora_megatron.serve.api.app import make_app
from bdlora_megatron.serve.api.state import APIServer
from bdlora_megatron.serve.api.text import Tokenizer
from bdlora_megatron.serve.settings import ApiKey, ServeSettings
from tests.serve.models import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer(str(folder))


def ask(tokenizer, method, path, *, key=None, json=None, **settings):
    made = ServeSettings(
        model="/m/base", adapters={"a": "/a", "b": "/b"}, adapter_dirs=("/tmp",), **settings
    )
    app = make_app(APIServer(made, tokenizer))

    async def one():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            # Bytes, as a client may send what is no ASCII.
            headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
            return await client.request(method, path, headers=headers, json=json)

    return asyncio.run(one())


KEYS = {
    "api_keys": (ApiKey(key="all-of-them"), ApiKey(key="only-a-key", models=("a",))),
    "admin_key": "the-admin-key",
}
COMPLETION = {"model": "a", "prompt": "x"}
LOAD = {"lora_name": "c", "lora_path": "/nowhere"}


def test_without_keys_everyone_is_served(tokenizer):
    answer = ask(tokenizer, "GET", "/v1/models")
    assert [card["id"] for card in answer.json()["data"]] == ["base", "a", "b"]
    # No engine is there: refused for that, and for nothing else.
    answer = ask(tokenizer, "POST", "/v1/completions", json=COMPLETION)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert ask(tokenizer, "GET", "/metrics").status_code == 200
    assert ask(tokenizer, "GET", "/health").status_code == 200
    assert ask(tokenizer, "GET", "/ready").text == "loading"


@pytest.mark.parametrize("key", [None, "", "wrong-key-entirely", "all-of-th\xe9"])
def test_without_a_right_key_nothing_is_told(tokenizer, key):
    for method, path, body in [
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/a", None),
        ("GET", "/metrics", None),
        ("POST", "/v1/completions", COMPLETION),
        ("PUT", "/api", {"prompts": ["x"]}),
        ("POST", "/v1/load_lora_adapter", LOAD),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "a"}),
    ]:
        answer = ask(tokenizer, method, path, json=body, key=key, **KEYS)
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "'a'" not in answer.text


def test_a_limited_key_sees_and_uses_its_models_alone(tokenizer):
    limited = {"key": "only-a-key", **KEYS}
    answer = ask(tokenizer, "GET", "/v1/models", **limited)
    assert [card["id"] for card in answer.json()["data"]] == ["a"]
    for model, status in [("a", 503), ("b", 404), ("base", 404), ("nobody", 404)]:
        body = {"model": model, "prompt": "x"}
        answer = ask(tokenizer, "POST", "/v1/completions", json=body, **limited)
        assert answer.status_code == status, model
    assert ask(tokenizer, "GET", "/v1/models/b", **limited).status_code == 404
    answer = ask(tokenizer, "PUT", "/api", json={"prompts": ["x"]}, **limited)
    assert answer.status_code == 404


def test_only_the_admin_loads_and_unloads(tokenizer):
    for path, body in [
        ("/v1/load_lora_adapter", LOAD),
        ("/v1/unload_lora_adapter", {"lora_name": "nobody"}),
    ]:
        for key, status in [("all-of-them", 401), ("only-a-key", 401), ("the-admin-key", None)]:
            answer = ask(tokenizer, "POST", path, json=body, key=key, **KEYS)
            assert answer.status_code == (status or (403 if "load_" in path[:9] else 404)), key
    without = {"api_keys": KEYS["api_keys"]}
    answer = ask(
        tokenizer, "POST", "/v1/load_lora_adapter", json=LOAD, key="all-of-them", **without
    )
    assert answer.status_code == 403


def test_the_admin_may_do_what_every_key_may(tokenizer):
    answer = ask(tokenizer, "GET", "/v1/models", key="the-admin-key", **KEYS)
    assert len(answer.json()["data"]) == 3
    assert ask(tokenizer, "GET", "/metrics", key="the-admin-key", **KEYS).status_code == 200
