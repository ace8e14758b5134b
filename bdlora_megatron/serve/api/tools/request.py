"""OpenAI's ``tools`` and ``tool_choice``, and which calls they leave an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from bdlora_megatron.serve.api.body import Body
from bdlora_megatron.serve.api.errors import BadRequestError

__all__ = ["Choice", "Tool", "ToolChoice", "Tools", "chosen"]

_MOST_TOOLS = 128
#: What a function without ``parameters`` takes.
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(Body):
    """A function that a model may call."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    @property
    def schema_(self) -> dict[str, Any]:
        """The schema of its arguments."""
        return _NOTHING if self.parameters is None else self.parameters


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates take it; with all that one may look at, as many fail without."""
        function = self.function
        told = {"name": function.name, "description": function.description or ""}
        return {"type": self.type, "function": {**told, "parameters": function.schema_}}


def _told_apart(tools: list[Tool]) -> list[Tool]:
    names = [tool.function.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two functions are called {twice!r}; give each a name of its own")
    return tools


Tools: TypeAlias = Annotated[list[Tool], Field(max_length=_MOST_TOOLS), AfterValidator(_told_apart)]


class Named(Body):
    """A function's name."""

    name: str


class NamedTool(Body):
    """A tool by its name."""

    type: Literal["function"]
    function: Named


class AllowedTools(Body):
    """Some of the tools; the prompt has all of them."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class ToolChoice(Body):
    """A choice other than a word."""

    type: Literal["function", "allowed_tools"]
    function: Named | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _goes_with_its_type(self) -> ToolChoice:
        if getattr(self, self.type) is None:
            raise ValueError(f"type={self.type!r} wants {self.type}")
        return self


@dataclass(frozen=True, slots=True)
class Choice:
    """The calls that an answer may make.

    Attributes:
        tools: The callable ones, each with its place among those sent.
        mode: ``auto`` may call or not, ``required`` calls, and ``named`` calls the one tool once.
    """

    tools: tuple[tuple[int, Tool], ...]
    mode: Literal["auto", "required", "named"]


def chosen(tools: Sequence[Tool], choice: str | ToolChoice | None) -> Choice | None:
    """What a request leaves its answer to call.

    Args:
        tools: Its ``tools``.
        choice: Its ``tool_choice``.

    Returns:
        The choice; None where nothing may be called.

    Raises:
        BadRequestError: It asks for a call of what is not there.
    """
    if not tools:
        if isinstance(choice, ToolChoice) or choice == "required":
            raise BadRequestError("tool_choice asks for a call; send tools", param="tool_choice")
        return None
    listed = tuple(enumerate(tools))
    if isinstance(choice, ToolChoice):
        if choice.allowed_tools is not None and choice.type == "allowed_tools":
            allowed = choice.allowed_tools
            names = [tool.function.name for tool in allowed.tools]
            return Choice(_named(listed, names), allowed.mode)
        assert choice.function is not None
        return Choice(_named(listed, [choice.function.name]), "named")
    if choice == "none":
        return None
    return Choice(listed, "required" if choice == "required" else "auto")


def _named(
    listed: tuple[tuple[int, Tool], ...], names: Sequence[str]
) -> tuple[tuple[int, Tool], ...]:
    known = {tool.function.name for _, tool in listed}
    stranger = next((name for name in names if name not in known), None)
    if stranger is not None:
        raise BadRequestError(
            f"tool_choice names {stranger!r}, and tools have {sorted(known)}; name one of these",
            param="tool_choice",
        )
    return tuple((place, tool) for place, tool in listed if tool.function.name in names)
