"""From a request to pieces of text, whichever API it came by."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from bdlora_megatron.serve.api.errors import BadRequestError, as_api_error
from bdlora_megatron.serve.api.formats import grammar_of
from bdlora_megatron.serve.api.schema import GenerationFields
from bdlora_megatron.serve.api.state import APIServer
from bdlora_megatron.serve.api.text import TextDelta, TextStream, Tokenizer
from bdlora_megatron.serve.api.tools.calling import Calling
from bdlora_megatron.serve.messages import Grammar, Sampling

__all__ = ["REQUEST_ID", "Answer", "Job", "Prompt", "answer", "plan", "stream"]

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

#: What the request at hand is called, for the log.
REQUEST_ID: ContextVar[str | None] = ContextVar("REQUEST_ID", default=None)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text and as tokens."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """All answers that one HTTP request asks for.

    Attributes:
        adapter: The adapter; None for the base model.
        model: What the request called it.
        prompts: What to answer.
        count: Answers to each; answer ``i`` of prompt ``p`` has index ``p * count + i``.
        sampling: How; each answer gets a seed of its own.
        stop: Texts that end an answer.
        tokenizer: What its prompts were read by; the adapter may go, or change, meanwhile.
        cache_salt: Its prompts share blocks with those of the same salt alone.
        calling: How its answers call tools, if they may.
    """

    adapter: str | None
    model: str
    prompts: tuple[Prompt, ...]
    count: int
    sampling: Sampling
    stop: tuple[str, ...]
    tokenizer: Tokenizer
    cache_salt: str | None = None
    calling: Calling | None = None
    arrived_s: float = field(default_factory=time.monotonic)

    @property
    def answers(self) -> int:
        """How many answers are asked for."""
        return len(self.prompts) * self.count

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of an answer."""
        return self.prompts[index // self.count]


@dataclass(slots=True)
class Answer:
    """A whole answer."""

    deltas: list[TextDelta] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Its text."""
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return sum(len(delta.choices) for delta in self.deltas)

    @property
    def cached(self) -> int:
        """How many tokens of its prompt were in the prefix cache."""
        return sum(delta.cached for delta in self.deltas)


def plan(
    api: APIServer,
    fields: GenerationFields,
    adapter: str | None,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    calling: Calling | None = None,
) -> Job:
    """Check what a request asks for.

    Args:
        api: The API server.
        fields: The request's body.
        adapter: What its ``model`` means.
        prompts: What to answer.
        max_tokens: The longest answer; what has room when None.
        logprobs: Report log-probabilities, and of so many tokens beside the chosen one.
        calling: How the answers call tools; any form that is asked for is in its grammar.

    Raises:
        BadRequestError: It asks for what can't be.
        ConfigError: Likewise.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    capacity = api.settings.max_model_len - longest
    if min(len(prompt.ids) for prompt in prompts) == 0:
        raise BadRequestError("a prompt has no tokens; send at least one", param="prompt")
    if capacity < (max_tokens or 1):
        raise BadRequestError(
            # By these words clients know that a prompt is too long, and may ask a longer model.
            f"this model's maximum context length is {api.settings.max_model_len} tokens, prompt "
            f"and answer together; the prompt is too long for max_tokens={max_tokens or 1}: it has "
            f"{longest} tokens; shorten one",
            code="context_length_exceeded",
            param="max_tokens",
        )
    text = (
        grammar_of(fields.response_format, fields.structured_outputs)
        if calling is None
        else calling.grammar
    )
    if text is not None and fields.ignore_eos:
        raise BadRequestError(
            "ignore_eos contradicts tools and forms of the answer: at their end there is an end "
            "token alone; send one",
            param="ignore_eos",
        )
    stop_ids, tokenizer = frozenset(fields.stop_token_ids or ()), api.tokenizer_of(adapter)
    if not fields.ignore_eos:
        stop_ids |= tokenizer.stop_ids
    top_k = fields.top_k or 0
    sampling = Sampling(
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        top_k=max(top_k, 0),
        min_p=fields.min_p or 0.0,
        seed=random.getrandbits(63) if fields.seed is None else fields.seed,
        logprobs=logprobs,
        max_tokens=capacity if max_tokens is None else max_tokens,
        stop_ids=stop_ids,
        min_tokens=fields.min_tokens,
        logit_bias=tuple((fields.logit_bias or {}).items()),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=(
            1.0 if fields.repetition_penalty is None else fields.repetition_penalty
        ),
        grammar=None if text is None else Grammar(text, tokenizer.vocabulary.key),
    )
    return Job(
        adapter=adapter,
        model=fields.model,
        prompts=tuple(prompts),
        count=fields.n,
        sampling=sampling,
        stop=fields.stop_texts,
        tokenizer=tokenizer,
        cache_salt=fields.cache_salt,
        calling=calling,
    )


async def stream(api: APIServer, job: Job) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """The pieces of all answers of a job, as they come. Leaving early cancels what is left.

    Raises:
        APIError: There is no room.
        TimeoutError: It took too long.
    """
    api.make_room(job.adapter, job.answers)
    inbox: asyncio.Queue[tuple[int, TextDelta] | BaseException] = asyncio.Queue()

    async def one(index: int) -> None:
        try:
            async with aclosing(_pieces(api, job, index)) as deltas:
                async for delta in deltas:
                    inbox.put_nowait((index, delta))
        except Exception as error:
            # Told to whoever reads the queue, who ends the others too.
            inbox.put_nowait(error)

    api.open_answers[job.adapter] += job.answers
    tasks = [asyncio.create_task(one(index)) for index in range(job.answers)]
    status, tokens, first_s = "cancelled", 0, None
    last_s: dict[int, float] = {}
    try:
        left, deadline_s = job.answers, job.arrived_s + api.settings.request_timeout_s
        while left:
            item = await _in_time(inbox.get(), deadline_s)
            if isinstance(item, BaseException):
                raise item
            now_s, came = time.monotonic(), len(item[1].choices)
            _remember(
                api,
                job,
                *item,
                first_s=None if first_s else now_s - job.arrived_s,
                opens=item[0] not in last_s,
            )
            first_s = now_s if first_s is None else first_s
            _time_tokens(api, last_s.get(item[0]), now_s, came)
            last_s[item[0]] = now_s
            tokens += came
            left -= item[1].finish is not None
            yield item
        status = "ok"
    except Exception as error:
        status = f"error {as_api_error(error).status}"
        raise
    finally:
        for task in tasks:
            task.cancel()
        api.open_answers[job.adapter] -= job.answers
        if not api.open_answers[job.adapter]:
            del api.open_answers[job.adapter]
        _record(api, job, status, tokens, first_s)
        # Last: where the client has gone, Starlette cancels whatever is awaited here.
        await asyncio.gather(*tasks, return_exceptions=True)


def _remember(
    api: APIServer, job: Job, index: int, delta: TextDelta, *, first_s: float | None, opens: bool
) -> None:
    """Tell the status page of a piece of an answer; where it opens one, of the prompt too."""
    # A prompt that is scored is computed whole.
    looked_up = opens and not job.sampling.prompt_logprobs
    api.history.add(
        _served_by(api, job),
        tokens=len(delta.choices),
        first_s=first_s,
        prompt=len(job.prompt_of(index).ids) if looked_up else 0,
        cached=delta.cached if looked_up else 0,
    )


def _time_tokens(api: APIServer, last_s: float | None, now_s: float, came: int) -> None:
    """Record the time between an answer's tokens; those that came together share it."""
    if last_s is not None:
        for _ in range(came):
            api.metrics.vllm_between_tokens_s.observe((now_s - last_s) / came)


async def _in_time(work: Coroutine[Any, Any, Result], deadline_s: float) -> Result:
    """Wait until a time on the monotonic clock.

    Raises:
        TimeoutError: It is past.
    """
    try:
        return await asyncio.wait_for(work, max(deadline_s - time.monotonic(), 0.0))
    except asyncio.TimeoutError as error:
        # Python 3.10's is no TimeoutError.
        raise TimeoutError from error


async def answer(api: APIServer, job: Job) -> list[Answer]:
    """All answers of a job, whole."""
    answers = [Answer() for _ in range(job.answers)]
    async with aclosing(stream(api, job)) as deltas:
        async for index, delta in deltas:
            answers[index].deltas.append(delta)
    return answers


async def _pieces(api: APIServer, job: Job, index: int) -> AsyncGenerator[TextDelta, None]:
    prompt = job.prompt_of(index)
    shown = None if job.calling is None else job.calling.shown
    least = job.sampling.min_tokens
    text = TextStream(job.tokenizer, prompt.ids, job.stop, min_tokens=least, shown=shown)
    # The same seed for every prompt of a request, another for each answer to it.
    sampling = replace(job.sampling, seed=job.sampling.seed + index % job.count)
    if sampling.grammar is not None:
        api.client.teach(job.tokenizer.vocabulary)
    given = api.client.stream(prompt.ids, sampling, job.adapter, job.cache_salt)
    async with aclosing(given) as tokens:
        async for token in tokens:
            delta = text.push(token)
            if delta is None:
                continue
            yield delta
            if delta.finish is not None:
                return


def _served_by(api: APIServer, job: Job) -> str:
    """The model's name for what is counted; one that has gone meanwhile has none of its own."""
    known = job.adapter is None or job.adapter in api.adapters
    return (job.adapter or api.base_name) if known else "unloaded"


def _record(api: APIServer, job: Job, status: str, tokens: int, first_s: float | None) -> None:
    now, metrics, model = time.monotonic(), api.metrics, _served_by(api, job)
    api.history.requests[model] += 1
    metrics.requests.labels(model, status).inc()
    metrics.prompt_tokens.labels(model).inc(job.prompt_tokens)
    metrics.generated_tokens.labels(model).inc(tokens)
    if first_s is not None:
        metrics.first_token_s.labels(model).observe(first_s - job.arrived_s)
        metrics.vllm_first_token_s.observe(first_s - job.arrived_s)
        if tokens > job.answers:
            per_answer = (tokens - job.answers) / job.answers
            metrics.per_token_s.labels(model).observe((now - first_s) / per_answer)
    seen = {"prompts": [p.text for p in job.prompts]} if api.settings.log_prompts else {}
    logger.info(
        "request",
        extra={
            "request_id": REQUEST_ID.get(),
            "model": model,
            "status": status,
            "answers": job.answers,
            "prompt_tokens": job.prompt_tokens,
            "generated_tokens": tokens,
            "first_token_s": None if first_s is None else round(first_s - job.arrived_s, 4),
            "total_s": round(now - job.arrived_s, 4),
            **seen,
        },
    )
