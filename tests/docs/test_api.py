"""The reference has a page for every public package, and for all that snippets import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks, documents

PACKAGE = ROOT / "bdlora_megatron"
DOCUMENTED = {
    name
    for page in (ROOT / "docs" / "api").glob("*.md")
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE)
}
#: The command line is described by its own help.
INTERNAL = {"bdlora_megatron.cli"}


def exports(path):
    """Whether a module says what is public in it."""
    return any(
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for node in ast.parse(path.read_text("utf-8")).body
    )


def test_every_public_package_has_a_page():
    packages = {
        f"bdlora_megatron.{path.parent.name}"
        for path in PACKAGE.glob("*/__init__.py")
        if exports(path)
    }
    assert len(packages) > 8
    assert packages - INTERNAL <= DOCUMENTED


def test_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs" / "api").glob("*.md"):
        assert f"api/{page.name}" in navigation


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *documents()], ids=lambda path: Path(path).name
)
def test_what_snippets_import_is_in_the_reference(path):
    for block in blocks(path.read_text("utf-8"), "python"):
        for node in ast.walk(ast.parse(block.body)):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("bdlora_"):
                continue
            if node.module == "bdlora_megatron":
                wanted = {f"bdlora_megatron.{alias.name}" for alias in node.names}
            else:
                wanted = {node.module}
            parents = {name.rpartition(".")[0] for name in DOCUMENTED}
            assert wanted <= DOCUMENTED | parents, f"{path.name}, line {block.line}"


def test_the_public_face_is_its_page_and_costs_nothing():
    import bdlora_megatron as bd

    page = (ROOT / "docs" / "api" / "face.md").read_text("utf-8")
    assert sorted(re.findall(r"^\| `bd\.(\w+)`", page, re.MULTILINE)) == sorted(bd.__all__)
    for name in bd.__all__:
        assert getattr(bd, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'apply_lra'"):
        _ = bd.apply_lra
    code = (
        "import sys, bdlora_megatron; print(*sorted({'torch', 'megatron', 'safetensors', 'numpy'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
