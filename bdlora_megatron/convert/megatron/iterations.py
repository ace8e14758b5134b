"""Which of a training's checkpoints to read: the one that its tracker names."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bdlora_megatron.convert.megatron.dist_tensors import METADATA_NAME

__all__ = ["ITERATION", "newest_iteration"]

logger = logging.getLogger(__name__)

ITERATION = re.compile(r"iter_(\d{7,})")
_TRACKER, _BRIDGE_TRACKER = "latest_checkpointed_iteration.txt", "latest_train_state.pt"
_LARGEST_TRACKER = 1 << 20


def newest_iteration(folder: Path, is_one: Callable[[Path], bool]) -> Path | None:
    """The newest complete iteration.

    A checkpoint that was being written when the training died has the highest number and no end;
    the tracker is written after it. Without a tracker the highest complete one counts.

    Args:
        folder: Holds `iter_*` folders, and perhaps a tracker.
        is_one: Whether a folder has what else its format needs.
    """
    complete = {
        int(found[1]): child
        for child in folder.iterdir()
        if (found := ITERATION.fullmatch(child.name))
        and (child / METADATA_NAME).is_file()
        and is_one(child)
    }
    named = _tracked(folder)
    if not complete:
        return None
    if named in complete:
        return complete[named]
    newest = complete[max(complete)]
    if named is not None:
        logger.warning(
            "%s: its tracker names iteration %d, which is not there or not complete; %s is read",
            folder,
            named,
            newest.name,
        )
    return newest


def _tracked(folder: Path) -> int | None:
    """The iteration that a tracker names, if there is a readable one."""
    text, state = folder / _TRACKER, folder / _BRIDGE_TRACKER
    try:
        if text.is_file():
            return int(text.read_text("ascii")[:32])
        if state.is_file() and state.stat().st_size <= _LARGEST_TRACKER:
            held: Any = torch.load(state, map_location="cpu", weights_only=True)
            return int(held["step"])
    except Exception:  # whatever a broken tracker raises, complete iterations are there to be read
        logger.warning("%s: its tracker cannot be read and does not count", folder)
    return None
