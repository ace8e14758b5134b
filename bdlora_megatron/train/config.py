"""From YAML and ``key=value`` arguments to a checked ``TrainConfig``.

OmegaConf reads and merges; ``schema`` declares the settings. Every problem is reported at once, so
that a run is not started five times to find five typing errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bdlora_megatron.errors import ConfigError, MissingDependencyError
from bdlora_megatron.settings import list_problems, read_settings
from bdlora_megatron.train.rag import RagOptions, template_problems
from bdlora_megatron.train.schema import ModelSection, TrainConfig

__all__ = ["from_mapping", "in_steps", "load_config", "to_mapping"]

_WHAT = "the training settings"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply ``key=value`` arguments, such as ``peft.bdlora.rank=24``.

    Args:
        path: The file.
        overrides: Dotted keys with values in YAML's syntax; later ones win.

    Returns:
        The checked settings.

    Raises:
        ConfigError: The file can't be read, or settings are unknown, missing, of the wrong type or
            contradictory; all of them are listed.
        MissingDependencyError: OmegaConf is not installed.
    """
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ImportError as error:
        raise MissingDependencyError(
            f"reading a training config needs OmegaConf ({error}); "
            "pip install 'bdlora-megatron[train]'"
        ) from error
    bad = [text for text in overrides if "=" not in text or text.startswith("=")]
    if bad:
        raise ConfigError(f"arguments {bad} are not key=value, such as peft.bdlora.rank=24")
    try:
        read = OmegaConf.load(path)
        if not OmegaConf.is_dict(read):
            raise ConfigError(f"{path} holds no sections with keys; see examples/train")
        merged = OmegaConf.merge(read, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a YAML file") from error
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as settings: {error}") from error
    assert isinstance(values, dict)
    return from_mapping(values)


def from_mapping(values: Mapping[Any, Any]) -> TrainConfig:
    """Check plain nested values and make a ``TrainConfig`` of them.

    Args:
        values: Sections, keys, values, as YAML gives them.

    Returns:
        The settings.

    Raises:
        ConfigError: Something is wrong; every problem is listed.
    """
    config = read_settings(TrainConfig, values, _WHAT)
    problems = _contradictions(config)
    if problems:
        raise ConfigError(list_problems(problems, _WHAT))
    return config


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """The settings as plain nested values, which ``from_mapping`` reads."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested values by dotted keys, such as ``peft.bdlora.rank``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{where}{key}"
        found.update(flat(value, f"{full}.") if isinstance(value, Mapping) else {full: value})
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _contradictions(config: TrainConfig) -> list[str]:
    """What is wrong with values whose types are right."""
    problems = _about_peft(config)
    model, train, optimizer = config.model, config.train, config.optimizer
    problems += _about_parallelism(model)
    if train.global_batch_size % train.micro_batch_size:
        problems.append(
            f"train.global_batch_size is {train.global_batch_size}; it must be a multiple of "
            f"micro_batch_size={train.micro_batch_size}"
        )
    if train.precision == "bf16" and model.dtype == "float32":
        problems.append(
            "model.dtype is float32; with train.precision=bf16 the base is bfloat16: leave "
            "model.dtype out, or train in fp32"
        )
    if optimizer.min_lr > optimizer.lr:
        problems.append(f"optimizer.min_lr is {optimizer.min_lr}; lr={optimizer.lr} is smaller")
    if (train.train_iters is None) == (train.epochs is None):
        problems.append("one of train.train_iters and train.epochs says how long; set it alone")
    problems += _about_schedule(config)
    return problems + _about_data(config) + _about_best(config)


def _about_parallelism(model: ModelSection) -> list[str]:
    """How rows and layers are to be divided."""
    problems = []
    tp, cp = model.tensor_model_parallel_size, model.context_parallel_size
    if model.sequence_parallel and model.seq_length % (tp * cp):
        context = f" x context_parallel_size={cp}" if cp > 1 else ""
        problems.append(
            f"model.seq_length is {model.seq_length}; with sequence_parallel it must be a multiple "
            f"of tensor_model_parallel_size={tp}{context}"
        )
    if cp > 1 and model.seq_length % (2 * cp):
        problems.append(
            f"model.seq_length is {model.seq_length}; with context_parallel_size={cp} it must be a "
            f"multiple of twice as many, {2 * cp}"
        )
    if model.chunks_per_stage is not None and model.pipeline_model_parallel_size == 1:
        problems.append(
            f"model.virtual_pipeline_model_parallel_size is {model.chunks_per_stage}, and there is "
            "one pipeline stage; leave it out, or set pipeline_model_parallel_size to 2 or more"
        )
    return problems


def in_steps(config: TrainConfig, rows: int) -> TrainConfig:
    """The settings with a number of steps, where they say how many walks over the data.

    Args:
        config: The checked settings.
        rows: Rows of the training data.

    Returns:
        The settings; their ``train_iters`` is set.

    Raises:
        ConfigError: The learning-rate schedule is shorter than its warm-up.
    """
    epochs, batch = config.train.epochs, config.train.global_batch_size
    if epochs is not None:
        steps = -(-rows * epochs // batch)
        config = replace(config, train=replace(config.train, train_iters=steps))
        if problems := _about_schedule(config):
            raise ConfigError(list_problems(problems, _WHAT))
    return config


def _about_schedule(config: TrainConfig) -> list[str]:
    scheduler, steps = config.scheduler, config.train.train_iters
    decay = scheduler.lr_decay_iters or steps
    if decay is None or scheduler.lr_warmup_iters < max(decay, 1):
        return []
    return [
        f"scheduler.lr_warmup_iters is {scheduler.lr_warmup_iters}; it must be less than the "
        f"{decay} steps of the schedule"
    ]


def _about_best(config: TrainConfig) -> list[str]:
    train, problems = config.train, []
    wanted = {
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "train.early_stopping_patience": train.early_stopping_patience is not None,
    }
    for name in (name for name, asked in wanted.items() if asked):
        if config.peft.scheme == "none":
            problems.append(f"{name} is set and scheme none trains nothing; leave it out")
        elif not config.dataset.validation:
            problems.append(f"{name} goes by the validation loss; name files in dataset.validation")
        elif not train.eval_interval:
            problems.append(
                f"{name} compares evaluations and train.eval_interval is 0, which makes one at the "
                "end; set the steps between them"
            )
    if train.early_stopping_min_delta and train.early_stopping_patience is None:
        problems.append(
            f"train.early_stopping_min_delta is {train.early_stopping_min_delta} and nothing stops "
            "early; set train.early_stopping_patience, or leave it out"
        )
    return problems


def _about_data(config: TrainConfig) -> list[str]:
    dataset, problems = config.dataset, []
    if not dataset.train and config.peft.scheme != "none":
        problems.append("dataset.train is empty; name JSONL files")
    if config.peft.scheme == "none" and not dataset.validation:
        problems.append("dataset.validation is empty; scheme none only evaluates")
    rag = RagOptions(document=dataset.rag.document, prompt=dataset.rag.prompt)
    problems += template_problems(rag)
    if dataset.format == "text" and (dataset.train_on != "all" or dataset.chat_template_kwargs):
        problems.append(
            "dataset.train_on and chat_template_kwargs are for conversations; leave them out with "
            "dataset.format=text"
        )
    return problems


def _about_peft(config: TrainConfig) -> list[str]:
    peft, problems = config.peft, []
    for name, section in (("bdlora", peft.bdlora), ("lora", peft.lora)):
        if not section.target_modules:
            problems.append(f"peft.{name}.target_modules is empty; name layers like linear_qkv")
    blocks = peft.bdlora
    if blocks.rank is not None and blocks.match_params_of_lora_rank is not None:
        problems.append(
            "peft.bdlora.rank and match_params_of_lora_rank are both set; the second decides the "
            "rank: leave one out"
        )
    problems += _about_start(config)
    if peft.invocation_tokens and peft.scheme == "none":
        problems.append(
            "peft.invocation_tokens is set and scheme none has no adapter; leave it out"
        )
    stages, recomputed = config.model.pipeline_model_parallel_size, config.model
    if peft.invocation_tokens and stages > 1 and recomputed.recompute_granularity != "none":
        problems.append(
            f"model.recompute_granularity is {recomputed.recompute_granularity}; with "
            f"peft.invocation_tokens and pipeline_model_parallel_size={stages} it must be none, "
            "since a stage recomputes a micro-batch after it has begun another"
        )
    if peft.scheme != "bdlora":
        return problems
    tp_size = config.model.tensor_model_parallel_size
    if blocks.num_blocks is None:
        problems.append(
            "peft.bdlora.num_blocks is missing; set it to the tensor-parallel size at which the "
            "adapter will be served, or to a multiple of it"
        )
    elif blocks.num_blocks % tp_size:
        problems.append(
            f"peft.bdlora.num_blocks is {blocks.num_blocks}; it must be a multiple of "
            f"tensor_model_parallel_size={tp_size}, at which the adapter is trained"
        )
    return problems


def _about_start(config: TrainConfig) -> list[str]:
    peft, problems = config.peft, []
    if peft.init_from is None:
        if peft.init_structure != "exact":
            problems.append(
                f"peft.init_structure is {peft.init_structure} and there is no adapter to start "
                "from; set peft.init_from, or leave it out"
            )
        return problems
    if peft.scheme == "none":
        problems.append(
            "peft.init_from is set and scheme none has no adapter; leave it out, or set "
            "train.train_iters: 0 to evaluate an adapter"
        )
    start, save = os.path.abspath(peft.init_from), os.path.abspath(config.checkpoint.save)
    if os.path.commonpath([start, save]) == save:
        problems.append(
            f"peft.init_from is {peft.init_from}, which lies in checkpoint.save={save} and would "
            "be replaced; save the run in another folder"
        )
    return problems
