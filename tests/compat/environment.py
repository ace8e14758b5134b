"""One virtual environment for each release, and the core's run inside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tests.compat.releases import CORE, Release

ROOT = Path(__file__).parents[2]
#: What the core's tests import, beside this package's own requirements.
_TOOLS = (
    "datasets",
    "einops",
    "fastapi",
    "httpx2",
    "hypothesis",
    "llguidance",
    "openai",
    "peft",
    "prometheus-client",
    "psutil",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "pyyaml",
    "safetensors",
    "schemathesis",
    "scipy",
    "tqdm",
    "transformers",
    "uvicorn",
)
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception): ")
_VERSIONS = """
import importlib.metadata, json, platform
names = ("torch", "numpy", "peft", "megatron-core")
found = {name: importlib.metadata.version(name) for name in names}
print(json.dumps({"python": platform.python_version(), **found}))
"""


@dataclass(kw_only=True)
class Result:
    """What happened on one release; `problem` where the core could not be run at all."""

    version: str
    date: str
    commit: str
    seconds: float = 0.0
    passed: int = 0
    skipped: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def save_results(path: Path, results: Sequence[Result]) -> None:
    """Keep them beside the table."""
    text = json.dumps([asdict(result) for result in results], indent=1)
    path.write_text(text + "\n", "utf-8")


def load_results(path: Path) -> dict[str, Result]:
    """The kept ones by version; none where there is no file."""
    if not path.exists():
        return {}
    return {row["version"]: Result(**row) for row in json.loads(path.read_text("utf-8"))}


def try_release(release: Release, cache: Path, pytest_args: list[str]) -> Result:
    """Install a release and run the core on it."""
    folder = cache / release.version
    commit = _output("git", "describe", "--always") + _changed()
    result = Result(version=release.version, date=time.strftime("%Y-%m-%d"), commit=commit)
    try:
        python = _install(release, folder)
        result.versions = json.loads(_output(python, "-c", _VERSIONS))
    except subprocess.CalledProcessError as error:
        result.problem = f"not installed: {_last_line(error.stderr)}"
    else:
        _run_core(python, folder, result, pytest_args)
    return result


def _install(release: Release, folder: Path) -> str:
    """The interpreter of the release's environment, which is made once."""
    python, stamp = folder / "bin" / "python", folder / "installed.stamp"
    interpreter = _interpreter(release.python)
    pins = (ROOT / "constraints-dev.txt").read_text("utf-8")
    wanted = json.dumps([asdict(release), interpreter, pins, _TOOLS])
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        return str(python)
    _output(interpreter or sys.executable, "-m", "venv", "--clear", str(folder))
    constraints = folder / "constraints.txt"
    constraints.write_text(_constraints(release), "utf-8")
    pip = (str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    _output(*pip, "-c", str(constraints), "torch", "numpy", *_TOOLS, *release.extra)
    force = () if interpreter else ("--ignore-requires-python",)
    _output(*pip, "--no-deps", *force, f"megatron-core=={release.version}")
    _output(*pip, "--no-deps", "--editable", str(ROOT))
    stamp.write_text(wanted, "utf-8")
    return str(python)


def _interpreter(wanted: tuple[int, int]) -> str | None:
    """An interpreter of this version that starts, if there is one."""
    if sys.version_info[:2] == wanted:
        return sys.executable
    name = f"python{wanted[0]}.{wanted[1]}"
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        found = shutil.which(name, path=folder)
        # A version manager's shim is there for every version it knows, chosen or not.
        if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return found
    return None


def _constraints(release: Release) -> str:
    """constraints-dev.txt without what the release decides."""
    decided = ("megatron-core==", *(f"{name.partition('<')[0]}==" for name in release.extra))
    lines = (ROOT / "constraints-dev.txt").read_text("utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(decided)) + "\n"


def _run_core(python: str, folder: Path, result: Result, pytest_args: list[str]) -> None:
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    started = time.monotonic()
    with (folder / "pytest.log").open("wb") as log:
        subprocess.run(
            [
                python,
                "-m",
                "pytest",
                "-q",
                "-n2",
                "--dist=loadfile",
                f"--junitxml={report}",
                *CORE,
                *pytest_args,
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    result.seconds = time.monotonic() - started
    if not report.exists():
        tail = (folder / "pytest.log").read_text("utf-8", "replace")
        result.problem = f"not run: {_last_line(tail)}"
        return
    for case in ElementTree.parse(report).iter("testcase"):
        _count(case, result)


def _count(case: ElementTree.Element, result: Result) -> None:
    name = f"{case.get('classname')}::{case.get('name')}"
    bad = case.find("failure")
    if bad is None:
        bad = case.find("error")
    if bad is not None:
        result.failures[name] = _reason(bad.text or bad.get("message") or "")
    elif case.find("skipped") is not None:
        result.skipped += 1
    else:
        result.passed += 1


def _reason(text: str) -> str:
    """The exception that explains a failure: the first one that a traceback ends with."""
    lines = [line.removeprefix("E").strip() for line in text.splitlines()]
    # A failed rank's own exception says more than the one that collects them.
    named = [line for line in lines if _EXCEPTION.match(line) and "RankError" not in line]
    chosen = named or [line for line in lines if line]
    return chosen[0][:200] if chosen else "unknown"


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _changed() -> str:
    """What a commit's name ends with where files differ from it; reports are made by runs."""
    differs = _output("git", "status", "--short", "-uno", "--", ".", ":!benchmarks/results")
    return "-dirty" if differs else ""


def _last_line(text: str | None) -> str:
    lines = [line for line in (text or "").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
