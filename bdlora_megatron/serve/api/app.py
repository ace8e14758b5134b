"""The ASGI app: routes, the names of requests, the limit on bodies, errors."""

from __future__ import annotations

import re
import uuid
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from bdlora_megatron.serve.api import admin, errors, megatron_api, openai, status, tokens
from bdlora_megatron.serve.api.errors import ASKED, APIError, Asked, told
from bdlora_megatron.serve.api.generation import REQUEST_ID
from bdlora_megatron.serve.api.history import Faults
from bdlora_megatron.serve.api.state import APIServer

__all__ = ["make_app"]


def make_app(api: APIServer) -> FastAPI:
    """Build the app."""
    app = FastAPI(title="bdlora-megatron", docs_url=None, redoc_url=None)
    app.state.api = api
    for module in (openai, tokens, admin, megatron_api, status):
        app.include_router(module.router)
    errors.install(app)
    # The last one is the outermost.
    app.add_middleware(_BodyLimit, most=api.settings.max_body_bytes)
    app.add_middleware(_Named, faults=api.faults)
    if api.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=api.settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Ignored-Fields"],
        )
    return app


class _Named:
    """Gives every request a name, its client's or a new one; answers HEAD as GET, without a body.

    What was not foreseen is answered here, so that its answer has the name too.
    """

    _GIVEN = re.compile(rb"[!-~]{1,128}")

    def __init__(self, app: Any, faults: Faults) -> None:
        self._app = app
        self._faults = faults

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given if self._GIVEN.fullmatch(given) else uuid.uuid4().hex.encode()
        REQUEST_ID.set(name.decode())
        ASKED.set(Asked(self._faults, scope["path"]))
        bodiless, started = scope["method"] == "HEAD", False

        async def answer(message: Any) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-request-id", name)]
                message = {**message, "headers": headers}
            elif bodiless:
                message = {**message, "body": b""}
            await send(message)

        scope = {**scope, "method": "GET"} if bodiless else scope
        try:
            await self._app(scope, receive, answer)
        except Exception as error:
            if started:
                raise
            await told(error).response()(scope, receive, answer)


class _BodyLimit:
    """Refuses bodies that are too large, as soon as that is known."""

    def __init__(self, app: Any, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._most:
            await told(self._refusal()).response()(scope, receive, send)
            return
        seen, refused = 0, False

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise self._refusal()
            return message

        async def answer(message: Any) -> None:
            # Whatever the app made of the broken-off body.
            nonlocal refused
            if seen <= self._most:
                await send(message)
            elif not refused:
                refused = True
                await told(self._refusal()).response()(scope, receive, send)

        await self._app(scope, counted, answer)

    def _refusal(self) -> APIError:
        return APIError(413, f"the body is larger than {self._most} bytes; send less at once")
