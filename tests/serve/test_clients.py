"""What people ask a server with, unmodified: `make test-clients` makes an environment that has it.

The server runs here. The clients run in their own environment, and reach nothing but the server.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
import subprocess
from functools import partial
from pathlib import Path

import httpx2 as httpx
import pytest
import yaml

from tests.serve import models
from tests.serve.clients.common import Go, Task, chat
from tests.serve.conftest import SIZES
from tests.serve.servers import RunningServer

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".venv-clients" / "bin"
#: A BD-LoRA, the base model, a vanilla LoRA.
MODELS = ["blocks", "model", "vanilla"]
PROMPTS = ["hello there", "ninety-nine bottles", "grün", "x"]
TOKENS = 8
KEY, FEW = "a-key-for-all", "a-key-for-few"
WORDS = [
    "beer", "wall", "bottle", "river", "stone", "green", "seven", "silver", "garden", "window",
    "paper", "engine",
]  # fmt: skip

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not BIN.is_dir(), reason="the clients are not installed; make test-clients installs them"
    ),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    names = [f"{name}={folder / 'adapters' / name}" for name in models.ADAPTERS]
    keys = f"api_keys=[{{key: {KEY}}}, {{key: {FEW}, models: [{MODELS[0]}]}}]"
    with RunningServer(
        folder, log, "--tp", "2", "--adapters", *names, "--set", *SIZES, keys
    ) as running:
        yield running


@pytest.fixture(scope="module")
def post(server):
    with httpx.Client(
        base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ) as raw:
        yield lambda path, **body: raw.post(path, json=body).raise_for_status().json()


@pytest.fixture(scope="module")
def task(server, tokenizer):
    spaces = [tokenizer.encode(c)[0] for c in " \n\r\t"]
    return Task(f"{server.url}/v1", KEY, FEW, MODELS, PROMPTS, "hello" * 100, TOKENS, spaces)


@pytest.fixture(scope="module")
def plain(post, task):
    """What plain requests get, one after another: texts with their numbers of tokens."""
    how = {"max_tokens": TOKENS, "temperature": 0}
    found = {"text": [], "chat": [], "drawn": []}
    for place, (model, prompt) in enumerate(task.asked):
        draw = {"max_tokens": TOKENS, "temperature": 1, "seed": place}
        asked = [
            ("text", post("/v1/completions", model=model, prompt=prompt, **how)),
            ("chat", post("/v1/chat/completions", model=model, messages=chat(prompt), **how)),
            ("drawn", post("/v1/completions", model=model, prompt=prompt, **draw)),
        ]
        for kind, answer in asked:
            found[kind].append([said(answer), answer["usage"]["completion_tokens"]])
    for answers in found.values():
        assert len({text for text, _ in answers}) == len(task.asked), "some adapters answer alike"
    return found


def said(answer):
    (choice,) = answer["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def call(folder, *command):
    """A command of the clients' environment, which neither asks a hub nor sees this one's paths."""
    hidden = {"PYTHONPATH", "VIRTUAL_ENV"}
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "OPENAI_API_KEY": KEY,
        # Else it asks for a list of prices.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OMP_NUM_THREADS": "1",
    }
    program, *arguments = map(str, command)
    done = subprocess.run(
        [BIN / program, *arguments], cwd=ROOT, env=env, timeout=600, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def call_at_once(folder, *commands):
    """Several of them at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(commands)) as pool:
        list(pool.map(lambda command: call(folder, *command), commands))


@pytest.fixture(scope="module", params=["openai", "langchain", "litellm"])
def client(request, task, tmp_path_factory):
    """A client's name, and what its run tells."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "task.json").write_text(json.dumps(dataclasses.asdict(task)))
    run = f"tests.serve.clients.{request.param}_run"
    call(folder, "python", "-m", run, folder / "task.json", folder / "told.json")
    return request.param, json.loads((folder / "told.json").read_text())


def test_each_way_to_ask_gets_what_a_plain_request_gets(client, plain):
    name, told = client
    assert len(told["texts"]) >= 6
    for way, answers in told["texts"].items():
        wanted = plain[way.split()[0]]
        assert [text for text, _ in answers] == [text for text, _ in wanted], way
        # LangChain counts no tokens of texts, nor LiteLLM those of streamed ones.
        counted = [[got, tokens] for (_, got), (_, tokens) in zip(answers, wanted, strict=True)]
        assert all(got == tokens for got, tokens in counted if got is not None), way
        assert way.startswith("text") or all(got is not None for got, _ in counted), way
    if name == "litellm":
        # The prompt has no room in one model, and is asked of another.
        assert told["fallback"] == plain["chat"][0]


def test_an_answer_is_sent_back_as_the_client_has_it(client, post):
    _, told = client
    messages = chat(PROMPTS[0])
    for text in told["conversation"]:
        how = {"max_tokens": TOKENS, "temperature": 0}
        answer = said(post("/v1/chat/completions", model=MODELS[0], messages=messages, **how))
        assert text == answer
        messages += [{"role": "assistant", "content": answer}, *chat("more")]
    assert len(messages) == 5


def test_log_probabilities_are_pefts_and_bytes_those_of_the_text(
    client, plain, tuned, tokenizer, alone
):
    _, told = client
    found = told["logprobs"]
    assert found["best"]
    assert found["chat"] == plain["chat"][0][0]
    for name in ("bytes", "streamed bytes"):
        # A token of this vocabulary is one byte, most often no text by itself.
        assert {len(token) for token in found.get(name, found["bytes"])} == {1}, name
        joined = bytes(itertools.chain(*found.get(name, found["bytes"])))
        assert joined.decode(errors="replace") == found["chat"], name
    if "values" in found:
        ids = tokenizer.encode(PROMPTS[0])
        whole = ids + alone(MODELS[0], ids, TOKENS)
        scores = models.logits(tuned, MODELS[0], whole).log_softmax(-1)
        wanted = [float(scores[place, token]) for place, token in enumerate(whole[1:])]
        assert found["text"] == PROMPTS[0] + plain["text"][0][0]
        assert found["values"][0] is None
        assert found["values"][1:] == pytest.approx(wanted, abs=1e-4)


ERRORS = {
    "openai": {
        "temperature": "BadRequestError", "format": "BadRequestError", "name": "NotFoundError",
        "key": "AuthenticationError", "key for others": "NotFoundError",
        "endpoint": "NotFoundError", "length": "BadRequestError",
    },
    "langchain": {
        "length": "OpenAIContextOverflowError", "name": "OpenAIModelNotFoundError",
        "key": "OpenAIAuthenticationError",
    },
    "litellm": {
        "length": "ContextWindowExceededError", "name": "NotFoundError",
        "key": "AuthenticationError", "temperature": "BadRequestError",
    },
}  # fmt: skip


def test_refusals_are_the_errors_that_each_client_has_for_them(client):
    name, told = client
    assert told["errors"] == ERRORS[name]


def test_tools_are_called_by_each_way_to_ask_for_it(client, post):
    name, told = client
    if name == "openai":
        pytest.skip("tests/serve/test_tool_calls.py has it")
    for model, (called, *arguments, said_) in zip(MODELS, told["tools"], strict=True):
        assert called == "Go"
        assert all(Go.model_validate(one) for one in arguments)
        assert all(one == arguments[0] for one in arguments), "by the most probable tokens"
        call_ = {"id": "abcdEF123", "type": "function", "function": {
            "name": "Go", "arguments": json.dumps(arguments[0])}}  # fmt: skip
        messages = [
            *chat(PROMPTS[3]),
            {"role": "assistant", "content": None, "tool_calls": [call_]},
            {"role": "tool", "tool_call_id": "abcdEF123", "content": "done"},
        ]
        how = {"max_tokens": TOKENS, "temperature": 0}
        assert said_ == said(post("/v1/chat/completions", model=model, messages=messages, **how))


def test_models_headers_and_fields_of_others(client, plain):
    name, told = client
    if "models" in told:
        assert sorted(told["models"]) == sorted(["model", *models.ADAPTERS])
    if name == "openai":
        assert told["models_of_few"] == [MODELS[0]]
        assert told["held"] == plain["text"][0][0]
        assert told["headers"] == {
            "request": "ours-1", "ignored": "a_field_of_nobody", "text": plain["chat"][0][0],
        }  # fmt: skip


def choices():
    """Questions with four answers each; any will do for a model of random numbers."""
    return [
        {
            "question": " ".join(WORDS[(i + k) % 12] for k in (0, 3, 7)),
            "choices": [WORDS[(5 * i + k) % 12] for k in (0, 1, 4, 6)],
            "answer": i % 4,
        }
        for i in range(12)
    ]


def write_tasks(folder):
    """Two tasks of lm-eval's over a file: which answer is likeliest, and how a text goes on."""
    data = folder / "choices.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in choices()))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}:",
    }
    kinds = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        },
        "goes_on": {
            "output_type": "generate_until",
            "doc_to_target": "{{question}}",
            "generation_kwargs": {"until": ["1"], "max_gen_toks": 12, "temperature": 0},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **kind}))


def lm_eval(folder, kind, tasks, *more, **arguments):
    """A run of lm-eval's own command; ``arguments`` are those of its model."""
    arguments |= {"num_concurrent": 4, "max_length": 256}
    listed = ",".join(f"{name}={value}" for name, value in arguments.items())
    return [
        *("lm-eval", "run", "--model", kind, "--model_args", listed, "--tasks", tasks, *more),
        *("--include_path", folder, "--log_samples", "--output_path", folder / kind),
    ]  # fmt: skip


def samples(folder, kind, model, task):
    """What lm-eval has written down of each document, in their order."""
    (path,) = (folder / kind / model).glob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda sample: sample["doc_id"])


@pytest.fixture(scope="module")
def evaluated(server, folder, tmp_path_factory):
    """Runs of lm-eval at the same time: its prompts as ids in batches, as texts, as ids that it has
    from the server, and as conversations.
    """
    made = tmp_path_factory.mktemp("evaluated")
    write_tasks(made)
    texts, chats = (f"{server.url}/v1/{path}completions" for path in ("", "chat/"))
    own = {"tokenizer_backend": "huggingface", "tokenizer": folder / "model"}
    run = partial(lm_eval, made, "local-completions", "choices,goes_on")
    call_at_once(
        made,
        run("--batch_size", "4", model="blocks", base_url=texts, **own),
        run(model="model", base_url=texts, **own, tokenized_requests="False"),
        run(model="vanilla", base_url=texts, auth_token=KEY),
        lm_eval(
            made, "local-chat-completions", "goes_on", "--apply_chat_template",
            model="blocks", base_url=chats,
        ),
    )  # fmt: skip
    return made


def test_lm_eval_scores_as_peft_does(evaluated, tuned, tokenizer):
    every = set()
    for model in MODELS:
        wanted, right = [], 0
        for line in choices():
            ids = tokenizer.encode(f"{line['question']}:")
            more = [tokenizer.encode(f" {choice}") for choice in line["choices"]]
            scored = [score(tuned, model, ids, each) for each in more]
            wanted += scored
            right += max(range(4), key=lambda i: scored[i][0]) == line["answer"]
        documents = samples(evaluated, "local-completions", model, "choices")
        found = [reply for document in documents for (reply,) in document["resps"]]
        values = [value for value, _ in wanted]
        assert [float(value) for value, _ in found] == pytest.approx(values, abs=1e-3)
        assert [greedy == "True" for _, greedy in found] == [greedy for _, greedy in wanted]
        (results,) = (evaluated / "local-completions" / model).glob("results_*.json")
        accuracy = json.loads(results.read_text())["results"]["choices"]["acc,none"]
        assert accuracy == pytest.approx(right / 12)
        every.add(tuple(values))
    assert len(every) == len(MODELS), "the adapters are scored alike"


def test_lm_eval_reads_pefts_answers_up_to_its_stop(evaluated, tokenizer, alone):
    cut = 0
    for kind, model in [
        *(("local-completions", m) for m in MODELS),
        ("local-chat-completions", "blocks"),
    ]:
        documents = samples(evaluated, kind, model, "goes_on")
        for document, line in zip(documents, choices(), strict=True):
            prompt = f"{line['question']}:"
            prompt = f"<user>{prompt}\n<assistant>" if "chat" in kind else prompt
            ids = alone(model, tokenizer.encode(prompt), 12)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert document["resps"] == [[text.partition("1")[0]]], (kind, model)
            cut += "1" in text
    assert cut > 3, "few answers are cut at the stop; the test shows less than it says"


def score(tuned, model, ids, more):
    """How probable some tokens are after others, by PEFT; and whether each is the likeliest."""
    rows = models.logits(tuned, model, ids + more).log_softmax(-1)[len(ids) - 1 : -1]
    greedy = rows.argmax(-1).tolist() == more
    return float(sum(row[token] for row, token in zip(rows, more, strict=True))), greedy


def guidellm(folder, served, url, model, path):
    """A run of guidellm's own command: twelve requests, four at a time."""
    backend = {
        "kind": "openai_http", "target": url, "model": model, "api_key": KEY,
        "request_format": path, "extras": {"body": {"temperature": 0}},
    }  # fmt: skip
    return [
        *("guidellm", "run", "--disable-console", "--backend", json.dumps(backend)),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", "kind=max_requests,count=12"),
        *("--data", "kind=synthetic_text,prompt_tokens=20,output_tokens=8"),
        *("--tokenizer", f"kind=hf_auto,model={served / 'model'}"),
        *("--output", f"kind=json,path={folder / model}.json"),
    ]


def answered(server):
    """How many requests of each model the server says it has answered."""
    lines = [line for line in server.log.read_text().splitlines() if line.startswith("{")]
    told = [line for line in map(json.loads, lines) if line["message"] == "request"]
    return collections.Counter(line["model"] for line in told if line["status"] == "ok")


def test_guidellm_counts_what_the_server_counts(server, folder, post, tmp_path):
    paths = dict.fromkeys(MODELS, "/v1/completions") | {MODELS[0]: "/v1/chat/completions"}
    before = answered(server)
    runs = [guidellm(tmp_path, folder, server.url, model, path) for model, path in paths.items()]
    call_at_once(tmp_path, *runs)
    counts = answered(server) - before
    for model, path in paths.items():
        (benchmark,) = json.loads((tmp_path / f"{model}.json").read_text())["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        # guidellm 0.8 may end before it has read its own last result.
        assert totals["successful"] in {11, 12}, totals
        assert totals["errored"] == totals["incomplete"] == 0, totals
        assert counts[model] == 12
        for request in benchmark["requests"]["successful"]:
            body = json.loads(request["request_args"])["body"]
            assert body["model"] == model
            assert body["stream_options"]["continuous_usage_stats"] is True
            again = post(path, **{**body, "stream": False, "stream_options": None})
            assert request["output"] == said(again)
            assert request["prompt_tokens"] == again["usage"]["prompt_tokens"] >= 20
            assert request["output_tokens"] == again["usage"]["completion_tokens"] == 8
