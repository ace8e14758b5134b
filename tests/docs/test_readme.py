"""README.md: every snippet runs, every command is checked, every link and extra exists."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.docs.commands import check_command, declared_extras, dry_run, extras_in
from tests.docs.pages import ROOT, blocks, links

README = ROOT / "README.md"
TEXT = README.read_text("utf-8")
MAX_LINES = 150


def test_length():
    assert len(TEXT.splitlines()) <= MAX_LINES


def test_python_blocks_run_in_order(tmp_path):
    """One after the other in one process, as a reader would type them in."""
    found = blocks(TEXT, "python")
    assert found
    source = ""
    for block in found:
        # Empty lines, so that a traceback names the line of README.md.
        source += "\n" * (block.line - source.count("\n")) + block.body
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


@pytest.mark.parametrize(
    "command", [command for block in blocks(TEXT, "sh") for command in block.commands()]
)
def test_command_is_right(command):
    check_command(command)


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_make_target_sets_itself_up(target):
    recipe = dry_run(target)
    environment = recipe.index("-m venv --clear .venv")
    dependencies = recipe.index("install -c constraints-dev.txt")
    used = recipe.rindex(".venv/bin/")
    assert environment < dependencies < used


def test_extras_exist():
    named = extras_in(TEXT)
    assert named, "README.md names no extra; is the pattern still right?"
    assert named <= declared_extras()


def test_internal_links_exist():
    internal = links(TEXT)
    assert internal
    missing = [target for target in internal if not (ROOT / target).exists()]
    assert not missing


def test_no_badges():
    assert "![" not in TEXT
