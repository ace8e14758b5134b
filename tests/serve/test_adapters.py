"""Loading and unloading adapters while requests run, and what may not be loaded."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import threading

import httpx2 as httpx
import pytest

from tests.serve import models
from tests.serve.soak import ask, load, soak, text, unload

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
