"""Hundreds of requests, most of them malformed, made from our own OpenAPI description."""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from tests.serve import models

pytestmark = pytest.mark.engine

_MODES = {schemathesis.GenerationMode.NEGATIVE: 110, schemathesis.GenerationMode.POSITIVE: 12}


@pytest.fixture(scope="module")
def api(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_request_is_answered_or_refused_clearly(api, server):
    """And afterwards the server serves as before."""
    statuses: Counter[int] = Counter()

    def check(case):
        answer = case.call(timeout=60)
        statuses[answer.status_code] += 1
        # 503 is no answer to anything that a client may send while the server is ready.
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    for result in api.get_all_operations():
        operation = result.ok()
        for mode, count in _MODES.items():
            try:
                cases = operation.as_strategy(generation_mode=mode)
                run = settings(
                    max_examples=count,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                )(given(case=cases)(check))
                run()
            except Unsatisfiable:
                # Nothing can be wrong with a request that takes nothing.
                assert mode is schemathesis.GenerationMode.NEGATIVE
                assert operation.method == "get"
    assert sum(count for status, count in statuses.items() if status >= 400) >= 600, statuses
    assert statuses[400] >= 500, statuses
    assert server.get("/ready") == (200, b"ready")
    assert server.metric("bdlora_used_blocks") == server.metric("bdlora_queued") == 0
    status, cards = server.get("/v1/models")
    assert status == 200
    assert all(name.encode() in cards for name in models.ADAPTERS)
