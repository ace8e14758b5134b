"""``/tokenize``, ``/detokenize``, ``/tokenizer_info`` and ``/version``, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from bdlora_megatron import __version__
from bdlora_megatron.serve.api.fields import ignored_fields, ignored_header
from bdlora_megatron.serve.api.openai import chat_ids
from bdlora_megatron.serve.api.schema import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from bdlora_megatron.serve.api.state import APIServer

__all__ = ["router"]

router = APIRouter()


@router.post("/tokenize")
async def tokenize(
    request: Request, response: Response, body: TokenizeTextRequest | TokenizeChatRequest
) -> dict[str, Any]:
    """The tokens of a text or of a conversation, as a request with it would be read."""
    api: APIServer = request.app.state.api
    adapter = api.resolve(body.model or api.base_name, api.authorize(request))
    tokenizer = api.tokenizer_of(adapter)
    unread: tuple[str, ...] = ()
    if isinstance(body, TokenizeTextRequest):
        ids = tuple(tokenizer.encode(body.prompt, special=body.add_special_tokens))
    else:
        ids, unread = chat_ids(api, body, adapter)
    response.headers.update(ignored_header([*ignored_fields(dict(body.undeclared())), *unread]))
    spelt = [tokenizer.spell(token) for token in ids]
    return {
        "count": len(ids),
        "max_model_len": api.settings.max_model_len,
        "tokens": ids,
        "token_strs": spelt if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(
    request: Request, response: Response, body: DetokenizeRequest
) -> dict[str, Any]:
    """The text of some tokens, special ones spelt out."""
    api: APIServer = request.app.state.api
    adapter = api.resolve(body.model or api.base_name, api.authorize(request))
    response.headers.update(ignored_header(ignored_fields(dict(body.undeclared()))))
    return {"prompt": api.tokenizer_of(adapter).decode(body.tokens, special=True)}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """What a client without the model's files has to know of its tokenizer."""
    api: APIServer = request.app.state.api
    adapter = api.resolve(model or api.base_name, api.authorize(request))
    return api.tokenizer_of(adapter).facts()


@router.get("/version")
async def version() -> dict[str, str]:
    """This package's version."""
    return {"version": __version__}
