"""Conversations as people have them: what is learnt of each, and what is refused."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.train.chats import ChatOptions, Encoder
from tests.train.runs import make_tokenizer, read_examples
from tests.unit.train.test_examples import parts, read

WRITE = "<|{{ m.role }}|>{{ m.content }}<|end|>"
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = f"{{% for m in messages %}}{WRITE}{{% endfor %}}{ASK}"
# GLM's habit: the next role is the only end of a turn.
NO_END = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Qwen3's: reasoning is written for the last answer only.
REWRITES = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}<|assistant|>\n<think>\n\n"
    "</think>\n\n{{ m.content }}<|end|>\n{% else %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% if enable_thinking is "
    "defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TAGS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}THOUGHT {% generation %}"
    "{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}" + ASK
)
TOOLS = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}" + PLAIN
CALLS = TOOLS.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}",
)
TOOL = {"type": "function", "function": {"name": "get", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "get", "arguments": '{"x": 1}'}}


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


TWO = {"messages": [user("q"), answer("a"), user("r"), answer("b")]}


def chats(tmp_path, template, *lines, format="chat", **options):
    """What each document of the lines holds."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    settings = {"chats": ChatOptions(**options), "seq_length": 256}
    examples = read(tmp_path, tokenizer, lines, format, **settings)
    return [parts(tokenizer, example) for example in examples]


def learnt(tmp_path, template, *lines, **options):
    """What is learnt, document by document."""
    documents = chats(tmp_path, template, *lines, **options)
    return [[text for flag, text in document if flag] for document in documents]


@pytest.mark.parametrize("key", ["weight", "train"])
@pytest.mark.parametrize("no", [0, False])
def test_an_answer_without_weight_is_context(tmp_path, key, no):
    line = {"messages": [user("q"), answer("DRAFT", **{key: no}), user("r"), answer("good")]}
    line["messages"][3][key] = 1
    (document,) = chats(tmp_path, PLAIN, line)
    assert document == [
        (False, "<|user|>q<|end|><|assistant|>DRAFT<|end|><|user|>r<|end|><|assistant|>"),
        (True, "good<|end|>"),
    ]


def test_a_line_that_says_to_learn_nothing_is_counted(tmp_path, caplog):
    nothing = {"messages": [user("q"), answer("a", weight=0)]}
    assert learnt(tmp_path, PLAIN, nothing, TWO) == [["a<|end|>", "b<|end|>"]]
    assert "1 have nothing to learn" in caplog.text


def test_tools_reach_the_template(tmp_path):
    for tools in ([TOOL], json.dumps([TOOL])):
        (document,) = chats(tmp_path, TOOLS, {"messages": [user("q"), answer("a")], "tools": tools})
        assert '<|system|>[{"type": "function", "function": {"name": "get"' in document[0][1]
        assert document[-1] == (True, "a<|end|>")


def test_what_the_template_writes_for_a_call_is_learnt(tmp_path):
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    back = {"role": "tool", "content": "7", "tool_call_id": "call_1"}
    line = {"messages": [user("q"), called, back, answer("a")], "tools": [TOOL]}
    assert learnt(tmp_path, CALLS, line) == [['CALL get {"x": 1}<|end|>', "a<|end|>"]]


@pytest.mark.parametrize(
    ("template", "line", "wanted"),
    [
        (PLAIN, {**TWO, "tools": [TOOL]}, "does not use tools"),
        (
            TOOLS.replace("{{ tools | tojson }}", "tools"),
            {**TWO, "tools": [TOOL]},
            "does not write the tool 'get'",
        ),
        (TOOLS, {**TWO, "tools": "[{"}, "'tools' is text that is not JSON"),
        (
            TOOLS,
            {"messages": [user("q"), {"role": "assistant", "tool_calls": [CALL]}]},
            "message 2 has the key 'tool_calls', which the chat template does not read",
        ),
        (
            CALLS.replace("CALL {{ c.function.name }}", "CALL"),
            {"messages": [user("q"), {"role": "assistant", "tool_calls": [CALL]}]},
            r"does not write tool_calls\[0\] of message 2",
        ),
        (PLAIN, {"messages": [user("q"), {"role": "assistant", "content": None}]}, "no content"),
        (PLAIN, {"messages": [user("q"), answer("a", weight=0.5)]}, "wanted 0 or 1"),
        (PLAIN, {"messages": [user("q"), answer("a", weight=0, train=True)]}, "one of them"),
        (PLAIN, {"messages": [{**user("q"), "weight": 1}, answer("a")]}, "only the assistant's"),
        (PLAIN, {"messages": [user("q"), answer("a", loss=False)]}, "the key 'loss'"),
        (PLAIN, {"messages": [user("q"), answer("a", reasoning="why")]}, "the key 'reasoning'"),
        (PLAIN, {**TWO, "weight": 0}, "'weight' is not supported here"),
        (PLAIN, {**TWO, "images": ["x.png"]}, "'images' is not supported here"),
        (PLAIN, {**TWO, "chat_template_kwargs": {"think": 1}}, "does not read"),
        (PLAIN, {**TWO, "mask": "Assistant"}, "only the user's turns"),
        (PLAIN, {"messages": [user([{"type": "image_url"}]), answer("a")]}, "type 'image_url'"),
        (PLAIN, {"messages": [user(3), answer("a")]}, "content of type 'int'"),
        (PLAIN, {"conversations": [{"from": "who", "value": "q"}]}, "message 1 is from 'who'"),
        (
            PLAIN.replace("{{ m.content }}", "{% if m.role != 'user' %}{{ m.content }}{% endif %}"),
            TWO,
            r"does not write message 1 \(user\)",
        ),
        (
            PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"),
            {"messages": [user("q"), answer("<think>why</think>a")]},
            "does not write content of message 2 as it stands",
        ),
        (
            PLAIN.replace(ASK, "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"),
            TWO,
            "prompt, which ends in .*<think>', is not how it writes message 2",
        ),
        (REWRITES, TWO, "set dataset.train_on=last"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(tmp_path, template, line, wanted):
    with pytest.raises(ConfigError, match=rf"1 line.*\n- .*data.jsonl line 1: .*{wanted}"):
        chats(tmp_path, template, line)


def test_other_keys_are_named_and_left_out_keys_are_not(tmp_path, caplog):
    line = {"messages": [user("q"), answer("a", name="bot")], "id": 7, "source": "x", "meta": None}
    assert learnt(tmp_path, PLAIN, line, line) == [["a<|end|>"], ["a<|end|>"]]
    assert "the key 'id' is not read (2 times)" in caplog.text
    assert "the key 'source' is not read (2 times)" in caplog.text
    assert "the key 'name' of messages is not read (2 times)" in caplog.text
    assert "meta" not in caplog.text
    caplog.clear()
    line = {"messages": [user("q"), answer("a", loss=0)], "images": ["x"], "id": 7}
    ignored = ("loss", "images", "id")
    assert learnt(tmp_path, PLAIN, line, ignore_keys=ignored) == [["a<|end|>"]]
    assert not caplog.records


def test_the_last_answer_is_learnt_as_it_will_be_asked_for(tmp_path):
    (document,) = chats(tmp_path, REWRITES, TWO, train_on="last")
    assert document == [
        (False, "<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n<|user|>\nr<|end|>\n<|assistant|>\n"),
        (True, "<think>\n\n</think>\n\nb<|end|>\n"),
    ]
    for where in ("settings", "line"):
        off = {"enable_thinking": False}
        line = {**TWO, "chat_template_kwargs": off} if where == "line" else TWO
        kwargs = off if where == "settings" else {}
        (document,) = chats(tmp_path, REWRITES, line, train_on="last", template_kwargs=kwargs)
        assert document[0][1].endswith("<|assistant|>\n<think>\n\n</think>\n\n")
        assert document[1] == (True, "b<|end|>\n")


@pytest.mark.parametrize("name", ["enable_thinkin", "tokenize"])
def test_arguments_that_the_template_does_not_take_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"dataset.chat_template_kwargs sets {name}, which"):
        chats(tmp_path, REWRITES, TWO, template_kwargs={name: False})


def test_an_end_that_the_template_does_not_write_is_learnt(tmp_path, caplog):
    documents = chats(tmp_path, NO_END, TWO)
    # The second prompt is the template's, as a server is sent it: without that end.
    assert documents == [
        [(False, "<|user|>\nq<|assistant|>\n"), (True, "a<|end|>")],
        [(False, "<|user|>\nq<|assistant|>\na<|user|>\nr<|assistant|>\n"), (True, "b<|end|>")],
    ]
    assert "writes no end of turn; '<|end|>' is learnt behind the answer (2 times)" in caplog.text


def test_an_end_at_which_serving_does_not_stop_is_named(tmp_path, caplog):
    documents = chats(tmp_path, PLAIN.replace("<|end|>", "<|system|>"), TWO)
    assert documents[0][1] == (True, "a<|system|>")
    assert "answers end in '<|system|>', at which serving does not stop" in caplog.text
    caplog.clear()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN.replace("<|end|>", "<|system|>")
    tokenizer.name_or_path = str(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, tokenizer.convert_tokens_to_ids("<|system|>")]})
    )
    read(tmp_path, tokenizer, [TWO], "chat")
    assert not caplog.records


def test_what_the_templates_tags_mark_is_learnt(tmp_path, caplog):
    # The tokenizer writes the space before a word, whose token it is.
    assert learnt(tmp_path, TAGS, TWO) == [[" a<|end|>", " b<|end|>"]]
    line = {"messages": [user("q"), answer("a", weight=0), user("r"), answer("b")]}
    assert learnt(tmp_path, TAGS, line) == [[" b<|end|>"]]
    assert not caplog.records
    endless = TAGS.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    assert learnt(tmp_path, endless, TWO) == [[" a", " b"]]
    assert "tags leave out the end of the turn" in caplog.text


@pytest.mark.parametrize(
    ("format", "line"),
    [
        (
            "chat",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        ),
        (
            "chat",
            {
                "mask": "User",
                "system": "",
                "conversations": [
                    {"from": "User", "value": "q"},
                    {"from": "Assistant", "value": "a"},
                ],
            },
        ),
        ("chat", {"messages": [user([{"type": "text", "text": "q"}]), answer("a")]}),
        ("chat", {"messages": [user("q"), answer("a"), user("more")]}),
        ("prompt_completion", {"prompt": [user("q")], "completion": [answer("a")]}),
    ],
    ids=["ShareGPT", "NeMo", "parts", "trailing", "TRL"],
)
def test_other_spellings_of_a_chat(tmp_path, format, line):
    assert chats(tmp_path, PLAIN, line, format=format) == [
        [(False, "<|user|>q<|end|><|assistant|>"), (True, "a<|end|>")]
    ]


def test_sharegpts_function_calls_are_tool_calls(tmp_path):
    said = json.dumps(CALL["function"])
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": said},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a"},
    ]
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    wanted = {"messages": [user("q"), called, {"role": "tool", "content": "r"}, answer("a")]}
    assert chats(tmp_path, CALLS, {"conversations": turns}) == chats(tmp_path, CALLS, wanted)
    turns[1]["value"] = "look it up"
    with pytest.raises(ConfigError, match="message 2 is a function_call that is not JSON"):
        chats(tmp_path, CALLS, {"conversations": turns})


def test_a_system_beside_the_turns_and_answers_in_a_prompt(tmp_path):
    line = {"system": "s", "conversations": [{"from": "human", "value": "q"}]}
    line["conversations"].append({"from": "gpt", "value": "a"})
    (document,) = chats(tmp_path, PLAIN, line)
    assert document[0][1].startswith("<|system|>s<|end|><|user|>q")
    line = {"prompt": TWO["messages"][:3], "completion": TWO["messages"][3:]}
    assert learnt(tmp_path, PLAIN, line, format="prompt_completion") == [["b<|end|>"]]


def test_nemos_input_and_output(tmp_path, caplog):
    pair = {"input": "q", "output": "a"}
    documents = chats(tmp_path, PLAIN, pair, format="prompt_completion")
    assert documents == [[(False, "q"), (True, "a<|end|>")]]
    assert not caplog.records
    chats(tmp_path, PLAIN, pair, format="prompt_completion", train_on="last")
    assert "dataset.train_on and chat_template_kwargs are not used (1 times)" in caplog.text
    alpaca = {"instruction": "i", "input": "q", "output": "a"}
    with pytest.raises(ConfigError, match="'instruction' is not supported here"):
        chats(tmp_path, PLAIN, alpaca, format="prompt_completion")


GOOD = json.dumps(TWO).encode()


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"\xef\xbb\xbf" + GOOD + b"\n", 1),
        (GOOD + b"\r\n\r\n" + GOOD + b"\n\n", 2),
        (GOOD.replace(b'"q"', b'"a\\ud800b"'), r"line 1: \\ud800 is half of a surrogate pair"),
        (GOOD + b"\n" + GOOD.replace(b'"q"', b'"\\ud83d\\ude00"'), 2),
        (GOOD.decode().encode("utf-16"), "is not UTF-8 text but UTF-16"),
        (GOOD + b'\n"\xe4"', "line 2 is not UTF-8"),
        (GOOD + b"\n" + GOOD + b'\n{"messages": [\n', "line 3: not JSON"),
        (b'{"messages": [], ' + GOOD[1:], "line 1: an object names the key 'messages' twice"),
        (b"[" * 100_000, "line 1: not readable: nested too deep"),
        (b"[" + GOOD + b"]", "line 1: wanted one JSON object a line; found list"),
    ],
    ids=["bom", "crlf", "half", "pair", "utf-16", "latin", "cut", "twice", "deep", "list"],
)
def test_files(tmp_path, data, wanted):
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    if isinstance(wanted, int):
        assert len(read_examples([path], make_tokenizer(), format="chat", seq_length=64)) == wanted
        return
    with pytest.raises(ConfigError, match=wanted):
        read_examples([path], make_tokenizer(), format="chat", seq_length=64)


@pytest.mark.parametrize("format", ["chat", "text", "prompt_completion"])
def test_a_token_beyond_the_embedding_is_refused(tmp_path, format):
    line = {
        "chat": TWO,
        "text": {"text": "q"},
        "prompt_completion": {"prompt": "q", "completion": ""},
    }
    tokenizer = make_tokenizer()
    most = read(tmp_path, tokenizer, [line[format]], format)[0].tokens.max()
    assert read(tmp_path, tokenizer, [line[format]], format, vocab_size=most + 1)
    with pytest.raises(ConfigError, match=rf"line 1: token {most} \(.* is not among the {most} of"):
        read(tmp_path, tokenizer, [line[format]], format, vocab_size=most)


def sentencepiece(scheme):
    """A tokenizer that writes a space before a text, in one of three ways."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # Trained on words, so that a token begins with a space and never ends with one.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=120,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz[]/▁\n:"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the fox [INST] jumps [/INST] over a dog"] * 4, trainer)
    if scheme == "legacy":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


@pytest.mark.parametrize("scheme", ["always", "first", "legacy"])
def test_every_answer_stands_behind_what_a_server_is_sent(tmp_path, scheme):
    """Llama 2's template and kin, whose later turns begin in the middle of a text."""
    tokenizer = sentencepiece(scheme)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    messages = [user("the fox"), answer("jumps"), user("a dog"), answer("over it")]
    (example,) = read(tmp_path, tokenizer, [{"messages": messages}], "chat")
    tokens, flags = example.tokens.tolist(), example.learnt.tolist()
    for turn, said in ((1, " jumps </s>"), (3, " over it </s>")):
        prompt = tokenizer.apply_chat_template(
            messages[:turn], tokenize=False, add_generation_prompt=True
        )
        sent = tokenizer.encode(prompt, add_special_tokens=False)
        whole = tokenizer.encode(prompt + said, add_special_tokens=False)
        assert tokens[: len(whole)] == whole
        assert whole[: len(sent)] == sent
        assert flags[len(sent) : len(whole)] == [True] * (len(whole) - len(sent))
        assert not flags[len(sent) - 1]
    assert len(tokens) == len(whole)


@pytest.mark.parametrize("scheme", ["always", "first", "legacy"])
def test_a_later_turn_that_is_tokenized_otherwise_is_a_document_of_its_own(tmp_path, scheme):
    tokenizer = sentencepiece(scheme)
    # No token keeps the turns apart, so the end of an answer grows into what follows.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}x:{{ m.content }}y:{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [user("the fox"), answer("jumps"), user("a dog"), answer("over")]
    examples = read(tmp_path, tokenizer, [{"messages": messages}], "chat")
    assert len(examples) == 2
    for example, turn in zip(examples, (1, 3), strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:turn], tokenize=False, add_generation_prompt=True
        )
        sent = tokenizer.encode(prompt, add_special_tokens=False)
        assert example.tokens[: len(sent)].tolist() == sent
        assert not example.learnt[: len(sent)].any()
        assert example.learnt[len(sent) :].all()
        text = tokenizer.decode(example.tokens)
        assert text.strip() == prompt + messages[turn]["content"] + "</s>"


@pytest.mark.parametrize("make", [make_tokenizer, lambda: sentencepiece("first")])
@pytest.mark.parametrize("text", ["", "a</s><s>b", "<|user|>a <|end|>\n<|end|>", "plain", " <s> "])
def test_cut_texts_have_the_tokens_of_whole_ones(make, text):
    tokenizer = make()
    assert Encoder(tokenizer).ids(text) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("scheme", ["always", "first", "legacy"])
def test_a_completion_is_tokenized_behind_its_prompt(tmp_path, scheme):
    tokenizer = sentencepiece(scheme)
    line = {"prompt": "the fox", "completion": " jumps over"}
    (example,) = read(tmp_path, tokenizer, [line], "prompt_completion")
    assert example.tokens.tolist() == tokenizer.encode("the fox jumps over</s>")
