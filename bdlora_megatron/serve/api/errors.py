"""Errors in the shape in which OpenAI's API tells them."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from bdlora_megatron.errors import BDLoRAError
from bdlora_megatron.serve.api.client import EngineGoneError, RequestFailedError
from bdlora_megatron.serve.api.history import Faults

__all__ = ["ASKED", "APIError", "Asked", "BadRequestError", "as_api_error", "install", "told"]

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


#: Of a client that did not wait for its answer.
_GONE = 499
#: Whose bodies hold no prompts, so that what they are told may be shown to others.
_OPEN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


@dataclass(slots=True)
class Asked:
    """The request at hand, as far as its faults are noted.

    Attributes:
        faults: Where.
        path: What it asks.
        model: Whom, once that is known.
    """

    faults: Faults
    path: str
    model: str | None = None


ASKED: ContextVar[Asked | None] = ContextVar("ASKED", default=None)


class APIError(Exception):
    """An answer other than 200.

    Attributes:
        status: HTTP's.
        body: What the client gets.
        headers: With it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message, param = _sendable(message), None if param is None else _sendable(param)
        super().__init__(message)
        self.status = status
        self.headers = headers
        kind = _TYPES.get(status, "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, headers=self.headers)


class BadRequestError(APIError):
    """An answer of status 400: the client must send something else."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(400, message, param=param, code=code)


def _sendable(text: str) -> str:
    """A text that may repeat what a client sent, with halves of surrogate pairs spelt out."""
    return text.encode(errors="backslashreplace").decode()


def as_api_error(error: Exception) -> APIError:
    """What a client is told of an error.

    Args:
        error: Anything that was raised while a request was answered.

    Returns:
        The answer; of what was not foreseen it tells nothing.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, (RequestValidationError, ValidationError)):
        return _invalid(list(error.errors()))
    if isinstance(error, EngineGoneError):
        return APIError(503, str(error), headers={"Retry-After": "5"})
    if isinstance(error, RequestFailedError):
        if error.kind == "AdapterNotFoundError":
            return APIError(404, str(error), code="model_not_found", param="model")
        if error.kind in {"CapacityError", "ConfigError"}:
            return BadRequestError(str(error))
        return APIError(500, str(error))
    if isinstance(error, TimeoutError):
        return APIError(504, "the request took too long and was cancelled")
    if isinstance(error, BDLoRAError):
        return BadRequestError(str(error))
    logger.error("unforeseen error", exc_info=error)
    return APIError(500, "internal error; the server's log tells more")


def told(error: Exception) -> APIError:
    """As ``as_api_error``, for an answer that is sent: the status page will show it.

    What is wrong with a body may repeat some of it, so the page names the field alone.
    """
    answer, asked = as_api_error(error), ASKED.get()
    if asked is None or answer.status == _GONE:
        return answer
    fault = answer.body["error"]
    message, field = str(answer), (fault["param"] or "").partition(".")[0]
    if answer.status == 400 and asked.path not in _OPEN:
        place = f" in {field}" if field else ""
        message = f"{fault['code'] or fault['type']}{place}: {asked.path}"
    kind = f"{asked.path} {fault['code']} {field}"
    asked.faults.add(answer.status, message, kind=kind, model=asked.model)
    return answer


def install(app: FastAPI) -> None:
    """Let an app tell all its errors in this shape."""

    async def any_error(request: Request, error: Exception) -> JSONResponse:
        del request
        return told(error).response()

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        what = f"{error.detail}: {request.method} {request.url.path}"
        headers = None if error.headers is None else dict(error.headers)
        return told(APIError(error.status_code, what, headers=headers)).response()

    app.add_exception_handler(APIError, any_error)
    app.add_exception_handler(BDLoRAError, any_error)
    app.add_exception_handler(TimeoutError, any_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, any_error)


def _invalid(problems: list[Any]) -> APIError:
    """All that is wrong with a body; its first place is the ``param``."""
    texts, params = [], []
    for problem in problems[:8]:
        place = ".".join(str(part) for part in problem["loc"] if part != "body")
        params.append(place)
        text = str(problem["msg"])
        if problem["type"] == "extra_forbidden":
            text = "unknown or unsupported parameter; leave it out"
        texts.append(f"{place}: {text}" if place else text)
    return BadRequestError("; ".join(texts), param=params[0] or None)
