"""Whether a command that a page shows is one that works: its program, its options, its files."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise

from bdlora_megatron.cli.main import _parser
from tests.docs.pages import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_EXTRAS = re.compile(r"(?<![\w\]])(?:bdlora-megatron|\.)?\[(?P<names>[a-z]+(?:,[a-z]+)*)\](?!\()")
#: What a shell does between programs of a pipeline.
_PIPES = {"|", "&&", ";"}


def check_command(command: str) -> None:
    """Fail where a command names a program, an option or a file that is not there."""
    for program, *arguments in _pipeline(command):
        assert program in CHECKS, f"a command that no test checks: {command}"
        CHECKS[program](arguments)


def _pipeline(command: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in shlex.split(command, comments=True):
        if word in _PIPES:
            parts.append([])
        elif parts[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            parts[-1].append(word)
    return parts


def check_make(arguments: list[str]) -> None:
    """Every target exists and does something."""
    targets = [argument for argument in arguments if "=" not in argument]
    assert targets, "`make` alone only prints the list of targets"
    for target in targets:
        assert dry_run(target).strip(), f"`make {target}` does nothing"


def _check_pip(arguments: list[str]) -> None:
    assert arguments[0] in {"install", "wheel"}
    for requirement in arguments[1:]:
        named, _, address = requirement.partition(" @ ")
        assert address or not named.startswith("bdlora-megatron"), "no package index has it yet"
        if requirement.partition("[")[0] in (".", "bdlora-megatron"):
            assert extras_in(requirement) <= declared_extras()


def _check_python(arguments: list[str]) -> None:
    while arguments[0] == "-W":
        arguments = arguments[2:]
    assert arguments[0] == "-m", "run modules by name, so that they can be found"
    assert find_spec(arguments[1]), arguments[1]


def _check_torchrun(arguments: list[str]) -> None:
    assert "-m" in arguments, "run modules by name, so that they can be found"
    module, *rest = arguments[arguments.index("-m") + 1 :]
    assert find_spec(module), module
    if module == "bdlora_megatron":
        check_bdlora(rest)


def check_bdlora(arguments: list[str]) -> None:
    """The command line takes these arguments, and files of the repository are there."""
    arguments = [argument for argument in arguments if argument != "..."]
    _parser().parse_args(arguments)
    for argument in arguments:
        if argument.startswith("examples/"):
            assert (ROOT / argument).is_file(), argument


def _check_curl(arguments: list[str]) -> None:
    for option, value in pairwise(arguments):
        if option == "-d":
            json.loads(value)


def _check_lm_eval(arguments: list[str]) -> None:
    """`make test-clients` runs it with these options and arguments of its model."""
    run = (ROOT / "tests" / "serve" / "test_clients.py").read_text()
    for name in re.findall(r"(?<!\S)--\w+|\w+(?==)", " ".join(arguments)):
        assert name in run, name


def _check_files(arguments: list[str]) -> None:
    """Files of the repository are there; the program itself is asked nothing."""
    named = [argument for argument in arguments if argument.startswith("examples/")]
    assert all((ROOT / argument).exists() for argument in named), named


CHECKS = {
    "bdlora": check_bdlora,
    "curl": _check_curl,
    "docker": _check_files,
    "grep": lambda arguments: None,
    "kubectl": _check_files,
    "lm-eval": _check_lm_eval,
    "ls": lambda arguments: None,
    "make": check_make,
    "pip": _check_pip,
    "python": _check_python,
    "torchrun": _check_torchrun,
}


def dry_run(target: str) -> str:
    """What `make` would do for a target on a machine where nothing has been made."""
    # Everything counts as out of date, so that a recipe is seen on a machine where it has run.
    command = ["make", "--no-print-directory", "--dry-run", "--always-make", target]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def declared_extras() -> set[str]:
    """The extras in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return set(project["optional-dependencies"])


def extras_in(text: str) -> set[str]:
    """The extras that a text names."""
    return {name for match in _EXTRAS.finditer(text) for name in match["names"].split(",")}
