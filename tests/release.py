"""Build the wheel and the sdist, and try the wheel where nothing of the checkout is in reach.

Run: `make release-check`, or `python -m tests.release --only serve` for one extra. Each extra is
installed from the wheel into an empty environment of its own, which takes minutes and gigabytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "tests" / "fixtures" / "5ae9907" / "peft"
BARE = "none"
#: Extras whose packages are compiled with CUDA.
NEED_CUDA = ("te", "nemo", "bridge")
COMMANDS = (
    ("--help",),
    ("convert", "adapter", "--to", "slora", "--tp", "2", "--out", "converted"),
    ("verify", "adapter", "converted/adapter"),
    ("plan", "--model", "llama-3.1-8b", "--tp", "8", "--hardware", "a100-nvlink"),
    ("serve", "--help"),
)
INSTALL_S, COMMAND_S = 3600, 600


def main() -> int:
    """Exit status: 0 where every extra could be installed and every command ran."""
    arguments = _parse()
    with tempfile.TemporaryDirectory(prefix="bdlora-release-") as folder:
        wheel = build(Path(folder))
        extras = [BARE, *(extra for extra in extras_of(wheel) if extra not in NEED_CUDA)]
        failed = []
        for extra in extras:
            if arguments.only and extra not in arguments.only:
                continue
            problem = try_extra(wheel, extra, Path(folder))
            print(f"{extra}: {problem or 'installed, and every command ran'}", flush=True)
            failed += [extra] if problem else []
    print(f"not tried, for they need CUDA: {', '.join(NEED_CUDA)}")
    return 1 if failed else 0


def build(folder: Path) -> Path:
    """Make both archives in an environment of their own, the wheel from the sdist.

    Returns:
        The wheel, which holds every module of the package and nothing else.
    """
    python = _environment(folder / "build")
    _run([python, "-m", "pip", "install", "build"], folder, INSTALL_S)
    _run([python, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT)], folder, INSTALL_S)
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    tracked = _run(["git", "ls-files", "bdlora_megatron"], ROOT, COMMAND_S).splitlines()
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == set(tracked), f"in one of wheel and git: {packed ^ set(tracked)}"
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked) <= inside, f"missing in the sdist: {set(tracked) - inside}"
    print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, {len(packed)} files", flush=True)
    return wheel


def extras_of(wheel: Path) -> list[str]:
    """The extras that a wheel's metadata declares."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    return [line.partition(": ")[2] for line in lines if line.startswith("Provides-Extra: ")]


def try_extra(wheel: Path, extra: str, folder: Path) -> str | None:
    """Install one extra and run the commands.

    Returns:
        What went wrong.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{extra}-") as place:
        here = Path(place)
        (here / "adapter").symlink_to(ADAPTER)
        try:
            python = _environment(here / "environment")
            named = str(wheel) if extra == BARE else f"{wheel}[{extra}]"
            _run([python, "-m", "pip", "install", named], here, INSTALL_S)
            where = _run(
                [python, "-c", "import bdlora_megatron as b; print(b.__file__)"], here, COMMAND_S
            )
            assert Path(where.strip()).is_relative_to(here), f"imported from {where}"
            bdlora = str(Path(python).with_name("bdlora"))
            for command in COMMANDS:
                _run([bdlora, *command], here, COMMAND_S)
        except subprocess.CalledProcessError as error:
            return f"{' '.join(error.cmd)} ended with {error.returncode}:\n{error.output[-2000:]}"
        except subprocess.TimeoutExpired as error:
            return f"{' '.join(error.cmd)} did not end within {error.timeout} s"
    return None


def _environment(folder: Path) -> str:
    _run([sys.executable, "-m", "venv", str(folder)], folder.parent, COMMAND_S)
    return str(folder / "bin" / "python")


def _run(command: Sequence[str], folder: Path, timeout_s: float) -> str:
    outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        command,
        cwd=folder,
        env=outside,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=timeout_s,
    ).stdout


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="EXTRA", help=f"some extras, or {BARE}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
