"""Forms of answers through OpenAI's own client, against the running server on two ranks."""

from __future__ import annotations

import concurrent.futures
import json
import re
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.serve import models

pytestmark = pytest.mark.engine


class Point(BaseModel):
    """Short, whatever a random model makes of it."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["point", "corner"]
    place: list[Literal[1, 2, 3]] = Field(max_length=2)
    seen: bool


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def spaces(tokenizer):
    """Else a model that knows nothing may write spaces until it is cut."""
    return {str(tokenizer.encode(c)[0]): -100 for c in " \n\r\t"}


def test_every_model_follows_a_form_while_others_ask_for_none(client, spaces):
    """Base, vanilla and block-diagonal adapters, n answers each, streamed and whole."""
    names = ["model", *models.ADAPTERS]
    chat = [{"role": "user", "content": "Where?"}]

    def parsed(i):
        got = client.chat.completions.parse(
            model=names[i % 4], messages=chat, response_format=Point, logit_bias=spaces,
            n=2, seed=i, temperature=1, max_tokens=150,
        )  # fmt: skip
        assert all(choice.finish_reason == "stop" for choice in got.choices)
        return [choice.message.parsed for choice in got.choices]

    def streamed(i):
        asked = {"structured_outputs": {"regex": "[a-f]{5}-[0-9]{2,3}"}}
        chunks = client.completions.create(
            model=names[i % 4], prompt="hello", seed=i, max_tokens=40, stream=True, extra_body=asked
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    def free(i):
        got = client.completions.create(
            model=names[i % 4], prompt="hello", temperature=0, max_tokens=30
        )
        return got.choices[0].text

    alone = [free(i) for i in range(4)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        points = [pool.submit(parsed, i) for i in range(4)]
        texts = [pool.submit(streamed, i) for i in range(4)]
        others = [pool.submit(free, i) for i in range(4)]
    assert all(isinstance(point, Point) for made in points for point in made.result())
    assert len({point.model_dump_json() for made in points for point in made.result()}) > 2
    assert all(re.fullmatch("[a-f]{5}-[0-9]{2,3}", made.result()) for made in texts)
    assert [made.result() for made in others] == alone


def test_a_length_cuts_a_form_and_a_fault_is_told(client, spaces):
    format_ = {"type": "json_object"}
    cut = client.completions.create(
        model="blocks", prompt="hello", max_tokens=4, extra_body={"response_format": format_},
        logit_bias=spaces, logprobs=1,
    ).choices[0]  # fmt: skip
    assert cut.finish_reason == "length"
    assert cut.text.startswith("{")
    assert len(cut.logprobs.tokens) == 4
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.text)
    asked = {"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        client.completions.create(model="blocks", prompt="hello", extra_body=asked)
    assert caught.value.param == "structured_outputs.json"
