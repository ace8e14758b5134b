"""The status page at ``/`` and the numbers that it shows."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse

from bdlora_megatron import __version__
from bdlora_megatron.serve.api.state import APIServer
from bdlora_megatron.serve.settings import ApiKey

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

_PAGE = resources.files("bdlora_megatron.serve.api").joinpath("status.html").read_text()
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The page; it holds no numbers and needs no key."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


@router.get("/status.json")
async def numbers(request: Request) -> JSONResponse:
    """What the page shows, for the models that the key may use."""
    api: APIServer = request.app.state.api
    key = api.authorize(request)
    names, client = api.allowed(key), api.client
    everything = key is None or key.models is None
    engine = asdict(client.snapshot)
    # By model below, for those that the key may use.
    del engine["running_adapters"], engine["waiting_adapters"]
    state = "draining" if api.draining else "ready" if client.is_ready else "loading"
    told = {
        "state": "ended" if client.has_ended else state,
        "version": __version__,
        "up_s": int(time.time()) - api.started,
        "engine": engine,
        "limits": {
            "max_num_seqs": api.settings.max_num_seqs,
            "max_queue": api.settings.max_queue,
        },
        "history": api.history.series(set(names)),
        "models": _models(api, key, names),
        "errors": api.faults.told(None if everything else names),
    }
    # As it is: there may be thousands of models, and checking them would hold up answers.
    return JSONResponse(told)


def _models(api: APIServer, key: ApiKey | None, names: list[str]) -> list[dict[str, Any]]:
    """The models that a key may use, those that come or go, and those that were refused."""
    requests = api.metrics.requests_by_model()
    where = {
        name: {"slot": "in a slot", "host": "in host memory", "loading": "loading"}[place]
        for place, found in asdict(api.client.places).items()
        for name in found
    }
    models = []
    for name in names:
        card = api.adapters.get(name)
        state = "base model" if card is None else where.get(name, "on disk")
        models.append(
            {
                "name": name,
                "version": None if card is None else card.version,
                "state": api.changing.get(name, state),
                "running": requests["running"].get(name, 0),
                "waiting": requests["waiting"].get(name, 0),
                "requests": api.history.requests[name],
                "tokens": api.history.tokens[name],
            }
        )
    coming = {name: what for name, what in api.changing.items() if name not in names}
    refused = api.refused_for(key)
    # One that was refused may come after all.
    for name, state in {**dict.fromkeys(refused, "refused"), **coming}.items():
        if key is None or key.models is None or name in key.models:
            reason = refused.get(name) if state == "refused" else None
            models.append({"name": name, "state": state, "reason": reason})
    return models
