"""The pages below docs/: commands are checked, snippets name what exists, links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from bdlora_megatron.errors import MissingDependencyError
from tests.docs.commands import check_command
from tests.docs.pages import ROOT, blocks, documents, links

PAGES = {path.relative_to(ROOT / "docs").as_posix(): path for path in documents()}
COMMANDS = [
    pytest.param(command, id=f"{name}: {command[:50]}")
    for name, path in PAGES.items()
    for block in blocks(path.read_text("utf-8"), "sh")
    for command in block.commands()
]
SNIPPETS = [
    pytest.param(block.body, id=f"{name}:{block.line}")
    for name, path in PAGES.items()
    for block in blocks(path.read_text("utf-8"), "python")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_right(command):
    check_command(command)


@pytest.mark.parametrize("source", SNIPPETS)
def test_snippet_names_what_exists(source):
    """Snippets need models and process groups; that they import what there is needs neither."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("bdlora_megatron"):
            missing = {alias.name for alias in node.names} - _names(node.module)
            assert not missing, f"{node.module} has no {missing}"


def _names(module):
    try:
        return set(dir(importlib.import_module(module))) | set(_exported(module))
    except (ImportError, MissingDependencyError):
        # The plugs import their hosts, which the environments of tests/hosts have.
        assert module in ("bdlora_megatron.bridge", "bdlora_megatron.nemo")
        return set(_exported(module))


def _exported(module):
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return ()


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    path = PAGES[name]
    for target in links(path.read_text("utf-8")):
        assert (path.parent / target).resolve().exists(), f"{name} links to {target}"


@pytest.mark.parametrize("name", ["train", "convert", "serve"])
def test_figures_name_modules_that_exist(name):
    drawn = (ROOT / "docs" / "figures" / f"{name}.svg").read_text("utf-8")
    texts = re.findall(r"<text [^>]*monospace[^>]*>([^<]+)", drawn)
    modules = [part for text in texts for part in text.split(", ") if re.search(r"/|\.py$", part)]
    assert len(modules) > 4
    missing = [module for module in modules if not (ROOT / "bdlora_megatron" / module).exists()]
    assert not missing
