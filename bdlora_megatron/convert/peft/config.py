"""PEFT's `adapter_config.json`: the rank, the scale and the blocks of every module."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdlora_megatron.blocks import Blocked
from bdlora_megatron.convert.adapter.invocation import parse_invocation
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.hints import unreadable
from bdlora_megatron.convert.peft.patterns import Patience, first_match, why_unsafe
from bdlora_megatron.errors import AdapterFormatError

__all__ = [
    "ALORA",
    "BDLoRAOptions",
    "ModuleSettings",
    "PeftConfig",
    "parse_peft_config",
    "read_raw_config",
]

CONFIG_NAME = "adapter_config.json"
#: PEFT's name for the tokens from which an Activated LoRA acts.
ALORA = "alora_invocation_tokens"
# A rank and an alpha for each module of a model with a thousand layers fit in a tenth.
_LARGEST_CONFIG = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class BDLoRAOptions:
    """The `use_bdlora` entry.

    Attributes:
        num_blocks: Blocks of every block-diagonal factor.
        a_patterns: A module whose path contains one of these blocks A.
        b_patterns: Likewise for B.
        match_strict: A module that matches neither is an error; without, it is vanilla.
    """

    num_blocks: int
    a_patterns: tuple[str, ...]
    b_patterns: tuple[str, ...]
    match_strict: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSettings:
    """What the config says of one module.

    Attributes:
        rank: The total rank.
        scale: alpha / rank, or alpha / sqrt(rank).
        num_blocks: 1 for vanilla LoRA.
        blocked: The block-diagonal factor, None for vanilla LoRA.
    """

    rank: int
    scale: float
    num_blocks: int
    blocked: Blocked | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftConfig:
    """The part of a PEFT LoRA config that decides each module's update.

    Attributes:
        rank: The default total rank.
        alpha: The default alpha.
        use_rslora: Scale by alpha / sqrt(rank).
        rank_pattern: Rank by pattern of module paths.
        alpha_pattern: Alpha by pattern of module paths.
        bdlora: Block-diagonal options, None for vanilla LoRA.
        invocation_tokens: From where an Activated LoRA acts, None for one that acts everywhere.
        patience: The time left for matching the patterns.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    bdlora: BDLoRAOptions | None
    invocation_tokens: tuple[int, ...] | None = None
    patience: Patience = field(default_factory=Patience, compare=False, repr=False)

    def settings_for(self, module_path: str) -> ModuleSettings:
        """Resolve one module by PEFT's rules.

        The patterns of rank and alpha are regular expressions for the end of the path, and the
        first that matches counts. Those of blocks are substrings of the path. The scale uses the
        total rank, never one block's.

        Args:
            module_path: The module's path in the base model, such as
                `model.layers.0.self_attn.q_proj`.

        Raises:
            AdapterFormatError: If PEFT itself would not accept the block patterns for this module,
                or matching takes too long.
        """
        rank = first_match(self.rank_pattern, module_path, self.rank, self.patience)
        alpha = first_match(self.alpha_pattern, module_path, self.alpha, self.patience)
        blocked = None if self.bdlora is None else _blocked_by(self.bdlora, module_path)
        return ModuleSettings(
            rank=int(rank),
            scale=alpha / (math.sqrt(rank) if self.use_rslora else rank),
            num_blocks=self.bdlora.num_blocks if self.bdlora and blocked else 1,
            blocked=blocked,
        )


def read_raw_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json` as it is.

    Raises:
        AdapterFormatError: If there is none, or it is no JSON object.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterFormatError(
            f"{folder} holds no {CONFIG_NAME}; pass a folder as PEFT's save_pretrained writes it"
        )
    size = path.stat().st_size
    if size > _LARGEST_CONFIG:
        raise AdapterFormatError(
            f"{path} has {size} bytes, wanted at most {_LARGEST_CONFIG}; save the adapter again"
        )
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        why = unreadable(path, error, "save the adapter again")
        raise AdapterFormatError(f"{path} is no JSON{why}") from error
    if not isinstance(raw, dict):
        raise AdapterFormatError(
            f"{path} holds a JSON {type(raw).__name__}, wanted an object; save the adapter again"
        )
    return raw


def parse_peft_config(raw: Mapping[str, Any]) -> PeftConfig:
    """Read rank, scale and blocks.

    Raises:
        AdapterFormatError: If a value has the wrong type or range. All of them are listed.
    """
    problems = Problems()
    for option, default in (("r", 8), ("lora_alpha", 8)):
        _check_number(option, raw.get(option, default), problems, integer=option == "r")
    for option in ("rank_pattern", "alpha_pattern"):
        _check_pattern(option, raw.get(option) or {}, problems, integer=option == "rank_pattern")
    if not isinstance(raw.get("use_rslora", False), bool | None):
        problems.add(f"use_rslora is {raw['use_rslora']!r}, wanted true or false")
    options = raw.get("use_bdlora")
    if options is not None:
        _check_bdlora(options, problems)
    invocation = parse_invocation(ALORA, raw.get(ALORA), problems)
    if invocation and raw.get("task_type") != "CAUSAL_LM":
        problems.add(
            f"{ALORA} is set and task_type is {raw.get('task_type')!r}, for which PEFT lets the "
            'adapter act on no token; set task_type to "CAUSAL_LM"'
        )
    problems.raise_if_any(f"{CONFIG_NAME} is malformed")
    return PeftConfig(
        rank=raw.get("r", 8),
        alpha=raw.get("lora_alpha", 8),
        use_rslora=bool(raw.get("use_rslora")),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        bdlora=None if options is None else _bdlora(options),
        invocation_tokens=invocation,
    )


def _blocked_by(options: BDLoRAOptions, path: str) -> Blocked | None:
    by_a = any(pattern in path for pattern in options.a_patterns)
    by_b = any(pattern in path for pattern in options.b_patterns)
    if by_a and by_b:
        raise AdapterFormatError(
            "use_bdlora lists the module both in target_modules_bd_a and in target_modules_bd_b, "
            "wanted at most one of them; take it out of one"
        )
    if not (by_a or by_b) and options.match_strict:
        raise AdapterFormatError(
            "use_bdlora lists the module neither in target_modules_bd_a nor in "
            "target_modules_bd_b; set match_strict to false if it is vanilla LoRA"
        )
    return "A" if by_a else "B" if by_b else None


def _check_number(option: str, value: object, problems: Problems, *, integer: bool) -> None:
    if integer:
        wrong = isinstance(value, bool) or not isinstance(value, int) or value < 1
        wanted = "a positive integer"
    else:
        wrong = (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) < 1e30  # also false for NaN
        )
        wanted = "a finite number"
    if wrong:
        problems.add(f"{option} is {value!r}, wanted {wanted}; save the adapter again")


def _check_pattern(option: str, patterns: object, problems: Problems, *, integer: bool) -> None:
    if not isinstance(patterns, dict):
        problems.add(f"{option} is {patterns!r}, wanted an object of module patterns")
        return
    for pattern, value in patterns.items():
        shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
        _check_number(f"{option}[{shown!r}]", value, problems, integer=integer)
        why = why_unsafe(pattern)
        if why:
            problems.add(f"{option}[{shown!r}] {why}; name the modules more plainly")


def _check_bdlora(options: object, problems: Problems) -> None:
    if not isinstance(options, dict):
        problems.add(f"use_bdlora is {options!r}, wanted null or an object")
        return
    lists = ("target_modules_bd_a", "target_modules_bd_b")
    for option in lists:
        value = options.get(option) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            problems.add(f"use_bdlora.{option} is {value!r}, wanted a list of strings")
    _check_number("use_bdlora.nblocks", options.get("nblocks", 1), problems, integer=True)
    if not isinstance(options.get("match_strict", True), bool):
        problems.add(f"use_bdlora.match_strict is {options['match_strict']!r}, wanted a boolean")
    for option in sorted(options.keys() - {*lists, "nblocks", "match_strict"}):
        problems.add(f"use_bdlora has the unknown option {option!r}; if harmless, take it out")


def _bdlora(options: Mapping[str, Any]) -> BDLoRAOptions:
    def patterns(option: str) -> tuple[str, ...]:
        listed: Sequence[str] = options.get(option) or ()
        return tuple(listed)

    return BDLoRAOptions(
        num_blocks=options.get("nblocks", 1),
        a_patterns=patterns("target_modules_bd_a"),
        b_patterns=patterns("target_modules_bd_b"),
        match_strict=options.get("match_strict", True),
    )
