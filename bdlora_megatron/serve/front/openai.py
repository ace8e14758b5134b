"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from bdlora_megatron.serve.front.errors import APIError, BadRequestError, as_api_error
from bdlora_megatron.serve.front.generation import Answer, Job, Prompt, answer, plan, stream
from bdlora_megatron.serve.front.schema import ChatRequest, CompletionRequest, GenerationFields
from bdlora_megatron.serve.front.state import Front
from bdlora_megatron.serve.front.text import Piece, Tokenizer
from bdlora_megatron.serve.messages import Choice

__all__ = ["Form", "plan_body", "router", "until_gone"]

router = APIRouter()
Result = TypeVar("Result")


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Go on with a text."""
    front: Front = request.app.state.front
    adapter = front.resolve(body.model, front.authorize(request))
    return await _respond(request, body, plan_body(front, body, adapter))


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    front: Front = request.app.state.front
    adapter = front.resolve(body.model, front.authorize(request))
    return await _respond(request, body, plan_body(front, body, adapter))


def plan_body(front: Front, body: CompletionRequest | ChatRequest, adapter: str | None) -> Form:
    """Check a body.

    Args:
        front: The front.
        body: Of either kind.
        adapter: What its ``model`` means.

    Returns:
        What to do, and how to write the answer down.

    Raises:
        BadRequestError: Fields contradict each other, or ask for what can't be.
        ConfigError: Likewise.
    """
    if isinstance(body, ChatRequest):
        return _plan_chat(front, body, adapter)
    if body.best_of not in {None, body.n}:
        raise BadRequestError(
            "best_of must be n or left out: answers are not ranked", param="best_of"
        )
    if body.echo and body.logprobs is not None:
        raise BadRequestError("echo does not go with logprobs: those of prompts are not computed")
    prompts = [_prompt(front.tokenizer, prompt) for prompt in body.prompts]
    job = plan(front, body, adapter, prompts, max_tokens=body.max_tokens, logprobs=body.logprobs)
    return _Completion(front, job, echo=body.echo)


def _plan_chat(front: Front, body: ChatRequest, adapter: str | None) -> Form:
    """As ``plan_body``.

    Raises:
        BadRequestError: Fields contradict each other.
    """
    if body.top_logprobs and not body.logprobs:
        raise BadRequestError("top_logprobs wants logprobs=true", param="top_logprobs")
    ids = tuple(front.tokenizer.encode_chat([message.plain() for message in body.messages]))
    job = plan(
        front,
        body,
        adapter,
        [Prompt("", ids)],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return _Chat(front, job)


async def until_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do some work for a client, unless the client goes away.

    Args:
        request: The client's request, its body read.
        work: What to do.

    Returns:
        What it gave.

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


def _prompt(tokenizer: Tokenizer, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(prompt, tuple(tokenizer.encode(prompt)))
    return Prompt(tokenizer.decode(prompt), tuple(prompt))


async def _respond(request: Request, body: GenerationFields, form: Form) -> Response:
    front: Front = request.app.state.front
    if not body.stream:
        answers = await until_gone(request, answer(front, form.job))
        return JSONResponse(form.whole(answers))
    usage = body.stream_options is not None and body.stream_options.include_usage
    pieces = stream(front, form.job)
    # The first piece before the status: a refusal is then told as one.
    first = await until_gone(request, _first(pieces))
    return StreamingResponse(
        _events(form, first, pieces, usage=usage),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _first(pieces: AsyncGenerator[tuple[int, Piece], None]) -> tuple[int, Piece]:
    return await anext(pieces)


async def _events(
    form: Form, first: tuple[int, Piece], pieces: Any, *, usage: bool
) -> AsyncGenerator[str, None]:
    """Server-sent events: a chunk for each piece, and at the end ``[DONE]``."""
    tokens = 0
    try:
        async with aclosing(pieces):
            for index in range(form.job.answers):
                opening = form.opening(index)
                if opening is not None:
                    yield _event(form.chunk([opening], usage=usage))
            item: tuple[int, Piece] | None = first
            while item is not None:
                tokens += len(item[1].choices)
                yield _event(form.chunk([form.piece(*item)], usage=usage))
                item = await anext(pieces, None)
    except Exception as error:
        yield _event(as_api_error(error).body)
        return
    if usage:
        yield _event({**form.chunk([], usage=False), "usage": form.usage(tokens)})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Form:
    """A job, and how one of the two APIs writes its answers down.

    Attributes:
        job: What to do.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, front: Front, job: Job) -> None:
        self.job = job
        self._tokenizer = front.tokenizer
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self.choice(index, made) for index, made in enumerate(answers)]
        total = sum(made.tokens for made in answers)
        return {**self._head(self.kind), "choices": choices, "usage": self.usage(total)}

    def chunk(self, choices: list[dict[str, Any]], *, usage: bool) -> dict[str, Any]:
        """One event of a stream."""
        empty = {"usage": None} if usage else {}
        return {**self._head(self.chunk_kind), "choices": choices, **empty}

    def usage(self, tokens: int) -> dict[str, int]:
        """What the answers cost."""
        prompt = self.job.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.job.model,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of an answer before its first token, if anything."""
        raise NotImplementedError

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of an answer in a stream."""
        raise NotImplementedError

    def choice(self, index: int, made: Answer) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def _spelt(self, token: int) -> str:
        return self._tokenizer.decode([token], special=True)


class _Completion(Form):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, front: Front, job: Job, *, echo: bool) -> None:
        super().__init__(front, job)
        self._echo = echo
        # Where each answer's next token begins in its text.
        self._offsets = [len(self._before(index)) for index in range(job.answers)]

    def opening(self, index: int) -> dict[str, Any] | None:
        text = self._before(index)
        return self._choice(index, text, (), None) if text else None

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, piece.text, piece.choices, piece.finish)

    def choice(self, index: int, made: Answer) -> dict[str, Any]:
        choices = [choice for piece in made.pieces for choice in piece.choices]
        text = self._before(index) + made.text
        return self._choice(index, text, choices, made.pieces[-1].finish)

    def _before(self, index: int) -> str:
        return self.job.prompt_of(index).text if self._echo else ""

    def _choice(
        self, index: int, text: str, choices: Sequence[Choice], finish: str | None
    ) -> dict[str, Any]:
        logprobs = (
            self._logprobs(index, choices) if self.job.sampling.logprobs is not None else None
        )
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, choices: Sequence[Choice]) -> dict[str, Any]:
        tokens = [self._spelt(choice.token) for choice in choices]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [
                {self._spelt(token): value for token, value in choice.top} for choice in choices
            ],
            "text_offset": offsets,
        }


class _Chat(Form):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.choices),
            "finish_reason": piece.finish,
        }

    def choice(self, index: int, made: Answer) -> dict[str, Any]:
        choices = [choice for piece in made.pieces for choice in piece.choices]
        return {
            "index": index,
            "message": {"role": "assistant", "content": made.text},
            "logprobs": self._logprobs(choices),
            "finish_reason": made.pieces[-1].finish,
        }

    def _logprobs(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if self.job.sampling.logprobs is None:
            return None
        return {
            "content": [
                {
                    **self._token(choice.token, choice.logprob),
                    "top_logprobs": [self._token(token, value) for token, value in choice.top],
                }
                for choice in choices
            ]
        }

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._spelt(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
