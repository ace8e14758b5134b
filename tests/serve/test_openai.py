"""OpenAI's API through OpenAI's own client, against a running server on two ranks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time

import httpx2 as httpx
import openai
import pytest

from bdlora_megatron.serve.messages import Sampling
from tests.serve import models
from tests.serve.conftest import SIZES
from tests.serve.servers import RunningServer
from tests.unit.serve.test_penalties import by_hand

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed_with_their_parents(client, folder):
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {"model", *models.ADAPTERS}
    assert cards["model"].parent is None
    assert cards["blocks"].parent == "model"
    assert cards["blocks"].root == str(folder / "adapters" / "blocks")
    assert client.models.retrieve("blocks").id == "blocks"


@pytest.fixture(params=[1, 2, 4])
def at_tp(request, folder, tmp_path):
    """A client of a server on so many ranks."""
    if request.param == 2:
        url, own = request.getfixturevalue("server").url, contextlib.nullcontext()
    else:
        names = [f"{name}={folder / 'adapters' / name}" for name in models.ADAPTERS]
        own = RunningServer(
            folder, tmp_path / "log", "--tp", str(request.param), "--adapters", *names,
            "--set", *SIZES,
        )  # fmt: skip
        url = own.url
    with own, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_every_model_answers_as_alone_while_all_are_served_at_once(at_tp, alone, tokenizer):
    """Forty requests in flight over base, vanilla and block-diagonal adapters.

    Where nothing is drawn, alone is PEFT; else the same request while nobody else asks.
    """
    names = ["model", *models.ADAPTERS]
    wanted = [(names[i % 4], f"{i} bottles of beer" * (1 + i % 5), 3 + i % 9) for i in range(40)]
    drawn = {
        i: {"seed": i, "n": 1 + i % 2, "temperature": 0.9, "top_p": 0.9, "presence_penalty": i / 20}
        for i in range(0, 40, 5)
    }

    def ask(i):
        model, prompt, count = wanted[i]
        how = drawn.get(i, {"temperature": 0})
        return at_tp.completions.create(
            model=model, prompt=prompt, max_tokens=count, logprobs=0, **how
        )

    apart = {i: [choice.text for choice in ask(i).choices] for i in drawn}
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    different = set()
    for i, ((model, prompt, count), answer) in enumerate(zip(wanted, answers, strict=True)):
        ids, usage = tokenizer.encode(prompt), answer.usage
        if i in drawn:
            assert [choice.text for choice in answer.choices] == apart[i], (model, prompt)
            continue
        (choice,), expected = answer.choices, alone(model, ids, count)
        text = tokenizer.decode(expected, skip_special_tokens=True)
        assert choice.text == text, (model, prompt)
        assert choice.finish_reason == ("stop" if expected[-1] == 1 else "length")
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(expected))
        assert usage.total_tokens == len(ids) + len(expected)
        different.add((model, tuple(expected)))
    assert len(different) > 25, "the adapters answer alike; the test shows less than it says"


def test_min_p_of_one_leaves_the_most_probable_token(client):
    request = {"model": "blocks", "prompt": "hello", "max_tokens": 12}
    hot = {"temperature": 2, "seed": 3}
    wanted = client.completions.create(**request, temperature=0).choices[0].text
    free = client.completions.create(**request, **hot).choices[0].text
    held = client.completions.create(**request, **hot, extra_body={"min_p": 1.0}).choices[0].text
    assert held == wanted != free


def test_a_stream_says_what_a_whole_answer_says(client):
    for model in ("model", "blocks"):
        request = {"model": model, "prompt": "hello", "max_tokens": 20, "temperature": 0}
        whole = client.completions.create(**request)
        chunks = list(
            client.completions.create(
                **request, stream=True, stream_options={"include_usage": True}
            )
        )
        *texts, last = chunks
        assert "".join(chunk.choices[0].text for chunk in texts) == whole.choices[0].text
        assert texts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert last.choices == []
        assert last.usage == whole.usage
        assert len(texts) > 3
        assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_may_count_its_tokens_as_they_come(client):
    request = {"model": "model", "prompt": "hello", "max_tokens": 9, "temperature": 0}
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.completions.create(**request, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    whole = client.completions.create(**request).usage
    assert all(chunk.usage.prompt_tokens == whole.prompt_tokens for chunk in chunks)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == whole.completion_tokens
    # Without a total nothing is counted.
    options = {"continuous_usage_stats": True}
    plain = client.completions.create(**request, stream=True, stream_options=options)
    assert all(chunk.usage is None for chunk in plain)


@pytest.mark.parametrize("stream", [False, True])
def test_fields_without_effect_are_named_in_a_header(server, stream):
    messages = [
        {"role": "user", "content": "Say hi"},
        {"role": "assistant", "content": None, "refusal": None, "annotations": []},
        {"role": "user", "content": "more", "höhe": 1},
    ]
    body = {
        "model": "model", "messages": messages, "max_tokens": 2, "stream": stream, "store": True,
        "tools": [], "tool_choice": "none", "n": None, "metadata": None, "a field\n": 1,
    }  # fmt: skip
    with httpx.Client(base_url=server.url) as raw:
        answer = raw.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        names = answer.headers["x-ignored-fields"].split(", ")
        assert sorted(names) == ["a%20field%0A", "messages.h%C3%B6he", "store"]
        plain = raw.post("/v1/chat/completions", json={**body, "a field\n": None, "store": None})
        assert plain.headers["x-ignored-fields"] == "messages.h%C3%B6he"


def test_the_front_has_no_torch(server):
    """It answers while ranks compute, and a process with torch is ten times as large."""
    libraries = {mapped.path for mapped in server.api.memory_maps()}
    assert any("tokenizers" in path for path in libraries), "no tokenizer was read"
    assert not any("libtorch" in path for path in libraries)


def test_chat_uses_the_models_template(client, alone, tokenizer):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    ids = tokenizer.encode("<system>be kind\n<user>hello\n<assistant>")
    made = client.chat.completions.create(
        model="vanilla", messages=messages, max_completion_tokens=9, temperature=0,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    expected = alone("vanilla", ids, 9)
    assert made.usage.prompt_tokens == len(ids)
    assert made.choices[0].message.role == "assistant"
    assert made.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True)
    content = made.choices[0].logprobs.content
    assert len(content) == len(expected)
    for token in content:
        assert len(token.top_logprobs) == 3
        # Greedy: the chosen token is the most probable one.
        assert token.top_logprobs[0].logprob == token.logprob
    told = b"".join(bytes(token.bytes) for token in content)
    assert told.decode(errors="replace") == made.choices[0].message.content
    assert {len(token.bytes) for token in content} == {1}
    assert "\ufffd" in [token.token for token in content], "no character is torn"
    streamed = client.chat.completions.create(
        model="vanilla", messages=messages, max_tokens=9, temperature=0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in streamed]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == made.choices[0].message.content


def test_stop_texts_end_an_answer_and_are_cut_off(client):
    request = {"model": "model", "prompt": "hello", "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**request).choices[0].text
    stop = text[10:13]
    for stream in (False, True):
        made = client.completions.create(**request, stop=["never there", stop], stream=stream)
        choices = [chunk.choices[0] for chunk in made] if stream else made.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_several_answers_have_seeds_of_their_own_and_a_seed_repeats_them(client):
    request = {"model": "blocks", "prompt": ["one", "two"], "n": 3, "max_tokens": 12, "seed": 11}
    first = client.completions.create(**request)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == list(range(6))
    assert len(set(texts)) == 6
    assert [c.text for c in client.completions.create(**request).choices] == texts
    alone = client.completions.create(**{**request, "prompt": "two", "n": 1})
    assert alone.choices[0].text == texts[3]
    other = client.completions.create(**{**request, "seed": 12})
    assert [c.text for c in other.choices] != texts
    assert first.usage.prompt_tokens == 6


def test_echo_token_prompts_and_log_probabilities(client, tokenizer):
    ids = tokenizer.encode("hello")
    made = client.completions.create(
        model="model", prompt=ids, echo=True, max_tokens=3, temperature=0
    )
    plain = client.completions.create(
        model="model", prompt="hello", max_tokens=3, temperature=0, logprobs=2
    )
    assert made.choices[0].text == "hello" + plain.choices[0].text
    logprobs = plain.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 3
    assert logprobs.text_offset[0] == 0
    assert max(logprobs.top_logprobs[0].values()) == logprobs.token_logprobs[0]


@pytest.mark.parametrize(
    "asked",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"extra_body": {"repetition_penalty": 1.4}},
        {"logit_bias": {"40": 6.5, "50": -100}},
        {"extra_body": {"min_tokens": 12, "stop_token_ids": list(range(30, 90))}},
        {"presence_penalty": -0.5, "frequency_penalty": 0.6, "logit_bias": {"77": 4},
         "extra_body": {"repetition_penalty": 1.2, "min_tokens": 3, "stop_token_ids": [60, 61]}},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("model", ["model", "blocks"])
def test_penalties_are_openais_and_vllms_on_pefts_logits(client, tuned, tokenizer, model, asked):
    request = {"model": model, "prompt": "hello", "max_tokens": 50, "temperature": 0, **asked}
    made = client.completions.create(**request, logprobs=0)
    fields = {**asked, **asked.get("extra_body", {})}
    fields.pop("extra_body", None)
    bias = {int(token): value for token, value in fields.pop("logit_bias", {}).items()}
    stops = frozenset({1, *fields.pop("stop_token_ids", ())})
    how = Sampling(logit_bias=tuple(bias.items()), stop_ids=stops, max_tokens=50, **fields)
    prompt, said, worth, turned = tokenizer.encode("hello"), [], [], 0
    while len(said) < 50 and not (said and said[-1] in stops):
        logits = models.logits(tuned, model, prompt + said)[-1]
        changed = by_hand(logits.tolist(), how, prompt, said)
        said.append(max(range(len(changed)), key=changed.__getitem__))
        worth.append(float(logits.log_softmax(-1)[said[-1]]))
        turned += said[-1] != int(logits.argmax())
    (choice,) = made.choices
    assert choice.text == tokenizer.decode(said, skip_special_tokens=True)
    assert choice.finish_reason == ("stop" if said[-1] in stops else "length")
    # What is reported is the model's own.
    assert choice.logprobs.token_logprobs == pytest.approx(worth, abs=1e-4)
    assert turned, "no token was turned away; the test shows less than it says"
    again = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=16, **asked
    )
    assert again.choices[0].message.content


def test_an_answer_with_a_least_length_is_not_ended_by_a_stop_text_before(client):
    request = {"model": "model", "prompt": "hello", "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**request).choices[0].text
    least = {"min_tokens": 9}
    made = client.completions.create(**request, stop=text[:4], extra_body=least).choices[0]
    assert made.text == text
    stop = text[8:11]
    made = client.completions.create(**request, stop=stop, extra_body=least).choices[0]
    assert made.text == text[: text.index(stop)]
    assert made.finish_reason == "stop"


@pytest.mark.parametrize("model", ["model", *models.ADAPTERS])
def test_prompts_are_scored_as_peft_scores_them(client, tuned, alone, tokenizer, model):
    # Longer than a step: the prompt is read in chunks.
    prompt = "ninety-nine bottles of beer on the wall, ninety-nine bottles of beer"
    ids = tokenizer.encode(prompt)
    request = {"model": model, "prompt": prompt, "echo": True, "logprobs": 2, "temperature": 0}
    made = client.completions.create(**request, max_tokens=2)
    assert made.choices[0].text.startswith(prompt)
    found = made.choices[0].logprobs
    whole = ids + alone(model, ids, 2)
    wanted = models.logits(tuned, model, whole).log_softmax(-1)
    assert len(found.tokens) == len(whole) == len(ids) + 2
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    for place, token in enumerate(whole[1:], start=1):
        row = wanted[place - 1]
        assert found.token_logprobs[place] == pytest.approx(float(row[token]), abs=1e-4)
        # Two tokens that are no text by themselves are spelt alike: the more probable one stays.
        top = list(found.top_logprobs[place].values())
        assert top == pytest.approx(row.topk(2).values[: len(top)].tolist(), abs=1e-4)
    assert found.text_offset == list(range(len(whole)))
    # Nothing but the score, and all of it in a stream's first piece.
    scored = client.completions.create(**request, max_tokens=0)
    assert scored.choices[0].text == prompt
    assert scored.choices[0].finish_reason == "length"
    assert scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        found.token_logprobs[1:-2], abs=1e-5
    )
    stream = client.completions.create(**request, max_tokens=2, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == made.choices[0].text
    streamed = [value for chunk in chunks for value in chunk.logprobs.token_logprobs]
    assert streamed[1:] == pytest.approx(found.token_logprobs[1:], abs=1e-5)
    assert len(chunks[0].logprobs.tokens) > len(ids)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "does not exist"),
        ({"max_tokens": 999}, openai.BadRequestError, "256"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"prompt": ""}, openai.BadRequestError, "no tokens"),
        ({"prompt": [[1], [10**6]]}, openai.BadRequestError, "token ids"),
        ({"frequency_penalty": 2.5}, openai.BadRequestError, "frequency_penalty"),
        ({"presence_penalty": -2.5}, openai.BadRequestError, "presence_penalty"),
        ({"logit_bias": {"7": 101}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"hello": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias.*token ids beyond"),
        ({"extra_body": {"repetition_penalty": 0}}, openai.BadRequestError, "repetition_penalty"),
        ({"extra_body": {"min_tokens": 17}}, openai.BadRequestError, "min_tokens=17"),
        ({"extra_body": {"guided_json": {}}}, openai.BadRequestError, "guided_json"),
        ({"best_of": 3}, openai.BadRequestError, "best_of"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_in_openais_words(client, change, error, says):
    with pytest.raises(error, match=says) as caught:
        client.completions.create(**{"model": "model", "prompt": "hello", **change})
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}


def test_strange_requests_get_errors_of_the_same_shape(server):
    with httpx.Client(base_url=server.url) as raw:
        for status, answer in [
            (404, raw.get("/v1/nothing")),
            (405, raw.get("/v1/completions")),
            (400, raw.post("/v1/completions", content=b"{not json")),
            (400, raw.post("/v1/completions", json=[1, 2])),
            (413, raw.post("/v1/completions", content=b" " * (2**22 + 1))),
            (413, raw.post("/v1/completions", content=(b" " * 2**20 for _ in range(5)))),
        ]:
            assert answer.status_code == status
            assert answer.json()["error"]["message"]


def test_megatrons_own_clients_work_and_may_name_an_adapter(server, client):
    with httpx.Client(base_url=server.url) as raw:
        for adapter in (None, "blocks"):
            body = {"prompts": ["hello", "you"], "tokens_to_generate": 5, "top_k": 1}
            if adapter:
                body["adapter"] = adapter
            answer = raw.put("/api", json=body).raise_for_status().json()
            for prompt, text, tokens in zip(
                body["prompts"], answer["text"], answer["tokens"], strict=True
            ):
                same = client.completions.create(
                    model=adapter or "model", prompt=prompt, max_tokens=5, temperature=0, echo=True
                )
                assert text == same.choices[0].text
                assert len(tokens) == len(prompt) + same.usage.completion_tokens


def test_health_readiness_and_metrics(server):
    assert server.get("/health") == (200, b"ok")
    assert server.get("/ready") == (200, b"ready")
    text = server.get("/metrics")[1].decode()
    for name in ("requests_total", "time_to_first_token_seconds_bucket", "slot_loads_total"):
        assert f"bdlora_{name}" in text
    assert server.metric('bdlora_requests_total{model="blocks",status="ok"}') > 0


def test_routers_read_vllms_names(server, client):
    """What the Gateway API inference extension's protocol and vLLM's dashboards ask for."""
    first = server.metric('vllm:time_to_first_token_seconds_count{model_name="model"}')
    between = server.metric('vllm:inter_token_latency_seconds_count{model_name="model"}')
    stream = client.completions.create(
        model="blocks",
        prompt="the fox",
        max_tokens=40,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    running, text = 0.0, ""
    # The engine's numbers come with its steps.
    for _ in range(200):
        text = server.get("/metrics")[1].decode()
        running = server.metric('vllm:num_requests_running{model_name="model"}')
        if running and 'running_lora_adapters="blocks"' in text:
            break
        time.sleep(0.01)
    rest = list(stream)
    assert running == 1
    assert 'vllm:lora_requests_info{max_lora="' in text
    assert 'running_lora_adapters="blocks",waiting_lora_adapters=""' in text
    assert 'vllm:cache_config_info{block_size="' in text
    assert rest[-1].choices[0].finish_reason == "length"
    assert server.metric('vllm:num_requests_waiting{model_name="model"}') == 0
    assert 0 <= server.metric('vllm:kv_cache_usage_perc{model_name="model"}') <= 1
    assert server.metric('vllm:time_to_first_token_seconds_count{model_name="model"}') == first + 1
    found = server.metric('vllm:inter_token_latency_seconds_count{model_name="model"}')
    # Tokens that came with the first piece have no time between them.
    assert between < found <= between + 39
