"""What a line of training data says: its keys, each accounted for, and chats as messages.

Data comes in the spellings of OpenAI (``messages``), ShareGPT and NeMo (``conversations`` of
``from`` and ``value``, ``input`` and ``output``) and TRL (``prompt`` and ``completion``, as text or
as messages). A key that would change what is learnt is honoured or refused; any other that is not
read is counted, for one warning at the end.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "REASONING",
    "BadLineError",
    "Chat",
    "Keys",
    "Template",
    "read_chat",
    "read_pair",
    "read_record",
    "with_reasoning",
]


class BadLineError(Exception):
    """What is wrong with one line."""


#: Keys of a line that change what is seen or learnt, and are not carried out.
# fmt: off
_MEANINGFUL = frozenset({
    "weight", "weights", "sample_weight", "loss", "loss_weight", "loss_mask", "mask",
    "masked", "train", "trainable", "learn", "functions", "function_call", "documents",
    "image", "images", "video", "videos", "audio", "audios", "system", "tools",
    "chat_template", "chat_template_kwargs",
})
# fmt: on
#: Keys that beside a prompt and its completion belong to the prompt, or say what a completion is.
_OF_PAIRS = frozenset({"instruction", "input", "context", "history", "suffix", "label", "labels"})
#: Keys of a message that no template need write.
# fmt: off
_HARMLESS = frozenset({
    "id", "name", "tool_call_id", "refusal", "annotations", "cache_control", "timestamp",
    "created", "created_at", "date", "model", "lang", "language", "source", "index", "turn",
    "uid", "uuid", "metadata",
})
# fmt: on
#: Names of a message's reasoning; templates read one or another.
REASONING = ("reasoning_content", "thinking", "reasoning")
_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
    **{role: role for role in ("user", "assistant", "system", "developer", "tool")},
}
_CHAT_KEYS = ("tools", "chat_template_kwargs", "system", "mask")
_IGNORE = "name it in dataset.ignore_keys to leave it out"


class Keys:
    """Accounts for every key of every line.

    Attributes:
        notes: What was not read or was changed, and in how many places.
    """

    def __init__(self, ignored: Sequence[str] = ()) -> None:
        """Start an account.

        Args:
            ignored: Keys that the settings say to leave out, of lines and of messages.
        """
        self._ignored = frozenset(ignored)
        self.notes: Counter[str] = Counter()

    def kept(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The keys that say something: neither null nor left out by the settings."""
        return {k: v for k, v in values.items() if v is not None and k not in self._ignored}

    def rest_of_line(self, record: Mapping[str, Any], known: Sequence[str]) -> None:
        """Note the keys of a line that are not ``known``.

        Raises:
            BadLineError: One of them changes what is learnt.
        """
        for key, value in record.items():
            if key in known or _says_nothing(key, value):
                continue
            if key in _MEANINGFUL or (
                key in _OF_PAIRS and not {"prompt", "input"}.isdisjoint(known)
            ):
                raise BadLineError(f"{key!r} is not supported here; {_IGNORE}")
            self.notes[f"the key {key!r} is not read"] += 1

    def rest_of_message(self, message: Mapping[str, Any], number: int, template: Template) -> None:
        """Note the keys of a message that the template does not read.

        Raises:
            BadLineError: One of them is not known to be harmless.
        """
        for key, value in message.items():
            if key in {"role", "content"} or _says_nothing(key, value) or template.mentions(key):
                continue
            if key not in _HARMLESS:
                raise BadLineError(
                    f"message {number} has the key {key!r}, which the chat template does not read; "
                    f"{_IGNORE}"
                )
            self.notes[f"the key {key!r} of messages is not read"] += 1


class Template:
    """The text of a chat template."""

    def __init__(self, text: str) -> None:
        self._words = frozenset(re.findall(r"\w+", text))
        #: Whether the template itself marks what is to be learnt.
        self.marks = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None

    def mentions(self, name: str) -> bool:
        """Whether a name occurs in it, so that it may be read."""
        return name in self._words


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation.

    Attributes:
        messages: As chat templates take them: ``role``, ``content`` as text, and more.
        weights: For each message, whether the line says to learn it; None where it says nothing.
        first: Messages before this one are a prompt, in which nothing is learnt.
        tools: Schemas of functions.
        template_kwargs: The line's own arguments of the template.
    """

    messages: list[dict[str, Any]]
    weights: list[bool | None]
    first: int = 0
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def read_record(line: str, keys: Keys) -> dict[str, Any]:
    """The object that a line holds, without nulls.

    Args:
        line: JSON.
        keys: The account.

    Returns:
        Its keys and values.

    Raises:
        BadLineError: It is no JSON object, names a key twice, or holds half of a surrogate pair.
    """
    try:
        record = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise BadLineError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise BadLineError("not readable: nested too deep") from error
    if not isinstance(record, dict):
        raise BadLineError(f"wanted one JSON object a line; found {type(record).__name__}")
    if "\\u" in line:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise BadLineError(
                f"\\u{ord(half):04x} is half of a surrogate pair, and no character; write the "
                "whole pair or remove it"
            ) from error
    return keys.kept(record)


def read_pair(record: Mapping[str, Any], keys: Keys) -> tuple[str, str] | Chat:
    """A prompt and its completion: texts, or a chat.

    Args:
        record: ``prompt`` and ``completion``, or NeMo's ``input`` and ``output``.
        keys: The account.

    Returns:
        Both texts; the chat where both are lists of messages.

    Raises:
        BadLineError: It is neither, or says more than can be honoured.
    """
    spelt = [n for n in (("prompt", "completion"), ("input", "output")) if set(n) <= record.keys()]
    if len(spelt) != 1:
        raise BadLineError(
            f"wanted text under 'completion' and 'prompt', or 'output' and 'input'; found "
            f"{list(record)}{_other_format(record)}"
        )
    names = spelt[0]
    prompt, completion = (record[name] for name in names)
    if isinstance(prompt, str) and isinstance(completion, str):
        keys.rest_of_line(record, names)
        return prompt, completion
    if isinstance(prompt, list) and isinstance(completion, (list, dict)):
        completion = completion if isinstance(completion, list) else [completion]
        return _chat(record, keys, [*prompt, *completion], names, first=len(prompt))
    raise BadLineError(
        f"wanted text or messages under both {names[0]!r} and {names[1]!r}; found "
        f"{type(prompt).__name__} and {type(completion).__name__}"
    )


def read_chat(record: Mapping[str, Any], keys: Keys) -> Chat:
    """A conversation from OpenAI's ``messages`` or ShareGPT's ``conversations``.

    Args:
        record: The line.
        keys: The account.

    Returns:
        The conversation.

    Raises:
        BadLineError: It is none, or says more than can be honoured.
    """
    names = [name for name in ("messages", "conversations") if name in record]
    turns = record[names[0]] if len(names) == 1 else None
    if not isinstance(turns, list) or not turns:
        raise BadLineError(
            'wanted {"messages": [{"role": ..., "content": ...}, ...]} or {"conversations": '
            f'[{{"from": ..., "value": ...}}, ...]}}; found {list(record)}{_other_format(record)}'
        )
    return _chat(record, keys, turns, names)


def _chat(
    record: Mapping[str, Any],
    keys: Keys,
    turns: Sequence[Any],
    names: Sequence[str],
    *,
    first: int = 0,
) -> Chat:
    keys.rest_of_line(record, (*names, *_CHAT_KEYS))
    messages, weights = [], []
    for number, turn in enumerate(turns, 1):
        message = _message(turn, number, keys)
        weights.append(_weight(message, number))
        messages.append(message)
    if record.get("system"):
        if any(message["role"] == "system" for message in messages):
            raise BadLineError("both 'system' and a message of that role; leave one out")
        if not isinstance(record["system"], str):
            raise BadLineError(f"'system' is {type(record['system']).__name__}; wanted text")
        messages.insert(0, {"role": "system", "content": record["system"]})
        weights.insert(0, None)
        first += bool(first)
    masked = record.get("mask", "user")
    if not isinstance(masked, str) or _ROLES.get(masked.lower()) != "user":
        raise BadLineError(f"'mask' is {masked!r}; only the user's turns can be masked; {_IGNORE}")
    return Chat(
        messages=messages,
        weights=weights,
        first=first,
        tools=_tools(record.get("tools")),
        template_kwargs=_mapping(record, "chat_template_kwargs"),
    )


def _message(turn: Any, number: int, keys: Keys) -> dict[str, Any]:
    """One turn with ``role`` and ``content``; its other keys stay.

    Raises:
        BadLineError: It is no turn of a known speaker with something to say.
    """
    if not isinstance(turn, dict):
        raise BadLineError(f"message {number} is {type(turn).__name__}; wanted an object")
    message = keys.kept(turn)
    if "from" in message and "role" not in message:
        said = message.pop("from")
        if said == "function_call":
            called = _said_call(message.pop("value", None), number)
            return {**message, "role": "assistant", **called}
        role = _ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise BadLineError(f"message {number} is from {said!r}; known are {', '.join(_ROLES)}")
        message["role"] = role
        if "value" in message and "content" not in message:
            message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str):
        raise BadLineError(f"message {number} has no role; found the keys {list(turn)}")
    if "content" in message:
        message["content"] = _content(message["content"], number, keys)
    elif not (message["role"] == "assistant" and message.get("tool_calls")):
        raise BadLineError(f"message {number} ({message['role']}) has no content")
    if message.get("tool_calls"):
        message["tool_calls"] = _calls(message["tool_calls"], number)
    return message


def _content(content: Any, number: int, keys: Keys) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kept = keys.kept(part) if isinstance(part, dict) else {}
        if kept.get("type") != "text" or not isinstance(kept.get("text"), str):
            found = kept.get("type", type(part).__name__)
            raise BadLineError(
                f"message {number} has content of type {found!r}; wanted text or parts of text"
            )
        for key in kept.keys() - {"type", "text"}:
            if key not in _HARMLESS and kept[key]:
                raise BadLineError(f"message {number} has a part with the key {key!r}; {_IGNORE}")
            keys.notes[f"the key {key!r} of parts of a message is not read"] += 1
        texts.append(kept["text"])
    return "".join(texts)


def _said_call(value: Any, number: int) -> dict[str, Any]:
    """A call, or a list of them, that ShareGPT's turns of ``function_call`` hold as JSON text.

    Raises:
        BadLineError: The text is not JSON, or no call.
    """
    try:
        said = json.loads(value)
    except (TypeError, ValueError) as error:
        raise BadLineError(
            f"message {number} is a function_call that is not JSON: {error}"
        ) from error
    calls = _calls(said if isinstance(said, list) else [said], number)
    return {"content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]}


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls with arguments as objects, as chat templates take them.

    Raises:
        BadLineError: They are no calls of functions.
    """
    if not isinstance(calls, list):
        raise BadLineError(f"message {number} has tool_calls that are no list")
    made = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadLineError(f"message {number} has a tool call without a function's name")
        if isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except ValueError as error:
                raise BadLineError(
                    f"message {number} calls {function['name']} with arguments that are not JSON: "
                    f"{error}"
                ) from error
            function = {**function, "arguments": arguments}
        made.append({**call, "function": function} if "function" in call else function)
    return made


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)  # many tables have a column of JSON
        except ValueError as error:
            raise BadLineError(f"'tools' is text that is not JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadLineError("'tools' is no list of schemas")
    return tools


def _weight(message: dict[str, Any], number: int) -> bool | None:
    """Take OpenAI's ``weight`` and Axolotl's ``train`` out of a message.

    Raises:
        BadLineError: They are neither 0 nor 1, or ask to learn what is not the assistant's.
    """
    said = {key: message.pop(key) for key in ("weight", "train") if key in message}
    if not said:
        return None
    wrong = {key: value for key, value in said.items() if value not in (0, 1)}
    if wrong or len(set(said.values())) > 1:
        raise BadLineError(f"message {number} has {wrong or said}; wanted 0 or 1, and one of them")
    learn = bool(next(iter(said.values())))
    if learn and message["role"] != "assistant":
        raise BadLineError(
            f"message {number} ({message['role']}) has {said}; only the assistant's are learnt"
        )
    return learn


def with_reasoning(message: Mapping[str, Any], template: Template) -> dict[str, Any]:
    """The message with its reasoning under the name that the template reads."""
    renamed = dict(message)
    for name in REASONING:
        known = [other for other in REASONING if template.mentions(other)]
        if name in renamed and known and name not in known:
            renamed.setdefault(known[0], renamed.pop(name))
    return renamed


def _mapping(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key) or {}
    if not isinstance(value, dict):
        raise BadLineError(f"{key!r} is {type(value).__name__}; wanted an object")
    return value


def _says_nothing(key: str, value: Any) -> bool:
    return value in (None, "", [], {}) or (key in {"weight", "train", "loss"} and value == 1)


def _other_format(record: Mapping[str, Any]) -> str:
    for name, format in (
        ("messages", "chat"),
        ("conversations", "chat"),
        ("completion", "prompt_completion"),
        ("output", "prompt_completion"),
        ("text", "text"),
    ):
        if name in record:
            return f"; is this dataset.format={format}?"
    return ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise BadLineError(f"an object names the key {twice[0]!r} twice")
    return made
