"""The status page at ``/`` and the numbers that it shows."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from bdlora_megatron.serve.api.state import APIServer

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

_PAGE = resources.files("bdlora_megatron.serve.api").joinpath("status.html").read_text()


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The page; it holds no numbers and needs no key."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": policy + "connect-src 'self'"})


@router.get("/status.json")
async def numbers(request: Request) -> dict[str, Any]:
    """What the page shows, for the models that the key may use."""
    api: APIServer = request.app.state.api
    key = api.authorize(request)
    names = api.allowed(key)
    base, client, metrics = api.base_name, api.client, api.metrics
    snapshot = asdict(client.snapshot)
    resident = set(snapshot.pop("resident"))
    ended: dict[str, float] = {}
    (family,) = metrics.requests.collect()
    for sample in family.samples:
        if sample.name.endswith("_total"):
            ended[sample.labels["model"]] = ended.get(sample.labels["model"], 0) + sample.value
    tokens = _by_model(metrics.generated_tokens, "_total", names)
    state = "draining" if api.draining else "ready" if client.is_ready else "loading"
    return {
        "time_s": time.monotonic(),
        "state": state,
        "engine": {name.replace("_", " "): value for name, value in snapshot.items()},
        "tokens": sum(tokens.values()),
        "first_sum_s": sum(_by_model(metrics.first_token_s, "_sum", names).values()),
        "first_count": sum(_by_model(metrics.first_token_s, "_count", names).values()),
        "models": [
            {
                "name": name,
                "parent": None if name == base else base,
                "resident": name == base or name in resident,
                "outstanding": client.outstanding[None if name == base else name],
                "requests": int(ended.get(name, 0)),
                "tokens": int(tokens.get(name, 0)),
            }
            for name in names
        ],
        "refused": [{"name": name, "reason": r} for name, r in api.refused_for(key).items()],
    }


def _by_model(metric: Any, suffix: str, models: list[str]) -> dict[str, float]:
    """A metric's values of some models."""
    (family,) = metric.collect()
    return {
        sample.labels["model"]: sample.value
        for sample in family.samples
        if sample.name.endswith(suffix) and sample.labels["model"] in models
    }
