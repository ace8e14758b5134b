"""The lowest validation loss of a run, and whether waiting for a lower one has lasted too long."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bdlora_megatron.convert import WriteOptions, open_adapter, write_adapter
from bdlora_megatron.train.schema import TrainSection

__all__ = ["BEST_ADAPTER", "Best", "write_best"]

BEST_ADAPTER = "adapter-best"


@dataclass(kw_only=True, slots=True)
class Best:
    """What the evaluations of a run gave so far; part of its checkpoints.

    Attributes:
        loss: The lowest loss; None before the first evaluation.
        step: Steps done when it was measured.
        counted_loss: The loss that a lower one is measured from, to count for early stopping.
        counted_step: Steps done then.
        waited: Evaluations since.
        evaluated: Steps done at the last evaluation that was taken in.
    """

    loss: float | None = None
    step: int = 0
    counted_loss: float | None = None
    counted_step: int = 0
    waited: int = 0
    evaluated: int = 0

    @classmethod
    def of_checkpoint(cls, facts: Mapping[str, Any]) -> Best:
        """What a checkpoint's facts hold; nothing in those of older ones."""
        return cls(**facts.get("best", {}))

    def facts(self) -> dict[str, Any]:
        """For a checkpoint's facts."""
        return {"best": asdict(self)}

    def note(self, step: int, loss: float, settings: TrainSection) -> None:
        """Take an evaluation in; once, however often a step is evaluated.

        Args:
            step: Steps done.
            loss: Its loss; one that is no number is never the best.
            settings: How much lower counts for early stopping.
        """
        if step <= self.evaluated:
            return
        self.evaluated = step
        delta = settings.early_stopping_min_delta
        self.waited += 1
        if _lower(loss, self.counted_loss, delta):
            self.counted_loss, self.counted_step, self.waited = loss, step, 0
        if _lower(loss, self.loss, 0.0):
            self.loss, self.step = loss, step

    def why_stop(self, settings: TrainSection) -> str | None:
        """Why the run ends before its last step; None if it goes on.

        Args:
            settings: How long to wait.

        Returns:
            A sentence without its beginning.
        """
        patience = settings.early_stopping_patience
        if patience is None or self.waited < patience:
            return None
        delta = settings.early_stopping_min_delta
        below = "" if self.counted_loss is None else f" below {self.counted_loss - delta:.4f}"
        return (
            f"no validation loss{below} in {self.waited} evaluations since step "
            f"{self.counted_step} (train.early_stopping_patience)"
        )


def write_best(checkpoint: Path, base_model: str) -> None:
    """Write the adapter of the best step's checkpoint beside it, on one process.

    Where a run was killed, the folder may hold that of a step after the checkpoint it goes on from.

    Args:
        checkpoint: The checkpoint, in the run's folder.
        base_model: Name or path of the base model, noted in the adapter's config.
    """
    options = WriteOptions(overwrite=True, base_model=base_model)
    with open_adapter(checkpoint) as adapter:
        write_adapter(adapter, checkpoint.with_name(BEST_ADAPTER), "peft", options=options)


def _lower(loss: float, best: float | None, delta: float) -> bool:
    return math.isfinite(loss) and (best is None or loss < best - delta)
