"""Tool calls: what a model may write, what is read from it in any pieces, what a client gets."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

import jsonschema_rs
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlora_megatron.serve.api.app import make_app
from bdlora_megatron.serve.api.errors import BadRequestError
from bdlora_megatron.serve.api.generation import Answer
from bdlora_megatron.serve.api.openai import plan_body
from bdlora_megatron.serve.api.responses import ChatResponse
from bdlora_megatron.serve.api.schema import ChatRequest
from bdlora_megatron.serve.api.state import APIServer
from bdlora_megatron.serve.api.text import TextStream, Tokenizer
from bdlora_megatron.serve.api.tools import formats
from bdlora_megatron.serve.api.tools.reader import CallReader
from bdlora_megatron.serve.engine.sampling import Sampler
from bdlora_megatron.serve.messages import Choice, Token
from bdlora_megatron.serve.settings import ServeSettings
from tests.serve.models import make_tokenizer
from tests.unit.serve.tool_models import TEMPLATES, make_tool_tokenizer

FORMATS = {
    "hermes": formats._HERMES, "llama3_json": formats.BARE,
    "mistral": formats._LIST, "marked": formats._MARKED,
}  # fmt: skip
NAMES = ("add", "add-2", "look", "7")
POINT = {
    "type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
    "additionalProperties": False,
}  # fmt: skip
SCHEMAS = {
    "add": {
        "type": "object", "required": ["a"], "additionalProperties": False,
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99},
                       "b": {"type": "string", "maxLength": 4}},
    },
    # As pydantic writes nested models; each function's references are its own.
    "add-2": {
        "type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "required": ["p"],
        "$defs": {"P": POINT}, "additionalProperties": False,
    },
    "look": {
        "type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "required": ["p"],
        "$defs": {"P": {"enum": ["}", '"', "</tool_call>"]}}, "additionalProperties": False,
    },
    "7": None,
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {
        "name": name, "description": "It does", **({"parameters": schema} if schema else {})}}
    for name, schema in SCHEMAS.items()
]  # fmt: skip
EMPTY = {"type": "object", "additionalProperties": False}
CHAT = [{"role": "user", "content": "Go"}]


# --- reading ------------------------------------------------------------------------------------


def written(family, name, arguments, *, first=True):
    """A call as its family writes it."""
    item = f'{{"name": "{name}", "arguments": {arguments}}}'
    return {
        "hermes": f"<tool_call>\n{item}\n</tool_call>",
        "llama3_json": ("" if first else "; ") + item.replace('"arguments"', '"parameters"', 1),
        "mistral": ("[TOOL_CALLS] [" if first else ", ") + item,
        "marked": f"[TOOL_CALLS]{name}[ARGS]{arguments}",
    }[family]


def read(family, pieces):
    """Content and calls, put together from the pieces that a client gets."""
    reader = CallReader(FORMATS[family], NAMES)
    content, calls, order = "", {}, []
    for number, piece in enumerate(pieces):
        said = reader.push(piece, last=number == len(pieces) - 1)
        content += said.content
        for index, call in said.calls.items():
            if index not in calls:
                assert call.name is not None, "a call begins with its name"
                assert index == len(calls), "calls come in order"
                calls[index] = [call.name, ""]
            else:
                assert call.name is None, "a name comes once"
            calls[index][1] += call.arguments
            order.append(index)
    assert order == sorted(order)
    return content, [tuple(call) for call in calls.values()]


ARGUMENTS = [
    "{}", '{"a": 1}', '{"a": {"b": [1, {"c": "}"}]}}', '{"s": "\\"}]\\\\"}', '{"s": "é€𝄞 \\u00e9"}',
    '{ "s" : "</tool_call>; [TOOL_CALLS]{\\n" }', '{"a": 1.0, "b": 1e400, "c": -0}',
    '{"s": "\\\\"}',
    '{"cmd": "mkdir {a,b"}', "{\n  \"a\": [\n    {}\n  ]\n}",
]  # fmt: skip


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_are_what_the_model_wrote(family, arguments):
    text = written(family, "add", arguments) + written(family, "look", arguments, first=False)
    text += "]" if family == "mistral" else ""
    wanted = ("", [("add", arguments), ("look", arguments)])
    assert read(family, [text]) == wanted
    assert read(family, list(text)) == wanted
    if family != "llama3_json":
        assert read(family, list("Let me see:\n\n" + text)) == ("Let me see:", wanted[1])


@pytest.mark.parametrize("family", FORMATS)
def test_what_is_no_call_is_content(family):
    for text in (
        "", " ", "hello ", "a < b [c] {d} ", '{"name": "Bob", "age": 3}', '{"name": "nobody", '
        '"parameters": {}}', "<tool_cal", "[TOOL_CAL", " {", '{"name"', "{}\n", '[{"name": "add"}]',
        "</tool_call>",
    ):  # fmt: skip
        assert read(family, [text]) == (text, [])
        assert read(family, list(text) or [""]) == (text, [])


@pytest.mark.parametrize("family", FORMATS)
def test_a_call_that_is_cut_before_its_arguments_is_content_and_after_it_a_call(family):
    text = written(family, "add", '{"a": 1}')
    begins = text.index('{"a"')
    for end in range(len(text)):
        content, calls = read(family, [text[:end]])
        if end <= begins:
            assert (content, calls) == (text[:end], [])
        else:
            assert content == ""
            assert calls == [("add", text[begins:end][: len('{"a": 1}')])]


def test_more_and_less_usual_ways_are_read_too():
    """Spaces where JSON has them, and what models add."""
    text = '\n{\t"name":"add" ,\n"parameters" :{"a":1}} ;{"name": "look","parameters":{}}\n'
    assert read("llama3_json", list(text)) == ("", [("add", '{"a":1}'), ("look", "{}")])
    text = 'Now <|python_tag|>{"name": "add", "parameters": {}}'
    assert read("llama3_json", list(text)) == ("Now", [("add", "{}")])
    text = '[TOOL_CALLS]add[CALL_ID]abcDEF123[ARGS] {"a": 1}\n'
    assert read("marked", list(text)) == ("", [("add", '{"a": 1}')])
    text = '<tool_call>{"name":"add","arguments":{}}</tool_call>done<tool_call> no'
    assert read("hermes", list(text)) == ("done<tool_call> no", [("add", "{}")])
    text = '<tool_call> no <tool_call>{"name":"7","arguments":{}}\n</tool_call>'
    assert read("hermes", list(text)) == ("<tool_call> no", [("7", "{}")])


PARTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
    "{", "}", "[", "]", '"', "\\", ",", ";", ":", " ", "\n", "add",
    '"name"', '"arguments"', '"parameters"',
    '{"name": "add", "arguments": ', '{"name": "look", "parameters": ', "{}", "hi", "é", "<",
    "tool_",
    *ARGUMENTS[:4],
    *(written(family, "add", '{"a": "}"}') for family in FORMATS),
]  # fmt: skip


@pytest.mark.parametrize("family", FORMATS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_do_not_change_what_is_read(family, data):
    """Any text, cut anywhere; nothing that a client has had is taken back."""
    text = "".join(data.draw(st.lists(st.sampled_from(PARTS), max_size=14)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert read(family, pieces) == read(family, [text]) == read(family, list(text) or [""])


# --- grammars -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apis(tmp_path_factory):
    """A server of each family, without its ranks; with marks that are tokens, and without."""
    made = {}
    for family in FORMATS:
        for marks in (True, False):
            folder = tmp_path_factory.mktemp("tools") / "model"
            make_tool_tokenizer(folder, family, marks=marks)
            made[family, marks] = make_api(folder)
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A server whose chat template knows nothing of tools."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    make_tokenizer(folder)
    return make_api(folder)


def make_api(folder, **more):
    settings = ServeSettings(model=str(folder), max_model_len=8192, **more)
    return APIServer(settings, Tokenizer(settings.model))


def plan(api, **more):
    body = {"model": "model", "messages": CHAT, "tools": TOOLS, "max_tokens": 2000, "seed": 1}
    body |= more
    return plan_body(api, ChatRequest.model_validate(body), None)


def say(reply, *, seed, lead="", size=512, most=None):
    """What a model says that knows nothing, but how to begin; token by token."""
    job = reply.job
    sampling, tokenizer = job.sampling, job.tokenizer
    sampler = Sampler()
    sampler.masks.learn(tokenizer.vocabulary)
    sampler.masks.prepare(sampling.grammar)
    sampler.add(0, sampling, [5])
    leads = tokenizer.encode(lead, special=False)
    bias = torch.zeros(size)
    # Else it writes spaces and texts for ever.
    bias[[tokenizer.encode(c, special=False)[0] for c in " \n\r\t"]] = -4.0
    bias[list(sampling.stop_ids)] = 1.0
    bias[tokenizer.encode('"', special=False)] = 4.0
    tokens = []
    while True:
        generator = torch.Generator().manual_seed(1000 * seed + len(tokens))
        logits = 2 * torch.randn(1, size, generator=generator) + bias
        if len(tokens) < len(leads):
            logits[0, leads[len(tokens)]] += 1000.0
        (choice,) = sampler.choose(logits, [0])
        assert not sampler.masks.faults
        last = choice.token in sampling.stop_ids
        long = len(tokens) + 1 == (most or sampling.max_tokens)
        tokens.append(Token(0, choice, "stop" if last else "length" if long else None))
        if last or long:
            return tokens


def deltas_of(reply, tokens):
    job = reply.job
    stream = TextStream(job.tokenizer, job.prompts[0].ids, job.stop, shown=job.calling.shown)
    made = []
    for token in tokens:
        delta = stream.push(token)
        if delta is not None:
            made.append(delta)
            if delta.finish is not None:
                break
    return made


def answer(reply, tokens):
    """The whole answer; a stream's pieces, put together, are the same."""
    deltas = deltas_of(reply, tokens)
    reply = ChatResponse(reply.job)
    streamed = [reply.opening(0), *(reply.delta(0, delta) for delta in deltas)]
    message, finish = dict(streamed[0]["delta"]), None
    for chunk in filter(None, streamed):
        delta = chunk["delta"]
        assert finish is None
        finish = chunk["finish_reason"]
        if delta.get("content"):
            message["content"] = (message["content"] or "") + delta["content"]
        for piece in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if piece["index"] == len(calls):
                calls.append({k: piece[k] for k in ("id", "type")} | {"function": {
                    "name": piece["function"]["name"], "arguments": ""}})  # fmt: skip
            else:
                assert "id" not in piece
                assert "name" not in piece["function"]
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    choice = ChatResponse(reply.job).choice(0, Answer(deltas))
    assert finish == choice["finish_reason"]
    told = {**choice["message"]}
    ids = [call["id"] for one in (told, message) for call in one.get("tool_calls", ())]
    assert len(set(ids)) == len(ids)
    for one in (told, message):
        for call in one.get("tool_calls", ()):
            assert len(call["id"]) == 9
            assert call.pop("id").isalnum()
    assert told == message
    return choice


def calls_of(choice):
    """The calls of an answer, whose arguments follow their schemas."""
    found = []
    for call in choice["message"].get("tool_calls", ()):
        function = call["function"]
        value = json.loads(function["arguments"])
        schema = SCHEMAS[function["name"]] or EMPTY
        assert jsonschema_rs.validator_for(schema).is_valid(value), call
        found.append((function["name"], value))
    return found


EVERY = [(family, marks) for family in FORMATS for marks in (True, False)]


@pytest.mark.parametrize(("family", "marks"), EVERY)
def test_a_model_that_knows_nothing_calls_what_it_must(apis, family, marks):
    names, several = set(), 0
    for seed in range(12):
        choice = answer(reply := plan(apis[family, marks], tool_choice="required"), say(
            reply, seed=seed))  # fmt: skip
        calls = calls_of(choice)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        assert calls
        names |= {name for name, _ in calls}
        several += len(calls) > 1
    assert len(names) >= 2
    # Llama's template, as here, writes one call alone.
    assert bool(several) == (family != "llama3_json")


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_function_is_called_once(apis, family, name):
    named = {"type": "function", "function": {"name": name}}
    for seed in range(2):
        reply = plan(apis[family, True], tool_choice=named)
        choice = answer(reply, say(reply, seed=seed))
        assert [called for called, _ in calls_of(choice)] == [name]
        # As OpenAI has it.
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("family", FORMATS)
def test_an_answer_may_end_in_spaces_after_its_call(apis, family, parallel):
    """Else a model that writes a line's end would have to call once more."""
    text = written(family, "7", "{}") + ("]" if family == "mistral" else "") + "\n</s>"
    reply = plan(apis[family, True], tool_choice="required", parallel_tool_calls=parallel)
    tokens = say(reply, seed=1, lead=text)
    assert reply.job.tokenizer.decode([t.choice.token for t in tokens], special=True) == text
    assert calls_of(choice := answer(reply, tokens)) == [("7", {})]
    assert choice["message"]["content"] is None


LEADS = {
    "hermes": "Well.\n<tool_call>", "llama3_json": '{"name": "add"', "mistral": "Well.[TOOL_CALLS]",
    "marked": "Well.[TOOL_CALLS]",
}  # fmt: skip


@pytest.mark.parametrize(("family", "marks"), EVERY)
def test_once_a_call_has_begun_it_becomes_one(apis, family, marks):
    """Left to itself, a model says what it likes up to a call."""
    for seed in range(6):
        reply = plan(apis[family, marks])
        choice = answer(reply, say(reply, seed=seed, lead=LEADS[family]))
        assert calls_of(choice)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == (None if family == "llama3_json" else "Well.")


@pytest.mark.parametrize(("family", "marks"), EVERY)
def test_a_text_without_calls_is_any_text(apis, family, marks):
    texts = ["Hi <b> [TOOL", '{"name": "Bob"}', "[1]", " {", "é\n\n", "<tool_cal"]
    if marks:
        texts += {"hermes": ["<think>\n</think>x"], "llama3_json": ["a<|header|>{"]}.get(
            family, ["[THINK]x"]
        )
    for text in texts:
        reply = plan(apis[family, marks])
        choice = answer(reply, say(reply, seed=1, lead=f"{text}</s>"))
        shown = text.replace("<|header|>", "").replace("[THINK]", "")
        assert choice["message"] == {"role": "assistant", "content": shown}
        assert choice["finish_reason"] == "stop"


FORM = {"response_format": {"type": "json_schema", "json_schema": {
    "name": "f", "schema": {"type": "object", "required": ["name"], "additionalProperties": False,
                            "properties": {"name": {"enum": ["add", "Bob"]}}}}}}  # fmt: skip


@pytest.mark.parametrize(("family", "marks"), [e for e in EVERY if e[0] != "llama3_json"])
def test_with_a_form_an_answer_has_it_or_calls(apis, family, marks):
    calls = texts = 0
    for lead in (
        "",
        '{"name": "Bob"',
        '{"name": "add"',
        LEADS[family].removeprefix("Well.").strip(),
    ):
        for seed in range(4):
            reply = plan(apis[family, marks], **FORM)
            choice = answer(reply, say(reply, seed=seed, lead=lead))
            if calls_of(choice):
                calls += 1
                assert choice["message"]["content"] is None
                assert choice["finish_reason"] == "tool_calls"
            else:
                texts += 1
                assert json.loads(choice["message"]["content"])["name"] in {"add", "Bob"}
                assert choice["finish_reason"] == "stop"
    assert calls
    assert texts


def test_a_form_is_refused_where_it_can_not_be_told_from_calls_and_fits_calls_that_must_be(apis):
    api = apis["llama3_json", True]
    with pytest.raises(BadRequestError, match="JSON without a mark"):
        plan(api, **FORM)
    reply = plan(api, tool_choice="required", **FORM)
    assert calls_of(answer(reply, say(reply, seed=1)))


@pytest.mark.parametrize("family", FORMATS)
def test_parallel_calls_are_made_where_they_may_be(apis, family):
    most = {True: 0, False: 0}
    for parallel in most:
        for seed in range(8):
            reply = plan(apis[family, True], parallel_tool_calls=parallel, tool_choice="required")
            calls = calls_of(answer(reply, say(reply, seed=seed)))
            most[parallel] = max(most[parallel], len(calls))
    assert most[False] == 1
    # Llama's template, as here, can write one call alone, and would refuse the next request.
    assert (most[True] > 1) == (family != "llama3_json")


@pytest.mark.parametrize("family", FORMATS)
def test_allowed_tools_are_called_and_all_are_told(apis, family):
    allowed = [{"type": "function", "function": {"name": name}} for name in ("look", "7")]
    for mode in ("required", "auto"):
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
        reply = plan(apis[family, True], tool_choice=choice)
        told = plan(apis[family, True])
        assert reply.job.prompts == told.job.prompts
        lead = LEADS[family].replace("add", "look") if mode == "auto" else ""
        for seed in range(4):
            calls = calls_of(answer(reply, say(reply, seed=seed, lead=lead)))
            assert {name for name, _ in calls} <= {"look", "7"}
            assert calls
    # What is not allowed is text.
    if family == "llama3_json":
        choice = answer(reply, say(reply, seed=1, lead='{"name": "add"}</s>'))
        assert choice["message"]["content"] == '{"name": "add"}'


@pytest.mark.parametrize("family", FORMATS)
def test_a_cut_answer_tells_how_far_its_call_came(apis, family):
    named = {"type": "function", "function": {"name": "add"}}
    reply = plan(apis[family, True], tool_choice=named)
    tokens = say(reply, seed=3)
    whole = answer(reply, tokens)["message"]["tool_calls"][0]["function"]["arguments"]
    begun = 0
    for count in range(1, len(tokens) - 1):
        cut = [*tokens[: count - 1], replace(tokens[count - 1], finish="length")]
        choice = answer(plan(apis[family, True], tool_choice=named), cut)
        assert choice["finish_reason"] == "length"
        for call in choice["message"].get("tool_calls", ()):
            begun += 1
            # A cut may tear a character.
            assert whole.startswith(call["function"]["arguments"].rstrip("\ufffd"))
    assert begun


@pytest.mark.parametrize("family", FORMATS)
def test_a_stop_text_in_a_call_ends_it_and_logprobs_are_all_told(apis, family):
    named = {"type": "function", "function": {"name": "look"}}
    asked = {"tool_choice": named, "logprobs": True, "top_logprobs": 1}
    reply = plan(apis[family, True], **asked)
    tokens = [
        replace(token, choice=Choice(token.choice.token, -1.0)) for token in say(reply, seed=2)
    ]
    choice = answer(reply, tokens)
    assert len(choice["logprobs"]["content"]) == len(tokens)
    streamed = [ChatResponse(reply.job).delta(0, one) for one in deltas_of(reply, tokens)]
    told = [one for chunk in streamed if chunk for one in chunk["logprobs"]["content"]]
    assert told == choice["logprobs"]["content"]
    for mode in ("required", named):
        reply = plan(apis[family, True], **{**asked, "tool_choice": mode}, stop='"p"')
        choice = answer(reply, tokens)
        assert choice["finish_reason"] == "stop"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["arguments"].strip() == "{"


@pytest.mark.parametrize("family", [name for name in FORMATS if name != "llama3_json"])
def test_whole_calls_are_a_reason_to_finish_and_half_a_call_is_none(apis, family):
    text = written(family, "7", "{}") + written(family, "add", '{"a": 42}', first=False)
    text += "]" if family == "mistral" else ""
    for stop, finish in ((None, "tool_calls"), ("42", "stop")):
        reply = plan(apis[family, True], stop=stop)
        ids = [*reply.job.tokenizer.encode(text, special=False), 1]
        tokens = [Token(0, Choice(i), "stop" if i == 1 else None) for i in ids]
        choice = answer(reply, tokens)
        assert choice["finish_reason"] == finish
        first, second = choice["message"]["tool_calls"]
        assert first["function"] == {"name": "7", "arguments": "{}"}
        assert second["function"]["arguments"] == ('{"a": 42}' if stop is None else '{"a": ')


# --- schemas ------------------------------------------------------------------------------------


def tool(parameters, **more):
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **more}}


LOOSE = [
    {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
    {"type": "object", "properties": {"a": {"type": "string", "format": "uint"}}},
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!x)"}}},
    {"type": "object", "properties": {"a": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}},
    {"type": "object", "not": {"required": ["a"]}},
]


@pytest.mark.parametrize("schema", LOOSE, ids=str)
def test_what_cannot_be_held_to_is_refused_when_strict_and_else_passed_over_and_named(apis, schema):
    api = apis["hermes", True]
    for choice in ("auto", "required"):
        reply = plan(api, tools=[tool(None), {**tool(schema), "function": {
            **tool(schema)["function"], "name": "g"}}], tool_choice=choice)  # fmt: skip
        assert reply.ignored == ("tools.1.function.parameters",)
        with pytest.raises(BadRequestError) as caught:
            plan(api, tools=[tool(schema, strict=True)], tool_choice=choice)
        assert caught.value.body["error"]["param"] == "tools[0].function.parameters"


FAULTS = [
    ({"type": "object", "properties": {"a": {"type": "strng"}}}, "Invalid type: strng"),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}}, "does not exist"),
    ({"type": "object", "properties": [1]}, "properties must be an object"),
    ({"type": "array"}, "arguments are an object"),
    ({"type": ["object", "null"]}, "arguments are an object"),
    ({"const": "\ud83d"}, "surrogate|parameters"),
    ({"required": ["a"], "additionalProperties": False}, "Unsatisfiable"),
]


@pytest.mark.parametrize(("schema", "says"), FAULTS, ids=str)
def test_faulty_parameters_are_refused_with_their_place(apis, schema, says):
    for choice in ("auto", "required"):
        with pytest.raises(BadRequestError, match=says) as caught:
            plan(apis["hermes", True], tools=[*TOOLS, tool(schema)], tool_choice=choice)
        error = caught.value.body["error"]
        assert error["param"] == "tools[4].function.parameters"
        assert error["message"].startswith("tools[4].function.parameters: ")


def test_nobody_sends_parameters_that_switch_the_check_off(apis):
    schema = {"type": "object", "not": {}, "x-guidance": {"lenient": True}}
    with pytest.raises(BadRequestError, match="not"):
        plan(apis["hermes", True], tools=[tool(schema, strict=True)])


TREE = {
    "$ref": "#/$defs/T",
    "$defs": {"T": {
        "type": "object", "required": ["l"], "additionalProperties": False,
        "properties": {"l": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/T"}]}},
    }},
}  # fmt: skip


EITHER = {"anyOf": [POINT, {"$ref": "#/$defs/T"}], "$defs": TREE["$defs"]}


@pytest.mark.parametrize("schema", [TREE, EITHER], ids=str)
def test_parameters_may_refer_to_themselves(apis, schema):
    """As pydantic writes a recursive model: a reference beside the definitions."""
    reply = plan(apis["hermes", True], tools=[tool(schema, strict=True)], tool_choice=named("f"))
    for seed in range(4):
        (call,) = answer(reply, say(reply, seed=seed))["message"]["tool_calls"]
        value = json.loads(call["function"]["arguments"])
        assert jsonschema_rs.validator_for(schema).is_valid(value), value


def test_parameters_without_a_type_are_still_an_object(apis):
    for parameters in ({}, {"properties": {"a": {"enum": [1]}}, "additionalProperties": False}):
        reply = plan(apis["hermes", True], tools=[tool(parameters)], tool_choice="required")
        for seed in range(3):
            choice = answer(reply, say(reply, seed=seed))
            assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith("{")


# --- choices ------------------------------------------------------------------------------------


def named(name):
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools", "two functions are called 'add'"),
        ({"tools": [tool({}, name="a b")]}, "tools.0.function.name", "pattern"),
        ({"tools": [tool({}, name="x" * 65)]}, "tools.0.function.name", "pattern"),
        ({"tools": [tool({}, name="x\n")]}, "tools.0.function.name", "pattern"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "'function'"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tools": [tool({})] * 129}, "tools", "at most 128"),
        ({"tool_choice": named("nobody")}, "tool_choice", "nobody.*'7', 'add'"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [named("nobody")]}}}, "tool_choice", "nobody"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "send tools"),
        ({"tools": None, "tool_choice": named("add")}, "tool_choice", "send tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "send tools"),
        ({"tool_choice": "any"}, "tool_choice", "'auto', 'none' or 'required'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "wants function"),
        ({"ignore_eos": True}, "ignore_eos", "contradicts tools"),
        ({"parallel_tool_calls": "many"}, "parallel_tool_calls", "boolean"),
    ],
    ids=str,
)  # fmt: skip
def test_a_choice_that_cannot_be_is_refused(apis, body, param, says):
    """The engine is not even there."""
    body = {"model": "model", "messages": CHAT, "tools": TOOLS, **body}
    with TestClient(make_app(apis["hermes", True]), raise_server_exceptions=False) as client:
        got = client.post("/v1/chat/completions", json=body)
    assert got.status_code == 400, got.text
    error = got.json()["error"]
    assert re.search(says, error["message"]), error
    assert error["param"].startswith(param)


def test_no_tools_and_no_choice_ask_for_nothing(apis):
    api = apis["hermes", True]
    bare = plan(api, tools=None, seed=1)
    assert bare.job.calling is None
    assert bare.job.sampling.grammar is None
    for body in (
        {"tools": []}, {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
        {"tool_choice": "none"},
    ):  # fmt: skip
        reply = plan(api, seed=1, **body)
        assert reply.job.prompts == bare.job.prompts
        assert reply.job.sampling == bare.job.sampling
        assert reply.job.calling is None
        assert reply.ignored == ()
        assert reply.opening(0)["delta"]["content"] == ""


def test_a_model_that_is_not_told_of_tools_calls_what_it_must_and_nothing_else(plain):
    with pytest.raises(BadRequestError, match="does not tell the model of tools"):
        plan(plain)
    for choice in ("required", named("add")):
        reply = plan(plain, tool_choice=choice)
        assert calls_of(answer(reply, say(reply, seed=1)))
        assert reply.ignored == ("tools",)


def test_what_a_client_says_of_tools_beside_their_fields_is_named(apis):
    reply = plan(apis["hermes", True], tools=[{**tool({}, mood=1), "cache_control": {"type": "x"}}])
    assert sorted(reply.ignored) == ["tools.cache_control", "tools.function.mood"]


# --- templates ----------------------------------------------------------------------------------

CALL = {"id": "abcdEF123", "type": "function"}
HISTORY = [
    *CHAT,
    {"role": "assistant", "content": None, "tool_calls": [
        {**CALL, "function": {"name": "add", "arguments": '{"a": 1, "b": "é"}'}}]},
    {"role": "tool", "tool_call_id": "abcdEF123", "content": "2"},
]  # fmt: skip


@pytest.mark.parametrize("family", FORMATS)
def test_a_template_reads_tools_and_what_was_called(apis, family):
    api = apis[family, True]
    (prompt,) = plan(api, messages=HISTORY).job.prompts
    text = api.tokenizer.decode(prompt.ids, special=True)
    call = {
        "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>',
        "llama3_json": '{"name": "add", "parameters": {"a": 1, "b": "é"}}',
        "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": "é"}, "id": "abc',
        "marked": '[TOOL_CALLS]add[ARGS]{"a": 1, "b": "é"}',
    }[family]
    assert call in text
    for one in TOOLS:
        assert f'"name": "{one["function"]["name"]}"' in text
    assert '"description": "It does"' in text
    assert "strict" not in text
    # The tags are tokens, not their letters.
    for mark, token in api.tokenizer._tokenizer.get_added_vocab().items():
        assert (mark in text) == (token in prompt.ids)


def test_arguments_of_before_are_an_object_however_they_are_sent(apis):
    api = apis["hermes", True]

    def told(arguments):
        function = {"name": "add", "arguments": arguments}
        before = {"role": "assistant", "tool_calls": [{**CALL, "function": function}]}
        (prompt,) = plan(api, messages=[*CHAT, before]).job.prompts
        return api.tokenizer.decode(prompt.ids).rpartition('"arguments": ')[2].partition("\n")[0]

    assert told('{"a": 1}') == told({"a": 1}) == told(' {"a":1}') == '{"a": 1}}'
    assert told("") == told("null") == told({}) == told(None) == "{}}"
    for wrong in ("{", "[1]", '"{}"', "3", 3, "[" * 100000):
        with pytest.raises(ValueError, match="arguments"):
            told(wrong)


@pytest.mark.parametrize("family", FORMATS)
def test_an_answer_goes_back_as_it_was_handed_out(apis, family):
    """With the identifiers that we make, and without the names of results, which nobody sends."""
    reply = plan(apis[family, True], tool_choice="required")
    choice = answer(reply, say(reply, seed=4))
    calls = [
        {"id": f"abcdEF1{i:02}", **call} for i, call in enumerate(choice["message"]["tool_calls"])
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "2"} for call in calls]
    message = {**choice["message"], "tool_calls": calls, "refusal": None, "annotations": []}
    again = plan(apis[family, True], messages=[*CHAT, message, *results])
    assert again.ignored == () or "messages.tool_call_id" in again.ignored
    text = again.job.tokenizer.decode(again.job.prompts[0].ids, special=True)
    for call in calls:
        assert text.count(f'"name": "{call["function"]["name"]}"') >= 1


QWEN_CODER = """
{%- for tool in tools or [] %}{{ tool.function.name }}{% endfor %}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call><function={{ call.function.name }}></function></tool_call>
{%- endfor %}{% endfor %}"""


def test_the_format_is_the_templates_or_the_settings(tmp_path, apis):
    for (family, _), api in apis.items():
        written_ = api.written_by(api.tokenizer)
        assert written_.told
        assert written_.format == FORMATS[family]
        assert written_.several == (family != "llama3_json")
    make_tool_tokenizer(tmp_path / "model", "marked")
    (tmp_path / "model" / "chat_template.jinja").write_text(QWEN_CODER)
    with pytest.raises(BadRequestError, match="tool_call_parser"):
        plan(make_api(tmp_path / "model"))
    for parser, format_ in (
        ("hermes", FORMATS["hermes"]), ("llama3_json", FORMATS["llama3_json"]),
        # Its tokenizer has the newer mark.
        ("mistral", FORMATS["marked"]),
    ):  # fmt: skip
        api = make_api(tmp_path / "model", tool_call_parser=parser)
        assert plan(api).job.calling.format == format_
    make_tool_tokenizer(tmp_path / "other" / "model", "mistral")
    api = make_api(tmp_path / "other" / "model", tool_call_parser="mistral")
    assert plan(api).job.calling.format == FORMATS["mistral"]


def test_a_model_may_have_a_template_of_its_own_for_tools(tmp_path):
    """As Hermes 2 Pro's and Command R's tokenizers have."""
    make_tool_tokenizer(tmp_path / "model", "hermes")
    file = tmp_path / "model" / "tokenizer_config.json"
    listed = [
        {"name": "default", "template": "{{ messages[0].content }}!"},
        {"name": "tool_use", "template": TEMPLATES["hermes"]},
    ]
    (tmp_path / "model" / "chat_template.jinja").unlink()
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": listed}))
    api = make_api(tmp_path / "model")
    text = api.tokenizer.decode(plan(api).job.prompts[0].ids)
    assert text.startswith("<|system|>Tools:")
    assert api.tokenizer.decode(plan(api, tools=[]).job.prompts[0].ids) == "Go!"
    assert plan(api).job.calling.format == FORMATS["hermes"]


def test_tools_are_tokenized_as_requests_with_them_are_read(apis, plain):
    api = apis["hermes", True]
    with TestClient(make_app(api)) as client:
        made = client.post("/tokenize", json={"messages": CHAT, "tools": TOOLS}).json()
    assert tuple(made["tokens"]) == plan(api).job.prompts[0].ids
    with TestClient(make_app(plain)) as client:
        got = client.post("/tokenize", json={"messages": CHAT, "tools": TOOLS})
    assert got.headers["x-ignored-fields"] == "tools"
