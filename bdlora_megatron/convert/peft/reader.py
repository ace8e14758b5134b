"""Reading a Hugging Face PEFT adapter, LoRA or BD-LoRA.

The names and shapes of all tensors are checked against the config before any data is read: a
module's plan holds all that is needed to load it, and loads it by itself. Shapes alone are
ambiguous (a packed factor looks like the dense one of a narrower module), so the config decides
and the modules must agree on one base model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bdlora_megatron.blocks import BlockFactors, reshard
from bdlora_megatron.convert.adapter.lazy import LazyModules, in_memory
from bdlora_megatron.convert.adapter.neutral import (
    FUSED,
    PROJECTIONS,
    Adapter,
    BaseShape,
    ModuleKey,
    blocked_factor,
    infer_base_shape,
)
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.hints import folder_hint
from bdlora_megatron.convert.peft.config import (
    ModuleSettings,
    PeftConfig,
    parse_peft_config,
    read_raw_config,
)
from bdlora_megatron.convert.peft.fused import part_rows, split
from bdlora_megatron.convert.peft.leftovers import equal_to_base, kind_of
from bdlora_megatron.convert.peft.names import (
    PEFT_PREFIX,
    FactorName,
    parse_factor,
    with_latent_attention,
)
from bdlora_megatron.convert.peft.options import READ_WITHOUT, check_ignorable, find_refused
from bdlora_megatron.convert.peft.tensors import open_tensors
from bdlora_megatron.convert.tensor_files import TensorSource
from bdlora_megatron.decoder import FUSED_PARTS
from bdlora_megatron.errors import AdapterFormatError, ShapeError

__all__ = ["IGNORED_BY_PEFT", "open_peft", "read_peft"]

logger = logging.getLogger(__name__)

#: In an adapter's metadata: how many of its file's tensors PEFT would ignore.
IGNORED_BY_PEFT = "tensors_ignored_by_peft"
_COPIES = "it is read without tensors that equal the base model's"

# VeLoRA's direction for compressing what backward keeps; the forward pass does not depend on it.
_TRAINING_ONLY = re.compile(r"\.lora_velora_embed$")
# An encoder's layers carry the same names as a decoder's.
_NO_DECODER = re.compile(r"encoder|vision|visual|audio|speech")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """The tensors that are a module's A and B."""

    key: ModuleKey
    A: FactorName
    B: FactorName


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModulePlan:
    """How to load one module.

    Attributes:
        key: The module.
        names: The tensors that are A and B.
        settings: What the config says of it.
        rows: Where its rows of a fused module's B begin, and how many they are.
    """

    key: ModuleKey
    names: tuple[str, str]
    settings: ModuleSettings
    rows: tuple[int, int] | None = None


@contextmanager
def open_peft(
    path: str | Path,
    *,
    allow_pickle: bool = False,
    ignore_unknown: Collection[str] = (),
    base: BaseShape | None = None,
    base_folder: Path | None = None,
) -> Iterator[Adapter]:
    """Open an adapter as PEFT's `save_pretrained` writes it.

    Tensors may have any of the usual spellings (`convert.peft.names`); a warning tells when PEFT
    itself would ignore them. Vanilla modules come with one block. A module whose factor on the
    other side is block-diagonal (`target_modules_bd_a` and `_bd_b` swapped) gains nothing from
    tensor parallelism; its factor is expanded and it becomes a vanilla module with the same update,
    with a warning.

    Args:
        path: The adapter's folder; its name becomes the adapter's.
        allow_pickle: Read `adapter_model.bin` where there are no safetensors, tensors only.
        ignore_unknown: Unknown options of the config that change nothing, by name.
        base: The base model's heads, for a fused `qkv_proj` beside which no `o_proj` tells them.
        base_folder: The base model's folder; whole weights that equal its own are dropped.

    Yields:
        The adapter. Its modules are read when they are looked up, as long as it is open.

    Raises:
        AdapterFormatError: If the files are missing or broken, or hold what cannot be represented.
            All such problems are listed.
        ConfigError: If `ignore_unknown` names an option that is known.
    """
    check_ignorable(ignore_unknown)
    folder = Path(path).resolve()
    raw = read_raw_config(folder)
    _check_kind(folder, raw)
    config = parse_peft_config(raw)
    problems = Problems()
    subject = f"cannot read the PEFT adapter in {folder}"
    with open_tensors(folder, allow_pickle=allow_pickle) as source:
        factors, leftovers = _sorted_out(source.facts, raw)
        same = equal_to_base(source, leftovers, base_folder, problems)
        allowed = ["modules_to_save"] if same and same == set(leftovers) else []
        unread = find_refused(raw, problems, ignore_unknown=ignore_unknown, allowed=allowed)
        for name in sorted(set(leftovers) - same):
            problems.add(f"the file holds {kind_of(name)}", name)
        if not source.facts:
            problems.add("the file holds no tensors; save the adapter again")
        pairs = _pairs(factors, problems)
        plans = _plan(pairs, config, problems)
        plans = _unfused(source, plans, base or BaseShape(), problems)
        facts, found = _check_plans(source, plans, problems)
        problems.raise_if_any(subject)
        by_key = {plan.key: plan for plan in plans}

        def load(key: ModuleKey) -> BlockFactors:
            plan = by_key[key]
            return _factors(plan, *(source.load(name) for name in plan.names))

        expanded = [plan for plan in plans if _is_swapped(plan)]
        for what, names in ((READ_WITHOUT, unread), (_COPIES, sorted(same))):
            if names:
                logger.warning("%s: %s: %s", folder, what, ", ".join(names))
        ignored = _ignored_by_peft(raw, pairs)
        _warn(folder, raw, ignored, expanded)
        yield Adapter(
            name=folder.name,
            modules=LazyModules(facts, load, subject=subject),
            base=found,
            invocation_tokens=config.invocation_tokens,
            metadata=_metadata(raw, pairs, ignored, expanded),
        )


def read_peft(
    path: str | Path, *, allow_pickle: bool = False, base: BaseShape | None = None
) -> Adapter:
    """Read an adapter as PEFT's `save_pretrained` writes it; see `open_peft`.

    Args:
        path: The adapter's folder; its name becomes the adapter's.
        allow_pickle: Read `adapter_model.bin` where there are no safetensors, tensors only.
        base: As for `open_peft`.

    Returns:
        The adapter, in memory of its own.
    """
    with open_peft(path, allow_pickle=allow_pickle, base=base) as adapter:
        return in_memory(adapter)


def _check_kind(folder: Path, raw: Mapping[str, Any]) -> None:
    """Refuse what has PEFT's file names and is of another tool.

    Raises:
        AdapterFormatError: It is.
    """
    if "fine_tune_type" in raw or "lora_parameters" in raw:
        why = folder_hint(folder) or "it is a config of MLX; pass an adapter in PEFT's format"
        raise AdapterFormatError(f"{folder} is no adapter of PEFT's, {why}")


def _sorted_out(
    facts: Mapping[str, Tensor | None], raw: Mapping[str, Any]
) -> tuple[list[FactorName], list[str]]:
    """The factors of the seven projections, and the names of all else that is not to be lost."""
    factors, leftovers = [], []
    for name in facts:
        factor = parse_factor(name, task_type=raw.get("task_type"))
        if factor is not None:
            factors.append(factor)
        elif not _TRAINING_ONLY.search(name):
            leftovers.append(name)
    return with_latent_attention(factors), leftovers


def _pairs(factors: Sequence[FactorName], problems: Problems) -> list[_Pair]:
    """The factors by module, in the order of the modules."""
    found: dict[ModuleKey, dict[str, FactorName]] = {}
    for factor in factors:
        other = found.setdefault(factor.key, {}).setdefault(factor.factor, factor)
        if other is not factor:
            _add_clash(other, factor, problems)
    if not found:
        problems.add(
            "there are no factors of decoder layers; pass the adapter of a Llama-like model"
        )
    _check_prefixes({factor.prefix for factor in factors}, problems)
    pairs = []
    for key, pair in sorted(found.items()):
        if len(pair) < 2:
            missing = "B" if "A" in pair else "A"
            problems.add(f"lora_{missing} is missing; copy or save the adapter again", str(key))
            continue
        pairs.append(_Pair(key=key, A=pair["A"], B=pair["B"]))
    return pairs


def _plan(pairs: Iterable[_Pair], config: PeftConfig, problems: Problems) -> list[_ModulePlan]:
    """Look up what the config says of every module."""
    plans = []
    for pair in pairs:
        try:
            settings = config.settings_for(pair.A.path)
        except AdapterFormatError as error:
            problems.add(str(error), str(pair.key))
            continue
        names = (pair.A.name, pair.B.name)
        plans.append(_ModulePlan(key=pair.key, names=names, settings=settings))
    return plans


def _unfused(
    source: TensorSource, plans: Sequence[_ModulePlan], base: BaseShape, problems: Problems
) -> list[_ModulePlan]:
    """A plan for each projection, where the file has one module for several."""
    for plan in plans:
        A = source.facts[plan.names[0]]
        if plan.key.name == "o_proj" and A is not None and base.q_size is None:
            blocks = plan.settings.num_blocks if plan.settings.blocked == "A" else 1
            base = replace(base, q_size=A.shape[-1] * blocks)
    apart: dict[ModuleKey, _ModulePlan] = {}
    for plan in plans:
        B = source.facts[plan.names[1]]
        sizes: Mapping[Any, int | None] = {plan.key.name: None}
        if plan.key.name in FUSED_PARTS and B is not None:
            try:
                sizes = part_rows(plan.key.name, B.shape[0], base)
            except AdapterFormatError as error:
                problems.add(str(error), str(plan.key))
                continue
        first = 0
        for name, size in sizes.items():
            key = replace(plan.key, name=name)
            rows = None if size is None else (first, size)
            first += size or 0
            if key in apart:
                problems.add("it is adapted by itself and in a fused module", str(key))
            apart[key] = replace(plan, key=key, rows=rows)
    return [apart[key] for key in sorted(apart)]


def _add_clash(one: FactorName, other: FactorName, problems: Problems) -> None:
    if one.prefix != other.prefix:
        # `_check_prefixes` says so.
        return
    names = {name.adapter or "without a name" for name in (one, other)}
    problems.add(
        f"the file holds several adapters ({', '.join(sorted(names))}) and one config; save each "
        "by itself"
        if len(names) > 1
        else "two tensors are the same factor under two spellings; keep one of them",
        one.name,
        other.name,
    )


def _check_plans(
    source: TensorSource, plans: Iterable[_ModulePlan], problems: Problems
) -> tuple[dict[ModuleKey, BlockFactors], BaseShape]:
    """Build every module from shapes alone, and see that they are of one base model."""
    facts: dict[ModuleKey, BlockFactors] = {}
    for plan in plans:
        A, B = (source.facts[name] for name in plan.names)
        if A is None or B is None:
            kind = next(source.types[n] for n in plan.names if source.facts[n] is None)
            problems.add(f"factors are no F64, F32, F16 or BF16 but {_uncast(kind)}", str(plan.key))
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
    factors = replace(reshard(factors, 1), blocked=wanted) if _is_swapped(plan) else factors
    return factors if plan.rows is None else split(factors, *plan.rows)


def _uncast(kind: str) -> str:
    """A type that factors cannot have, and what to do."""
    if "F8_" in kind or "float8" in kind:
        return (
            f"{kind}; cast them, which loses nothing: save_file({{name: tensor.to(torch.bfloat16) "
            "for name, tensor in load_file(path).items()}, path) with safetensors.torch"
        )
    return f"{kind}; dequantise the adapter and save it again"


def _is_swapped(plan: _ModulePlan) -> bool:
    return plan.settings.blocked not in (None, blocked_factor(plan.key.name))


def _check_prefixes(prefixes: set[str], problems: Problems) -> None:
    """One stack of decoder layers: two would overwrite each other's modules."""
    if len(prefixes) > 1:
        problems.add(
            "several stacks of layers are adapted, wanted one; split the adapter", *prefixes
        )
    for prefix in prefixes:
        if _NO_DECODER.search(prefix):
            problems.add("the adapted layers are no language decoder's", prefix)


def _ignored_by_peft(raw: Mapping[str, Any], pairs: Sequence[_Pair]) -> list[FactorName]:
    targets = raw.get("target_modules")
    both = (name for pair in pairs for name in (pair.A, pair.B))
    return [name for name in both if not name.is_applied(targets)]


def _warn(
    folder: Path,
    raw: Mapping[str, Any],
    ignored: Sequence[FactorName],
    expanded: Sequence[_ModulePlan],
) -> None:
    if ignored:
        logger.warning(
            "%s: PEFT ignores %d of its tensors, such as %r, for their names or its "
            "target_modules; they are read as those of %s%s",
            folder,
            len(ignored),
            ignored[0].name,
            PEFT_PREFIX,
            ignored[0].path,
        )
    if raw.get("init_lora_weights") == "lora_ga":
        logger.warning(
            "%s: it was trained with LoRA-GA, which changes the base weights in training; it is "
            "read as PEFT reads it, on top of the unchanged ones",
            folder,
        )
    if expanded:
        logger.warning(
            "%s: it blocks %d modules on the side that tensor parallelism does not split; they are "
            "read as vanilla LoRA",
            folder,
            len(expanded),
        )


def _metadata(
    raw: Mapping[str, Any],
    pairs: Sequence[_Pair],
    ignored: Sequence[FactorName],
    expanded: Sequence[_ModulePlan],
) -> dict[str, str]:
    metadata = {"format": "peft", "peft_prefix": f"{PEFT_PREFIX}{pairs[0].A.prefix}"}
    if any(pair.key.name in FUSED_PARTS for pair in pairs):
        metadata[PROJECTIONS] = FUSED
    if ignored:
        metadata[IGNORED_BY_PEFT] = str(len(ignored))
    for option in ("base_model_name_or_path", "peft_version", "task_type"):
        if isinstance(raw.get(option), str):
            metadata[option] = raw[option]
    if expanded:
        metadata["expanded_modules"] = " ".join(str(plan.key) for plan in expanded)
    return metadata
