"""Whether a run may go on from a checkpoint: only if it would have been the same run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.models import HFConfig
from bdlora_megatron.train.config import to_mapping
from bdlora_megatron.train.examples import Example
from bdlora_megatron.train.schema import TrainConfig

__all__ = ["check_resumable", "run_facts"]

#: Settings that change nothing about what is learnt: where, how fast, and what is told of it.
_FREE = (
    "model.hf_path",
    "model.model_class",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.sequence_parallel",
    "model.recompute_granularity",
    "dataset.train",
    "dataset.validation",
    "train.train_iters",
    "train.micro_batch_size",
    "train.eval_interval",
    "train.eval_iters",
    "checkpoint.",
    "logger.",
    "export.",
)

#: Settings that older checkpoints do not know, with what they then were.
_SINCE_THEN = {
    "train.precision": "fp32",
    "dataset.train_on": "all",
    "dataset.ignore_keys": [],
}


def run_facts(config: TrainConfig, hf: HFConfig, examples: Sequence[Example]) -> dict[str, Any]:
    """What has to be equal for a run to go on as if it had never stopped.

    Args:
        config: The settings.
        hf: The base model's facts; files may have moved.
        examples: The training data; likewise.

    Returns:
        Plain values for ``save_checkpoint``.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes())
        digest.update(example.learnt.tobytes())
    return {"settings": to_mapping(config), "base": repr(hf), "data": digest.hexdigest()}


def check_resumable(saved: Mapping[str, Any], facts: Mapping[str, Any], path: str) -> None:
    """Refuse to go on with other settings, another base model or other data.

    Args:
        saved: Of the checkpoint.
        facts: Of this run.
        path: The checkpoint, for the message.

    Raises:
        ConfigError: They differ; all differences are listed.
    """
    before, now = _SINCE_THEN | _flat(saved["settings"]), _flat(facts["settings"])
    problems = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_FREE)
    ]
    if _schedule_moves(before, now):
        problems.append(
            f"train.train_iters was {before['train.train_iters']} and is "
            f"{now['train.train_iters']}, which moves the learning-rate schedule; set "
            "scheduler.lr_decay_iters from the start to train longer than planned"
        )
    problems += [
        f"{what} differs from the checkpoint's"
        for key, what in (("base", "the base model's config"), ("data", "the training data"))
        if saved[key] != facts[key]
    ]
    if problems:
        raise ConfigError(
            f"cannot resume from {path}, which belongs to another run; name another folder in "
            "checkpoint.save, or undo:" + "".join(f"\n- {problem}" for problem in problems)
        )


def _schedule_moves(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return (
        before["train.train_iters"] != now["train.train_iters"]
        and now["scheduler.lr_decay_iters"] is None
        and now["scheduler.lr_decay_style"] != "constant"
    )


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{where}{key}"
        flat.update(_flat(value, f"{full}.") if isinstance(value, Mapping) else {full: value})
    return flat
