"""OpenAI's API through OpenAI's own client, against a running server on two ranks."""

from __future__ import annotations

import concurrent.futures

import httpx2 as httpx
import openai
import pytest
import torch

from tests.serve import models

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tuned(folder):
    """PEFT's model with all adapters."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tuned = None
    for name in models.ADAPTERS:
        path = folder / "adapters" / name
        if tuned is None:
            tuned = peft.PeftModel.from_pretrained(base, path, adapter_name=name)
        else:
            tuned.load_adapter(path, adapter_name=name)
    return tuned


@pytest.fixture(scope="module")
def alone(tuned):
    """What PEFT answers, token by token, to a prompt's token ids."""

    def answer(model: str, ids: list[int], count: int) -> list[int]:
        given = torch.tensor([ids])
        settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        settings |= {"attention_mask": torch.ones_like(given)}
        if model == "model":
            with tuned.disable_adapter():
                out = tuned.generate(given, **settings)
        else:
            tuned.set_adapter(model)
            out = tuned.generate(given, **settings)
        return out[0, len(ids) :].tolist()

    return answer


@pytest.fixture(scope="module")
def tokenizer(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder / "model")


def test_models_are_listed_with_their_parents(client, folder):
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {"model", *models.ADAPTERS}
    assert cards["model"].parent is None
    assert cards["blocks"].parent == "model"
    assert cards["blocks"].root == str(folder / "adapters" / "blocks")
    assert client.models.retrieve("blocks").id == "blocks"


def test_every_model_answers_as_peft_does_while_all_are_served_at_once(client, alone, tokenizer):
    """Forty requests in flight over base, vanilla and block-diagonal adapters, on two ranks."""
    names = ["model", *models.ADAPTERS]
    wanted = [(names[i % 4], f"{i} bottles of beer" * (1 + i % 5), 3 + i % 9) for i in range(40)]

    def ask(request):
        model, prompt, count = request
        made = client.completions.create(
            model=model, prompt=prompt, max_tokens=count, temperature=0, logprobs=0
        )
        return made.choices[0], made.usage

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, wanted))
    different = set()
    for (model, prompt, count), (choice, usage) in zip(wanted, answers, strict=True):
        ids = tokenizer.encode(prompt)
        expected = alone(model, ids, count)
        text = tokenizer.decode(expected, skip_special_tokens=True)
        assert choice.text == text, (model, prompt)
        assert choice.finish_reason == ("stop" if expected[-1] == 1 else "length")
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(expected))
        assert usage.total_tokens == len(ids) + len(expected)
        different.add((model, tuple(expected)))
    assert len(different) > 30, "the adapters answer alike; the test shows less than it says"


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


@torch.no_grad()
def _log_probabilities(tuned, model, ids):
    """Of every next token in every place, by PEFT."""
    if model == "model":
        with tuned.disable_adapter():
            return tuned(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    tuned.set_adapter(model)
    return tuned(torch.tensor([ids])).logits[0].double().log_softmax(-1)


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
    wanted = _log_probabilities(tuned, model, whole)
    assert len(found.tokens) == len(whole) == len(ids) + 2
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    for place, token in enumerate(whole[1:], start=1):
        row = wanted[place - 1]
        assert found.token_logprobs[place] == pytest.approx(float(row[token]), abs=1e-4)
        # Two tokens that are no text by themselves are spelt alike, and are one entry.
        top = list(found.top_logprobs[place].values())
        assert top == pytest.approx(row.topk(2).values[-len(top) :].tolist(), abs=1e-4)
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
        ({"frequency_penalty": 1.0}, openai.BadRequestError, "frequency_penalty"),
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
