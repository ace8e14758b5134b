"""README.md: every snippet runs, every command is checked, every link and extra exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bdlora_megatron.cli.main import _parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TEXT = README.read_text("utf-8")
MAX_LINES = 150

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)#]+)[^)]*\)")
_EXTRAS = re.compile(r"(?<![\w\]])(?:bdlora-megatron|\.)?\[(?P<names>[a-z]+(?:,[a-z]+)*)\](?!\()")


def _blocks(language: str) -> list[tuple[int, str]]:
    """The fenced blocks of one language, each with the number of the line above its body."""
    return [
        (TEXT.count("\n", 0, match.start("body")), match["body"])
        for match in _FENCE.finditer(TEXT)
        if match["language"] == language
    ]


def _commands() -> list[str]:
    lines = [line for _, body in _blocks("sh") for line in body.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _check_make(arguments: list[str]) -> None:
    targets = [argument for argument in arguments if "=" not in argument]
    assert targets, "`make` alone only prints the list of targets"
    for target in targets:
        recipe = _dry_run(target)
        assert recipe.strip(), f"`make {target}` does nothing"


def _check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    for requirement in arguments[1:]:
        if not requirement.startswith("-"):
            assert requirement.partition("[")[0] in (".", "bdlora-megatron"), requirement
            assert _extras_in(requirement) <= _declared_extras()


def _check_python(arguments: list[str]) -> None:
    assert arguments[0] == "-m", "run modules by name, so that they can be found"
    assert find_spec(arguments[1]), arguments[1]


def _check_bdlora(arguments: list[str]) -> None:
    _parser().parse_args(arguments)
    for argument in arguments:
        if argument.startswith("examples/"):
            assert (ROOT / argument).is_file(), argument


CHECKS = {
    "bdlora": _check_bdlora,
    "make": _check_make,
    "pip": _check_pip,
    "python": _check_python,
}


def _dry_run(target: str) -> str:
    # Everything counts as out of date, so that a recipe is seen on a machine where it has run.
    command = ["make", "--no-print-directory", "--dry-run", "--always-make", target]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _declared_extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return set(project["optional-dependencies"])


def _extras_in(text: str) -> set[str]:
    return {name for match in _EXTRAS.finditer(text) for name in match["names"].split(",")}


def test_length():
    assert len(TEXT.splitlines()) <= MAX_LINES


def test_python_blocks_run_in_order(tmp_path):
    """One after the other in one process, as a reader would type them in."""
    blocks = _blocks("python")
    assert blocks
    source = ""
    for line_above, body in blocks:
        # Empty lines, so that a traceback names the line of README.md.
        source += "\n" * (line_above - source.count("\n")) + body
    program = "import sys; exec(compile(sys.stdin.read(), 'README.md', 'exec'), {})"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        input=source,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", _commands())
def test_command_is_right(command):
    program, *arguments = shlex.split(command, comments=True)
    assert program in CHECKS, f"README.md has a command that no test checks: {command}"
    CHECKS[program](arguments)


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_make_target_sets_itself_up(target):
    recipe = _dry_run(target)
    environment = recipe.index("-m venv .venv")
    dependencies = recipe.index("install -c constraints-dev.txt")
    used = recipe.rindex(".venv/bin/")
    assert environment < dependencies < used


def test_extras_exist():
    named = _extras_in(TEXT)
    assert named, "README.md names no extra; is the pattern still right?"
    assert named <= _declared_extras()


def test_internal_links_exist():
    targets = [match["target"] for match in _LINK.finditer(TEXT)]
    internal = [target for target in targets if "://" not in target]
    assert internal
    missing = [target for target in internal if not (ROOT / target).exists()]
    assert not missing


def test_no_badges():
    assert "![" not in TEXT
