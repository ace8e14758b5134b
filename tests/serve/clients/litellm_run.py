"""LiteLLM's functions and its router, against a running server; started by ``test_clients``."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm

from tests.serve.clients.common import Go, Task, chat, error_of, run


def ask(task: Task) -> dict[str, Any]:
    how = {
        "api_base": task.url, "api_key": task.key, "temperature": 0, "max_tokens": task.tokens,
    }  # fmt: skip
    router = _router(task, how)
    found = asyncio.run(_at_once(router, task, how))
    streams = {"stream": True, "stream_options": {"include_usage": True}}
    for provider in ("openai", "hosted_vllm"):
        found[f"chat by {provider}"] = [
            _said(litellm.completion(model=f"{provider}/{m}", messages=chat(p), **how))
            for m, p in task.asked
        ]
        found[f"chat stream by {provider}"] = [
            _joined(litellm.completion(f"{provider}/{m}", chat(p), **streams, **how))
            for m, p in task.asked
        ]
    found["text whole"] = [
        _text(litellm.text_completion(prompt=p, model=f"text-completion-openai/{m}", **how))
        for m, p in task.asked
    ]
    found["text stream"] = [_text_stream(m, p, how) for m, p in task.asked]
    return {
        "texts": found,
        "models": litellm.get_valid_models(
            check_provider_endpoint=True,
            custom_llm_provider="openai",
            api_base=task.url,
            api_key=task.key,
        ),
        "conversation": _conversation(task, how),
        "logprobs": _logprobs(task, how),
        "fallback": _said(
            router.completion(
                model="short", messages=chat(task.prompts[0]), max_tokens=task.tokens, temperature=0
            )
        ),
        "tools": _tools(task, how),
        "errors": _errors(task, how),
    }


def _router(task: Task, how: dict[str, Any]) -> litellm.Router:
    """All models, and one that asks for more tokens than it has room for, with a fallback."""
    models = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}", **how}}
        for name in task.models
    ]
    short = {"model": f"openai/{task.models[1]}", **how}
    short["extra_body"] = {"max_tokens": 10**6}
    models.append({"model_name": "short", "litellm_params": short})
    return litellm.Router(
        model_list=models, context_window_fallbacks=[{"short": [task.models[0]]}], num_retries=0
    )


async def _at_once(router: litellm.Router, task: Task, how: dict[str, Any]) -> dict[str, list[Any]]:
    """All models and prompts as one batch, straight and through the router."""
    straight = [
        litellm.acompletion(model=f"openai/{m}", messages=chat(p), **how) for m, p in task.asked
    ]
    routed = [router.acompletion(model=m, messages=chat(p)) for m, p in task.asked]
    answers = [_said(made) for made in await asyncio.gather(*straight, *routed)]
    half = len(straight)
    return {"chat at once": answers[:half], "chat routed at once": answers[half:]}


def _said(made: Any) -> list[Any]:
    return [made.choices[0].message.content, made.usage.completion_tokens]


def _joined(stream: Any) -> list[Any]:
    """A streamed chat's text, and the tokens that its end has counted."""
    text, tokens = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        tokens = chunk.usage.completion_tokens if getattr(chunk, "usage", None) else tokens
    return [text, tokens]


def _text(made: Any) -> list[Any]:
    return [made.choices[0].text, made.usage.completion_tokens]


def _text_stream(model: str, prompt: str, how: dict[str, Any]) -> list[Any]:
    stream = litellm.text_completion(
        prompt=prompt, model=f"text-completion-openai/{model}", stream=True, **how
    )
    return ["".join(chunk.choices[0].text or "" for chunk in stream), None]


def _conversation(task: Task, how: dict[str, Any]) -> list[str]:
    """Two answers, the first of which is sent back as the client dumps it."""
    messages: list[Any] = chat(task.prompts[0])
    said = []
    for _ in range(2):
        made = litellm.completion(model=f"openai/{task.models[0]}", messages=messages, **how)
        said.append(made.choices[0].message.content)
        messages += [made.choices[0].message.model_dump(), *chat("more")]
    return said


def _logprobs(task: Task, how: dict[str, Any]) -> dict[str, Any]:
    request = {"messages": chat(task.prompts[0]), "logprobs": True, "top_logprobs": 2, **how}
    made = litellm.completion(model=f"openai/{task.models[0]}", **request)
    stream = litellm.completion(model=f"openai/{task.models[0]}", **request, stream=True)
    pieces = [chunk.choices[0].get("logprobs") for chunk in stream]
    tokens = made.choices[0].logprobs.content
    scored = litellm.text_completion(
        prompt=task.prompts[0],
        model=f"text-completion-openai/{task.models[0]}",
        logprobs=1,
        echo=True,
        **how,
    )
    return {
        "chat": made.choices[0].message.content,
        "bytes": [token.bytes for token in tokens],
        "best": all(token.top_logprobs[0].logprob == token.logprob for token in tokens),
        "streamed bytes": [token.bytes for piece in pieces if piece for token in piece.content],
        "text": scored.choices[0].text,
        "values": scored.choices[0].logprobs.token_logprobs,
    }


def _tools(task: Task, how: dict[str, Any]) -> list[Any]:
    """Arguments, whole and streamed, and what is said of the result."""
    function = {"name": "Go", "description": "goes", "parameters": Go.model_json_schema()}
    asked = {
        **how, "max_tokens": 150, "logit_bias": {str(token): -100 for token in task.spaces},
        "tools": [{"type": "function", "function": function}], "tool_choice": "required",
        "parallel_tool_calls": False,
    }  # fmt: skip
    found = []
    for model in task.models:
        messages: list[Any] = chat(task.prompts[3])
        # hosted_vllm would take additionalProperties out of schemas.
        name = f"openai/{model}"
        made = litellm.completion(model=name, messages=messages, **asked).choices[0].message
        (call,) = made.tool_calls
        chunks = list(litellm.completion(model=name, messages=messages, stream=True, **asked))
        (streamed,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
        again = [*messages, made.model_dump(), result]
        said = litellm.completion(model=name, messages=again, **how).choices[0].message.content
        arguments = [json.loads(one.function.arguments) for one in (call, streamed)]
        found.append([call.function.name, *arguments, said])
    return found


def _errors(task: Task, how: dict[str, Any]) -> dict[str, str]:
    def one(model: str = task.models[0], prompt: str = task.prompts[0], **more: Any) -> str:
        request = {"model": f"openai/{model}", "messages": chat(prompt), **how, **more}
        return error_of(lambda: litellm.completion(**request))

    return {
        "length": one(prompt=task.long),
        "name": one(model="nobody"),
        "key": one(api_key="a-strange-key"),
        "temperature": one(temperature=-1),
    }


if __name__ == "__main__":
    run(ask)
