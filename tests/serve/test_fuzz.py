"""A thousand requests, most of them malformed, made from our own OpenAPI description."""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from tests.serve import models

_statuses: Counter[int] = Counter()


@pytest.fixture(scope="module")
def api(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    schema.config.generation.update(modes=list(schemathesis.GenerationMode))
    return schema


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_every_request_is_answered_or_refused_clearly(case):
    answer = case.call(timeout=60)
    _statuses[answer.status_code] += 1
    # 503 is no answer to anything that a client may send while the server is ready.
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and case.path.startswith(("/v1", "/api")):
        assert answer.json()["error"]["message"]


def test_and_afterwards_the_server_serves_as_before(server):
    assert sum(_statuses.values()) > 500, _statuses
    assert server.get("/ready") == (200, b"ready")
    assert server.metric("bdlora_used_blocks") == 0
    assert server.metric("bdlora_queued") == 0
    status, cards = server.get("/v1/models")
    assert status == 200
    assert all(name.encode() in cards for name in models.ADAPTERS)
