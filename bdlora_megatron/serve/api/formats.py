"""The form that an answer must have: OpenAI's ``response_format``, vLLM's ``structured_outputs``.

Either becomes a grammar in llguidance's words, which is checked before anything runs. What the
library would pass over, as a keyword that it does not know or a special token, is a fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from llguidance import LLMatcher
from pydantic import Field, model_validator

from bdlora_megatron.serve.api.body import Body
from bdlora_megatron.serve.api.errors import BadRequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

__all__ = ["ResponseFormat", "StructuredOutputs", "grammar_of", "schema_grammar"]

# The library walks references and rules by recursion: a chain of thousands ends the process.
_MOST_RULES = 1000
_DEEPEST = 100
# Of a number by ``multipleOf``; beyond, the library counts for minutes.
_MOST_REMAINDERS = 1000
_MOST_CHARACTERS = 2**19
#: What of a fault is told.
_TOLD = 600
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_OBJECT: Mapping[str, Any] = {"type": "object"}


class JsonSchema(Body):
    """A JSON schema with a name."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    # Answers follow the schema either way.
    strict: bool = False


class ResponseFormat(Body):
    """OpenAI's way to ask for a form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(
                f"type={self.type!r} {'without' if self.json_schema is None else 'with'} "
                "json_schema; type='json_schema' wants one, and the others want none"
            )
        return self


class StructuredOutputs(Body):
    """vLLM's way to ask for a form."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False

    @model_validator(mode="after")
    def _one_form(self) -> StructuredOutputs:
        if self.asked or self.model_extra or self.disable_any_whitespace:
            if len(self.asked) != 1:
                raise ValueError(
                    f"got {list(self.asked) or 'none'} of {', '.join(_KINDS)}; send exactly one"
                )
            if self.disable_any_whitespace and not (self.json_ is not None or self.json_object):
                raise ValueError("disable_any_whitespace goes with json or json_object alone")
        return self

    @property
    def asked(self) -> tuple[str, ...]:
        """Which forms were sent."""
        values = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        return tuple(n for n, value in zip(_KINDS, values, strict=True) if value is not None)


def grammar_of(format_: ResponseFormat | None, structured: StructuredOutputs | None) -> str | None:
    """The grammar of the answers that a request asks for.

    Args:
        format_: Its ``response_format``.
        structured: Its ``structured_outputs``.

    Returns:
        The grammar, in llguidance's words; None where any text will do.

    Raises:
        BadRequestError: It is faulty, or asks for what can't be held to.
    """
    formatted = format_ is not None and format_.type != "text"
    asks = structured is not None and bool(structured.asked)
    if formatted and asks:
        raise BadRequestError(
            "response_format and structured_outputs both ask for a form; send one",
            param="structured_outputs",
        )
    if format_ is not None and formatted:
        schema = _OBJECT if format_.json_schema is None else format_.json_schema.schema_
        place = "response_format" + (".json_schema.schema" if format_.json_schema else "")
        return schema_grammar(schema, place)[0]
    if structured is not None and asks:
        return _of_structured(structured)
    return None


def _of_structured(asked: StructuredOutputs) -> str:
    place = f"structured_outputs.{asked.asked[0]}"
    if asked.regex is not None:
        return _checked(LLMatcher.grammar_from_regex(_text(asked.regex, place)), place)
    if asked.choice is not None:
        # Alternatives of a grammar, instead of a regex, would be slow where there are many.
        whole = _text("|".join(map(_escaped, asked.choice)), place)
        return _checked(LLMatcher.grammar_from_regex(whole), place)
    if asked.grammar is not None:
        text = _text(asked.grammar, place)
        if text.lstrip().startswith("{") or "%json" in text:
            raise BadRequestError(
                f"{place}: wanted rules in Lark's syntax, without %json; send a schema as json",
                param=place,
            )
        rules = text.count("\n") + 1
        if rules > _MOST_RULES:
            raise BadRequestError(
                f"{place}: {rules} lines, and {_MOST_RULES} are read; send fewer", param=place
            )
        return _checked(LLMatcher.grammar_from_lark(text), place)
    schema: Any = _OBJECT if asked.json_object else asked.json_
    if isinstance(schema, str):
        try:
            schema = json.loads(_text(schema, place))
        except (ValueError, RecursionError) as error:
            raise BadRequestError(f"{place}: not JSON: {error}", param=place) from error
    return schema_grammar(schema, place, whitespace=not asked.disable_any_whitespace)[0]


def schema_grammar(
    schema: Any, place: str, *, whitespace: bool = True, lenient: bool = False
) -> tuple[str, bool]:
    """The grammar of the JSON texts that a schema allows.

    Args:
        schema: The schema.
        place: What a fault calls it.
        whitespace: There may be some between the parts.
        lenient: Pass over what can't be held to.

    Returns:
        The grammar, and whether it holds to all of the schema.

    Raises:
        BadRequestError: There is none, or the schema is too large to be looked at.
    """
    if not isinstance(schema, Mapping):
        raise BadRequestError(f"{place}: wanted a schema as a JSON object", param=place)
    _look_through(schema, place)
    try:
        text = _text(json.dumps(schema), place)
        # What a schema itself asks the library to overlook is not overlooked.
        options: JsonCompileOptions = {
            "lenient": lenient,
            "coerce_one_of": lenient,
            "whitespace_flexible": whitespace,
        }
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=options)
    except ValueError as error:
        raise BadRequestError(f"{place}: {error}"[:_TOLD], param=place) from error
    faulty, told = _looked_at(grammar)
    if lenient and not faulty:
        return grammar, not told
    if lenient and told[0].startswith("regex parse error"):
        # Most often a pattern that looks around, which other libraries know.
        return schema_grammar(_OBJECT, place)[0], False
    return _checked(grammar, place), True


def _look_through(schema: Any, place: str) -> None:
    """See that the library will come to an end with a schema; by levels, as it may be deep.

    Raises:
        BadRequestError: Perhaps it would not.
    """
    level, references = [schema], 0
    steps: set[Fraction] = set()
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                references += "$ref" in value
                steps |= _steps(value.get("multipleOf"))
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below
        if not level:
            break
    # Numbers that are multiples of several have as many remainders as the least common one.
    scale = math.lcm(*(step.denominator for step in steps))
    remainders = math.lcm(*(int(step * scale) for step in steps))
    for fault in (
        f"deeper than {_DEEPEST} levels; flatten it" if level else "",
        f"{references} of $ref, and {_MOST_RULES} are followed; send fewer"
        if references > _MOST_RULES
        else "",
        f"all of multipleOf together have more than {_MOST_REMAINDERS} remainders; "
        "choose smaller or rounder numbers"
        if remainders > _MOST_REMAINDERS
        else "",
    ):
        if fault:
            raise BadRequestError(f"{place}: {fault}", param=place)


def _steps(value: Any) -> set[Fraction]:
    """A ``multipleOf``, if there is one; what is none is for the library to refuse."""
    usable = isinstance(value, (int, float)) and 0 < value < _MOST_CHARACTERS
    return {Fraction(repr(value))} if usable and value is not True else set()


def _escaped(text: str) -> str:
    """A regex of one text."""
    plain = (c if c.isalnum() or not c.isascii() else f"\\x{{{ord(c):x}}}" for c in text)
    return f"(?:{''.join(plain)})"


def _text(text: str, place: str) -> str:
    """A text that the library can read.

    Raises:
        BadRequestError: It can't.
    """
    if len(text) > _MOST_CHARACTERS:
        raise BadRequestError(
            f"{place}: {len(text)} characters, and {_MOST_CHARACTERS} are read; send fewer",
            param=place,
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequestError(
            f"{place}: half of a surrogate pair, {text[error.start]!a}; send whole characters",
            param=place,
        ) from error
    return text


def _checked(grammar: str, place: str) -> str:
    _, told = _looked_at(grammar)
    fault = "; ".join(
        "special tokens can't be asked for" if "<special_token>" in text else text for text in told
    )
    if fault:
        raise BadRequestError(f"{place}: {fault}"[:_TOLD], param=place)
    return grammar


@lru_cache(maxsize=256)
def _looked_at(grammar: str) -> tuple[bool, tuple[str, ...]]:
    """Whether a grammar is faulty, and why; the warnings tell what the library would pass over."""
    faulty, told = LLMatcher.validate_grammar_with_warnings(grammar)
    return faulty, tuple(told)
