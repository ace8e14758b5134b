"""From YAML and ``key=value`` arguments to a checked ``TrainConfig``.

OmegaConf reads and merges; what comes out is held against the dataclasses of ``schema``, and every
problem is told at once, so that a run is not started five times to find five typing errors.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bdlora_megatron.errors import ConfigError, MissingDependencyError
from bdlora_megatron.train.schema import TrainConfig

__all__ = ["from_mapping", "load_config", "to_mapping"]


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
            "reading a training config needs OmegaConf; pip install 'bdlora-megatron[train]'"
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
    problems: list[str] = []
    config = _section(TrainConfig, values, "", problems)
    if config is not None:
        problems += _contradictions(config)
    if problems:
        lines = "".join(f"\n- {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problem(s) in the training settings:{lines}")
    assert isinstance(config, TrainConfig)
    return config


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """The settings as plain nested values, which ``from_mapping`` reads."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _section(cls: type, values: Any, where: str, problems: list[str]) -> Any:
    """An instance of ``cls``, or None if it can't be made; ``problems`` grows."""
    if not isinstance(values, Mapping):
        problems.append(f"{where or 'the file'} is {values!r}; wanted a section with keys")
        return None
    hints = get_type_hints(cls)
    known = {entry.name: entry for entry in fields(cls)}
    before = len(problems)
    made = {}
    for key, value in values.items():
        full = f"{where}.{key}" if where else str(key)
        if key not in known:
            problems.append(f"{full} is unknown{_nearest(str(key), known, where)}")
        elif is_dataclass(hints[key]):
            made[key] = _section(hints[key], {} if value is None else value, full, problems)
        else:
            made[key] = _value(hints[key], value, full, problems)
    for name, entry in known.items():
        if name in values or entry.default is not MISSING or entry.default_factory is not MISSING:
            continue
        full = f"{where}.{name}" if where else name
        if is_dataclass(hints[name]):
            # Tells which of its keys are needed.
            made[name] = _section(hints[name], {}, full, problems)
        else:
            problems.append(f"{full} is missing")
    return cls(**made) if len(problems) == before else None


def _nearest(key: str, known: Mapping[str, Any], where: str) -> str:
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {f'{where}.' if where else ''}{near[0]}?"
    elsewhere = _everywhere(TrainConfig, "")
    same = [full for full in elsewhere if full.rpartition(".")[2] == key]
    if same:
        return f"; did you mean {same[0]}?"
    return f"; known here: {', '.join(known)}"


def _everywhere(cls: Any, where: str) -> list[str]:
    names = []
    for name, hint in get_type_hints(cls).items():
        full = f"{where}.{name}" if where else name
        names += _everywhere(hint, full) if is_dataclass(hint) else [full]
    return names


def _value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    found = _convert(hint, value)
    if found is _WRONG:
        problems.append(f"{where} is {value!r}; wanted {_describe(hint)}")
        return None
    return found


_WRONG = object()


def _convert(hint: Any, value: Any) -> Any:
    """The value as ``hint`` wants it, or ``_WRONG``."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        fits = (_convert(option, value) for option in options)
        return next((found for found in fits if found is not _WRONG), _WRONG)
    if origin is Literal:
        # `scheme: none` is a string here, but a person may mean YAML's null by it.
        value = "none" if value is None and "none" in options else value
        return value if isinstance(value, str) and value in options else _WRONG
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        good = isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items)
        return tuple(items) if good else _WRONG
    if origin is dict:
        named = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        return value if named else {} if value is None else _WRONG
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool):
        return _WRONG
    return value if isinstance(value, hint) else _WRONG


def _describe(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in options)
    if origin is Literal:
        return f"one of {', '.join(options)}"
    if origin is tuple:
        return "a list of names"
    if origin is dict:
        return "a section with keys"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, "nothing")


def _contradictions(config: TrainConfig) -> list[str]:
    """What is wrong with values whose types are right."""
    problems = []
    for name, least in _LEAST.items():
        section, _, key = name.rpartition(".")
        value = getattr(_at(config, section), key)
        if value is not None and not value >= least:
            problems.append(f"{name} is {value}; wanted at least {least}")
    problems += _about_peft(config)
    model, train, optimizer = config.model, config.train, config.optimizer
    if model.sequence_parallel and model.seq_length % model.tensor_model_parallel_size:
        problems.append(
            f"model.seq_length is {model.seq_length}; with sequence_parallel it must be a multiple "
            f"of tensor_model_parallel_size={model.tensor_model_parallel_size}"
        )
    if train.micro_batch_size > 0 and train.global_batch_size % train.micro_batch_size:
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
    decay = config.scheduler.lr_decay_iters or train.train_iters
    if config.scheduler.lr_warmup_iters >= decay:
        problems.append(
            f"scheduler.lr_warmup_iters is {config.scheduler.lr_warmup_iters}; it must be less "
            f"than the {decay} steps of the schedule"
        )
    return problems + _about_data(config)


def _about_data(config: TrainConfig) -> list[str]:
    dataset, problems = config.dataset, []
    if not dataset.train and config.peft.scheme != "none":
        problems.append("dataset.train is empty; name JSONL files")
    if config.peft.scheme == "none" and not dataset.validation:
        problems.append("dataset.validation is empty; scheme none only evaluates")
    if dataset.format == "text" and (dataset.train_on != "all" or dataset.chat_template_kwargs):
        problems.append(
            "dataset.train_on and chat_template_kwargs are for conversations; leave them out with "
            "dataset.format=text"
        )
    return problems


def _about_peft(config: TrainConfig) -> list[str]:
    peft, problems = config.peft, []
    for name, section in (("bdlora", peft.bdlora), ("lora", peft.lora)):
        if not 0.0 <= section.dropout < 1.0:
            problems.append(f"peft.{name}.dropout is {section.dropout}; wanted at least 0, below 1")
        if not section.target_modules:
            problems.append(f"peft.{name}.target_modules is empty; name layers like linear_qkv")
    blocks = peft.bdlora
    if blocks.rank is not None and blocks.match_params_of_lora_rank is not None:
        problems.append(
            "peft.bdlora.rank and match_params_of_lora_rank are both set; the second decides the "
            "rank: leave one out"
        )
    if peft.scheme != "bdlora":
        return problems
    tp_size = config.model.tensor_model_parallel_size
    if blocks.num_blocks is None:
        problems.append(
            "peft.bdlora.num_blocks is missing; set it to the tensor-parallel size at which the "
            "adapter will be served, or to a multiple of it"
        )
    elif tp_size > 0 and blocks.num_blocks % tp_size:
        problems.append(
            f"peft.bdlora.num_blocks is {blocks.num_blocks}; it must be a multiple of "
            f"tensor_model_parallel_size={tp_size}, at which the adapter is trained"
        )
    return problems


_LEAST = {
    "model.seq_length": 2,
    "model.tensor_model_parallel_size": 1,
    "model.pipeline_model_parallel_size": 1,
    "peft.bdlora.num_blocks": 1,
    "peft.bdlora.rank": 1,
    "peft.bdlora.match_params_of_lora_rank": 1,
    "peft.lora.rank": 1,
    "train.train_iters": 0,
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
    "train.eval_interval": 0,
    "train.eval_iters": 0,
    "optimizer.lr": 0,
    "optimizer.min_lr": 0,
    "optimizer.weight_decay": 0,
    "optimizer.adam_beta1": 0,
    "optimizer.adam_beta2": 0,
    "optimizer.adam_eps": 0,
    "optimizer.clip_grad": 0,
    "scheduler.lr_warmup_iters": 0,
    "scheduler.lr_decay_iters": 1,
    "checkpoint.save_interval": 0,
    "checkpoint.keep": 1,
    "logger.log_interval": 1,
    "rng.seed": 0,
}


def _at(config: TrainConfig, section: str) -> Any:
    found: Any = config
    for name in section.split("."):
        found = getattr(found, name)
    return found
