"""A base model with an adapter added to its weights, in Hugging Face's format.

The base's files are written again, one tensor in memory at a time. Sums are formed in float64 and
rounded once, to the base's type; what that rounding costs the update is measured.

Letters in shapes: I in features, O out features.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlora_megatron.blocks import BlockFactors, reshard
from bdlora_megatron.convert.adapter import Adapter, ModuleKey
from bdlora_megatron.convert.adapter.lazy import module_facts
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.adapter.tables import format_table
from bdlora_megatron.convert.folders import new_folder
from bdlora_megatron.convert.peft.fused import fuse, is_fused
from bdlora_megatron.convert.structure.changes import whole_error
from bdlora_megatron.convert.tensor_files import TensorSource, open_safetensors, write_safetensors
from bdlora_megatron.errors import UnsupportedError
from bdlora_megatron.models.files import TensorFiles

__all__ = ["MergeReport", "MergedModule", "merge_adapter"]

#: Numbers of a weight that are in float64 at once.
_CHUNK = 1 << 20
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedModule:
    """One module's update in the merged weight.

    Attributes:
        key: The module.
        norm: Frobenius norm of the update.
        error: Frobenius norm of what rounding to the base's type took from it, over ``norm``.
    """

    key: ModuleKey
    norm: float
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What became of an adapter in its base's weights.

    Attributes:
        dtypes: The types of the merged weights.
        modules: Every module, in order.
        left_out: What of the base's folder was not carried along.
    """

    dtypes: tuple[str, ...]
    modules: tuple[MergedModule, ...]
    left_out: tuple[str, ...]

    @property
    def error(self) -> float:
        """Relative error of all updates taken as one long vector."""
        return whole_error([(module.norm, module.error) for module in self.modules])

    @property
    def worst(self) -> MergedModule:
        """The module that lost most."""
        return max(self.modules, key=lambda module: module.error)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        modules = [{**asdict(module), "key": str(module.key)} for module in self.modules]
        return {
            "dtypes": list(self.dtypes),
            "error": self.error,
            "worst": str(self.worst.key),
            "modules": modules,
            "left_out": list(self.left_out),
        }

    def table(self) -> str:
        """The report for people: the module that lost most, and the whole."""
        rows = [
            (f"worst: {self.worst.key}", f"{self.worst.norm:.3g}", f"{self.worst.error:.3g}"),
            (
                "whole adapter",
                f"{math.hypot(*(m.norm for m in self.modules)):.3g}",
                f"{self.error:.3g}",
            ),
        ]
        return format_table(("module", "size of the update", "relative error"), rows)


def merge_adapter(base: Path, adapter: Adapter, out: Path) -> MergeReport:
    """Write a base model whose weights hold an adapter's update.

    The folder has the base's files, shards and types; it appears complete or not at all.

    Args:
        base: The base model's folder in Hugging Face's format.
        adapter: An adapter that fits it (`models.check_base`), lazy or in memory.
        out: The new folder.

    Returns:
        What rounding to the base's type cost each update.

    Raises:
        AdapterFormatError: The base has no weight for a module, or one of another shape; all such
            modules are listed. Or a module's numbers are not finite.
        ConfigError: The base's files are missing or broken, or something is at `out`.
        UnsupportedError: The adapter acts on a part of the tokens only, the base is quantised, or
            a sum exceeds the range of its type.
    """
    if adapter.invocation_tokens:
        raise UnsupportedError(
            f"adapter {adapter.name!r} acts from its invocation tokens "
            f"{list(adapter.invocation_tokens)} on, and merged weights act on every token; serve "
            "it as an adapter"
        )
    if is_fused(adapter):
        adapter = fuse(adapter)
    with TensorFiles(base) as files:
        names, shapes = files.files, files.shapes
    places = _places(adapter, shapes)
    modules: dict[ModuleKey, MergedModule] = {}
    dtypes: set[str] = set()
    with new_folder(out, overwrite=False) as folder:
        for name in names:
            with open_safetensors(base / name) as source:
                for merged, dtype in _write_file(folder / name, source, adapter, places):
                    modules[merged.key] = merged
                    dtypes.add(str(dtype).removeprefix("torch."))
        left_out = _carry_along(base, folder)
    return MergeReport(
        dtypes=tuple(sorted(dtypes)),
        modules=tuple(modules[key] for key in sorted(modules)),
        left_out=left_out,
    )


def _places(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ModuleKey]:
    """The module that changes each weight, by the weight's name."""
    places, problems = {}, Problems()
    for key, factors in module_facts(adapter).items():
        name = f"model.{key}.weight"
        wanted = (factors.out_features, factors.in_features)
        if shapes.get(name) != wanted:
            got = f"is {list(shapes[name])}" if name in shapes else "is not there"
            problems.add(f"{name} {got} in the base model, wanted {list(wanted)}", str(key))
        places[name] = key
    problems.raise_if_any(f"adapter {adapter.name!r} cannot be merged")
    return places


def _write_file(
    path: Path, source: TensorSource, adapter: Adapter, places: Mapping[str, ModuleKey]
) -> Iterator[tuple[MergedModule, torch.dtype]]:
    """Write one file of the base; gives each module that was merged and its weight's type."""
    facts = {name: fact for name, fact in source.facts.items() if fact is not None}
    # Wide types first keep every tensor aligned.
    ordered = dict(sorted(facts.items(), key=lambda item: -item[1].itemsize))
    with write_safetensors(path, ordered, {"format": "pt"}) as write:
        for name in ordered:
            tensor, key = source.load(name), places.get(name)
            if key is not None:
                yield _merge(tensor, adapter.modules[key], key), tensor.dtype
            write(name, tensor)


def _merge(weight: Tensor, factors: BlockFactors, key: ModuleKey) -> MergedModule:
    """Add an update to a weight ``[O, I]`` in place, some rows at a time.

    Raises:
        UnsupportedError: A sum exceeds the range of the weight's type.
    """
    whole = reshard(factors, 1)
    A, B = whole.A.double(), whole.B.double() * whole.scale
    rows = max(1, _CHUNK // weight.shape[1])
    norms, losses = [], []
    for part, left in zip(weight.split(rows), B.split(rows), strict=True):
        update, before = left @ A, part.double()
        part.copy_(before + update)
        after = part.double()
        if not after.isfinite().all():
            raise UnsupportedError(
                f"{key}: base and update together exceed the range of {weight.dtype}; save the "
                "base model in bfloat16 or float32 first"
            )
        norms.append(update.norm().item())
        losses.append((after - before - update).norm().item())
    norm = math.hypot(*norms)
    return MergedModule(key=key, norm=norm, error=math.hypot(*losses) / norm if norm else 0.0)


def _carry_along(base: Path, folder: Path) -> tuple[str, ...]:
    """Copy config, tokenizer and all else but weights; the names of what stays behind."""
    left_out = []
    for path in sorted(base.iterdir()):
        target = folder / path.name
        if path.name == "additional_chat_templates" and path.is_dir():
            shutil.copytree(path, target)
        elif target.exists() or path.name.startswith("."):
            continue
        elif path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, target)
        else:
            left_out.append(path.name)
    return tuple(left_out)
