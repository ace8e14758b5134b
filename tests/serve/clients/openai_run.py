"""OpenAI's own client, against a running server; started by ``test_clients``."""

from __future__ import annotations

import asyncio
from typing import Any

import openai

from tests.serve.clients.common import Task, chat, error_of, run


def ask(task: Task) -> dict[str, Any]:
    client = openai.OpenAI(base_url=task.url, api_key=task.key, max_retries=0)
    few = openai.OpenAI(base_url=task.url, api_key=task.few, max_retries=0)
    return {
        "models": [card.id for card in client.models.list()],
        "models_of_few": [card.id for card in few.models.list()],
        "texts": _texts(client, task) | asyncio.run(_at_once(task)),
        "conversation": _conversation(client, task),
        "logprobs": _logprobs(client, task),
        "headers": _headers(client, task),
        "held": _held(client, task),
        "errors": _errors(client, few, task),
    }


def _how(task: Task) -> dict[str, Any]:
    return {"max_tokens": task.tokens, "temperature": 0}


def _texts(client: openai.OpenAI, task: Task) -> dict[str, list[Any]]:
    """One after another, whole and in streams, with what each has cost."""
    found: dict[str, list[Any]] = {"text whole": [], "text stream": [], "chat stream": []}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for model, prompt in task.asked:
        request = {"model": model, **_how(task)}
        whole = client.completions.create(**request, prompt=prompt)
        found["text whole"].append([whole.choices[0].text, whole.usage.completion_tokens])
        *pieces, last = client.completions.create(**request, **options, prompt=prompt)
        text = "".join(piece.choices[0].text for piece in pieces)
        found["text stream"].append([text, last.usage.completion_tokens])
        *pieces, last = client.chat.completions.create(**request, **options, messages=chat(prompt))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        found["chat stream"].append([text, last.usage.completion_tokens])
    return found


async def _at_once(task: Task) -> dict[str, list[Any]]:
    """All models and prompts as one batch, by either endpoint."""
    async with openai.AsyncOpenAI(base_url=task.url, api_key=task.key, max_retries=0) as client:
        chats = [
            client.chat.completions.create(model=model, messages=chat(prompt), **_how(task))
            for model, prompt in task.asked
        ]
        texts = [
            client.completions.create(model=model, prompt=prompt, **_how(task))
            for model, prompt in task.asked
        ]
        draws = [
            client.completions.create(
                model=model, prompt=prompt, max_tokens=task.tokens, temperature=1, seed=place
            )
            for place, (model, prompt) in enumerate(task.asked)
        ]
        answers = await asyncio.gather(*chats, *texts, *draws)
    said = [[_text(made.choices[0]), made.usage.completion_tokens] for made in answers]
    count = len(chats)
    return {
        "chat at once": said[:count],
        "text at once": said[count : 2 * count],
        "drawn at once": said[2 * count :],
    }


def _text(choice: Any) -> str:
    return choice.text if hasattr(choice, "text") else choice.message.content


def _conversation(client: openai.OpenAI, task: Task) -> list[str]:
    """Two answers, the first of which is sent back as the client dumps it."""
    messages: list[Any] = chat(task.prompts[0])
    said = []
    for _ in range(2):
        made = client.chat.completions.create(model=task.models[0], messages=messages, **_how(task))
        said.append(made.choices[0].message.content)
        messages += [made.choices[0].message.model_dump(), *chat("more")]
    return said


def _logprobs(client: openai.OpenAI, task: Task) -> dict[str, Any]:
    request = {"model": task.models[0], **_how(task)}
    made = client.completions.create(**request, prompt=task.prompts[0], logprobs=1, echo=True)
    told = client.chat.completions.create(
        **request, messages=chat(task.prompts[0]), logprobs=True, top_logprobs=2
    )
    tokens = told.choices[0].logprobs.content
    return {
        "text": made.choices[0].text,
        "values": made.choices[0].logprobs.token_logprobs,
        "chat": told.choices[0].message.content,
        "bytes": [token.bytes for token in tokens],
        "best": all(token.top_logprobs[0].logprob == token.logprob for token in tokens),
    }


def _headers(client: openai.OpenAI, task: Task) -> dict[str, Any]:
    raw = client.chat.completions.with_raw_response.create(
        model=task.models[0],
        messages=chat(task.prompts[0]),
        **_how(task),
        extra_headers={"X-Request-Id": "ours-1"},
        extra_body={"a_field_of_nobody": 1},
    )
    return {
        "request": raw.headers["x-request-id"],
        "ignored": raw.headers["x-ignored-fields"],
        "text": raw.parse().choices[0].message.content,
    }


def _held(client: openai.OpenAI, task: Task) -> str:
    """The most probable tokens at a high temperature, by a field that is not OpenAI's."""
    made = client.completions.create(
        model=task.models[0],
        prompt=task.prompts[0],
        max_tokens=task.tokens,
        temperature=2,
        extra_body={"top_k": 1},
    )
    return made.choices[0].text


def _errors(client: openai.OpenAI, few: openai.OpenAI, task: Task) -> dict[str, str]:
    stranger = openai.OpenAI(base_url=task.url, api_key="a-strange-key", max_retries=0)
    one, other, prompt = task.models[0], task.models[1], task.prompts[0]
    format_ = {"type": "structural_tag"}
    return {
        "temperature": error_of(
            lambda: client.completions.create(model=one, prompt=prompt, temperature=-1)
        ),
        "format": error_of(
            lambda: client.chat.completions.create(
                model=one, messages=chat(prompt), response_format=format_
            )
        ),
        "name": error_of(lambda: client.completions.create(model="nobody", prompt=prompt)),
        "key": error_of(lambda: stranger.completions.create(model=one, prompt=prompt)),
        "key for others": error_of(lambda: few.completions.create(model=other, prompt=prompt)),
        "endpoint": error_of(lambda: client.responses.create(model=one, input=prompt)),
        "length": error_of(
            lambda: client.completions.create(model=one, prompt=task.long, stream=True)
        ),
    }


if __name__ == "__main__":
    run(ask)
