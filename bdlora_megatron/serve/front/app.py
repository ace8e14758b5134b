"""The ASGI app: routes, the limit on bodies, errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from bdlora_megatron.serve.front import admin, errors, megatron_api, openai, status
from bdlora_megatron.serve.front.errors import APIError
from bdlora_megatron.serve.front.state import Front

__all__ = ["make_app"]


def make_app(front: Front) -> FastAPI:
    """Build the app.

    Args:
        front: What its requests share.

    Returns:
        The app.
    """
    app = FastAPI(title="bdlora-megatron", docs_url=None, redoc_url=None)
    app.state.front = front
    for module in (openai, admin, megatron_api, status):
        app.include_router(module.router)
    errors.install(app)
    app.add_middleware(_BodyLimit, most=front.settings.max_body_bytes)
    return app


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
            await self._refusal().response()(scope, receive, send)
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
                await self._refusal().response()(scope, receive, send)

        await self._app(scope, counted, answer)

    def _refusal(self) -> APIError:
        return APIError(413, f"the body is larger than {self._most} bytes; send less at once")
