"""How OpenAI's two APIs write an answer down, whole or in pieces."""

from __future__ import annotations

import secrets
import string
import time
import uuid
from collections.abc import Sequence
from typing import Any

from bdlora_megatron.serve.api.generation import Answer, Job
from bdlora_megatron.serve.api.text import TextDelta
from bdlora_megatron.serve.messages import Choice

# Mistral's chat templates want ids of nine letters and digits, and no others mind.
_ID_LETTERS, _ID_LENGTH = string.ascii_letters + string.digits, 9

__all__ = ["ChatResponse", "CompletionResponse", "ResponseBody"]


class ResponseBody:
    """A job, and how one of the two APIs writes its answers down.

    Attributes:
        job: What to do.
        ignored: Fields of the request that have no effect.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ignored: tuple[str, ...] = ()
        self._cached = 0
        self._tokenizer = job.tokenizer
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self.choice(index, made) for index, made in enumerate(answers)]
        total = sum(made.tokens for made in answers)
        for index, made in enumerate(answers):
            self.found(index, made.cached)
        return {**self._head(self.kind), "choices": choices, "usage": self.usage(total)}

    def chunk(self, choices: list[dict[str, Any]], **usage: Any) -> dict[str, Any]:
        """One event of a stream; with ``usage``, where that was asked for."""
        return {**self._head(self.chunk_kind), "choices": choices, **usage}

    def found(self, index: int, cached: int) -> None:
        """Note how many tokens of an answer's prompt were in the cache when it began.

        A prompt counts once, as its first answer found it.
        """
        if index % self.job.count == 0:
            self._cached += cached

    def usage(self, tokens: int) -> dict[str, Any]:
        """What the answers cost."""
        prompt = self.job.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached},
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

    def delta(self, index: int, delta: TextDelta) -> dict[str, Any] | None:
        """A piece of an answer in a stream; None if it says nothing yet."""
        raise NotImplementedError

    def choice(self, index: int, made: Answer) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError


class CompletionResponse(ResponseBody):
    """``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, job: Job, *, echo: bool, silent: bool) -> None:
        """Say how.

        Args:
            job: What to do.
            echo: Put the prompt before each answer, with its log-probabilities if the job has them.
            silent: Leave the answers themselves out.
        """
        super().__init__(job)
        self._echo = echo
        self._silent = silent
        self._scored = job.sampling.prompt_logprobs
        self._begun: set[int] = set()
        # Where each answer's next token begins in its text.
        self._offsets = [0 if self._scored else len(self._before(i)) for i in range(job.answers)]

    def usage(self, tokens: int) -> dict[str, Any]:
        """What the answers cost."""
        return super().usage(0 if self._silent else tokens)

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of an answer before its first token, if anything."""
        # The log-probabilities of a prompt come with the first token, and the prompt with them.
        text = "" if self._scored else self._before(index)
        return self._choice(index, text, (), None) if text else None

    def delta(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """A piece of an answer in a stream."""
        text, choices = self._said(delta)
        if self._scored and index not in self._begun:
            self._begun.add(index)
            text = self._before(index) + text
            choices = (*self._prompt(index, delta), *choices)
        return self._choice(index, text, choices, self._finish(delta))

    def choice(self, index: int, made: Answer) -> dict[str, Any]:
        """A whole answer."""
        said = [self._said(delta) for delta in made.deltas]
        text = self._before(index) + "".join(text for text, _ in said)
        choices = [choice for _, some in said for choice in some]
        if self._scored:
            choices = [*self._prompt(index, made.deltas[0]), *choices]
        return self._choice(index, text, choices, self._finish(made.deltas[-1]))

    def _said(self, delta: TextDelta) -> tuple[str, tuple[Choice, ...]]:
        return ("", ()) if self._silent else (delta.text, delta.choices)

    def _finish(self, delta: TextDelta) -> str | None:
        # Whatever ended the token that is left out, the answer was as long as it could be.
        return "length" if self._silent and delta.finish else delta.finish

    def _before(self, index: int) -> str:
        return self.job.prompt_of(index).text if self._echo else ""

    def _prompt(self, index: int, first: TextDelta) -> list[Choice]:
        """The prompt's tokens. Nothing says how probable the first one is."""
        return [Choice(self.job.prompt_of(index).ids[0]), *first.prompt]

    def _choice(
        self, index: int, text: str, choices: Sequence[Choice], finish: str | None
    ) -> dict[str, Any]:
        logprobs = (
            self._logprobs(index, choices) if self.job.sampling.logprobs is not None else None
        )
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, choices: Sequence[Choice]) -> dict[str, Any]:
        tokens = [self._tokenizer.spell(choice.token) for choice in choices]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [
                None if choice.logprob is None else self._top(choice) for choice in choices
            ],
            "text_offset": offsets,
        }

    def _top(self, choice: Choice) -> dict[str, float]:
        """By text. Of tokens that are spelt alike, the most probable one, which comes first."""
        found: dict[str, float] = {}
        for token, value in choice.top:
            found.setdefault(self._tokenizer.spell(token), value)
        return found


class ChatResponse(ResponseBody):
    """``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        calling = job.calling
        self._readers = [calling.reader() for _ in range(job.answers)] if calling else []

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of an answer before its first token, if anything."""
        # Where tools may be called, there may be no content.
        delta = {"role": "assistant", "content": None if self._readers else ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, delta: TextDelta) -> dict[str, Any] | None:
        """A piece of an answer in a stream; None if it says nothing yet."""
        content, calls = self._said(index, delta.text, last=delta.finish is not None)
        said: dict[str, Any] = {"content": content} if content else {}
        if calls:
            said["tool_calls"] = [{"index": number, **call} for number, call in calls.items()]
        logprobs = self._logprobs(delta.choices)
        if not (said or logprobs or delta.finish):
            return None
        finish = self._finish(index, delta)
        return {"index": index, "delta": said, "logprobs": logprobs, "finish_reason": finish}

    def choice(self, index: int, made: Answer) -> dict[str, Any]:
        """A whole answer."""
        choices = [choice for delta in made.deltas for choice in delta.choices]
        content, calls = self._said(index, made.text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self._readers:
            message["content"] = content or None
        if calls:
            message["tool_calls"] = list(calls.values())
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choices),
            "finish_reason": self._finish(index, made.deltas[-1]),
        }

    def _said(self, index: int, text: str, *, last: bool) -> tuple[str, dict[int, dict[str, Any]]]:
        """Content, and pieces of calls by their numbers."""
        if not self._readers:
            return text, {}
        said = self._readers[index].push(text, last=last)
        calls = {}
        for number, piece in said.calls.items():
            function = {"arguments": piece.arguments}
            call: dict[str, Any] = {"function": function}
            if piece.name is not None:
                function["name"] = piece.name
                call |= {"id": _call_id(), "type": "function"}
            calls[number] = call
        return said.content, calls

    def _finish(self, index: int, delta: TextDelta) -> str | None:
        """OpenAI's reasons: whole calls are one, but not where the request named the function."""
        calling = self.job.calling
        if calling is None or calling.named or delta.finish != "stop":
            return delta.finish
        reader = self._readers[index]
        return "tool_calls" if reader.count and not reader.inside else "stop"

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
        spelt = self._tokenizer
        return {
            "token": spelt.spell(token),
            "logprob": logprob,
            # Clients put the characters together that are torn between tokens.
            "bytes": list(spelt.spell_bytes(token)),
        }


def _call_id() -> str:
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
