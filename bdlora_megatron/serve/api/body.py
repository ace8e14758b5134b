"""What all bodies of requests have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Body"]


class Body(BaseModel):
    """A JSON object that a client sends."""

    # Fields that are not declared are kept: `fields` tells what becomes of them.
    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Null is a field's default, as if it had been left out, but where it means something."""
        if not isinstance(data, dict):
            return data
        return {name: v for name, v in data.items() if v is not None or name == "max_tokens"}

    def undeclared(self) -> Iterator[tuple[str, Any]]:
        """The fields that are not declared, by their paths, in this body and in what it holds."""
        yield from (self.model_extra or {}).items()
        for name in type(self).model_fields:
            value = getattr(self, name)
            items = value if isinstance(value, list) else [value]
            # All items of a list are of one kind, and lists of tokens are long.
            if items and isinstance(items[0], Body):
                for item in items:
                    yield from ((f"{name}.{below}", v) for below, v in item.undeclared())
