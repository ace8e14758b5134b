"""Bodies of requests, as OpenAI's API names their fields, and what each may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "GenerationFields",
    "LoadRequest",
    "MegatronRequest",
    "StreamOptions",
    "UnloadRequest",
]

# Bounds that keep one request from being many; the engine has its own on lengths.
_MOST_CHOICES = 128
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class _Body(BaseModel):
    # A field that is not known is refused: a client that sends it expects it to work.
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    """What a stream ends with."""

    include_usage: bool = False


class GenerationFields(_Body):
    """What both kinds of request have.

    ``top_k``, ``min_p``, ``repetition_penalty``, ``min_tokens``, ``ignore_eos`` and
    ``stop_token_ids`` are vLLM's.
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
    user: Annotated[str, Field(max_length=512)] | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts, however many were sent."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(GenerationFields):
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
    best_of: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, however many were sent."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": self.role, "content": text}


class TextFormat(_Body):
    """The one form in which an answer comes."""

    type: Literal["text"]


class ChatRequest(GenerationFields):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None


class LoadRequest(_Body):
    """The body of ``/v1/load_lora_adapter``, as vLLM has it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadRequest(_Body):
    """The body of ``/v1/unload_lora_adapter``, as vLLM has it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_int_id: int | None = None


class MegatronRequest(_Body):
    """The body of ``PUT /api``, as Megatron-LM's text generation server has it; and ``adapter``."""

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
