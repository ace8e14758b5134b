"""What the tools of a request mean for its answer: a grammar, and a reader of what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bdlora_megatron.serve.api.errors import BadRequestError
from bdlora_megatron.serve.api.formats import schema_grammar
from bdlora_megatron.serve.api.text import Tokenizer
from bdlora_megatron.serve.api.tools.formats import BARE, Format, Written
from bdlora_megatron.serve.api.tools.grammar import Function, Markers, grammar_of_calls
from bdlora_megatron.serve.api.tools.reader import CallReader
from bdlora_megatron.serve.api.tools.request import Choice, Tool

__all__ = ["Calling", "calling", "check_parameters"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calling:
    """How an answer calls tools.

    Attributes:
        grammar: What it must follow, in llguidance's words.
        format: How it writes calls down.
        names: What it may call.
        named: It calls the one function that the request names.
        shown: The special tokens that belong to calls, with their texts.
        loose: The places of parameters that are held to in part only.
    """

    grammar: str
    format: Format
    names: tuple[str, ...]
    named: bool
    shown: Mapping[int, str]
    loose: tuple[str, ...]

    def reader(self) -> CallReader:
        """A reader for one answer."""
        return CallReader(self.format, self.names)


def calling(
    choice: Choice, written: Written, tokenizer: Tokenizer, *, parallel: bool, form: str | None
) -> Calling:
    """See what a choice means for the answers of a model.

    Args:
        choice: Which tools may be called.
        written: What the model's chat template makes of them.
        tokenizer: The model's.
        parallel: An answer may make several calls, if the template can write them down later.
        form: The grammar of answers without calls, if the request asks for a form.

    Raises:
        BadRequestError: The model is not told of the tools and may do without them, a form can't
            be told from its calls, or parameters are faulty.
    """
    if choice.mode == "auto":
        _check(written)
    format_ = written.format or BARE
    if choice.mode == "auto" and form is not None and format_.bare:
        raise BadRequestError(
            "this model's calls are JSON without a mark, so that a grammar can't tell them from a "
            "JSON answer; send tools or a form of the answer, or tool_choice 'required' or 'none'",
            param="response_format",
        )
    functions = []
    loose = []
    for place, tool in choice.tools:
        arguments, whole = _arguments(place, tool)
        functions.append(Function(tool.function.name, arguments))
        if not whole:
            loose.append(f"tools.{place}.function.parameters")
    found = {text: tokenizer.token_of(text) for text in format_.markers}
    tokens = {text: token for text, token in found.items() if token is not None}
    others = tokenizer.special_ids - tokenizer.stop_ids - set(tokens.values())
    grammar = grammar_of_calls(
        format_,
        functions,
        Markers(tokens, others),
        free=choice.mode == "auto",
        several=parallel and written.several and choice.mode != "named",
        form=form,
    )
    return Calling(
        grammar=grammar,
        format=format_,
        names=tuple(function.name for function in functions),
        named=choice.mode == "named",
        shown={t: text for text, t in tokens.items() if not tokenizer.decode([t])},
        loose=tuple(loose),
    )


def _arguments(place: int, tool: Tool) -> tuple[str, bool]:
    """The grammar of a function's arguments.

    Args:
        place: Its place among the tools.
        tool: The function.

    Returns:
        The grammar, and whether it holds arguments to all of the schema: without ``strict``, what
        can't be held to is passed over.

    Raises:
        BadRequestError: The schema is faulty, or ``strict`` and can't be held to.
    """
    function, where = tool.function, f"tools[{place}].function.parameters"
    schema = function.schema_
    if schema.get("type", "object") != "object":
        raise BadRequestError(
            f"{where}: type is {schema['type']!r}; arguments are an object: wanted 'object'",
            param=where,
        )
    return schema_grammar({**schema, "type": "object"}, where, lenient=not function.strict)


def _check(written: Written) -> None:
    """See that a model may be left to call or not.

    Raises:
        BadRequestError: It is not told of the tools, or its calls can't be read.
    """
    told = "tool_choice 'required' or a function's name works without"
    if not written.told:
        raise BadRequestError(
            "this model's chat template does not tell the model of tools; use a template that "
            f"does ({told})",
            param="tools",
        )
    if written.format is None:
        raise BadRequestError(
            "how this model writes calls is not known from its chat template; the server's "
            f"setting tool_call_parser names a format ({told})",
            param="tools",
        )


def check_parameters(choice: Choice) -> None:
    """Read the parameters of all that may be called; what was found is remembered.

    Raises:
        BadRequestError: As ``_arguments``.
    """
    for place, tool in choice.tools:
        _arguments(place, tool)
