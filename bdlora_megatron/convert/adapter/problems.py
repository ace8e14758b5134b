"""All that is wrong with a file, told at once."""

from __future__ import annotations

import re
from pathlib import Path

from bdlora_megatron.errors import AdapterFormatError, BDLoRAError, UnsupportedError, explain

__all__ = ["Problems", "brief_causes"]

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

    def add_error(self, error: BDLoRAError, *names: str) -> None:
        """Note what an error says, which may be a list itself."""
        for what in error.causes or (str(error),):
            self.add(what, *names)

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
            failure = error(f"{subject}:{''.join(lines)}")
            failure.causes = tuple(self._names)
            raise failure


def brief_causes(error: Exception, *folders: Path) -> list[str]:
    """What is wrong, in few words that are the same for all adapters that have it.

    Args:
        error: Why an adapter was refused.
        *folders: The adapter's, or those of both in question; their paths are left out.
    """
    causes = (isinstance(error, BDLoRAError) and error.causes) or (explain(error, *folders[:1]),)
    brief = []
    for cause in causes:
        text = cause
        for folder in folders:
            text = text.replace(str(folder.resolve()), "the folder")
            text = text.replace(str(folder), "the folder")
        # What is wanted and what to do stands behind; sizes differ from adapter to adapter.
        text = re.split(r"[;:] |, which ", text.partition("\n")[0])[0]
        text = re.sub(r"\[[^\]]*\]|\b\d+(\.\d+)?\b", "...", text)
        brief.append(_shortened(text))
    return list(dict.fromkeys(brief))


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
