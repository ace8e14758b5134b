"""One folder for a machine with a GPU and no network: `make device-kit`.

In it are wheels of this package, of Megatron-Core and of what else such a machine lacks, without
their dependencies; the tests and benchmarks; and `run.sh`, which installs the wheels beside the
machine's own packages and runs `python -m benchmarks.device`. The machine brings Python 3.12 and
torch for CUDA with Triton, transformers, PEFT, pytest, hypothesis, einops and psutil.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device.facts import commit
from benchmarks.device.parts import ROOT

__all__ = ["checked_size", "copy_repository", "make_kit"]

OUT = ROOT / "build" / "device-kit"
#: What travels to such a machine is limited, and other things travel too.
MOST_BYTES = 60 * 2**20
_PINS = ROOT / "constraints-device.txt"
_COPIED = ("tests", "benchmarks", "examples", "pyproject.toml", "README.md")
_LEFT_OUT = "benchmarks/results/"
_PYTHON = "3.12"
_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")


def make_kit(out: Path) -> int:
    """Pack everything, in the place of what was there.

    Args:
        out: The folder.

    Returns:
        Its size in bytes.

    Raises:
        RuntimeError: It is too large.
    """
    shutil.rmtree(out, ignore_errors=True)
    wheels = out / "wheels"
    wheels.mkdir(parents=True)
    _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
    for_that_machine = ["--only-binary=:all:", "--python-version", _PYTHON]
    for platform in _PLATFORMS:
        for_that_machine += ["--platform", platform]
    wanted = ["--requirement", str(_PINS), "--dest", str(wheels)]
    _pip("download", "--no-deps", *for_that_machine, *wanted)
    shutil.copy(_PINS, out)
    shutil.copy(Path(__file__).with_name("run.sh"), out)
    copy_repository(out / "repository")
    return checked_size(out)


def checked_size(out: Path, most: int = MOST_BYTES) -> int:
    """The bytes of all files below a folder.

    Args:
        out: The folder.
        most: What they may be.

    Returns:
        Their number.

    Raises:
        RuntimeError: They are more.
    """
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > most:
        raise RuntimeError(
            f"{out} has {size / 2**20:.0f} MiB, wanted {most / 2**20:.0f} at most; take packages "
            f"out of {_PINS.name}"
        )
    return size


def copy_repository(out: Path) -> None:
    """Copy the tests, the benchmarks and the examples as they are now, and note the commit.

    Args:
        out: The folder.
    """
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", *_COPIED]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if not name.startswith(_LEFT_OUT):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, out / name)
    (out / "COMMIT").write_text(commit() + "\n", "utf-8")


def _pip(*arguments: str) -> None:
    command: Sequence[str] = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments, "--quiet"], check=True)


def main() -> None:
    """Pack, and say how large it is."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device.kit", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    out = parser.parse_args().out
    size = make_kit(out)
    print(f"{out}: {size / 2**20:.1f} MiB; copy it and run: sh {out.name}/run.sh")


if __name__ == "__main__":
    main()
