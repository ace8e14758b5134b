"""Conversations as tokens: every answer behind the tokens that a server would be sent for it.

A line gives one document where its answers can share one. Where a later prompt does not begin with
the tokens of an earlier answer (some SentencePiece vocabularies, or a stop token that the template
does not write), it gives several, so that each answer is learnt as it will be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.models.config import stop_ids
from bdlora_megatron.train.lines import (
    REASONING,
    BadLineError,
    Chat,
    Keys,
    Template,
    with_reasoning,
)

__all__ = ["ChatEncoder", "ChatOptions", "Encoder", "Marked", "TrainOn"]

TrainOn = Literal["all", "last"]

#: Tokens and whether each is learnt.
Marked = tuple[list[int], list[bool]]

# fmt: off
_OWN_ARGUMENTS = frozenset({
    "conversation", "messages", "tools", "documents", "chat_template",
    "add_generation_prompt", "tokenize", "padding", "continue_final_message", "truncation",
    "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
    "return_assistant_tokens_mask", "sanitize_control_tokens",
})
# fmt: on
_CACHED_TEXTS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """How conversations are read.

    Attributes:
        train_on: Whether all answers of a line are learnt or the last one.
        template_kwargs: Arguments of the chat template; a line's own come before them.
        ignore_keys: Keys of lines and messages to leave out.
    """

    train_on: TrainOn = "all"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    ignore_keys: tuple[str, ...] = ()


class Encoder:
    """A tokenizer that gives a text the same tokens behind another as in one with it."""

    def __init__(self, tokenizer: Any) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: Of ``transformers``.
        """
        self.tokenizer = tokenizer
        self._cuts = _cuts(tokenizer)
        self._ids = lru_cache(_CACHED_TEXTS)(self._tokenize)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, without those that begin or end every sequence."""
        # A turn is tokenized once, not again with each later one: nothing reaches across a cut.
        starts = [match.start() for match in self._cuts.finditer(text)] if self._cuts else []
        edges = [0, *(start for start in starts if start), len(text)]
        return [token for start, stop in pairwise(edges) for token in self._ids(text[start:stop])]

    def after(self, prompt: list[int], whole: list[int], text: str) -> list[int]:
        """Tokens of ``text`` as they follow ``prompt``.

        Args:
            prompt: Tokens of what comes before.
            whole: Tokens of both in one.
            text: What follows.

        Returns:
            The rest of ``whole``, where no token reaches across the seam; else the text's own, in
            the form that it has inside a text.
        """
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        # SentencePiece writes a space before what begins a text, and not behind a line break.
        mark = self.ids("\n")
        marked = self.ids("\n" + text)
        return marked[len(mark) :] if marked[: len(mark)] == mark else self.ids(text)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class ChatEncoder:
    """Makes documents of conversations."""

    def __init__(self, encoder: Encoder, options: ChatOptions, keys: Keys) -> None:
        """Prepare for a tokenizer's chat template.

        Args:
            encoder: The tokenizer.
            options: How conversations are read.
            keys: Where to count what is not read.

        Raises:
            ConfigError: The template does not take the arguments of ``options``.
        """
        self._encoder, self._options, self._keys = encoder, options, keys
        self._tokenizer = encoder.tokenizer
        self._stop_ids = stop_ids(
            Path(self._tokenizer.name_or_path or "/dev/null"), self._tokenizer.eos_token_id
        )
        self._template = lru_cache(None)(self._read_template)
        if options.template_kwargs:
            problem = self._about_arguments(options.template_kwargs, self._template(tools=False))
            if problem:
                raise ConfigError(f"dataset.chat_template_kwargs {problem}")

    def documents(self, chat: Chat) -> list[Marked]:
        """The documents of a conversation; none where the line says to learn nothing.

        Raises:
            BadLineError: The conversation has no answer, or the template does not write it such
                that answers can be told from the rest.
        """
        chat = self._checked(chat)
        documents: list[Marked] = []
        told = ""
        for index in self._answers(chat):
            before = self._render(chat, index, prompt=True)
            text = self._render(chat, index + 1)
            if not before.startswith(told):
                raise BadLineError(
                    "the chat template writes earlier turns differently once a later one follows, "
                    "so not all answers can be learnt from one line; set dataset.train_on=last to "
                    "learn the last one"
                )
            self._check_answer(chat.messages[index], index, before, text)
            prompt, answer = self._encoder.ids(before), self._answer(chat, index, before, text)
            tokens, learnt = documents[-1] if documents else ([], [])
            if not documents or prompt[: len(tokens)] != tokens:
                documents.append(([], []))
                tokens, learnt = documents[-1]
            learnt += [False] * (len(prompt) - len(tokens)) + answer[1]
            tokens += prompt[len(tokens) :] + answer[0]
            told = text
        return documents

    def _checked(self, chat: Chat) -> Chat:
        """The conversation as the template takes it, up to its last answer.

        Raises:
            BadLineError: The template would leave out something that the line says.
        """
        template = self._template(tools=chat.tools is not None)
        if chat.tools is not None and not template.mentions("tools"):
            raise BadLineError(
                "the chat template does not use tools; name 'tools' in dataset.ignore_keys to "
                "leave them out"
            )
        problem = self._about_arguments(chat.template_kwargs, template)
        if problem:
            raise BadLineError(f"chat_template_kwargs {problem}")
        answers = [n for n, m in enumerate(chat.messages) if m["role"] == "assistant"]
        if not answers or answers[-1] < chat.first:
            raise BadLineError("no message has the role 'assistant', so there is nothing to learn")
        last = answers[-1] + 1
        if last < len(chat.messages):
            self._keys.notes["messages behind the last answer are left out"] += 1
        messages = [with_reasoning(message, template) for message in chat.messages[:last]]
        for number, message in enumerate(messages, 1):
            self._keys.rest_of_message(message, number, template)
        chat = replace(chat, messages=messages)
        self._check_shown(chat)
        return chat

    def _answers(self, chat: Chat) -> Iterator[int]:
        answers = [
            number
            for number, message in enumerate(chat.messages)
            if message["role"] == "assistant" and number >= chat.first
        ]
        chosen = answers if self._options.train_on == "all" else answers[-1:]
        return (number for number in chosen if chat.weights[number] is not False)

    def _check_shown(self, chat: Chat) -> None:
        """Hold the template to writing every tool and all that is not the assistant's.

        Raises:
            BadLineError: It leaves something out.
        """
        text = self._render(chat, len(chat.messages))
        squeezed = _squeeze(text)
        for tool in chat.tools or []:
            name = tool.get("function", tool).get("name")
            if not isinstance(name, str) or name not in text:
                raise BadLineError(f"the chat template does not write the tool {name!r}")
        for number, message in enumerate(chat.messages):
            if message["role"] == "assistant" or _squeeze(message["content"]) in squeezed:
                continue
            # Perhaps it is only written in another form, as JSON for one.
            without = [*chat.messages]
            without[number] = {**message, "content": ""}
            if self._render(replace(chat, messages=without), len(without)) == text:
                raise BadLineError(
                    f"the chat template does not write message {number + 1} ({message['role']})"
                )

    def _check_answer(self, message: Mapping[str, Any], index: int, before: str, text: str) -> None:
        """Hold the template to the answer behind its prompt, whole.

        Raises:
            BadLineError: The answer does not follow the prompt, or a part of it is left out.
        """
        if not text.startswith(before):
            raise BadLineError(
                f"the chat template's prompt, which ends in {before[-24:]!r}, is not how it writes "
                f"message {index + 1}, so a model would be asked otherwise than it learns; set "
                "dataset.chat_template_kwargs (such as enable_thinking: false) or change the "
                "template"
            )
        answer = _squeeze(text[len(before) :])
        parts = {"content": message.get("content", "")}
        parts |= {name: message[name] for name in REASONING if name in message}
        for number, call in enumerate(message.get("tool_calls") or []):
            parts[f"tool_calls[{number}]"] = call.get("function", call)["name"]
        for name, part in parts.items():
            if _squeeze(str(part)) not in answer:
                raise BadLineError(
                    f"the chat template does not write {name} of message {index + 1} as it stands, "
                    "so something else would be learnt; change the line or the template"
                )

    def _answer(self, chat: Chat, index: int, before: str, text: str) -> Marked:
        """Tokens of an answer behind its prompt, and which are learnt."""
        prompt, whole = self._encoder.ids(before), self._encoder.ids(text)
        ids = self._encoder.after(prompt, whole, text[len(before) :])
        if self._template(tools=chat.tools is not None).marks:
            return ids, self._marks(chat, index, ids)
        end = next((t for t in reversed(ids) if self._tokenizer.decode([t]).strip()), None)
        if end not in self._stop_ids:
            if end in self._tokenizer.added_tokens_decoder:
                self._keys.notes[
                    f"answers end in {self._tokenizer.decode([end])!r}, at which serving does not "
                    "stop; name it in generation_config.json under eos_token_id"
                ] += 1
            else:
                self._keys.notes[
                    f"the chat template writes no end of turn; {self._tokenizer.eos_token!r} is "
                    "learnt behind the answer"
                ] += 1
                ids = [*ids, self._tokenizer.eos_token_id]
        return ids, [True] * len(ids)

    def _marks(self, chat: Chat, index: int, ids: list[int]) -> list[bool]:
        """What the template's own tags mark of an answer.

        Raises:
            BadLineError: They mark nothing of it, or cannot be told apart token by token.
        """
        marked = self._apply(
            chat,
            index + 1,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        learnt = [bool(flag) for flag in marked["assistant_masks"]][-len(ids) :]
        if list(marked["input_ids"])[-len(ids) :] != ids or not any(learnt):
            raise BadLineError(
                f"the chat template's generation tags mark nothing of message {index + 1}, or a "
                "part of a token"
            )
        if not any(t in self._stop_ids for t, flag in zip(ids, learnt, strict=True) if flag):
            self._keys.notes[
                "the chat template's generation tags leave out the end of the turn, so no stop "
                "token is learnt"
            ] += 1
        return learnt

    def _render(self, chat: Chat, stop: int, *, prompt: bool = False) -> str:
        text: str = self._apply(chat, stop, tokenize=False, add_generation_prompt=prompt)
        return text

    def _apply(self, chat: Chat, stop: int, **options: Any) -> Any:
        if not stop:
            raise BadLineError("the first message is the assistant's; wanted a user's before it")
        arguments = {**self._options.template_kwargs, **chat.template_kwargs, **options}
        try:
            return self._tokenizer.apply_chat_template(
                chat.messages[:stop], tools=chat.tools, **arguments
            )
        except Exception as error:  # Templates are programs of their own and raise what they like.
            raise BadLineError(f"the chat template refuses it: {error}") from error

    def _read_template(self, *, tools: bool) -> Template:
        try:
            return Template(self._tokenizer.get_chat_template(None, [] if tools else None))
        except ValueError as error:
            raise ConfigError(
                "the tokenizer has no chat template for these lines; put one into "
                f"tokenizer_config.json, or use another dataset.format: {error}"
            ) from error

    def _about_arguments(self, arguments: Mapping[str, Any], template: Template) -> str | None:
        own = sorted(_OWN_ARGUMENTS & arguments.keys())
        unread = sorted(name for name in arguments if not template.mentions(name))
        if own:
            return f"sets {', '.join(own)}, which only this package sets"
        return (
            f"sets {', '.join(unread)}, which the chat template does not read" if unread else None
        )


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _cuts(tokenizer: Any) -> re.Pattern[str] | None:
    """Where texts may be cut without a change of tokens: before tokens that split any text."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    whole = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not (token.lstrip or token.normalized or token.single_word)
    ]
    return (
        re.compile("|".join(map(re.escape, sorted(whole, key=len, reverse=True))))
        if whole
        else None
    )
