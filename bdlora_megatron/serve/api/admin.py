"""Models, loading and unloading adapters, health and metrics."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from bdlora_megatron.errors import AdapterFormatError, ConfigError
from bdlora_megatron.serve.api.errors import APIError, BadRequestError
from bdlora_megatron.serve.api.fields import ignored_fields, ignored_header
from bdlora_megatron.serve.api.schema import LoadRequest, UnloadRequest
from bdlora_megatron.serve.api.state import AdapterCard, APIServer
from bdlora_megatron.serve.files import Fingerprint, fingerprint
from bdlora_megatron.serve.settings import check_adapter_name

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The base model and the adapters that the key may use, and those that were refused."""
    api: APIServer = request.app.state.api
    key = api.authorize(request)
    names, refused = api.allowed(key), api.refused_for(key)
    return {
        "object": "list",
        "data": [_card(api, name) for name in names],
        # Not among the models: clients choose from those.
        "refused": [{"id": name, "reason": why} for name, why in refused.items()],
    }


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> dict[str, Any]:
    """One model."""
    api: APIServer = request.app.state.api
    api.resolve(model, api.authorize(request))
    return _card(api, model)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(request: Request, response: Response, body: LoadRequest) -> str:
    """Load an adapter, or a new version of one whose files or folder have changed.

    Raises:
        APIError: Loading is off, or the name is being loaded or unloaded.
        BadRequestError: The adapter can't be loaded; the message tells why.
    """
    api: APIServer = request.app.state.api
    api.authorize_admin(request)
    if not api.settings.adapter_dirs:
        raise APIError(403, "loading is off: the server was started without adapter_dirs")
    path, files = _find(api, body)
    known = api.adapters.get(body.lora_name)
    same = known is not None and known.path == path and known.files == files
    if same and not body.load_inplace:
        raise BadRequestError(
            f"the lora adapter {body.lora_name!r} has already been loaded; its files have not "
            "changed since: send load_inplace=true to load them again",
            param="lora_name",
        )
    version = 1 if known is None else known.version + 1
    card = AdapterCard(body.lora_name, path, version=version, files=files)
    async with _Changing(api, body.lora_name, "loading"):
        try:
            note = await asyncio.to_thread(api.give_text, card)
        except ConfigError as error:
            raise BadRequestError(f"adapter {body.lora_name!r} was not loaded: {error}") from error
        result = await api.client.load(body.lora_name, str(path), api.settings.layout)
        if result.error is not None:
            raise BadRequestError(f"adapter {body.lora_name!r} was not loaded: {result.error}")
        card.invocation_tokens = result.invocation_tokens
        api.adapters[body.lora_name] = card
        api.refused.pop(body.lora_name, None)
    response.headers.update(ignored_header(_ignored(api, body)))
    success = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    return success if note is None else f"{success} {note}."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(request: Request, response: Response, body: UnloadRequest) -> str:
    """Unload an adapter: no new request gets it, and it goes when the last one has ended.

    Raises:
        APIError: There is no such adapter, or it is being loaded or unloaded.
    """
    api: APIServer = request.app.state.api
    api.authorize_admin(request)
    if body.lora_name not in api.adapters:
        raise APIError(
            404, f"the lora adapter {body.lora_name!r} cannot be found", param="lora_name"
        )
    async with _Changing(api, body.lora_name, "unloading"):
        card = api.adapters.pop(body.lora_name)
        error = await api.client.unload(body.lora_name)
        if error is not None:
            api.adapters[body.lora_name] = card
            raise APIError(500, error)
        api.metrics.forget(body.lora_name)
        api.history.forget(body.lora_name)
    response.headers.update(ignored_header(_ignored(api, body)))
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


@router.get("/health", response_class=PlainTextResponse)
async def health(request: Request) -> Response:
    """Whether the server's processes live."""
    api: APIServer = request.app.state.api
    alive = not api.client.has_ended
    return PlainTextResponse("ok" if alive else "the engine has ended", 200 if alive else 503)


@router.get("/ready", response_class=PlainTextResponse)
async def ready(request: Request) -> Response:
    """Whether requests would be answered."""
    api: APIServer = request.app.state.api
    if api.draining:
        return PlainTextResponse("draining", 503)
    if not api.client.is_ready:
        return PlainTextResponse("loading", 503)
    return PlainTextResponse("ready")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text form. Where keys are asked for, the admin's."""
    api: APIServer = request.app.state.api
    if api.settings.api_keys or api.settings.admin_key is not None:
        api.authorize_admin(request)
    return Response(api.metrics.text(), media_type="text/plain; version=0.0.4")


def _ignored(api: APIServer, body: LoadRequest | UnloadRequest) -> list[str]:
    """Fields without effect; whether an adapter fits the base model, its shapes tell."""
    undeclared = dict(body.undeclared())
    if undeclared.get("base_model_name") == api.base_name:
        del undeclared["base_model_name"]
    return ignored_fields(undeclared)


class _Changing:
    """Holds a name while it is loaded or unloaded."""

    def __init__(self, api: APIServer, name: str, what: str) -> None:
        self._api = api
        self._name = name
        self._what = what

    async def __aenter__(self) -> None:
        if self._name in self._api.changing:
            raise APIError(
                409, f"adapter {self._name!r} is being loaded or unloaded; try again later"
            )
        self._api.changing[self._name] = self._what

    async def __aexit__(self, *exception: object) -> None:
        self._api.changing.pop(self._name, None)


def _find(api: APIServer, body: LoadRequest) -> tuple[Path, Fingerprint]:
    """The folder to load, and what its files are like.

    Raises:
        BadRequestError: The name can't be one, or there is no such folder.
        APIError: Status 403; the folder is not below those that are allowed.
    """
    if body.lora_name == api.base_name:
        raise BadRequestError(f"{body.lora_name!r} is the base model's name", param="lora_name")
    try:
        check_adapter_name(body.lora_name)
    except ConfigError as error:
        raise BadRequestError(str(error), param="lora_name") from error
    try:
        path = api.settings.adapter_path(body.lora_path)
    except (ConfigError, ValueError) as error:
        raise APIError(403, str(error), param="lora_path") from error
    try:
        return path, fingerprint(path)
    except (AdapterFormatError, OSError) as error:
        raise BadRequestError(
            f"{body.lora_path!r} is no adapter's folder", param="lora_path"
        ) from error


def _card(api: APIServer, name: str) -> dict[str, Any]:
    base = api.base_name
    card = api.adapters.get(name)
    told: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": api.started if card is None else card.created,
        "owned_by": "bdlora-megatron",
        "root": str(api.settings.model if card is None else card.path),
        "parent": None if card is None else base,
        "max_model_len": api.settings.max_model_len,
    }
    if card is not None and card.invocation_tokens is not None:
        told["invocation_tokens"] = list(card.invocation_tokens)
    return told
