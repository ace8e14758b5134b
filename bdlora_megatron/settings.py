"""Settings from files and arguments: pydantic's dataclasses, and one list of all problems.

``train.schema`` and ``serve.settings`` declare theirs with these types. Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from bdlora_megatron.errors import ConfigError

__all__ = [
    "FORBID_UNKNOWN",
    "Count",
    "Flag",
    "Names",
    "Natural",
    "Number",
    "Seconds",
    "Section",
    "list_problems",
    "read_settings",
]

T = TypeVar("T")

FORBID_UNKNOWN = ConfigDict(extra="forbid")

# YAML has types of its own: a text that looks like a number, or a 1 for yes, is a mistake.
Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
Natural = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[float, Strict(), Field(ge=0)]
Seconds = Annotated[float, Strict(), Field(gt=0)]
Names = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]
#: A section of which every key may be left out, or which stands there without any.
Section = BeforeValidator(lambda value: {} if value is None else value)

_WANTED = {
    "bool_type": "true or false",
    "dataclass_type": "a section with keys",
    "dict_type": "a section with keys",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "string_too_short": "at least {min_length} characters",
    "string_type": "text",
    "tuple_type": "a list of names",
}


def read_settings(
    cls: type[T], values: object, what: str, renamed: Mapping[str, str] | None = None
) -> T:
    """Make settings of plain nested values.

    Args:
        cls: A pydantic dataclass.
        values: Sections, keys, values, as YAML gives them.
        what: What they are the settings of, in messages.
        renamed: Old names at the top, and what they are called now.

    Returns:
        The settings.

    Raises:
        ConfigError: Keys are unknown or missing, or values are wrong; every problem is listed, and
            the nearest name with each unknown one.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        problems = [
            _problem(cls, found, renamed or {}) for found in error.errors(include_url=False)
        ]
        raise ConfigError(list_problems(problems, what)) from error


def list_problems(problems: Sequence[str], what: str) -> str:
    """One message for all of some settings' problems."""
    lines = "".join(f"\n- {problem}" for problem in problems)
    return f"{len(problems)} problem(s) in {what}:{lines}"


def _problem(cls: type, found: Any, renamed: Mapping[str, str]) -> str:
    where, kind = ".".join(map(str, found["loc"])), found["type"]
    if kind == "unexpected_keyword_argument":
        return f"{where} is {_unknown(cls, found['loc'], renamed)}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "value_error":
        return f"{where}: {found['ctx']['error']}" if where else str(found["ctx"]["error"])
    context = found.get("ctx", {})
    wanted = _WANTED.get(kind, found["msg"].removeprefix("Input should be ")).format(**context)
    if kind == "literal_error":
        wanted = f"one of {context['expected'].replace(' or ', ', ')}".replace("'", "")
    shown = (
        "wrong (its value is not shown)" if _is_secret(cls, found["loc"]) else repr(found["input"])
    )
    return f"{where or 'the file'} is {shown}; wanted {wanted}"


def _unknown(cls: type, location: Sequence[Any], renamed: Mapping[str, str]) -> str:
    """What to say of an unknown key: its new name, the nearest key there, or the same elsewhere."""
    *sections, key = map(str, location)
    if not sections and key in renamed:
        return f"now called {renamed[key]}; rename it, its meaning is the same"
    known = list(_fields(_at(cls, sections)))
    if near := get_close_matches(key, known, n=1, cutoff=0.5):
        return f"unknown; did you mean {'.'.join([*sections, near[0]])}?"
    same = [full for full in _leaves(cls) if full.rpartition(".")[2] == key]
    return f"unknown; did you mean {same[0]}?" if same else f"unknown; known: {', '.join(known)}"


def _fields(cls: Any) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(cls, "__pydantic_fields__", {})
    return fields


def _at(cls: Any, sections: Sequence[str]) -> Any:
    """The class of a section; None within a list or any other value."""
    for name in sections:
        field = _fields(cls).get(name)
        cls = _section(field.annotation) if field is not None else None
    return cls


def _section(annotation: Any) -> Any:
    """A section that may be left out, without its None."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    return next((each for each in get_args(annotation) if is_dataclass(each)), annotation)


def _leaves(cls: Any, where: str = "") -> Iterator[str]:
    for name, field in _fields(cls).items():
        section = _section(field.annotation)
        if is_dataclass(section):
            yield from _leaves(section, f"{where}{name}.")
        else:
            yield f"{where}{name}"


def _is_secret(cls: type, location: Sequence[Any]) -> bool:
    """Whether a value is kept out of messages, as it is out of ``repr``."""
    field = _fields(cls).get(str(location[0])) if location else None
    return field is not None and not field.repr
