"""``/tokenize``, ``/detokenize``, ``/tokenizer_info`` and ``/version``, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from bdlora_megatron import __version__
from bdlora_megatron.serve.front.fields import ignored_fields, ignored_header
from bdlora_megatron.serve.front.openai import chat_ids
from bdlora_megatron.serve.front.schema import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from bdlora_megatron.serve.front.state import Front

__all__ = ["router"]

router = APIRouter()


@router.post("/tokenize")
async def tokenize(
    request: Request, response: Response, body: TokenizeTextRequest | TokenizeChatRequest
) -> dict[str, Any]:
    """The tokens of a text or of a conversation, as a request with it would be read."""
    front: Front = request.app.state.front
    adapter = front.resolve(body.model or front.base_name, front.authorize(request))
    tokenizer = front.tokenizer_of(adapter)
    unread: tuple[str, ...] = ()
    if isinstance(body, TokenizeTextRequest):
        ids = tuple(tokenizer.encode(body.prompt, special=body.add_special_tokens))
    else:
        ids, unread = chat_ids(front, body, adapter)
    response.headers.update(ignored_header([*ignored_fields(dict(body.undeclared())), *unread]))
    spelt = [tokenizer.spell(token) for token in ids]
    return {
        "count": len(ids),
        "max_model_len": front.settings.max_model_len,
        "tokens": ids,
        "token_strs": spelt if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(
    request: Request, response: Response, body: DetokenizeRequest
) -> dict[str, Any]:
    """The text of some tokens, special ones spelt out."""
    front: Front = request.app.state.front
    adapter = front.resolve(body.model or front.base_name, front.authorize(request))
    response.headers.update(ignored_header(ignored_fields(dict(body.undeclared()))))
    return {"prompt": front.tokenizer_of(adapter).decode(body.tokens, special=True)}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """What a client without the model's files has to know of its tokenizer."""
    front: Front = request.app.state.front
    adapter = front.resolve(model or front.base_name, front.authorize(request))
    return front.tokenizer_of(adapter).facts()


@router.get("/version")
async def version() -> dict[str, str]:
    """This package's version."""
    return {"version": __version__}
