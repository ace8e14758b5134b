"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from bdlora_megatron.invocation import active_from
from bdlora_megatron.serve.api.errors import APIError, BadRequestError, told
from bdlora_megatron.serve.api.fields import advice, ignored_fields, ignored_header, refused_field
from bdlora_megatron.serve.api.formats import grammar_of
from bdlora_megatron.serve.api.generation import Prompt, answer, plan, stream
from bdlora_megatron.serve.api.responses import ChatResponse, CompletionResponse, ResponseBody
from bdlora_megatron.serve.api.schema import (
    ChatRequest,
    CompletionRequest,
    Conversation,
    GenerationFields,
    StreamOptions,
)
from bdlora_megatron.serve.api.state import APIServer
from bdlora_megatron.serve.api.text import TextDelta, Tokenizer
from bdlora_megatron.serve.api.tools.calling import Calling, calling, check_parameters
from bdlora_megatron.serve.api.tools.request import chosen
from bdlora_megatron.serve.lines import json_line

__all__ = ["chat_ids", "plan_body", "router", "until_gone"]

router = APIRouter()
Result = TypeVar("Result")


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Go on with a text."""
    api: APIServer = request.app.state.api
    adapter = api.resolve(body.model, api.authorize(request))
    return await _respond(request, body, await _planned(api, body, adapter))


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    api: APIServer = request.app.state.api
    adapter = api.resolve(body.model, api.authorize(request))
    return await _respond(request, body, await _planned(api, body, adapter))


async def _planned(
    api: APIServer, body: CompletionRequest | ChatRequest, adapter: str | None
) -> ResponseBody:
    """As ``plan_body``; a large grammar, which takes a second to check, holds nobody up."""
    asked = body.response_format, body.structured_outputs
    if any(asked):
        # What was found is remembered.
        await asyncio.to_thread(grammar_of, *asked)
    if isinstance(body, ChatRequest):
        choice = chosen(body.tools, body.tool_choice)
        if choice is not None:
            await asyncio.to_thread(check_parameters, choice)
    return plan_body(api, body, adapter)


def plan_body(
    api: APIServer, body: CompletionRequest | ChatRequest, adapter: str | None
) -> ResponseBody:
    """Check a body.

    Args:
        api: The API server.
        body: Of either kind.
        adapter: What its ``model`` means.

    Returns:
        What to do, and how to write the answer down.

    Raises:
        BadRequestError: Fields contradict each other, or ask for what can't be.
        ConfigError: Likewise.
    """
    undeclared = dict(body.undeclared())
    refused = refused_field(undeclared)
    if refused is not None:
        raise BadRequestError(
            f"{refused} would change the answer and is not supported; {advice(refused)}",
            param=refused,
        )
    reply = (
        _plan_chat(api, body, adapter)
        if isinstance(body, ChatRequest)
        else _plan_text(api, body, adapter)
    )
    reply.ignored = (*ignored_fields(undeclared), *reply.ignored)
    if not _invokes(api, adapter, reply):
        # The base model alone answers.
        reply.ignored = (*reply.ignored, "model")
    return reply


def _invokes(api: APIServer, adapter: str | None, reply: ResponseBody) -> bool:
    """Whether every prompt has the tokens from which an Activated LoRA acts."""
    card = api.adapters.get(adapter or "")
    tokens = None if card is None else card.invocation_tokens
    return tokens is None or all(
        active_from(prompt.ids, tokens) is not None for prompt in reply.job.prompts
    )


def _plan_text(api: APIServer, body: CompletionRequest, adapter: str | None) -> ResponseBody:
    """As ``plan_body``.

    Raises:
        BadRequestError: Fields contradict each other.
    """
    if body.best_of not in {None, body.n}:
        raise BadRequestError(
            "best_of must be n or left out: answers are not ranked", param="best_of"
        )
    silent = body.max_tokens == 0
    if silent and not body.echo:
        raise BadRequestError(
            "max_tokens=0 wants echo=true, or nothing is left", param="max_tokens"
        )
    tokenizer = api.tokenizer_of(adapter)
    prompts = [_prompt(tokenizer, prompt, body.add_special_tokens) for prompt in body.prompts]
    # The engine gives one token at least; a form that says nothing leaves it out.
    most = 1 if silent else body.max_tokens
    job = plan(api, body, adapter, prompts, max_tokens=most, logprobs=body.logprobs)
    if body.echo and body.logprobs is not None:
        job = replace(job, sampling=replace(job.sampling, prompt_logprobs=True))
    return CompletionResponse(job, echo=body.echo, silent=silent)


def _plan_chat(api: APIServer, body: ChatRequest, adapter: str | None) -> ResponseBody:
    """As ``plan_body``.

    Raises:
        BadRequestError: Fields contradict each other.
    """
    if body.top_logprobs and not body.logprobs:
        raise BadRequestError("top_logprobs wants logprobs=true", param="top_logprobs")
    called = _calling(api, body, adapter)
    ids, unread = chat_ids(api, body, adapter)
    job = plan(
        api,
        body,
        adapter,
        [Prompt("", ids)],
        max_tokens=body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        calling=called,
    )
    reply = ChatResponse(job)
    reply.ignored = unread if called is None else (*unread, *called.loose)
    return reply


def _calling(api: APIServer, body: ChatRequest, adapter: str | None) -> Calling | None:
    """How answers call tools, if the request has any."""
    choice = chosen(body.tools, body.tool_choice)
    if choice is None:
        return None
    tokenizer = api.tokenizer_of(adapter)
    form = grammar_of(body.response_format, body.structured_outputs)
    return calling(
        choice, api.written_by(tokenizer), tokenizer, parallel=body.parallel_tool_calls, form=form
    )


def chat_ids(
    api: APIServer, body: Conversation, adapter: str | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """A conversation's tokens.

    Returns:
        The tokens, and the fields of messages that the template does not look at.

    Raises:
        BadRequestError: Fields contradict each other.
    """
    # Where the last message goes on, nothing stands before the answer, as in vLLM's API.
    prompts = body.add_generation_prompt
    if body.continue_final_message and prompts and "add_generation_prompt" in body.model_fields_set:
        raise BadRequestError(
            "add_generation_prompt and continue_final_message exclude each other; send one",
            param="continue_final_message",
        )
    tokenizer = api.tokenizer_of(adapter)
    ids = tuple(
        tokenizer.encode_chat(
            body.plain(),
            tools=[tool.plain() for tool in body.told_tools],
            special=body.add_special_tokens,
            continues=body.continue_final_message,
            prompts=prompts and not body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
    )
    unread = [
        *(f"messages.{name}" for message in body.messages for name in message.plain()),
        *(f"chat_template_kwargs.{name}" for name in body.chat_template_kwargs),
    ]
    told = tokenizer.tools_template if body.told_tools else tokenizer.template
    named = [n for n in dict.fromkeys(unread) if n.partition(".")[2] not in told]
    return ids, tuple(["tools", *named] if body.told_tools and "tools" not in told else named)


async def until_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do some work for a client, unless the client goes away.

    Raises:
        APIError: The client has gone, and the work was cancelled.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise APIError(499, "the client has gone")
        return await task
    finally:
        for each in (task, gone):
            each.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _prompt(tokenizer: Tokenizer, prompt: str | list[int], special: bool) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(prompt, tuple(tokenizer.encode(prompt, special=special)))
    return Prompt(tokenizer.decode(prompt), tuple(prompt))


async def _respond(request: Request, body: GenerationFields, reply: ResponseBody) -> Response:
    api: APIServer = request.app.state.api
    headers = ignored_header(reply.ignored)
    if not body.stream:
        answers = await until_gone(request, answer(api, reply.job))
        return JSONResponse(reply.whole(answers), headers=headers)
    deltas = stream(api, reply.job)
    # The first piece before the status: a refusal is then told as one.
    first = await until_gone(request, _first(deltas))
    events = _events(reply, first, deltas, body.stream_options or StreamOptions())
    return _EventStream(events, deltas, headers)


class _EventStream(StreamingResponse):
    """Server-sent events whose source ends with them, also where they were never begun.

    A client that goes away while its connection is full leaves Starlette between two events, and
    what makes them would then go on until the garbage is collected.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        source: AsyncGenerator[Any, None],
        headers: dict[str, str],
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._source = source

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self._source), aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _first(deltas: AsyncGenerator[tuple[int, TextDelta], None]) -> tuple[int, TextDelta]:
    return await anext(deltas)


async def _events(
    reply: ResponseBody, first: tuple[int, TextDelta], deltas: Any, options: StreamOptions
) -> AsyncGenerator[str, None]:
    """Server-sent events: a chunk for each piece, and at the end ``[DONE]``."""
    tokens = 0

    def chunk(choice: dict[str, Any]) -> str:
        if not options.include_usage:
            return _event(reply.chunk([choice]))
        so_far = reply.usage(tokens) if options.continuous_usage_stats else None
        return _event(reply.chunk([choice], usage=so_far))

    try:
        async with aclosing(deltas):
            for index in range(reply.job.answers):
                opening = reply.opening(index)
                if opening is not None:
                    yield chunk(opening)
            item: tuple[int, TextDelta] | None = first
            while item is not None:
                tokens += len(item[1].choices)
                reply.found(item[0], item[1].cached)
                said = reply.delta(*item)
                if said is not None:
                    yield chunk(said)
                item = await anext(deltas, None)
    except Exception as error:
        yield _event(told(error).body)
        return
    if options.include_usage:
        yield _event(reply.chunk([], usage=reply.usage(tokens)))
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json_line(data)}\n\n"
