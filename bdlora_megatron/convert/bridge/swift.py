"""Adapter checkpoints of Megatron-SWIFT: PEFT's config beside a distributed checkpoint.

    adapter_config.json   args.json   latest_checkpointed_iteration.txt
    iter_0000100/         decoder.layers.[<layer>.]self_attention.linear_qkv.lora_A.default.weight

One pair serves a whole fused layer. B of `linear_fc1` holds every rank's rows of gate and up after
each other, so that its order depends on the tensor-parallel size that saved it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bdlora_megatron.convert.adapter import Adapter, BaseShape
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.bridge.config import RUN_CONFIG_NAME
from bdlora_megatron.convert.megatron.dist_tensors import (
    METADATA_NAME,
    DistTensors,
    open_dist_tensors,
)
from bdlora_megatron.convert.megatron.format import merge_base
from bdlora_megatron.convert.megatron.iterations import ITERATION, newest_iteration
from bdlora_megatron.convert.megatron.reader import Pair, PairSettings, find_pairs, pair_modules
from bdlora_megatron.convert.megatron.run import is_training_state
from bdlora_megatron.convert.peft.config import (
    CONFIG_NAME,
    parse_peft_config,
    read_raw_config,
)
from bdlora_megatron.convert.peft.options import READ_WITHOUT, find_refused

__all__ = ["is_swift", "open_swift"]

logger = logging.getLogger(__name__)

_FACTOR = re.compile(r"(.*)\.lora_([AB])\.([^.]+)\.weight")
_GATED = "mlp.linear_fc1"


def is_swift(folder: Path) -> bool:
    """Whether a folder, or one iteration in it, is a checkpoint without PEFT's tensors."""
    if ITERATION.fullmatch(folder.name) and not (folder / RUN_CONFIG_NAME).is_file():
        return (folder.parent / CONFIG_NAME).is_file() and (folder / METADATA_NAME).is_file()
    return (
        (folder / CONFIG_NAME).is_file()
        and not any(folder.glob("adapter_model.*"))
        and any(folder.glob(f"iter_*/{METADATA_NAME}"))
    )


@contextmanager
def open_swift(
    folder: Path, *, base: BaseShape | None = None, ignore_unknown: Collection[str] = ()
) -> Iterator[Adapter]:
    """Open an adapter checkpoint of Megatron-SWIFT, saved at any parallel size.

    Args:
        folder: The checkpoint, whose newest complete iteration is read, or one iteration.
        base: The base model's heads, which the checkpoint does not tell.
        ignore_unknown: Unknown options of the config that change nothing, by name.

    Yields:
        The adapter, vanilla LoRA; a fused layer's pair comes as one update per projection.

    Raises:
        AdapterFormatError: If the files are missing or broken, or hold what cannot be represented.
            All such problems are listed.
    """
    folder = folder.resolve()
    weights = newest_iteration(folder, lambda _: True) or folder
    raw = read_raw_config(folder if (folder / CONFIG_NAME).is_file() else folder.parent)
    config = parse_peft_config(raw)
    problems = Problems()
    ignored = find_refused(raw, problems, ignore_unknown=ignore_unknown)
    if ignored:
        logger.warning("%s: %s: %s", folder, READ_WITHOUT, ", ".join(ignored))
    if config.invocation_tokens:
        problems.add(
            "alora_invocation_tokens is set, which Megatron-SWIFT's layers do not heed; take it "
            "out if the adapter acts on every token"
        )
    if config.rank_pattern or config.alpha_pattern:
        problems.add("rank_pattern or alpha_pattern is set; convert it with ms-swift itself")
    subject = f"cannot read the adapter in {weights}"
    tensors = _renamed(open_dist_tensors(weights), problems)
    pairs = find_pairs(tensors, problems, ignore=is_training_state)
    scale = config.settings_for("").scale
    sizes = {pair: _saved_at(pair, tensors, problems) for pair in pairs if pair.linear == _GATED}
    for pair in pairs:
        A = tensors.facts[pair.names[0]]
        if A is not None and A.shape[-2] != config.rank:
            problems.add(
                f"lora_A has rank {A.shape[-2]}, but the config says {config.rank}", pair.names[0]
            )
    known = base or BaseShape()
    modules, widths = pair_modules(
        tensors,
        dict.fromkeys(pairs, PairSettings(num_blocks=1, scale=scale)),
        known,
        problems,
        subject=subject,
        reorder=lambda pair, B: _in_order(B, sizes.get(pair, 1)),
    )
    shape = merge_base(known, widths, problems)
    problems.raise_if_any(subject)
    metadata = {"format": "swift", "iteration": weights.name}
    if isinstance(raw.get("base_model_name_or_path"), str):
        metadata["base_model_name_or_path"] = raw["base_model_name_or_path"]
    yield Adapter(name=folder.name, modules=modules, base=shape, metadata=metadata)


def _renamed(tensors: DistTensors, problems: Problems) -> DistTensors:
    """The checkpoint with the names that other checkpoints' factors have."""
    names: dict[str, str] = {}
    adapters = set()
    for name in tensors.facts:
        found = _FACTOR.fullmatch(name)
        if found is None or is_training_state(name):
            names[name] = name
            continue
        side = "in" if found[2] == "A" else "out"
        names[f"{found[1]}.adapter.linear_{side}.weight"] = name
        adapters.add(found[3])
    if len(adapters) > 1:
        problems.add("the checkpoint holds several adapters; save each by itself", *adapters)
    return replace(
        tensors,
        facts={new: tensors.facts[old] for new, old in names.items()},
        row_parts={new: tensors.row_parts[old] for new, old in names.items()},
        load=lambda name, layer: tensors.load(names[name], layer),
    )


def _saved_at(pair: Pair, tensors: DistTensors, problems: Problems) -> int:
    """The tensor-parallel size that saved a pair, which its B's parts tell."""
    fact, parts = tensors.facts[pair.names[1]], tensors.row_parts[pair.names[1]]
    assert fact is not None, "find_pairs has refused it"
    if parts is None or fact.shape[-2] % (2 * parts):
        problems.add(
            "the tensor's parts tell no tensor-parallel size, and its row order depends on it; "
            "save it again",
            pair.names[1],
        )
        return 1
    return parts


def _in_order(B: Tensor, tp: int) -> Tensor:
    """From gate and up rank by rank to all of gate, then all of up."""
    return B if tp == 1 else B.unflatten(0, (tp, 2, -1)).transpose(0, 1).flatten(0, 2)
