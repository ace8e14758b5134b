"""Grammars: what a random model says is what was asked for; its neighbours say what is theirs."""

from __future__ import annotations

import json
import random
import re

import jsonschema_rs
import pytest
import torch

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.serve.api.errors import BadRequestError
from bdlora_megatron.serve.api.formats import ResponseFormat, StructuredOutputs, grammar_of
from bdlora_megatron.serve.api.text import Tokenizer
from bdlora_megatron.serve.engine.masks import Masks
from bdlora_megatron.serve.engine.sampling import Sampler
from bdlora_megatron.serve.messages import Grammar, Sampling
from tests.serve.models import make_tokenizer

#: A row of logits is longer than the vocabulary of 258: models pad it.
V = 272


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer(str(folder))


def grammar(tokenizer, **asked):
    text = grammar_of(None, StructuredOutputs.model_validate(asked))
    return Grammar(text, tokenizer.vocabulary.key)


def sampler_of(tokenizer, samplings, prompts=None):
    sampler = Sampler()
    sampler.masks.learn(tokenizer.vocabulary)
    for request_id, sampling in enumerate(samplings):
        sampler.masks.prepare(sampling.grammar)
        sampler.add(request_id, sampling, [5])
    return sampler


def say(sampler, samplings, *, seed, most=400, dtype=torch.float32, bias=None):
    """Each request's tokens, from logits that follow from its number and its tokens alone."""
    said = {request_id: [] for request_id in range(len(samplings))}
    open_ = list(said)
    while open_:
        rows = []
        for i in open_:
            generator = torch.Generator().manual_seed(seed + 1000 * i + len(said[i]))
            rows.append(2 * torch.randn(V, generator=generator))
        logits = torch.stack(rows).to(dtype)
        if bias is not None:
            logits += bias
        for i, choice in zip(list(open_), sampler.choose(logits, open_), strict=True):
            said[i].append(choice.token)
            if choice.token in samplings[i].stop_ids or len(said[i]) == most:
                open_.remove(i)
    assert not sampler.masks.faults
    return said


def asking(tokenizer, seed=0, **asked):
    return Sampling(
        seed=seed, stop_ids=tokenizer.stop_ids, max_tokens=400, grammar=grammar(tokenizer, **asked)
    )


# --- schemas ------------------------------------------------------------------------------------


def make_schema(rng: random.Random, depth: int = 3):
    """A schema whose answers are short."""
    kinds = [
        "integer",
        "string",
        "enum",
        "boolean",
        "null",
        "const",
        "pattern",
        "number",
        "step",
        "$ref",
    ]
    kind = rng.choice([*kinds, "object", "object", "array", "array", "anyOf"] if depth else kinds)
    if kind == "object":
        names = rng.sample(["a", "bc", "d e", "ä", 'q"', "f"], rng.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: make_schema(rng, depth - 1) for name in names},
            "required": names[: rng.randint(0, len(names))],
            "additionalProperties": False,
        }
    if kind == "array":
        least = rng.randint(0, 2)
        items = make_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + 1}
    if kind == "anyOf":
        return {"anyOf": [make_schema(rng, depth - 1) for _ in range(rng.randint(2, 3))]}
    low = rng.randint(-200, 200)
    return {
        "integer": {"type": "integer", "minimum": low, "maximum": low + 50},
        "number": {"type": "integer", "exclusiveMinimum": 0, "maximum": 99, "multipleOf": 7},
        "step": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
        "string": {"type": "string", "minLength": rng.randint(0, 2), "maxLength": 4},
        "pattern": {"type": "string", "pattern": "^[a-c]{1,3}-?\\d{2}$"},
        "enum": {"enum": rng.sample(["x", 3, None, True, "ü", 2.5, [1], {"k": 1}], 3)},
        "const": {"const": rng.choice(["k", 12, False])},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "$ref": {"$ref": f"#/$defs/{rng.choice(['point', 'list'])}"},
    }[kind]


DEFS = {
    "point": {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["x"],
        "additionalProperties": False,
    },
    "list": {
        "anyOf": [
            {"type": "null"},
            {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2},
        ]
    },
}


@pytest.mark.parametrize("whitespace", [False, True])
def test_answers_are_json_of_their_schemas(tokenizer, whitespace):
    """Fifty random schemas each, in batches of ten, and a model that knows nothing."""
    rng = random.Random(17 + whitespace)
    kinds, checked = set(), 0
    for batch in range(5):
        schemas = [{**make_schema(rng), "$defs": DEFS} for _ in range(10)]
        samplings = [
            asking(tokenizer, seed, json=schema, disable_any_whitespace=not whitespace)
            for seed, schema in enumerate(schemas)
        ]
        bias = torch.zeros(V)
        # Else a model that knows nothing writes spaces for ever.
        bias[[tokenizer.encode(c)[0] for c in " \n\r\t"]] = -4.0
        sampler = sampler_of(tokenizer, samplings)
        said = say(sampler, samplings, seed=batch, bias=bias)
        for schema, ids in zip(schemas, said.values(), strict=True):
            assert ids[-1] in tokenizer.stop_ids, (schema, tokenizer.decode(ids))
            assert not {0, *range(258, V)} & set(ids)
            text = tokenizer.decode(ids[:-1], special=True)
            value = json.loads(text)
            assert jsonschema_rs.validator_for(schema).is_valid(value), (schema, text)
            assert whitespace or not re.search(r"[\[{,:]\s|^\s", re.sub(r'"[^"]*"', "", text))
            kinds.add(type(value))
            checked += 1
    assert checked == 50
    assert len(kinds) >= 5, "too few kinds of answers"


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2},
        {"presence_penalty": 2.0, "repetition_penalty": 3.0}, {"min_tokens": 30},
        {"logit_bias": ((66, -100.0), (67, -100.0), (100, 100.0))}, {"temperature": 100.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_grammar_holds_whatever_else_is_asked(tokenizer, how):
    regex = "(ab|cd?)[0-9]{2,4}e"
    samplings = [
        Sampling(
            seed=seed, stop_ids=tokenizer.stop_ids, max_tokens=400,
            grammar=grammar(tokenizer, regex=regex), **how,
        )
        for seed in range(6)
    ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        sampler = sampler_of(tokenizer, samplings)
        for ids in say(sampler, samplings, seed=3, dtype=dtype).values():
            text = tokenizer.decode(ids[:-1], special=True)
            assert re.fullmatch(regex, text), text
            assert ids[-1] in tokenizer.stop_ids


def test_choices_are_one_of_them_and_each_can_be(tokenizer):
    choices = ["yes", "no", "", "a|b", "(c)*", " x\n", "ä€", "ye", "\\d", "-^$.[]{}?+#/&~'\"%", "𝄞"]
    samplings = [asking(tokenizer, seed, choice=choices) for seed in range(80)]
    said = say(sampler_of(tokenizer, samplings), samplings, seed=1)
    texts = {tokenizer.decode(ids[:-1], special=True) for ids in said.values()}
    assert texts == set(choices)


def test_a_lark_grammar_is_followed(tokenizer):
    rules = ('start: item ("," item)~0..3', 'item: NAME "=" NUMBER', "NAME: /[a-z]{1,3}/")
    text = "\n".join((*rules, "NUMBER: /[0-9]{1,2}/"))
    samplings = [asking(tokenizer, seed, grammar=text) for seed in range(8)]
    texts = set()
    for ids in say(sampler_of(tokenizer, samplings), samplings, seed=1).values():
        texts.add(tokenizer.decode(ids[:-1], special=True))
    assert all(re.fullmatch("[a-z]{1,3}=\\d{1,2}(,[a-z]{1,3}=\\d{1,2}){0,3}", t) for t in texts)
    assert len(texts) == 8


def test_any_object_and_any_length(tokenizer):
    """Cut by its length, an answer is the beginning of one."""
    samplings = [asking(tokenizer, seed, json_object=True) for seed in range(4)]
    said = say(sampler_of(tokenizer, samplings), samplings, seed=1, most=12)
    texts = [tokenizer.decode(ids) for ids in said.values()]
    assert all(text.startswith("{") for text in texts), texts


# --- neighbours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neighbours_are_left_alone_to_the_bit(tokenizer, dtype):
    free = [
        Sampling(seed=1, max_tokens=30, logprobs=2),
        Sampling(seed=2, max_tokens=30, temperature=0.0, presence_penalty=1.0),
        Sampling(seed=3, max_tokens=30, top_p=0.7),
    ]
    held = [asking(tokenizer, 4, regex="[a-f]{30,40}"), asking(tokenizer, 5, json={})]
    alone = say(sampler_of(tokenizer, free), free, seed=9, most=30, dtype=dtype)
    sampler = sampler_of(tokenizer, [*free, *held])
    together = say(sampler, [*free, *held], seed=9, most=30, dtype=dtype)
    assert {i: together[i] for i in alone} == alone


def test_a_step_without_grammars_is_left_alone(tokenizer):
    masks, logits = Masks(), torch.randn(2, V)
    masks.learn(tokenizer.vocabulary)
    one = grammar(tokenizer, regex="ab")
    masks.prepare(one)
    masks.add(1, one)
    assert masks.applied(logits, logits, [7, 8], idle=-1) is logits
    assert masks.applied(logits, logits, [1, 8], idle=1) is logits
    kept = logits.clone()
    masked = masks.applied(logits, logits, [8, 1], idle=-1)
    assert torch.equal(logits, kept)
    assert torch.equal(masked[0], logits[0])
    (allowed,) = (masked[1] > -torch.inf).nonzero()[:, 0].tolist()
    assert allowed == tokenizer.encode("a")[0]
    masks.remove(1)
    assert masks.applied(logits, logits, [8, 1], idle=-1) is logits


def test_a_thrown_away_token_is_not_followed_and_logprobs_are_the_models_own(tokenizer):
    sampling = Sampling(
        seed=1, logprobs=1, stop_ids=tokenizer.stop_ids, grammar=grammar(tokenizer, regex="ab")
    )
    sampler, logits = sampler_of(tokenizer, [sampling]), torch.randn(1, V)
    for _ in range(3):
        sampler.choose(logits, [0], idle=0)
    choices = [sampler.choose(logits, [0])[0] for _ in range(3)]
    assert [choice.token for choice in choices] == [*tokenizer.encode("ab"), 1]
    own = logits.double().log_softmax(-1)[0]
    for choice in choices:
        assert choice.logprob == pytest.approx(float(own[choice.token]), abs=1e-5)
        assert choice.top[0][0] == int(own.argmax())


def test_requests_of_one_grammar_go_their_own_ways(tokenizer):
    """As ``n`` answers to a prompt do; a grammar is read once, and each has its own copy."""
    samplings = [asking(tokenizer, seed, regex="[ab]{20}") for seed in range(8)]
    said = say(sampler_of(tokenizer, samplings), samplings, seed=2)
    texts = {tokenizer.decode(ids) for ids in said.values()}
    assert len(texts) == 8
    assert all(re.fullmatch("[ab]{20}", text) for text in texts)


def test_a_grammar_without_its_vocabulary_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="vocabulary that was not sent"):
        Masks().prepare(Grammar("", "x"))


def test_what_the_matcher_cannot_follow_is_a_fault_of_its_request(tokenizer):
    """Whatever the cause: here a grammar that was not checked, and a token it does not allow."""
    masks, logits = Masks(), torch.zeros(2, V)
    masks.learn(tokenizer.vocabulary)
    for request_id, text in ((1, "start: nowhere"), (2, 'start: "ab"')):
        one = Grammar(text, tokenizer.vocabulary.key)
        masks.prepare(one)
        masks.add(request_id, one)
    masks.applied(logits, logits, [1, 2], idle=-1)
    assert list(masks.faults) == [1]
    assert "nowhere" in masks.faults[1]
    masks.said(2, 77)
    assert "can't be followed" in masks.faults[2]
    assert "<state>" not in masks.faults[2]
    masks.applied(logits, logits, [1, 2], idle=-1)
    masks.remove(1)
    assert list(masks.faults) == [2]


# --- what is refused ----------------------------------------------------------------------------

DEEP = {"type": "integer"}
for _ in range(120):
    DEEP = {"type": "array", "items": DEEP}
CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)}
FAULTS = [
    ({"json": {"type": "strng"}}, "Invalid type: strng"),
    ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json": {"not": {"type": "string"}}}, "not"),
    ({"json": {"type": "object", "properties": {"a": {"if": {}}}}}, "if"),
    ({"json": {"not": {}, "x-guidance": {"lenient": True}}}, "not"),
    ({"json": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "oneOf"),
    ({"json": {"type": "string", "format": "foo"}}, "Unknown format: foo"),
    ({"json": {"$ref": "#/$defs/nowhere"}}, "nowhere"),
    ({"json": {"$ref": "http://127.0.0.1/x"}}, "not present|retriev"),
    ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
    ({"json": {"minLength": 3, "maxLength": 2, "type": "string"}}, "Unsatisfiable"),
    ({"json": "{"}, "not JSON"),
    ({"json": "[1]"}, "JSON object"),
    ({"json": {"const": "\ud83d"}}, "structured_outputs.json"),
    ({"json": DEEP}, "levels"),
    ({"json": {"$defs": {**CHAIN, "d3000": {}}, "$ref": "#/$defs/d0"}}, "3001 of"),
    ({"json": {"type": "integer", "multipleOf": 99999}}, "remainders"),
    ({"json": {"allOf": [{"multipleOf": 97}, {"multipleOf": 0.91}]}}, "remainders"),
    ({"json": {"anyOf": [{"multipleOf": n / 7} for n in range(1, 900)]}}, "remainders"),
    ({"json": {"allOf": [{"multipleOf": 1}, {"multipleOf": 5e-324}]}}, "remainders"),
    ({"json": {"enum": ["x" * 2**19]}}, "characters"),
    ({"regex": "("}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"choice": ["a", "\ud83d"]}, "surrogate"),
    ({"grammar": "start: nowhere"}, "unknown name"),
    ({"grammar": 'root ::= "a"'}, "Expected token"),
    ({"grammar": "start: <|eot|>"}, "special tokens"),
    ({"grammar": '{"grammars": []}'}, "Lark"),
    ({"grammar": 'start: %json {"not": {}}'}, "%json"),
    ({"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(2000))}, "lines"),
]


@pytest.mark.parametrize(("asked", "says"), FAULTS, ids=lambda value: str(value)[:40])
def test_a_fault_is_refused_with_its_place(asked, says):
    with pytest.raises(BadRequestError, match=says) as caught:
        grammar_of(None, StructuredOutputs.model_validate(asked))
    (name,) = asked
    error = caught.value.body["error"]
    assert error["param"] == f"structured_outputs.{name}"
    assert len(error["message"]) < 1000


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"regex": "a", "choice": ["b"]}, "regex.*choice.*send exactly one"),
        ({"jsn": {}}, "got none"),
        ({"regex": ""}, "at least 1 character"),
        ({"choice": []}, "at least 1 item"),
        ({"regex": "a", "disable_any_whitespace": True}, "json or json_object alone"),
    ],
    ids=str,
)
def test_no_form_or_two_are_refused(asked, says):
    with pytest.raises(ValueError, match=says):
        StructuredOutputs.model_validate(asked)


@pytest.mark.parametrize(
    "asked", [{"type": "json_schema"}, {"type": "text", "json_schema": {"name": "a", "schema": {}}}]
)
def test_a_schema_goes_with_its_type(asked):
    with pytest.raises(ValueError, match="json_schema"):
        ResponseFormat.model_validate(asked)
