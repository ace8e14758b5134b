"""What the page at ``/`` shows is true of a server with ranks."""

from __future__ import annotations

import json
import time

import httpx2 as httpx
import pytest

pytestmark = pytest.mark.engine


def status(server):
    return json.loads(server.get("/status.json")[1])


def until(server, holds):
    """The first status of which that holds; where adapters are is looked at twice a second."""
    for _ in range(150):
        told = status(server)
        if holds(told):
            return told
        time.sleep(0.1)
    raise AssertionError(told)


def model(told, name):
    (found,) = (m for m in told["models"] if m["name"] == name)
    return found


def served(told):
    return round(sum(rate or 0 for rate in told["history"]["tokens_s"]) * 5)


def complete(server, name, prompt="hello", **more):
    body = {"model": name, "prompt": prompt, "max_tokens": 5, "ignore_eos": True, **more}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()["usage"]


def test_what_was_served_is_counted_where_it_was_served(server):
    """Three requests, the last of which finds its prompt in the cache."""
    assert server.get("/")[0] == 200
    before = until(server, lambda told: told["history"]["tokens_s"][-1] == 0)
    other = complete(server, "vanilla")["prompt_tokens"]
    prompt = "a prompt of several blocks that nobody has sent before"
    usages = [complete(server, "blocks", prompt) for _ in range(2)]
    after = until(server, lambda told: served(told) == served(before) + 15)
    assert after["state"] == "ready"
    assert after["engine"]["num_slots"] == 2
    new, old = model(after, "blocks"), model(before, "blocks")
    assert new["requests"] - old["requests"] == 2
    assert new["tokens"] - old["tokens"] == 10
    assert (new["state"], new["running"], new["waiting"]) == ("in a slot", 0, 0)
    assert 0 < [value for value in after["history"]["first_s"] if value is not None][-1] < 60
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] == 0 < cached[1]
    length = usages[0]["prompt_tokens"]
    share = [value for value in after["history"]["cached"] if value is not None][-1]
    # The last piece of time has one of the requests, two or all.
    assert share in {cached[1] / (n * length + more) for n, more in ((1, 0), (2, 0), (2, other))}


def test_adapters_that_change_places_are_seen_where_they_are(server):
    """Three adapters and two slots; the metrics say the same."""
    names = ("vanilla", "blocks", "attention")
    for name in names:
        complete(server, name)
    told = until(
        server,
        lambda told: [model(told, name)["state"] for name in names[1:]] == ["in a slot"] * 2,
    )
    assert model(told, "vanilla")["state"] in {"in host memory", "on disk"}
    assert server.metric('bdlora_adapters{place="slot"}') == 2


def test_what_clients_are_told_is_among_the_recent_errors(server):
    body = {"model": "nobody", "prompt": "hello"}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 404
    newest = status(server)["errors"][0]
    assert (newest["status"], newest["model"]) == (404, "nobody")
    assert "does not exist" in newest["message"]
    assert abs(newest["at_s"] - time.time()) < 60
