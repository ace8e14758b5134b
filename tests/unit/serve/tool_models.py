"""Tokenizers and chat templates of the three families, as small as they can be."""

from __future__ import annotations

from pathlib import Path

#: Qwen's and Hermes's way: each call between tags.
HERMES = """
{%- if tools %}<|system|>Tools:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Answer with <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>.<|end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" and message.tool_calls %}<|assistant|>{{ message.content }}
{%- for call in message.tool_calls %}
{%- if not loop.first or message.content %}{{ "\n" }}{% endif -%}
{%- set given = call.function.arguments | tojson -%}
<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ given }}}\n</tool_call>
{%- endfor %}<|end|>
{% elif message.role == "tool" %}
{%- if not message.name is defined %}{{ raise_exception("a result has no name") }}{% endif -%}
<|user|><tool_response>{{ message.name }}: {{ message.content }}</tool_response><|end|>
{% else %}<|{{ message.role }}|>{{ message.content }}<|end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}""".replace("\\n", "\n")

#: Llama 3's way: an answer that is JSON alone, and one call at a time.
LLAMA = """
{%- for message in messages %}
{%- if message.role == "user" and loop.first and tools %}<|user|>Functions, to be called by \
{"name": function name, "parameters": dictionary of argument name and its value}:
{%- for tool in tools %}
{{ tool | tojson(indent=4) }}
{%- endfor %}
{{ message.content }}<|end|>
{% elif "tool_calls" in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception("single tool-calls only") }}{% endif %}
{%- set call = message.tool_calls[0].function -%}
<|assistant|>{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|end|>
{% elif message.role == "tool" %}<|ipython|>{{ {"output": message.content} | tojson }}<|end|>
{% else %}<|{{ message.role }}|>{{ message.content }}<|end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

_IDS = """
{%- macro wanted(id) %}
{%- if id is not defined or id | length != 9 %}{{ raise_exception("ids have length 9") }}{% endif %}
{%- endmacro %}"""

#: Mistral's first way: one list of calls.
MISTRAL = (
    _IDS
    + """
{%- for message in messages %}
{%- if message.role == "user" %}
{%- if tools and loop.index0 == messages | length - 1 or tools and loop.first -%}
[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]
{%- endif %}[INST] {{ message.content }}[/INST]
{%- elif message.tool_calls is defined %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}{{ wanted(call.id) }}
{{- (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}
{%- endfor %}]</s>
{%- elif message.role == "tool" %}{{ wanted(message.tool_call_id) -}}
[TOOL_RESULTS] {"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}\
[/TOOL_RESULTS]
{%- else %} {{ message.content }}</s>
{%- endif %}
{%- endfor %}"""
)

#: And its present way: each call with a marker, and a mark before the arguments.
MARKED = MISTRAL.replace(
    MISTRAL[MISTRAL.index("[TOOL_CALLS] [") : MISTRAL.index("{%- endfor %}]</s>")],
    "{{ message.content }}{% for call in message.tool_calls %}{{ wanted(call.id) -}}\n"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}\n",
).replace("{%- endfor %}]</s>", "{%- endfor %}</s>")

TEMPLATES = {"hermes": HERMES, "llama3_json": LLAMA, "mistral": MISTRAL, "marked": MARKED}
#: As their tokenizers have them: Qwen's tags are tokens that are not special.
SPECIAL = {
    "llama3_json": ("<|python_tag|>", "<|header|>"),
    "mistral": ("[TOOL_CALLS]", "[THINK]"),
    "marked": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]"),
}
ADDED = {"hermes": ("<tool_call>", "</tool_call>", "<think>", "</think>")}
_TEXTS = [
    '{"name": "add", "arguments": {"a": 1, "b": "xyz"}}\n</tool_call>\n<tool_call>\n',
    '{"name": "look", "parameters": {"p": {"x": 1}}}; {"name": "look", "parameters": {}}',
    '[{"name": "add", "arguments": {}}, {"name": "look", "arguments": {"a": 12}}]',
    "hello world hello there",
    '"arguments": {"a"}}}]; "}}"]',
]


def make_tool_tokenizer(folder: Path, family: str, *, marks: bool = True) -> None:
    """Save a tokenizer with merges over the parts of calls; without marks, these are text."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        _TEXTS * 20,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            max_token_length=12,
            show_progress=False,
        ),
    )
    if marks:
        made.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL.get(family, ())])
        made.add_tokens([AddedToken(t, special=False) for t in ADDED.get(family, ())])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATES[family],
    )
    fast.save_pretrained(folder)
