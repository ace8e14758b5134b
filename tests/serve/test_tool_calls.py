"""Tools through OpenAI's own client and its helpers, against the running server on two ranks."""

from __future__ import annotations

import concurrent.futures
import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.serve import models

pytestmark = pytest.mark.engine


class Place(BaseModel):
    """A nested model: its schema has references."""

    model_config = ConfigDict(extra="forbid")

    x: Literal[1, 2, 3]


class Go(BaseModel):
    """Go there."""

    model_config = ConfigDict(extra="forbid")

    to: Place
    fast: bool


class Say(BaseModel):
    """Say it."""

    model_config = ConfigDict(extra="forbid")

    words: list[Literal["}", '"', "é"]] = Field(max_length=2)


TOOLS = [openai.pydantic_function_tool(Go), openai.pydantic_function_tool(Say)]
KINDS = {"Go": Go, "Say": Say}
CHAT = [{"role": "user", "content": "?"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def how(tokenizer):
    """A model that knows nothing writes no spaces, and one call after the other no longer."""
    bias = {str(tokenizer.encode(c)[0]): -100 for c in " \n\r\t"}
    return {"logit_bias": bias, "temperature": 1, "max_tokens": 200, "parallel_tool_calls": False}


def test_every_model_calls_while_others_do_not(client, how):
    """Base, vanilla and block-diagonal adapters; named and required calls, others in between."""
    names = ["model", *models.ADAPTERS]

    def called(i):
        choice = "required" if i % 3 else {"type": "function", "function": {"name": "Say"}}
        made = client.chat.completions.parse(
            model=names[i % 4], messages=CHAT, tools=TOOLS, tool_choice=choice, seed=i, n=2, **how
        )
        for one in made.choices:
            assert one.finish_reason == ("tool_calls" if i % 3 else "stop")
            assert one.message.content is None
            (call,) = one.message.tool_calls
            assert i % 3 or call.function.name == "Say"
            assert isinstance(call.function.parsed_arguments, KINDS[call.function.name])
        return {one.message.tool_calls[0].function.arguments for one in made.choices}

    def free(i):
        got = client.chat.completions.create(
            model=names[i % 4], messages=CHAT, temperature=0, max_tokens=30
        )
        assert got.choices[0].message.tool_calls is None
        return got.choices[0].message.content

    alone = [free(i) for i in range(4)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(called, i) for i in range(8)]
        others = [pool.submit(free, i) for i in range(4)]
    assert len(set().union(*(made.result() for made in calls))) > 4
    assert [made.result() for made in others] == alone


def test_a_stream_tells_the_same_and_goes_back_with_the_result(client, how):
    request = {"model": "blocks", "messages": CHAT, "tools": TOOLS, "tool_choice": "required"}
    request |= {"seed": 7, **how}
    whole = client.chat.completions.create(**request)
    kinds, arguments = [], ""
    options = {"include_usage": True}
    with client.chat.completions.stream(**request, stream_options=options) as stream:
        for event in stream:
            kinds.append(event.type)
            if event.type == "tool_calls.function.arguments.delta":
                arguments += event.arguments_delta
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert "content.delta" not in kinds
    (one,), (other,) = whole.choices, final.choices
    (call,), (streamed,) = one.message.tool_calls, other.message.tool_calls
    assert arguments == streamed.function.arguments == call.function.arguments
    assert streamed.function.name == call.function.name
    assert isinstance(streamed.function.parsed_arguments, KINDS[call.function.name])
    assert one.finish_reason == other.finish_reason == "tool_calls"
    assert final.usage.completion_tokens == whole.usage.completion_tokens > 40
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    messages = [*CHAT, one.message.model_dump(), result]
    raw = client.chat.completions.with_raw_response.create(
        model="blocks", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=5
    )
    assert raw.parse().choices[0].message.content
    assert raw.headers["x-ignored-fields"] == "messages.tool_call_id"


def test_left_to_itself_a_model_says_what_it_likes(client, how):
    got = client.chat.completions.create(
        model="vanilla", messages=CHAT, tools=TOOLS, seed=1, logprobs=True, **how | {
            "max_tokens": 20}
    ).choices[0]  # fmt: skip
    assert got.finish_reason == "length"
    assert got.message.tool_calls is None
    assert got.message.content
    assert len(got.logprobs.content) == 20


def test_faults_are_told(client):
    faulty = {"type": "object", "properties": {"a": {"type": "strng"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": faulty}}
    with pytest.raises(openai.BadRequestError, match="strng") as caught:
        client.chat.completions.create(model="blocks", messages=CHAT, tools=[*TOOLS, tool])
    assert caught.value.param == "tools[2].function.parameters"
    with pytest.raises(openai.LengthFinishReasonError) as cut:
        client.chat.completions.parse(
            model="blocks", messages=CHAT, tools=TOOLS, tool_choice="required", max_tokens=40
        )
    assert json.loads(cut.value.completion.model_dump_json())["choices"][0]["message"]
