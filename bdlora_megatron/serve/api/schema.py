"""Bodies of requests, as OpenAI's API names their fields, and what each may be."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from bdlora_megatron.serve.api.body import Body
from bdlora_megatron.serve.api.formats import ResponseFormat, StructuredOutputs
from bdlora_megatron.serve.api.tools.request import Tool, ToolChoice, Tools

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "Conversation",
    "DetokenizeRequest",
    "GenerationFields",
    "LoadRequest",
    "MegatronRequest",
    "StreamOptions",
    "TokenizeChatRequest",
    "TokenizeTextRequest",
    "UnloadRequest",
]

# Bounds that keep one request from being many; the engine has its own on lengths.
_MOST_CHOICES = 128
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class StreamOptions(Body):
    """What a stream ends with."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationFields(Body):
    """What both kinds of request have.

    ``top_k``, ``min_p``, ``repetition_penalty``, ``min_tokens``, ``ignore_eos``,
    ``stop_token_ids``, ``cache_salt`` and ``structured_outputs`` are vLLM's.
    """

    model: Annotated[str, Field(min_length=1, max_length=256)]
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[_TokenId, _Bias], Field(max_length=1024)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _empty_stops_nothing(cls, stop: Any) -> Any:
        return None if stop == "" else stop

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts, however many were sent."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class _WithLength(GenerationFields):
    """A request whose length has two names; guidellm sends both, to either endpoint."""

    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> _WithLength:
        length = self.max_completion_tokens
        if length is not None:
            given = self.max_tokens if "max_tokens" in self.model_fields_set else None
            if given not in {None, length}:
                raise ValueError("max_tokens and max_completion_tokens differ; send one")
            self.max_tokens = length
        return self


class CompletionRequest(_WithLength):
    """The body of ``/v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MOST_CHOICES)]
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[_TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=_MOST_CHOICES),
        ]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    add_special_tokens: bool = True
    best_of: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, however many were sent."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """What a tool call calls."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arguments", mode="before")
    @classmethod
    def _read(cls, arguments: Any) -> Any:
        # By OpenAI's API they come as JSON; templates want them as values.
        if not isinstance(arguments, str):
            return arguments
        try:
            value = json.loads(arguments or "{}")
        except RecursionError as error:
            raise ValueError("too deep to be read; flatten it") from error
        return {} if value is None else value


class ToolCall(Body):
    """A call of a tool in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """As chat templates take it, its arguments as values."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    function_call: None = None
    audio: None = None

    @model_validator(mode="after")
    def _only_answers_may_be_silent(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} has no content; send a text")
        return self

    def plain(self) -> dict[str, Any]:
        """Role, text and what else was sent, as chat templates take them."""
        text = self.content or ""
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        told = ("name", "tool_call_id", "reasoning_content", "reasoning")
        more = {name: getattr(self, name) for name in told}
        more["tool_calls"] = [call.plain() for call in self.tool_calls or ()]
        return {"role": self.role, "content": text, **{k: v for k, v in more.items() if v}}


class Conversation(Body):
    """Messages, and how the chat template writes them down."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    tools: Tools = Field(default_factory=list)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def told_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return self.tools

    def plain(self) -> list[dict[str, Any]]:
        """The messages, as chat templates take them; results with the names of what was called."""
        called = {
            call.id: call.function.name
            for message in self.messages
            for call in message.tool_calls or ()
        }
        messages = [message.plain() for message in self.messages]
        for message in messages:
            # Hermes's templates refuse a result without, and OpenAI's clients send none.
            if message["role"] == "tool" and message.get("tool_call_id") in called:
                message.setdefault("name", called[message["tool_call_id"]])
        return messages


class ChatRequest(_WithLength, Conversation):
    """The body of ``/v1/chat/completions``."""

    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def told_tools(self) -> list[Tool]:
        """The tools that the model is told of: none where it may call none."""
        return [] if self.tool_choice == "none" else self.tools


class _Tokenize(Body):
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    return_token_strs: bool = False


class TokenizeTextRequest(_Tokenize):
    """The body of ``/tokenize`` with a text, as vLLM has it."""

    prompt: str
    add_special_tokens: bool = True


class TokenizeChatRequest(_Tokenize, Conversation):
    """The body of ``/tokenize`` with a conversation, as vLLM has it."""


class DetokenizeRequest(Body):
    """The body of ``/detokenize``, as vLLM has it."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    tokens: list[_TokenId]


class LoadRequest(Body):
    """The body of ``/v1/load_lora_adapter``, as vLLM has it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadRequest(Body):
    """The body of ``/v1/unload_lora_adapter``, as vLLM has it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_int_id: int | None = None


class MegatronRequest(Body):
    """The body of ``PUT /api``, as Megatron-LM's text generation server has it; and ``adapter``."""

    # Megatron-LM's API is closed: what it does not know can only be a mistake.
    model_config = ConfigDict(extra="forbid")

    prompts: Annotated[list[str], Field(min_length=1, max_length=128)]
    tokens_to_generate: Annotated[int, Field(ge=1, lt=2**31)] = 64
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    logprobs: Literal[False] = False
    add_BOS: bool = False  # noqa: N815
    random_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    no_log: bool = False
    adapter: Annotated[str, Field(min_length=1, max_length=256)] | None = None
