"""A checkpoint of `bdlora train` as an adapter: any step of a run, not the exported one alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bdlora_megatron.config import resolve
from bdlora_megatron.convert.adapter import Adapter, BaseShape
from bdlora_megatron.convert.adapter.invocation import parse_invocation
from bdlora_megatron.convert.adapter.neutral import FUSED, PROJECTIONS
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.adapter.scale import peft_scale
from bdlora_megatron.convert.hints import unreadable
from bdlora_megatron.convert.megatron.dist_tensors import DistTensors, open_dist_tensors
from bdlora_megatron.convert.megatron.format import merge_base
from bdlora_megatron.convert.megatron.reader import Pair, PairSettings, find_pairs, pair_modules
from bdlora_megatron.errors import AdapterFormatError

__all__ = ["RUN_NAME", "is_training_state", "open_run", "own_settings", "with_main_copies"]

RUN_NAME = "run.json"
_LARGEST = 4 << 20
_CHAINS = ("", "chained_0.", "chained_1.")
#: Under which names the plain optimizer and the distributed one keep float32 copies.
_MAINS = ("optimizer.state.fp32_param.", "optimizer.state.param.")


@contextmanager
def open_run(folder: Path, *, base: BaseShape | None = None) -> Iterator[Adapter]:
    """Open a checkpoint of a training run, on one process.

    In mixed precision the optimizer's float32 copies are read, as the run's own export does.

    Args:
        folder: A folder `step_*` of a run.
        base: What else is known of the base model.

    Raises:
        AdapterFormatError: If the files are missing or broken, or the run trained no adapter. All
            such problems are listed.
    """
    folder = folder.resolve()
    facts = _read(folder / RUN_NAME)
    model, peft = (facts["settings"].get(name) for name in ("model", "peft"))
    scheme = peft.get("scheme") if isinstance(peft, dict) else None
    if scheme not in ("bdlora", "lora", "slora"):
        raise AdapterFormatError(f"{folder / RUN_NAME} says scheme {scheme!r}; it has no adapter")
    section = peft.get("bdlora" if scheme == "bdlora" else "lora")
    tensors = with_main_copies(open_dist_tensors(folder))
    problems = Problems()
    subject = f"cannot read the training checkpoint in {folder}"
    pairs = find_pairs(tensors, problems, ignore=is_training_state)
    settings = own_settings(section if isinstance(section, dict) else {}, pairs, tensors, problems)
    known = base or BaseShape()
    modules, widths = pair_modules(tensors, settings, known, problems, subject=subject)
    shape = merge_base(known, widths, problems)
    invocation = parse_invocation("peft.invocation_tokens", peft.get("invocation_tokens"), problems)
    problems.raise_if_any(subject)
    metadata = {"format": "run", "scheme": scheme}
    if isinstance(model, dict) and isinstance(model.get("hf_path"), str):
        metadata["base_model_name_or_path"] = model["hf_path"]
    if facts.get(PROJECTIONS) == FUSED:
        metadata[PROJECTIONS] = FUSED
    yield Adapter(
        name=folder.name,
        modules=modules,
        base=shape,
        invocation_tokens=invocation,
        metadata=metadata,
    )


def is_training_state(name: str) -> bool:
    """Whether a checkpoint's tensor is the optimizer's."""
    return any(name.startswith(f"{chain}optimizer.") for chain in _CHAINS)


def with_main_copies(tensors: DistTensors) -> DistTensors:
    """The checkpoint with the optimizer's float32 copies in place of narrower parameters.

    Returns:
        The same names; a parameter without a whole copy stays what it is.
    """
    copies = {}
    for name, fact in tensors.facts.items():
        for main in (f"{chain}{kept}{name}" for chain in _CHAINS for kept in _MAINS):
            copy = tensors.facts.get(main)
            if copy is not None and fact is not None and copy.shape == fact.shape:
                copies[name] = main
    return replace(
        tensors,
        facts={name: tensors.facts[copies.get(name, name)] for name in tensors.facts},
        load=lambda name, layer: tensors.load(copies.get(name, name), layer),
    )


def own_settings(
    section: Mapping[str, Any], pairs: list[Pair], tensors: DistTensors, problems: Problems
) -> dict[Pair, PairSettings]:
    """Scale and blocks of every pair, from the settings that our training was given.

    Args:
        section: `alpha`, `use_rslora` and `num_blocks`; the rank is the tensors' own.
        pairs: The pairs of factors.
        tensors: The checkpoint.
        problems: Gets settings of the wrong type.
    """
    alpha, blocks = section.get("alpha"), section.get("num_blocks", 1)
    finite = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) < 1e30
    if alpha is not None and not finite:
        problems.add(f"alpha is {alpha!r}, wanted a finite number")
        alpha = None
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        problems.add(f"num_blocks is {blocks!r}, wanted a positive integer")
        blocks = 1
    settings = {}
    for pair in pairs:
        A = tensors.facts[pair.names[0]]
        assert A is not None, "find_pairs has refused it"
        rank = max(A.shape[-2], 1)
        _, numerator = resolve(rank=rank, alpha=alpha, num_blocks=blocks)
        scale = peft_scale(numerator, rank, use_rslora=bool(section.get("use_rslora")))
        settings[pair] = PairSettings(num_blocks=blocks, scale=scale)
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise AdapterFormatError(f"{path} is larger than {_LARGEST} bytes, as no settings are")
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        why = unreadable(path, error, "copy it again")
        raise AdapterFormatError(f"{path} cannot be read{why}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("settings"), dict):
        raise AdapterFormatError(f"{path} is of no checkpoint that bdlora train wrote")
    return raw
