"""The folder that `make device-kit` packs, and the script in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.device.kit import OUT, checked_size, copy_repository
from benchmarks.device.parts import ROOT
from tests.unit.ops.cases import HAS_GPU

SCRIPT = ROOT / "benchmarks" / "device" / "run.sh"
#: Kept apart from the versions that the tests run on.
OTHER_VERSIONS = {"megatron-core"}
_MAIN = """
import sys
import probe
print(probe.__file__)
print(sys.argv[1:])
"""


def _pins(name):
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_versions_are_those_of_the_tests():
    packed, tested = _pins("constraints-device.txt"), _pins("constraints-dev.txt")
    both = (packed.keys() & tested.keys()) - OTHER_VERSIONS
    assert {"fastapi", "uvicorn", "omegaconf"} <= both
    assert {name: packed[name] for name in both} == {name: tested[name] for name in both}


def test_the_repository_is_copied_without_its_reports(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository, to know its files")
    copy_repository(tmp_path)
    assert (tmp_path / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()
    assert (tmp_path / "benchmarks/device/run.sh").read_bytes() == SCRIPT.read_bytes()
    assert (tmp_path / "tests/conftest.py").exists()
    assert not (tmp_path / "benchmarks/results").exists()
    assert not (tmp_path / "bdlora_megatron").exists()
    described = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    )
    assert (tmp_path / "COMMIT").read_text().startswith(described.stdout.strip())


def test_a_kit_that_is_too_large_is_refused(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "large.whl").write_bytes(bytes(2**21))
    assert checked_size(tmp_path, 2**21) == 2**21
    with pytest.raises(RuntimeError, match=r"has 2 MiB, wanted 1 at most"):
        checked_size(tmp_path, 2**20)


def _wheel(folder):
    """A package of one module, as pip takes it."""
    info = "probe-1.0.dist-info"
    with zipfile.ZipFile(folder / "probe-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("probe.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tag)
        names = ["probe.py", f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD"]
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))


def _run(kit, *options, **environment):
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        ["sh", str(kit / "run.sh"), *options],
        env={**kept, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def test_the_script_installs_beside_what_is_there_and_passes_its_options_on(tmp_path):
    kit = tmp_path / "a kit"
    (kit / "wheels").mkdir(parents=True)
    shutil.copy(SCRIPT, kit)
    _wheel(kit / "wheels")
    package = kit / "repository" / "benchmarks" / "device"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "__main__.py").write_text(_MAIN, "utf-8")
    place, options = _run(kit, "--minutes", "3", "--out", "with a space").splitlines()
    assert Path(place) == kit / "site" / "probe.py"
    assert options == "['--minutes', '3', '--out', 'with a space']"
    # Installed once; another time there may be nothing to install from.
    shutil.rmtree(kit / "wheels")
    assert _run(kit).splitlines()[0] == place


def _machine():
    """A Python 3.12 with what a GPU machine has."""
    own = sys.executable if sys.version_info[:2] == (3, 12) else None
    python = os.environ.get("PYTHON312") or own or shutil.which("python3.12")
    if python is None:
        pytest.skip("needs Python 3.12: on the PATH, or named by PYTHON312")
    imports = "import torch, triton, transformers, peft, einops, psutil, pytest, hypothesis"
    has = subprocess.run([python, "-c", imports], capture_output=True, text=True)
    if has.returncode:
        pytest.skip(f"{python} lacks what a GPU machine has: {has.stderr.strip()[-200:]}")
    return python


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="sees that the kit runs on a CPU")
def test_the_kit_runs_by_what_it_brings(tmp_path):
    if not OUT.exists():
        pytest.skip(f"needs {OUT.relative_to(ROOT)}; make device-kit packs it")
    site = tmp_path / "site"
    environment = {"PYTHON": _machine(), "SITE": str(site), "CUDA_VISIBLE_DEVICES": ""}
    _run(OUT, "--only", "train", "--out", str(tmp_path / "out"), **environment)
    found = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for name in ("facts", "train")
    }
    assert {name: result["state"] for name, result in found.items()} == dict.fromkeys(
        found, "passed"
    )
    facts = found["facts"]["found"]
    assert facts["megatron-core"] == _pins("constraints-device.txt")["megatron-core"]
    assert facts["commit"] == (OUT / "repository" / "COMMIT").read_text().strip()
    assert (site / "megatron" / "core").is_dir()
    assert (site / "bdlora_megatron").is_dir()
