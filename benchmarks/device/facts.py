"""The machine and the versions, which a report begins with."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.device.parts import ROOT
from benchmarks.device.task import Outcome, Task

__all__ = ["commit", "run"]

#: What attention and layers may come from.
_OPTIONAL = ("flash-attn", "transformer-engine")
_PACKAGES = ("triton", "megatron-core", "transformers", "peft", "numpy", *_OPTIONAL)


def run(task: Task) -> Outcome:
    """Ask the machine.

    Args:
        task: The part's time box.

    Returns:
        The facts, by name.
    """
    del task
    facts = {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": commit(), **_device()}
    facts |= {"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
    facts |= {name: _version(name) for name in _PACKAGES}
    return Outcome(state="passed", line=f"{facts['device']}, {facts['date']}", found=facts)


def commit() -> str:
    """The commit of the sources: of the repository, or as noted in a copy of it."""
    noted = ROOT / "COMMIT"
    if noted.exists():
        return noted.read_text("utf-8").strip()
    if not (ROOT / ".git").exists():
        return "unknown"
    return _said("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")


def _device() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"device": f"no GPU; {os.cpu_count()} cores of {platform.machine()}"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory, GiB": f"{properties.total_memory / 2**30:.0f}",
        "L2, MiB": f"{properties.L2_cache_size / 2**20:.0f}",
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
