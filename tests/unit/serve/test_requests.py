"""Bodies as clients send them: what passes, what is refused, what is named as ignored."""

from __future__ import annotations

import json
import re
import shutil
import socket

import pytest
from fastapi.testclient import TestClient

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.serve.api.app import make_app
from bdlora_megatron.serve.api.errors import APIError
from bdlora_megatron.serve.api.fields import ignored_header
from bdlora_megatron.serve.api.openai import plan_body
from bdlora_megatron.serve.api.schema import ChatRequest, CompletionRequest
from bdlora_megatron.serve.api.state import APIServer
from bdlora_megatron.serve.api.text import Tokenizer
from bdlora_megatron.serve.server import Server
from bdlora_megatron.serve.settings import ServeSettings
from tests.serve.models import make_tokenizer

MESSAGES = [{"role": "user", "content": "Say hi"}]
#: What `message.model_dump()` of OpenAI's client makes of an answer.
DUMPED = {
    "role": "assistant", "content": "hi", "refusal": None, "annotations": [], "audio": None,
    "function_call": None, "tool_calls": None,
}  # fmt: skip
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = [
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "2"},
]
TOOLS_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.a }}]"
    "{% endfor %}{{ m.tool_call_id or '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if mood is defined %}({{ mood }}){% endif %}"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_tokenizer(folder / "model")
    return folder


def make_front(folder, **settings):
    settings = ServeSettings(model=str(folder / "model"), max_model_len=256, **settings)
    return APIServer(settings, Tokenizer(settings.model))


@pytest.fixture(scope="module")
def api(folder):
    return make_front(folder)


def plan(api, body, adapter=None):
    kind = ChatRequest if "messages" in body else CompletionRequest
    return plan_body(api, kind.model_validate({"model": "model", **body}), adapter)


def read(api, body, adapter=None):
    """What the model gets to read."""
    (prompt,) = plan(api, body, adapter).job.prompts
    return api.tokenizer.decode(prompt.ids)


def post(client, path, body):
    """Halves of surrogate pairs as escapes: clients that encode to UTF-8 raise before sending."""
    return client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


NEUTRAL = {
    "tools": [], "tool_choice": "none", "functions": None, "n": None, "stream": None,
    "store": False, "parallel_tool_calls": True, "service_tier": "auto", "temperature": None,
    "seed": None, "presence_penalty": None, "logit_bias": {}, "stop": [], "modalities": ["text"],
    "skip_special_tokens": True, "priority": 0, "use_beam_search": False, "length_penalty": 1.0,
    "continue_final_message": False, "add_generation_prompt": True, "chat_template_kwargs": {},
    "kv_transfer_params": None, "stream_options": None, "metadata": {}, "reasoning_effort": None,
    "response_format": {"type": "text"}, "logprobs": None, "min_tokens": None,
    "ignore_eos": None, "top_k": -1, "echo": False, "best_of": 1, "guided_json": None,
    "structured_outputs": {}, "bad_words": [], "documents": [], "user": "", "verbosity": "medium",
    "include_reasoning": True, "audio": None, "top_logprobs": 0,
}  # fmt: skip


@pytest.mark.parametrize("field", NEUTRAL)
def test_a_value_that_asks_for_nothing_changes_nothing(api, field):
    for body in ({"messages": MESSAGES}, {"prompt": "The sky is"}):
        if "prompt" in body and field in {"continue_final_message", "add_generation_prompt"}:
            continue
        reply = plan(api, {**body, "seed": 3, field: NEUTRAL[field]})
        plain = plan(api, {**body, "seed": 3})
        assert reply.ignored == ()
        assert reply.job.prompts == plain.job.prompts
        if field != "seed":
            assert reply.job.sampling == plain.job.sampling
        assert reply.job.count == 1


IGNORED = {
    "store": True, "metadata": {"a": "b"}, "service_tier": "flex", "safety_identifier": "u",
    "prompt_cache_key": "k", "request_id": "abc", "priority": 3, "user": "me", "temperatur": 0,
}  # fmt: skip


@pytest.mark.parametrize("field", IGNORED)
def test_a_field_that_changes_no_answer_is_named_as_ignored(api, field):
    for body in ({"messages": MESSAGES}, {"prompt": "The sky is"}):
        assert plan(api, {**body, field: IGNORED[field]}).ignored == (field,)


@pytest.mark.parametrize("name", ["", " ", "\n", "ä", "\ud83d", "a, b", "x" * 5000])
def test_any_name_of_a_field_makes_a_header(name):
    (value,) = ignored_header([name]).values()
    assert value == value.strip() != ""
    assert all("!" <= c <= "~" and c != "," for c in value)
    assert len(ignored_header([name] * 900)["X-Ignored-Fields"]) < 2**15


def test_fields_below_the_top_are_named_by_their_paths(api):
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [part], "mood": "bad"}, {**DUMPED, "refusal": "no"}]
    body = {"messages": messages, "stream_options": {"include_usage": True, "chatty": 1}}
    assert sorted(plan(api, body).ignored) == [
        "messages.content.cache_control", "messages.mood", "messages.refusal",
        "stream_options.chatty",
    ]  # fmt: skip


CHANGING = {
    "use_beam_search": True, "functions": [{}], "modalities": ["text", "audio"],
    "reasoning_effort": "low",
    "skip_special_tokens": False, "length_penalty": 1.2, "guided_json": {},
    "guided_choice": ["a"], "bad_words": ["a"], "prompt_logprobs": 0,
    "allowed_token_ids": [1], "truncate_prompt_tokens": 5, "chat_template": "x",
    "include_stop_str_in_output": True, "logits_processors": ["x"], "audio": {"voice": "x"},
    "web_search_options": {"a": 1}, "return_token_ids": True,
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGING)
def test_a_field_that_would_change_the_answer_is_refused_by_name(api, field):
    for body in ({"messages": MESSAGES}, {"prompt": "The sky is"}):
        with pytest.raises(APIError, match=field) as caught:
            plan(api, {**body, field: CHANGING[field]})
        assert caught.value.status == 400
        assert caught.value.body["error"]["param"] == field


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMS = {
    "object": {"response_format": {"type": "json_object"}},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {
        "name": "one", "strict": True, "schema": SCHEMA}}},
    "json": {"structured_outputs": {"json": SCHEMA}},
    "text": {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    "regex": {"structured_outputs": {"regex": "[a-z]+"}},
    "choice": {"structured_outputs": {"choice": ["yes", "no"]}},
    "grammar": {"structured_outputs": {"grammar": 'start: "a"'}},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_becomes_a_grammar_over_the_models_tokens(api, form):
    for body in ({"messages": MESSAGES}, {"prompt": "The sky is"}):
        reply = plan(api, {**body, **FORMS[form]})
        grammar = reply.job.sampling.grammar
        assert grammar.vocabulary == api.tokenizer.vocabulary.key
        assert grammar.text
        assert reply.ignored == ()
    same = {"schema": "json", "json": "text"}
    if form in same:
        other = plan(api, {"prompt": "a", **FORMS[same[form]]})
        assert other.job.sampling.grammar == grammar


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({**FORMS["object"], **FORMS["regex"]}, "send one"),
        ({**FORMS["regex"], "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "whitespace_pattern"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "got none"),
        ({"structured_outputs": {"regex": "("}}, "unclosed group"),
        ({"structured_outputs": {"regex": "\ud83d"}}, "regex"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "array", "uniqueItems": True}}}}, "uniqueItems"),
        ({"guided_regex": "a"}, "send structured_outputs=.'regex'"),
        ({"functions": [{"name": "f"}]}, "send tools"),
    ],
    ids=str,
)  # fmt: skip
def test_a_form_that_cannot_be_held_to_is_refused_before_anything_runs(api, fields, says):
    """The engine is not even there."""
    with TestClient(make_app(api), raise_server_exceptions=False) as client:
        for path, body in (("completions", {"prompt": "a"}),
                           ("chat/completions", {"messages": MESSAGES})):  # fmt: skip
            answer = post(client, f"/v1/{path}", {"model": "model", **body, **fields})
            assert answer.status_code == 400, answer.text
            assert re.search(says, answer.json()["error"]["message"]), answer.text


def test_an_unknown_part_of_a_form_is_named_as_ignored(api):
    format_ = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "mood": 1}}
    body = {"prompt": "a", "response_format": format_}
    assert plan(api, body).ignored == ("response_format.json_schema.mood",)
    backed = {"structured_outputs": {"regex": "a", "disable_fallback": True}}
    assert plan(api, {"prompt": "a", **backed}).ignored == ()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "suffix": "x"},
        {"prompt": "a", "top_logprobs": 3},
        {"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"prompt": "a", "tool_choice": "required"},
        {"messages": MESSAGES, "echo": True},
        {"messages": MESSAGES, "best_of": 2},
    ],
    ids=str,
)
def test_fields_of_the_other_endpoint_are_refused_where_they_would_matter(api, body):
    with pytest.raises(APIError, match="would change the answer"):
        plan(api, body)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "\ud83d x"}),
        ("completions", {"prompt": ["fine", "x \udc00"]}),
        ("completions", {"prompt": "a", "stop": "\ud83d"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "\ud83d"}]}]}),
        ("chat/completions", {"messages": [*MESSAGES, {**CALLED[0], "tool_calls": [
            {**CALL, "function": {"name": "x", "arguments": "{"}}]}]}),
        ("chat/completions", {"messages": [*MESSAGES, {**CALLED[0], "tool_calls": [
            {**CALL, "function": {"name": "x", "arguments": "[" * 100000}}]}]}),
        ("completions", {"prompt": "a", "logit_bias": {"\ud83d": 1}}),
        ("completions", {"prompt": "a", "model": "\ud83d"}),
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}),
        ("chat/completions", {"messages": [{**DUMPED, "function_call": {"name": "f"}}]}),
        ("chat/completions", {"messages": MESSAGES, "chat_template_kwargs": {"chat_template": ""}}),
        ("chat/completions", {"messages": [*MESSAGES, DUMPED], "add_generation_prompt": True,
                              "continue_final_message": True}),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_read_gets_a_clear_refusal(api, path, body):
    with TestClient(make_app(api), raise_server_exceptions=False) as client:
        answer = post(client, f"/v1/{path}", {"model": "model", **body})
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert message
    assert "Input should be a valid dictionary" not in message, "it was not even read"


def test_a_length_may_have_either_name_or_both(api):
    for fields in (
        {"max_tokens": 3}, {"max_completion_tokens": 3},
        {"max_tokens": 3, "max_completion_tokens": 3},
        {"max_tokens": None, "max_completion_tokens": 3},
    ):  # fmt: skip
        for body in ({"prompt": "a"}, {"messages": MESSAGES}):
            reply = plan(api, {**body, **fields})
            assert reply.job.sampling.max_tokens == 3
            assert reply.ignored == ()
    for body in ({"prompt": "a"}, {"messages": MESSAGES}):
        with pytest.raises(ValueError, match="differ"):
            plan(api, {**body, "max_tokens": 4, "max_completion_tokens": 3})


def test_an_answer_of_before_may_come_back_as_it_was_dumped(api):
    body = {"messages": [*MESSAGES, DUMPED, {"role": "user", "content": "more"}]}
    assert read(api, body) == "<user>Say hi\n<assistant>hi\n<user>more\n<assistant>"
    assert plan(api, body).ignored == ()


def test_tool_calls_reach_a_template_that_knows_them_and_are_named_where_it_does_not(
    api, folder, tmp_path
):
    body = {"messages": [*MESSAGES, *CALLED]}
    assert read(api, body) == "<user>Say hi\n<assistant>\n<tool>2\n<assistant>"
    assert plan(api, body).ignored == ("messages.tool_calls", "messages.tool_call_id")
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    knows = make_front(tmp_path)
    assert read(knows, body) == "<user>Say hi\n<assistant>[add 1]\n<tool>2c1\n<assistant>"
    assert plan(knows, body).ignored == ()
    told = {**body, "chat_template_kwargs": {"mood": "glad", "enable_thinking": False}}
    assert read(knows, told).endswith("<assistant>(glad)")
    assert plan(knows, told).ignored == ("chat_template_kwargs.enable_thinking",)


def test_an_answer_may_go_on_with_the_last_message(api):
    body = {"messages": [*MESSAGES, DUMPED], "continue_final_message": True}
    assert read(api, body) == "<user>Say hi\n<assistant>hi"
    bare = {"messages": MESSAGES, "add_generation_prompt": False}
    assert read(api, bare) == "<user>Say hi\n"


# --- an adapter's own tokenizer and template ---------------------------------------------------


@pytest.fixture
def with_adapters(folder, tmp_path):
    """Folders of adapters with what people leave beside the weights; and none, and the same."""
    shutil.copytree(folder / "model", tmp_path / "model")
    for name in ("none", "same", "template", "words"):
        (tmp_path / name).mkdir()
    for name in ("same", "template", "words"):
        for path in (folder / "model").iterdir():
            shutil.copy(path, tmp_path / name)
    # Training leaves this behind; the tokens are the same.
    file = tmp_path / "same" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding": {"pad_id": 0}}))
    (tmp_path / "template" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    words = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(words))
    return {name: str(tmp_path / name) for name in ("none", "same", "template", "words")}


@pytest.mark.parametrize("used", [True, False])
def test_an_adapters_own_text_is_used_when_asked_for_and_else_named(
    with_adapters, folder, used, caplog
):
    api = make_front(folder, adapters=with_adapters, adapter_tokenizers=used)
    body, plain = {"messages": [{"role": "user", "content": "ab"}]}, "<user>ab\n<assistant>"
    base = api.tokenizer.encode(plain)
    read = {name: list(plan(api, body, name).job.prompts[0].ids) for name in with_adapters}
    assert read["none"] == read["same"] == base
    notes = " ".join(record.getMessage() for record in caplog.records)
    if not used:
        assert read["template"] == read["words"] == base
        assert "chat template beside adapter 'template'" in notes
        assert "tokenizer beside adapter 'words'" in notes
        assert "'same'" not in notes
        assert "'none'" not in notes
        return
    assert not notes
    assert read["template"] == api.tokenizer.encode("ab!")
    # Two letters have changed places, so another text is read and written by the same tokens.
    assert read["words"] == api.tokenizer.encode(plain.translate({97: "b", 98: "a"}))
    assert api.tokenizer_of("words").decode(api.tokenizer.encode("ba")) == "ab"


def test_a_template_that_cannot_be_read_is_an_adapters_refusal(folder, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{not json")
    adapters = {"broken": str(tmp_path)}
    api = make_front(folder, adapters=adapters)
    assert "chat template" in api.refused["broken"]
    assert "broken" not in api.adapters
    with pytest.raises(APIError, match="refused when the server started"):
        api.resolve("broken", None)
    with pytest.raises(ConfigError, match="chat template"):
        make_front(folder, adapters=adapters, strict_adapters=True)


# --- what surrounds a server -------------------------------------------------------------------


@pytest.fixture(scope="module")
def http(folder):
    api = make_front(folder, cors_origins=("https://chat.example",))
    with TestClient(make_app(api), raise_server_exceptions=False) as client:
        yield client


def test_every_answer_names_its_request(http):
    given = http.get("/version", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    first, second = http.get("/version"), http.post("/v1/completions", content="{")
    assert second.status_code == 400
    assert len({first.headers["x-request-id"], second.headers["x-request-id"]}) == 2
    strange = http.get("/version", headers={"X-Request-Id": "a b" * 99})
    assert strange.headers["x-request-id"] != "a b" * 99


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/health", "/nothing"])
def test_head_is_get_without_a_body(http, path):
    head, get = http.head(path), http.get(path)
    assert head.status_code == get.status_code
    assert head.content == b""
    assert head.headers["content-length"] == str(len(get.content))


def test_pages_of_named_origins_may_ask(http, api):
    ours = {"Origin": "https://chat.example"}
    asked = {**ours, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    allowed = http.options("/v1/chat/completions", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ours["Origin"]
    refusal = http.post("/v1/completions", content="{", headers=ours)
    assert refusal.headers["access-control-allow-origin"] == ours["Origin"]
    other = http.get("/version", headers={"Origin": "https://elsewhere.example"})
    assert "access-control-allow-origin" not in other.headers
    with TestClient(make_app(api)) as plain:
        assert "access-control-allow-origin" not in plain.get("/version", headers=ours).headers


def test_texts_and_conversations_are_tokenized_as_requests_are(http, api):
    made = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    ids = api.tokenizer.encode("hé")
    assert made == {
        "count": 3, "max_model_len": 256, "tokens": ids, "token_strs": ["h", "\ufffd", "\ufffd"],
    }  # fmt: skip
    chat = http.post("/tokenize", json={"model": "model", "messages": MESSAGES, "x": 1})
    assert chat.json()["tokens"] == api.tokenizer.encode("<user>Say hi\n<assistant>")
    assert chat.headers["x-ignored-fields"] == "x"
    back = http.post("/detokenize", json={"tokens": [*ids, 1]}).json()
    assert back == {"prompt": "hé</s>"}
    for wrong in ({}, {"prompt": "\ud83d"}, {"prompt": 3}):
        assert post(http, "/tokenize", wrong).status_code == 400
    assert http.post("/tokenize", json={"model": "nobody", "prompt": "a"}).status_code == 404


def test_a_client_without_the_models_files_is_told_of_its_tokenizer(http, api):
    info = http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert info["chat_template"] == api.tokenizer.template
    ids = http.post("/tokenize", json={"prompt": "</s>", "add_special_tokens": False}).json()
    assert ids["tokens"] == [1]
    assert http.get("/tokenizer_info?model=nobody").status_code == 404


def test_a_prompt_that_is_too_long_is_told_in_the_words_that_clients_look_for(http):
    """LiteLLM and LangChain make an error of its own of it, by one phrase or the other."""
    for body in ({"prompt": "a" * 300}, {"messages": MESSAGES, "max_tokens": 300}):
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        error = post(http, path, {"model": "model", **body}).json()["error"]
        assert error["code"] == "context_length_exceeded"
        for phrase in ("this model's maximum context length is 256 tokens", "prompt is too long"):
            assert phrase in error["message"]


def test_no_piece_of_an_answer_waits_for_an_acknowledgement(folder):
    server = Server(ServeSettings(model=str(folder / "model"), host="127.0.0.1", port=0))
    with server._socket as listening, socket.create_connection(("127.0.0.1", server.port)):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_version_is_the_packages(http):
    import bdlora_megatron

    assert http.get("/version").json() == {"version": bdlora_megatron.__version__}
