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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from bdlora_megatron.errors import BDLoRAError, ConfigError
from bdlora_megatron.export import adapter_state
from bdlora_megatron.runtime import device
from bdlora_megatron.runtime.versions.checkpoint import (
    PlannedSave,
    optimizer_format,
    plan_distributed,
    save_distributed,
)
from bdlora_megatron.train.model import model_chunks
from bdlora_megatron.train.step import DivergedError, Stepper
from bdlora_megatron.train.writer import FileWriter

__all__ = ["SaveError", "Saver", "checkpoints", "load_checkpoint", "read_facts"]

_COMPLETE = re.compile(r"step_(\d{8,})")
_FACTS = "run.json"
# Layers by number, each with its own entry: not every layer need have an adapter.
_METADATA = {"non_homogeneous_layers": True}


class SaveError(BDLoRAError, RuntimeError):
    """A checkpoint could not be written in the background; those before it are good."""


def checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in a run's folder: steps done, path; the oldest first."""
    found = []
    for path in Path(folder).glob("step_*"):
        name = _COMPLETE.fullmatch(path.name)
        if name and path.is_dir():
            found.append((int(name.group(1)), path))
    return sorted(found)


class Saver:
    """Saves a run's checkpoints, while it waits or, by a process of each rank's, meanwhile.

    Every rank makes one and calls its methods with the same arguments. One save at a time is under
    way; the next one waits for it. As a context, it waits for the last one on leaving, unless an
    error came that not every rank need have met.
    """

    def __init__(self, folder: str | Path, *, keep: int, background: bool = False) -> None:
        """Prepare to save.

        Args:
            folder: The run's folder, the same on every rank.
            keep: How many of the newest checkpoints stay.
            background: Return from ``save`` before the files are written.
        """
        self._folder, self._keep = Path(folder), keep
        self._process = FileWriter() if background else None
        self._pending: tuple[int, int | None, PlannedSave] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or issubclass(kind, DivergedError):
                self.wait()
        finally:
            if self._process is not None:
                self._process.close()

    def save(
        self, step: int, stepper: Stepper, facts: Mapping[str, Any], *, spare: int | None = None
    ) -> None:
        """Write a checkpoint and remove old ones.

        Args:
            step: Steps done.
            stepper: What to save. Once this returns it may be stepped.
            facts: What a resumed run has to agree with; anything that JSON holds.
            spare: Steps of an old checkpoint that stays as well.

        Raises:
            SaveError: The save before this one failed in the background.

        Collectives:
            Those of ``dist_checkpointing.save``, two barriers and, in the background, those of
            ``wait``.
        """
        self.wait()
        unfinished = self._unfinished(step)
        if torch.distributed.get_rank() == 0:
            for leftover in self._folder.glob("step_*.unfinished"):
                shutil.rmtree(leftover)
            unfinished.mkdir(parents=True)
            (unfinished / _FACTS).write_text(json.dumps(facts, indent=1), "utf-8")
        torch.distributed.barrier()
        state = {**_sharded_state(stepper, is_loading=False), "step": step}
        if self._process is None:
            save_distributed(state, unfinished)
            self._publish(step, spare)
            return
        planned = plan_distributed(state, unfinished)
        if planned.files is not None:
            self._process.write(planned.files)
        self._pending = (step, spare, planned)

    def poll(self) -> None:
        """Give a checkpoint its name if every rank's files were written meanwhile.

        Raises:
            SaveError: A rank could not write; raised on every rank.

        Collectives:
            One all-reduce of one number while a save is under way, and then those of ``wait``.
        """
        if self._process is None or self._pending is None:
            return
        done = torch.tensor(int(self._process.is_done()), device=device())
        torch.distributed.all_reduce(done, op=torch.distributed.ReduceOp.MIN)
        if done:
            self.wait()

    def wait(self) -> None:
        """Wait until no save is under way.

        Raises:
            SaveError: A rank could not write; raised on every rank.

        Collectives:
            Where one was: an all-gather of what went wrong, those of Megatron-Core's
            ``save_state_dict_async_finalize``, and a barrier.
        """
        if self._process is None or self._pending is None:
            return
        step, spare, planned = self._pending
        self._pending = None
        written, problem = self._process.outcome() if planned.files is not None else (None, None)
        problems: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, problem)
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise SaveError(
                    f"the checkpoint of step {step} could not be written by rank {rank}: "
                    f"{problem}; the ones before it in {self._folder} are kept"
                )
        planned.finish(written)
        self._publish(step, spare)

    def _unfinished(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}.unfinished"

    def _publish(self, step: int, spare: int | None) -> None:
        """Give a checkpoint its name, and remove old ones."""
        torch.distributed.barrier()
        if torch.distributed.get_rank() != 0:
            return
        unfinished = self._unfinished(step)
        path = unfinished.with_suffix("")
        _sync(unfinished)
        if path.exists():
            shutil.rmtree(path)
        os.replace(unfinished, path)
        for number, old in checkpoints(self._folder)[: -self._keep]:
            if number == spare:
                continue
            # Renamed first: what is half removed must not look complete.
            doomed = old.with_name(f"{old.name}.unfinished")
            os.replace(old, doomed)
            shutil.rmtree(doomed)


def read_facts(path: Path) -> dict[str, Any]:
    """What ``Saver.save`` was told of the run.

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
    for name, chunk in _chunks(stepper):
        chunk.load_state_dict(state[name], strict=False)
    stepper.optimizer.load_state_dict(state["optimizer"])
    stepper.scheduler.load_state_dict(state["scheduler"])
    return int(state["step"])


def _chunks(stepper: Stepper) -> Iterator[tuple[str, Any]]:
    """This stage's parts of the model by Megatron-Core's names for them."""
    chunks = model_chunks(stepper.model)
    for number, chunk in enumerate(chunks):
        yield f"model{number}" if len(chunks) > 1 else "model", chunk.module


def _sharded_state(stepper: Stepper, *, is_loading: bool) -> dict[str, Any]:
    adapter = {name: adapter_state(chunk, _METADATA) for name, chunk in _chunks(stepper)}
    optimizer = stepper.optimizer.sharded_state_dict(
        adapter, is_loading=is_loading, **optimizer_format(stepper.optimizer)
    )
    return {
        **adapter,
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
