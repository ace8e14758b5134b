"""LangChain's classes for OpenAI's API, against a running server; started by ``test_clients``."""

from __future__ import annotations

import asyncio
from functools import reduce
from operator import add
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

from tests.serve.clients.common import Go, Task, error_of, run


def ask(task: Task) -> dict[str, Any]:
    how = {"base_url": task.url, "api_key": task.key, "temperature": 0, "max_tokens": task.tokens}
    chats = {name: ChatOpenAI(model=name, stream_usage=True, **how) for name in task.models}
    texts = {name: OpenAI(model=name, **how) for name in task.models}
    made = asyncio.run(_at_once(chats, task))
    found = {
        "chat at once": [_said(message) for message in made],
        "chat whole": [_said(chats[m].invoke(prompt)) for m, prompt in task.asked],
        "chat stream": [_said(reduce(add, chats[m].stream(p))) for m, p in task.asked],
        "text whole": [[texts[m].invoke(prompt), None] for m, prompt in task.asked],
        "text stream": [["".join(texts[m].stream(p)), None] for m, p in task.asked],
    }
    for kind, asked in (("chat", chats), ("text", texts)):
        # One thread for each chat; all texts in one request.
        lists = [asked[model].batch(task.prompts) for model in task.models]
        found[f"{kind} batch"] = [
            _said(answer) for answers in zip(*lists, strict=True) for answer in answers
        ]
    return {
        "texts": found,
        "conversation": _conversation(chats[task.models[0]], task),
        "logprobs": _logprobs(chats[task.models[0]], task),
        "tools": _tools(how, task),
        "errors": _errors(chats[task.models[0]], how, task),
    }


async def _at_once(chats: dict[str, ChatOpenAI], task: Task) -> list[Any]:
    """All models at once, each with all its prompts, in the order of ``asked``."""
    lists = await asyncio.gather(*(chats[name].abatch(task.prompts) for name in task.models))
    return [answer for answers in zip(*lists, strict=True) for answer in answers]


def _said(answer: Any) -> list[Any]:
    if isinstance(answer, str):
        return [answer, None]
    return [answer.content, answer.usage_metadata["output_tokens"]]


def _conversation(chat: ChatOpenAI, task: Task) -> list[str]:
    messages: list[Any] = [HumanMessage(task.prompts[0])]
    said = []
    for _ in range(2):
        answer = chat.invoke(messages)
        said.append(answer.content)
        messages += [answer, HumanMessage([{"type": "text", "text": "more"}])]
    return said


def _logprobs(chat: ChatOpenAI, task: Task) -> dict[str, Any]:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(task.prompts[0])
    tokens = answer.response_metadata["logprobs"]["content"]
    return {
        "chat": answer.content,
        "bytes": [token["bytes"] for token in tokens],
        "best": all(t["top_logprobs"][0]["logprob"] == t["logprob"] for t in tokens),
        "finish": answer.response_metadata["finish_reason"],
    }


def _tools(how: dict[str, Any], task: Task) -> list[Any]:
    """Arguments by each way to get some, and what an agent's next step says."""
    bias = dict.fromkeys(task.spaces, -100)
    longer = {**how, "max_tokens": 150, "logit_bias": bias}
    found = []
    for model in task.models:
        chat, prompt = ChatOpenAI(model=model, **longer), task.prompts[3]
        bound = chat.bind_tools([Go], tool_choice="any", parallel_tool_calls=False)
        answer = bound.invoke(prompt)
        (call,), (streamed,) = answer.tool_calls, reduce(add, bound.stream(prompt)).tool_calls
        (named,) = chat.bind_tools([Go], tool_choice="Go").invoke(prompt).tool_calls
        structured = chat.with_structured_output(Go, method="function_calling").invoke(prompt)
        said = ChatOpenAI(model=model, **how).invoke(
            [HumanMessage(prompt), answer, ToolMessage("done", tool_call_id=call["id"])]
        )
        found.append([
            call["name"], call["args"], streamed["args"], named["args"],
            structured.model_dump(), said.content,
        ])  # fmt: skip
    return found


def _errors(chat: ChatOpenAI, how: dict[str, Any], task: Task) -> dict[str, str]:
    prompt = task.prompts[0]
    stranger = {**how, "api_key": "a-strange-key"}
    return {
        "length": error_of(lambda: chat.invoke(task.long)),
        "name": error_of(lambda: ChatOpenAI(model="nobody", **how).invoke(prompt)),
        "key": error_of(lambda: ChatOpenAI(model=task.models[0], **stranger).invoke(prompt)),
    }


if __name__ == "__main__":
    run(ask)
