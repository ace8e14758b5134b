"""All that is wrong with a file, told at once."""

from __future__ import annotations

from bdlora_megatron.errors import AdapterFormatError, UnsupportedError

__all__ = ["Problems"]

_NAMED = 4
_LONGEST = 200


class Problems:
    """A list of problems, each with the names (tensors, modules) that have it."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._names)

    def add(self, what: str, *names: str) -> None:
        """Note a problem.

        Args:
            what: What was got and wanted and what to do; equal texts are told once.
            *names: What has it.
        """
        self._names.setdefault(what, []).extend(names)

    def raise_if_any(
        self, subject: str, error: type[AdapterFormatError | UnsupportedError] = AdapterFormatError
    ) -> None:
        """Refuse the file if there is a problem.

        Args:
            subject: What cannot be done, with the path.
            error: What to raise: another error where the file is fine and the request is not.

        Raises:
            AdapterFormatError: With one line per problem.
        """
        if self._names:
            lines = [f"\n- {what}{_listed(names)}" for what, names in self._names.items()]
            raise error(f"{subject}:{''.join(lines)}")


def _listed(names: list[str]) -> str:
    if not names:
        return ""
    # Names come from strangers' files: control characters have no place in a log line.
    shown = [_shortened(name) for name in sorted(names)[:_NAMED]]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" (in {', '.join(shown)}{more})"


def _shortened(name: str) -> str:
    name = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
    return name if name.isprintable() else ascii(name)
