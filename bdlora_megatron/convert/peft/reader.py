"""Reading a Hugging Face PEFT adapter, LoRA or BD-LoRA.

The names and shapes of all tensors are checked against the config before any data is read: a
module's plan holds all that is needed to load it, and loads it by itself. Shapes alone are
ambiguous (a packed factor looks like the dense one of a narrower module), so the config decides
and the modules must agree on one base model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from bdlora_megatron.blocks import BlockFactors, reshard
from bdlora_megatron.convert.adapter.lazy import LazyModules, in_memory
from bdlora_megatron.convert.adapter.neutral import (
    Adapter,
    BaseShape,
    ModuleKey,
    ModuleName,
    blocked_factor,
    infer_base_shape,
)
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.peft.config import (
    ModuleSettings,
    PeftConfig,
    find_refused,
    parse_peft_config,
    read_raw_config,
)
from bdlora_megatron.convert.peft.tensors import open_tensors
from bdlora_megatron.convert.tensor_files import TensorSource
from bdlora_megatron.errors import AdapterFormatError, ShapeError

__all__ = ["open_peft", "read_peft"]

logger = logging.getLogger(__name__)

_PEFT_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<prefix>(?:[^.]+\.)*?)layers\.(?P<layer>0|[1-9][0-9]{0,4})\."
    r"(?P<module>self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
    r"\.lora_(?P<factor>[AB])\.weight"
)
# Longer ones are no model's, and PEFT's patterns are matched against them.
_LONGEST_NAME = 128
# VeLoRA's direction for compressing what backward keeps; the forward pass does not depend on it.
_TRAINING_ONLY = re.compile(r"\.lora_velora_embed$")
# An encoder's layers carry the same names as a decoder's.
_NO_DECODER = re.compile(r"encoder|vision|visual|audio|speech")

#: What a tensor that is no factor of ours is, by its name; the first that matches counts.
_LEFTOVERS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"lora_magnitude_vector", "DoRA magnitudes, which are no low-rank update"),
        (r"lora_[AB]\.bias$", "biases of LoRA factors (lora_bias)"),
        (r"trainable_tokens|token_adapter", "replaced embedding rows (trainable_token_indices)"),
        (r"lora_embedding_[AB]|embed_tokens\.", "embeddings or factors of them"),
        (r"lora_diag", "KaSA diagonals"),
        (r"lora_[AB]\.weight$", "factors of a module that is none of the seven projections"),
        (r"\.bias$", "biases of the base model (bias)"),
        (r"\.weight$", "whole weights of the base model (modules_to_save)"),
        (r"", "tensors of an unknown kind"),
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModulePlan:
    """How to load one module.

    Attributes:
        key: The module.
        names: The tensors that are A and B.
        settings: What the config says of it.
    """

    key: ModuleKey
    names: tuple[str, str]
    settings: ModuleSettings


@contextmanager
def open_peft(path: str | Path, *, allow_pickle: bool = False) -> Iterator[Adapter]:
    """Open an adapter as PEFT's `save_pretrained` writes it.

    Vanilla modules come with one block. A module whose factor on the other side is block-diagonal
    (`target_modules_bd_a` and `_bd_b` swapped) gains nothing from tensor parallelism; its factor is
    expanded and it becomes a vanilla module with the same update, with a warning.

    Args:
        path: The adapter's folder; its name becomes the adapter's.
        allow_pickle: Read `adapter_model.bin` where there are no safetensors, tensors only.

    Yields:
        The adapter. Its modules are read when they are looked up, as long as it is open.

    Raises:
        AdapterFormatError: If the files are missing or broken, or hold what cannot be represented.
            All such problems are listed.
    """
    folder = Path(path).resolve()
    raw = read_raw_config(folder)
    config = parse_peft_config(raw)
    problems = Problems()
    find_refused(raw, problems)
    subject = f"cannot read the PEFT adapter in {folder}"
    with open_tensors(folder, allow_pickle=allow_pickle) as source:
        plans = _plan(source.facts, config, problems)
        facts, base = _check_plans(source, plans, problems)
        problems.raise_if_any(subject)
        by_key = {plan.key: plan for plan in plans}

        def load(key: ModuleKey) -> BlockFactors:
            plan = by_key[key]
            return _factors(plan, *(source.load(name) for name in plan.names))

        expanded = [plan for plan in plans if _is_swapped(plan)]
        _warn(folder, raw, expanded)
        yield Adapter(
            name=folder.name,
            modules=LazyModules(facts, load, subject=subject),
            base=base,
            metadata=_metadata(raw, plans, expanded),
        )


def read_peft(path: str | Path, *, allow_pickle: bool = False) -> Adapter:
    """Read an adapter as PEFT's `save_pretrained` writes it; see `open_peft`.

    Args:
        path: The adapter's folder; its name becomes the adapter's.
        allow_pickle: Read `adapter_model.bin` where there are no safetensors, tensors only.

    Returns:
        The adapter, in memory of its own.
    """
    with open_peft(path, allow_pickle=allow_pickle) as adapter:
        return in_memory(adapter)


def _plan(
    facts: Mapping[str, Tensor | None], config: PeftConfig, problems: Problems
) -> list[_ModulePlan]:
    """Pair the factors by module and look up their settings, in the order of the modules."""
    pairs: dict[ModuleKey, dict[str, re.Match[str]]] = {}
    prefixes = set()
    for name in facts:
        if _TRAINING_ONLY.search(name):
            continue
        found = _FACTOR.fullmatch(name)
        if found is None or len(name) > _LONGEST_NAME:
            problems.add(_leftover(name), name)
            continue
        prefixes.add(found["prefix"])
        pairs.setdefault(_key(found), {})[found["factor"]] = found
    if not pairs:
        problems.add(
            "there are no factors of decoder layers; pass the adapter of a Llama-like model"
        )
    _check_prefixes(prefixes, problems)
    plans = []
    for key, pair in sorted(pairs.items()):
        if len(pair) < 2:
            missing = "B" if "A" in pair else "A"
            problems.add(f"lora_{missing} is missing; copy or save the adapter again", str(key))
            continue
        try:
            settings = config.settings_for(_module_path(pair["A"]))
        except AdapterFormatError as error:
            problems.add(str(error), str(key))
            continue
        names = (pair["A"].string, pair["B"].string)
        plans.append(_ModulePlan(key=key, names=names, settings=settings))
    return plans


def _check_plans(
    source: TensorSource, plans: Iterable[_ModulePlan], problems: Problems
) -> tuple[dict[ModuleKey, BlockFactors], BaseShape]:
    """Build every module from shapes alone, and see that they are of one base model."""
    facts: dict[ModuleKey, BlockFactors] = {}
    for plan in plans:
        A, B = (source.facts[name] for name in plan.names)
        if A is None or B is None:
            problems.add(
                "factors are no F64, F32, F16 or BF16; dequantise the adapter and save it again",
                str(plan.key),
            )
            continue
        try:
            facts[plan.key] = _factors(plan, A, B)
        except (AdapterFormatError, ShapeError) as error:
            problems.add(str(error), str(plan.key))
    try:
        base = infer_base_shape((k, f.in_features, f.out_features) for k, f in facts.items())
    except ShapeError as error:
        problems.add(str(error))
        base = BaseShape()
    return facts, base


def _factors(plan: _ModulePlan, A: Tensor, B: Tensor) -> BlockFactors:
    """The module's update; a factor blocked on the wrong side is expanded.

    Raises:
        AdapterFormatError: If the rank is not the config's.
    """
    settings, wanted = plan.settings, blocked_factor(plan.key.name)
    if A.shape[:1] != (settings.rank,):
        raise AdapterFormatError(
            f"lora_A has shape {list(A.shape)}, but the config says rank {settings.rank}; "
            "the config and the tensors must be of one adapter"
        )
    factors = BlockFactors(
        A=A,
        B=B,
        num_blocks=settings.num_blocks,
        blocked=settings.blocked or wanted,
        scale=settings.scale,
    )
    return replace(reshard(factors, 1), blocked=wanted) if _is_swapped(plan) else factors


def _is_swapped(plan: _ModulePlan) -> bool:
    return plan.settings.blocked not in (None, blocked_factor(plan.key.name))


def _key(found: re.Match[str]) -> ModuleKey:
    # The pattern holds the seven names.
    name = cast("ModuleName", found["module"].partition(".")[2])
    return ModuleKey(layer=int(found["layer"]), name=name)


def _module_path(found: re.Match[str]) -> str:
    """The module's path in the base model, which is what PEFT's patterns are matched against."""
    return found.string.removeprefix(_PEFT_PREFIX).removesuffix(f".lora_{found['factor']}.weight")


def _check_prefixes(prefixes: set[str], problems: Problems) -> None:
    """One stack of decoder layers: two would overwrite each other's modules."""
    if len(prefixes) > 1:
        problems.add(
            "several stacks of layers are adapted, wanted one; split the adapter", *prefixes
        )
    for prefix in prefixes:
        if _NO_DECODER.search(prefix):
            problems.add("the adapted layers are no language decoder's", prefix)


def _leftover(name: str) -> str:
    what = next(what for pattern, what in _LEFTOVERS if pattern.search(name))
    return f"the file holds {what}, which an adapter here cannot; train or save it without them"


def _warn(folder: Path, raw: Mapping[str, Any], expanded: list[_ModulePlan]) -> None:
    if raw.get("init_lora_weights") == "lora_ga":
        logger.warning(
            "%s was trained with LoRA-GA, which changes the base weights in training; it is read "
            "as PEFT reads it, on top of the unchanged ones",
            folder,
        )
    if expanded:
        logger.warning(
            "%s blocks %d modules on the side that tensor parallelism does not split; they are "
            "read as vanilla LoRA",
            folder,
            len(expanded),
        )


def _metadata(
    raw: Mapping[str, Any], plans: list[_ModulePlan], expanded: list[_ModulePlan]
) -> dict[str, str]:
    metadata = {"format": "peft", "peft_prefix": plans[0].names[0].partition("layers.")[0]}
    for option in ("base_model_name_or_path", "peft_version", "task_type"):
        if isinstance(raw.get(option), str):
            metadata[option] = raw[option]
    if expanded:
        metadata["expanded_modules"] = " ".join(str(plan.key) for plan in expanded)
    return metadata
