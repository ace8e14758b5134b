"""Checkpoints of a run: the adapter, the optimizer's state, and the step. Never the base model.

A checkpoint is a folder ``step_00000042`` in Megatron-Core's distributed format. It is written
under another name and renamed when it is complete, so a folder with this name is always whole,
whenever the process died.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.export import adapter_state
from bdlora_megatron.runtime.versions.checkpoint import optimizer_format, save_distributed
from bdlora_megatron.train.step import Stepper

__all__ = ["checkpoints", "load_checkpoint", "read_facts", "save_checkpoint"]

_COMPLETE = re.compile(r"step_(\d{8,})")
_FACTS = "run.json"
# Layers by number, each with its own entry: not every layer need have an adapter.
_METADATA = {"non_homogeneous_layers": True}


def checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in a run's folder: steps done, path; the oldest first."""
    found = []
    for path in Path(folder).glob("step_*"):
        name = _COMPLETE.fullmatch(path.name)
        if name and path.is_dir():
            found.append((int(name.group(1)), path))
    return sorted(found)


def save_checkpoint(
    folder: str | Path,
    step: int,
    stepper: Stepper,
    facts: Mapping[str, Any],
    *,
    keep: int,
    spare: int | None = None,
) -> Path:
    """Write a checkpoint and remove old ones.

    Args:
        folder: The run's folder, the same on every rank.
        step: Steps done.
        stepper: What to save.
        facts: What a resumed run has to agree with; anything that JSON holds.
        keep: How many of the newest checkpoints stay.
        spare: Steps of one that stays as well.

    Returns:
        The checkpoint.

    Collectives:
        Those of ``dist_checkpointing.save``, and two barriers.
    """
    path = Path(folder) / f"step_{step:08d}"
    unfinished = path.with_name(f"{path.name}.unfinished")
    first = torch.distributed.get_rank() == 0
    if first:
        for leftover in Path(folder).glob("step_*.unfinished"):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
        (unfinished / _FACTS).write_text(json.dumps(facts, indent=1), "utf-8")
    torch.distributed.barrier()
    state = {**_sharded_state(stepper, is_loading=False), "step": step}
    save_distributed(state, unfinished)
    torch.distributed.barrier()
    if first:
        _sync(unfinished)
        if path.exists():
            shutil.rmtree(path)
        os.replace(unfinished, path)
        for number, old in checkpoints(folder)[:-keep]:
            if number == spare:
                continue
            # Renamed first: what is half removed must not look complete.
            doomed = old.with_name(f"{old.name}.unfinished")
            os.replace(old, doomed)
            shutil.rmtree(doomed)
    return path


def read_facts(path: Path) -> dict[str, Any]:
    """What ``save_checkpoint`` was told of the run.

    Raises:
        ConfigError: The folder is no checkpoint of a run.
    """
    try:
        facts = json.loads((path / _FACTS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is no checkpoint of a training run: {error}; remove it, or name another "
            "folder in checkpoint.save"
        ) from error
    return dict(facts)


def load_checkpoint(path: Path, stepper: Stepper) -> int:
    """Put a checkpoint into a freshly made stepper, at any parallel size.

    Part of it is a pickle, as Megatron-Core writes it: load what you wrote yourself.

    Args:
        path: A complete checkpoint.
        stepper: With the same adapters, not stepped yet.

    Returns:
        Steps done.

    Collectives:
        Those of ``dist_checkpointing.load``.
    """
    state = dist_checkpointing.load(_sharded_state(stepper, is_loading=True), str(path))
    stepper.model.module.load_state_dict(state["model"], strict=False)
    stepper.optimizer.load_state_dict(state["optimizer"])
    stepper.scheduler.load_state_dict(state["scheduler"])
    return int(state["step"])


def _sharded_state(stepper: Stepper, *, is_loading: bool) -> dict[str, Any]:
    adapter = adapter_state(stepper.model.module, _METADATA)
    optimizer = stepper.optimizer.sharded_state_dict(
        adapter, is_loading=is_loading, **optimizer_format(stepper.optimizer)
    )
    return {
        "model": adapter,
        "optimizer": optimizer,
        "scheduler": stepper.scheduler.state_dict(),
    }


def _sync(folder: Path) -> None:
    """Have the files on disk before their name says that they are."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
