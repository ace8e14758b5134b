"""Loading and unloading adapters while requests run, and what may not be loaded."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import threading

import httpx2 as httpx
import peft
import pytest
import torch
import transformers

from tests.serve import models
from tests.serve.soak import ask, load, soak, text, unload
from tests.serve.test_prefix_cache import BLOCK, HAS_CACHE

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def test_an_adapter_comes_changes_and_goes(http, folder, server):
    """A new adapter answers at once, its new version otherwise, and after that nobody."""
    path = folder / "adapters" / "changing"
    shutil.copytree(folder / "adapters" / "vanilla", path)
    try:
        assert ask(http, "changing").status_code == 404
        assert load(http, "changing", path).status_code == 200
        first = text(ask(http, "changing"))
        assert first == text(ask(http, "vanilla"))
        again = load(http, "changing", path)
        assert again.status_code == 400
        assert "already been loaded" in again.json()["error"]["message"]
        models.make_adapter(folder / "model", path, seed=99, r=4)
        assert load(http, "changing", path).status_code == 200
        assert text(ask(http, "changing")) != first
        held = server.metric("bdlora_host_bytes")
        assert unload(http, "changing").status_code == 200
        assert server.metric("bdlora_host_bytes") < held
        told = json.loads(server.get("/status.json")[1])["models"]
        assert "changing" not in {model["name"] for model in told}
        assert 'model="changing"' not in http.get("/metrics").text
        assert ask(http, "changing").status_code == 404
        assert unload(http, "changing").status_code == 404
    finally:
        shutil.rmtree(path)


def test_an_activated_lora_acts_from_its_invocation_on(http, folder, tokenizer):
    """As in PEFT, behind a chat template too; before that it uses the base model's blocks."""
    path = folder / "adapters" / "activated"
    # What the template puts before an answer: a multi-turn chat has it several times.
    invocation = tokenizer.encode("<assistant>", add_special_tokens=False)
    settings = {"seed": 11, "r": 4, "alora_invocation_tokens": invocation}
    models.make_adapter(folder / "model", path, **settings)
    tuned = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "model"), path
    )
    said = "An answer that is there already, and that is long enough for blocks. "
    messages = [{"role": "user", "content": f"First {said}"}, {"role": "user", "content": "Hm?"}]
    messages.insert(1, {"role": "assistant", "content": said})
    try:
        assert load(http, "activated", path).status_code == 200
        card = http.get("/v1/models/activated").json()
        assert card["invocation_tokens"] == invocation
        assert "invocation_tokens" not in http.get("/v1/models/vanilla").json()
        body = {"messages": messages, "max_tokens": 7, "temperature": 0, "n": 2}
        found = {}
        for model in ("model", "activated", "activated"):
            answer = http.post("/v1/chat/completions", json={"model": model, **body})
            assert answer.raise_for_status().headers.get("x-ignored-fields") is None
            choices, usage = answer.json()["choices"], answer.json()["usage"]
            found.setdefault(model, []).append(usage["prompt_tokens_details"]["cached_tokens"])
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        ids = list(getattr(ids, "input_ids", ids))
        given = torch.tensor([ids])
        with torch.no_grad():
            out = tuned.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=7,
                do_sample=False,
                pad_token_id=0,
            )
        wanted = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        assert [choice["message"]["content"] for choice in choices] == [wanted] * 2
        if HAS_CACHE:
            # The base model asked first; the adapter begins at the prompt's end.
            begins = len(ids) - len(invocation)
            whole = (len(ids) - 2) // BLOCK * BLOCK
            assert found["activated"] == [begins // BLOCK * BLOCK, whole]
            assert found["activated"][0] < whole
        # A prompt without them is the base model's, and that is told.
        missing = ask(http, "activated", "Nothing of the sort.")
        assert text(missing) == text(ask(http, "model", "Nothing of the sort."))
        assert missing.headers["x-ignored-fields"] == "model"
        both = ask(http, "activated", ["<assistant>Yes", "Nothing of the sort."])
        assert both.headers["x-ignored-fields"] == "model"
        assert "x-ignored-fields" not in ask(http, "activated", "<assistant>Yes").headers
        # A new version may act elsewhere, or be refused.
        models.make_adapter(folder / "model", path, **{**settings, "alora_invocation_tokens": [5]})
        assert load(http, "activated", path).status_code == 200
        assert http.get("/v1/models/activated").json()["invocation_tokens"] == [5]
        beyond = {**settings, "alora_invocation_tokens": [5, len(tokenizer)]}
        models.make_adapter(folder / "model", path, **beyond)
        refused = load(http, "activated", path)
        assert refused.status_code == 400
        assert f"the model's ids end at {len(tokenizer) - 1}" in refused.text
        assert http.get("/v1/models/activated").json()["invocation_tokens"] == [5]
        assert unload(http, "activated").status_code == 200
    finally:
        shutil.rmtree(path)


def test_a_load_says_that_an_adapters_own_template_is_not_used(http, folder):
    path = folder / "adapters" / "templated"
    shutil.copytree(folder / "adapters" / "vanilla", path)
    try:
        (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
        said = load(http, "templated", path)
        assert said.status_code == 200
        assert "chat template" in said.text
        assert "adapter_tokenizers" in said.text
        assert unload(http, "templated").status_code == 200
    finally:
        shutil.rmtree(path)


def test_what_cannot_be_loaded_is_refused_and_what_was_there_stays(http, folder):
    adapters = folder / "adapters"
    path = adapters / "broken"
    shutil.copytree(adapters / "vanilla", path)
    try:
        assert load(http, "broken", path).status_code == 200
        before = text(ask(http, "broken"))
        weights = path / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        refused = load(http, "broken", path)
        assert refused.status_code == 400
        assert "adapter_model.safetensors" in refused.json()["error"]["message"]
        # The old version is read again from files that have changed: refused, never mixed up.
        answer = ask(http, "broken")
        assert answer.status_code == 200 or "changed" in answer.json()["error"]["message"]
        assert answer.status_code != 200 or text(answer) == before
        assert unload(http, "broken").status_code == 200
    finally:
        shutil.rmtree(path)
    for name, where, status in [
        ("outside", "/etc", 403),
        ("outside", str(adapters / ".." / ".." / "x"), 403),
        ("outside", "\0", 403),
        ("missing", str(adapters / "missing"), 400),
        ("model", str(adapters / "vanilla"), 400),
        ("a b", str(adapters / "vanilla"), 400),
    ]:
        assert load(http, name, where).status_code == status, (name, where)
    assert text(ask(http, "vanilla"))


def test_a_link_does_not_lead_out_of_the_allowed_folders(http, folder, tmp_path):
    shutil.copytree(folder / "adapters" / "vanilla", tmp_path / "real")
    link = folder / "adapters" / "link"
    link.symlink_to(tmp_path / "real")
    try:
        assert load(http, "link", link).status_code == 403
    finally:
        link.unlink()


def test_unloading_waits_for_requests_in_flight(http, folder, server):
    path = folder / "adapters" / "leaving"
    shutil.copytree(folder / "adapters" / "blocks", path)
    try:
        assert load(http, "leaving", path).status_code == 200
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            body = {"model": "leaving", "prompt": "hello", "max_tokens": 200, "temperature": 0}
            body |= {"stream": True, "ignore_eos": True}
            with http.stream("POST", "/v1/completions", json=body) as running:
                lines = running.iter_lines()
                next(lines)
                going = pool.submit(unload, http, "leaving")
                # New requests are refused while the old one goes on.
                while ask(http, "leaving").status_code != 404:
                    pass
                # Tokens later it has still not been answered.
                for _ in range(20):
                    next(lines)
                assert load(http, "leaving", path).status_code == 409
                assert not going.done()
                assert server.metric('bdlora_outstanding_requests{model="leaving"}') == 1
                *_, last = [line for line in lines if line]
            assert last == "data: [DONE]"
            assert going.result(30).status_code == 200
    finally:
        shutil.rmtree(path)


def test_no_request_gets_another_adapters_answer_while_adapters_come_and_go(http, folder):
    """The same with ten thousand requests: ``python -m benchmarks.soak``."""
    counts = soak(http, folder, 400)
    assert counts["wrong"] == 0
    assert counts["right"] >= 320
    assert counts["loads"] >= 3
    assert counts["right"] + counts["gone"] == 400


def test_a_client_that_leaves_frees_its_cache_at_once(http, server):
    body = {"model": "model", "prompt": "hello" * 20, "max_tokens": 150, "ignore_eos": True}
    for streamed in (True, False):
        used = 0.0
        if streamed:
            with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                used = server.metric("bdlora_used_blocks")
        else:
            with pytest.raises(httpx.TimeoutException):
                http.post("/v1/completions", json=body, timeout=0.3)
        assert used > 0 or not streamed
        for _ in range(100):
            if server.metric("bdlora_running") + server.metric("bdlora_queued") == 0:
                break
            threading.Event().wait(0.1)
        assert server.metric("bdlora_used_blocks") == 0


def test_a_full_queue_says_so_and_when_to_come_back(http):
    """Eight run and forty may wait: forty more than forty are refused, until those have gone."""
    body = {"model": "model", "prompt": "hello", "max_tokens": 150, "ignore_eos": True, "n": 40}
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as first:
        assert first.status_code == 200
        # Kept: an iterator that is dropped closes the connection.
        lines = first.iter_lines()
        next(lines)
        refused = http.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert refused.headers["Retry-After"]
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    for _ in range(100):
        if ask(http, "model", n=40).status_code == 200:
            return
    raise AssertionError("the place of requests that have gone was not given to others")


def test_more_at_once_than_there_will_ever_be_room_for_is_no_matter_of_waiting(http):
    refused = ask(http, "model", n=100)
    assert refused.status_code == 400
    assert "48" in refused.json()["error"]["message"]
