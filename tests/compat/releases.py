"""Which releases are tried, and what each wants of its environment."""

from __future__ import annotations

from dataclasses import dataclass

#: What must hold on every release. Left out are tests of tools (command line, plots, demo) and of
#: what the server does with broken clients, files and processes, where Megatron-Core has no part.
CORE = (
    "tests/unit/test_blocks.py",
    "tests/unit/convert",
    "tests/tp",
    "tests/golden",
    "tests/runtime",
    "tests/unit/serve",
    "tests/serve/test_adapters.py",
    "tests/serve/test_generate.py",
    "tests/serve/test_openai.py",
)


@dataclass(frozen=True, kw_only=True)
class Release:
    """One release of Megatron-Core.

    `python` is the interpreter that it is tried on, which its users have: for 0.14 to 0.16 the one
    of their time, for newer ones the oldest that they support. Where it is not found, this one is
    taken all the same. `extra` are requirements beside the ones in constraints-dev.txt, which they
    override. `note` goes into the table.
    """

    version: str
    python: tuple[int, int] = (3, 11)
    extra: tuple[str, ...] = ()
    note: str = ""


#: What still takes it.
_NUMPY_1 = ("numpy<2", "scipy<1.16", "pandas<3", "pyarrow<25")

RELEASES = (
    Release(version="0.14.0", extra=_NUMPY_1, note="requires numpy below 2"),
    Release(version="0.15.3", extra=_NUMPY_1, note="requires numpy below 2"),
    Release(version="0.16.1"),
    Release(version="0.17.1", python=(3, 12)),
    # Imported without a condition, and on no list of requirements.
    Release(version="0.18.2", python=(3, 12), extra=("triton",), note="imports triton always"),
    Release(version="0.19.2", python=(3, 12), extra=("triton",), note="imports triton always"),
)
