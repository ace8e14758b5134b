"""The page at ``/``: served without a key, and what it shows is true."""

from __future__ import annotations

import json
import re

import httpx2 as httpx
import pytest

pytestmark = pytest.mark.engine


def test_the_page_reads_its_numbers_from_the_server(server):
    status, page = server.get("/")
    assert status == 200
    # Every element that the script looks for is there, and every path it asks is a route.
    ids = set(re.findall(r'at\("([\w-]+)"\)', page.decode()))
    assert len(ids) > 8
    assert ids <= set(re.findall(r'\bid="?([\w-]+)', page.decode()))
    body = {"model": "blocks", "prompt": "hello", "max_tokens": 5, "ignore_eos": True}
    before = json.loads(server.get("/status.json")[1])
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    after = json.loads(server.get("/status.json")[1])
    assert after["state"] == "ready"
    assert after["tokens"] - before["tokens"] == 5
    assert after["first_count"] - before["first_count"] == 1
    assert after["first_sum_s"] > before["first_sum_s"]
    (old,), (new,) = ([m for m in s["models"] if m["name"] == "blocks"] for s in (before, after))
    assert new["requests"] - old["requests"] == 1
    assert new["resident"] is True
    assert new["outstanding"] == 0
    assert after["engine"]["num slots"] == 2
