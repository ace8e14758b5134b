"""Whether a run may go on from a checkpoint: only if it would have been the same run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from bdlora_megatron.convert.adapter.neutral import FUSED, PROJECTIONS
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.models import HFConfig
from bdlora_megatron.models.fp8_files import open_weights
from bdlora_megatron.models.rope import RopeSettings
from bdlora_megatron.train.config import flat, to_mapping
from bdlora_megatron.train.examples import Example
from bdlora_megatron.train.rag import RagOptions
from bdlora_megatron.train.schema import TrainConfig

__all__ = ["check_resumable", "described", "run_facts", "weights_digest"]

#: Rows of each tensor that its digest looks at.
_ROWS = 16

#: Settings that change nothing about what is learnt: where, how fast, and what is told of it.
_FREE = (
    "model.hf_path",
    "peft.init_from",
    "model.model_class",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.sequence_parallel",
    "model.recompute_granularity",
    "dataset.train",
    "dataset.validation",
    "dataset.cache_dir",
    "dataset.num_proc",
    "train.train_iters",
    "train.epochs",
    "train.micro_batch_size",
    "train.eval_interval",
    "train.eval_iters",
    "train.early_stopping_",
    "checkpoint.",
    "logger.",
    "export.",
)

#: Its size decides how far examples are filled up, and so which fit into a row together.
_CONTEXT = "model.context_parallel_size"

#: Settings that older checkpoints do not know, with what they then were.
_SINCE_THEN = {
    _CONTEXT: 1,
    "train.precision": "fp32",
    "optimizer.use_distributed_optimizer": False,
    "dataset.train_on": "all",
    "dataset.ignore_keys": [],
    "dataset.rag.document": RagOptions().document,
    "dataset.rag.prompt": RagOptions().prompt,
    "peft.init_structure": "exact",
    "peft.invocation_tokens": [],
}


_COMPARED = {
    "base": "the base model's config differs",
    "weights": "the base model's weights differ",
    "data": "the training data differs",
    "start": "the adapter that the run starts from (peft.init_from) differs",
}


def weights_digest(folder: str | Path, hf: HFConfig) -> str:
    """A digest of names, shapes and some rows of every weight, whatever files hold them.

    It tells a base that was trained, merged or quantised from the one before. A change of single
    rows, of the embedding for one, may pass it by.

    Args:
        folder: The base model's folder.
        hf: Its facts.

    Returns:
        The digest, in hexadecimal.
    """
    digest = hashlib.sha256()
    with open_weights(folder, hf) as files:
        for name, shape in sorted(files.shapes.items()):
            # Copies and buffers that some versions of transformers store and others leave out.
            copied = hf.tied and name == "lm_head.weight"
            if copied or not shape or not name.endswith((".weight", ".bias")):
                continue
            digest.update(f"{name} {shape}".encode())
            count = min(shape[0], _ROWS) if len(shape) > 1 else 1
            for number in range(count):
                first = number * shape[0] // count
                rows = files.rows(name, first, first + 1 if len(shape) > 1 else shape[0])
                digest.update(f"{rows.dtype}".encode())
                digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_facts(
    config: TrainConfig,
    hf: HFConfig,
    examples: Sequence[Example],
    *,
    weights: str,
    start: str | None,
) -> dict[str, Any]:
    """What has to be equal for a run to go on as if it had never stopped.

    Args:
        config: The settings.
        hf: The base model's facts; files may have moved.
        examples: The training data; likewise.
        weights: Of ``weights_digest``.
        start: Of ``start_digest``.

    Returns:
        Plain values for ``Saver.save``.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes())
        digest.update(example.learnt.tobytes())
    facts = {
        "settings": to_mapping(config),
        "base": described(hf),
        "weights": weights,
        "data": digest.hexdigest(),
        "start": start,
    }
    # For those who read the checkpoint as an adapter.
    return {**facts, PROJECTIONS: FUSED} if hf.fused_projections else facts


def described(hf: HFConfig) -> str:
    """A base model's facts as text, which stays what it was when facts are added.

    Args:
        hf: The facts.

    Returns:
        What ``repr`` gave before; added facts are there only where they say something.
    """
    values = {item.name: getattr(hf, item.name) for item in fields(hf)}
    added = {"kv_head_replicas": 1, "fused_projections": False, "fp8_block": None}
    for name, usual in added.items():
        if values[name] == usual:
            del values[name]
    if hf.proj_bias == hf.mlp_bias:
        del values["proj_bias"]
        values["linear_bias"] = values.pop("mlp_bias")
    rope = hf.rope
    known = RopeSettings(kind=rope.kind, theta=rope.theta, factor=rope.factor)
    if rope.kind == "llama3":
        known = replace(known, low=1.0, high=4.0, original_positions=8192)
    if rope == known and rope.kind in {"default", "linear", "llama3"}:
        text = f"kind={rope.kind!r}, theta={rope.theta!r}, factor={rope.factor!r}"
        values.pop("rope")
        return f"HFConfig({_listed(values)}, rope=RopeSettings({text}))"
    return f"HFConfig({_listed(values)})"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def check_resumable(saved: Mapping[str, Any], facts: Mapping[str, Any], path: str) -> None:
    """Refuse to go on with other settings, another base model or other data.

    Args:
        saved: Of the checkpoint.
        facts: Of this run.
        path: The checkpoint, for the message.

    Raises:
        ConfigError: They differ; all differences are listed.
    """
    before, now = (_SINCE_THEN | flat(each["settings"]) for each in (saved, facts))
    problems = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not key.startswith(_FREE)
        and (key != _CONTEXT or now["dataset.packing"])
    ]
    if _schedule_moves(before, now):
        problems.append(
            f"train.train_iters was {before['train.train_iters']} and is "
            f"{now['train.train_iters']}, which moves the learning-rate schedule; set "
            "scheduler.lr_decay_iters from the start to train longer than planned"
        )
    # Older checkpoints know nothing of the weights, and started from no adapter.
    saved = {"weights": facts.get("weights"), "start": None, **saved}
    problems += [
        f"{what} from the checkpoint's"
        for key, what in _COMPARED.items()
        if _unordered(str(saved[key])) != _unordered(str(facts.get(key)))
    ]
    if problems:
        raise ConfigError(
            f"cannot resume from {path}, which belongs to another run; name another folder in "
            "checkpoint.save, or undo:" + "".join(f"\n- {problem}" for problem in problems)
        )


def _unordered(fact: str) -> list[str]:
    """A fact's parts; a config's fields have changed places from version to version."""
    return sorted(re.split(r"[(), ]+", fact))


def _schedule_moves(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return (
        before["train.train_iters"] != now["train.train_iters"]
        and now["scheduler.lr_decay_iters"] is None
        and now["scheduler.lr_decay_style"] != "constant"
    )
