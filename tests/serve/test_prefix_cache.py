"""What the HTTP API tells of the prefix cache, and what it must not show."""

from __future__ import annotations

import shutil

import httpx2 as httpx
import pytest

from bdlora_megatron.errors import UnsupportedError
from bdlora_megatron.runtime.versions.known import prefix_caching
from tests.serve import models
from tests.serve.soak import ask, load, text, unload

try:
    HAS_CACHE = prefix_caching(None)
except UnsupportedError:
    HAS_CACHE = False

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not HAS_CACHE, reason="Megatron-Core has a prefix cache since 0.17"),
]

#: Positions of a block in the server's settings; a token is a byte.
BLOCK = 8
SYSTEM = "Answer in the words of a fox. "


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def cached(answer) -> int:
    usage = answer.raise_for_status().json()["usage"]
    found: int = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 <= found <= usage["prompt_tokens"]
    return found


def found_of(length: int) -> int:
    """Whole blocks that leave two tokens."""
    return (length - 2) // BLOCK * BLOCK


@pytest.mark.parametrize("model", ["model", "vanilla", "blocks", "attention"])
def test_usage_counts_what_was_found(http, server, alone, tokenizer, model):
    def counts():
        names = ("prefix_cache_queries", "prefix_cache_hits")
        ours = [server.metric(f"bdlora_{name}_total") for name in names]
        theirs = [server.metric(f'vllm:{name}_total{{model_name="model"}}') for name in names]
        assert ours == theirs
        return ours

    prompt = SYSTEM + "What is up?"
    ids, before = tokenizer.encode(prompt), counts()
    expected = tokenizer.decode(alone(model, ids, 6), skip_special_tokens=True)
    # The same prompt for every model: each one's first request finds nothing.
    answers = [ask(http, model, prompt) for _ in range(2)]
    assert [text(answer) for answer in answers] == [expected] * 2
    assert [cached(answer) for answer in answers] == [0, found_of(len(ids))]
    queries, hits = counts()
    assert (queries - before[0], hits - before[1]) == (2 * len(ids), found_of(len(ids)))
    # Another question of the same system, and several at once; a prompt counts once.
    other = ask(http, model, SYSTEM + "Now?", n=2)
    assert cached(other) == len(SYSTEM) // BLOCK * BLOCK
    both = ask(http, model, [prompt, SYSTEM + "Else?"])
    assert cached(both) == found_of(len(ids)) + len(SYSTEM) // BLOCK * BLOCK
    assert server.metric("bdlora_used_blocks") == 0 < server.metric("bdlora_cached_blocks")
    assert server.metric('vllm:kv_cache_usage_perc{model_name="model"}') == 0


@pytest.mark.parametrize("stream", [False, True])
def test_chats_tell_it_too(http, stream):
    body = {
        "model": "blocks",
        "messages": [
            {"role": "system", "content": "You are a helper."},
            {"role": "user", "content": "hello"},
        ],
        "max_tokens": 4,
        "cache_salt": f"stream {stream}",
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    found = []
    for _ in range(2):
        answer = http.post("/v1/chat/completions", json=body).raise_for_status()
        if stream:
            *_, last, done = [line for line in answer.text.split("\n\n") if line]
            assert done == "data: [DONE]"
            usage = httpx.Response(200, text=last.removeprefix("data: ")).json()["usage"]
        else:
            usage = answer.json()["usage"]
        found.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert found == [0, found_of(usage["prompt_tokens"])]


def test_a_prompt_that_is_scored_is_computed_whole(http):
    prompt = SYSTEM + "How likely is that?"
    body = {"echo": True, "logprobs": 1, "max_tokens": 0}
    first = ask(http, "blocks", prompt, **body)
    assert cached(ask(http, "blocks", prompt)) < cached(ask(http, "blocks", prompt))
    again = ask(http, "blocks", prompt, **body)
    assert cached(first) == cached(again) == 0
    values = [
        answer.json()["choices"][0]["logprobs"]["token_logprobs"] for answer in (first, again)
    ]
    assert len(values[1]) == len(prompt)
    assert values[1] == [None, *(pytest.approx(value, abs=1e-5) for value in values[0][1:])]


def test_salts_keep_prompts_apart(http):
    prompt = SYSTEM + "Any salt?"
    salts = ["a", "b", "a", None, None]
    answers = [
        ask(http, "vanilla", prompt, **({} if salt is None else {"cache_salt": salt}))
        for salt in salts
    ]
    found, begin = found_of(len(prompt)), len(SYSTEM) // BLOCK * BLOCK
    assert [cached(answer) for answer in answers][:3] == [0, 0, found]
    assert [cached(answer) for answer in answers][3:] in ([0, found], [begin, found])
    assert len({text(answer) for answer in answers}) == 1
    assert all("x-ignored-fields" not in answer.headers for answer in answers)
    assert ask(http, "vanilla", prompt, cache_salt="").status_code == 400


def test_a_new_version_of_a_name_finds_nothing_of_the_old(http, folder):
    path = folder / "adapters" / "renewed"
    prompt = SYSTEM + "Which one are you?"
    shutil.copytree(folder / "adapters" / "vanilla", path)
    try:
        assert load(http, "renewed", path).status_code == 200
        old = [ask(http, "renewed", prompt) for _ in range(2)]
        assert [cached(answer) for answer in old] == [0, found_of(len(prompt))]
        shutil.rmtree(path)
        models.make_adapter(folder / "model", path, seed=98, r=4)
        assert load(http, "renewed", path, load_inplace=True).status_code == 200
        new = [ask(http, "renewed", prompt) for _ in range(2)]
        assert [cached(answer) for answer in new] == [0, found_of(len(prompt))]
        assert text(old[0]) == text(old[1]) != text(new[0]) == text(new[1])
        # Unloaded and loaded again, the name's count of versions goes on.
        assert unload(http, "renewed").status_code == 200
        assert load(http, "renewed", path).status_code == 200
        assert cached(ask(http, "renewed", prompt)) == 0
    finally:
        unload(http, "renewed")
        shutil.rmtree(path)
