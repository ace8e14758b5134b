"""The tensors of a collection: what there should be of each module, and reading it.

Letters in shapes: I in features, O out features, N blocks, k columns of one block's basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from bdlora_megatron.blocks import all_finite
from bdlora_megatron.convert.adapter.neutral import ModuleKey, blocked_factor
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.collection.manifest import (
    COLLECTION_NAME,
    CORE_NAME,
    Manifest,
    ModuleEntry,
    OneCore,
)
from bdlora_megatron.convert.tensor_files import TensorSource
from bdlora_megatron.errors import AdapterFormatError

__all__ = ["LazyTensors", "ModuleBasis", "basis_facts", "core_facts_of", "finite"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModuleBasis:
    """One module's basis in one cluster; the update of slice n is `U[n] S[n] V[n]^T`.

    Attributes:
        U: `[N, O / N, k]` in a column layer, `[N, O, k]` in a row layer.
        V: `[N, I, k]` in a column layer, `[N, I / N, k]` in a row layer.
    """

    U: Tensor
    V: Tensor


class LazyTensors(Mapping[ModuleKey, T], Generic[T]):
    """What a file holds of every module, read each time it is looked up.

    Attributes:
        facts: The same on the meta device, in order.
    """

    def __init__(self, facts: Mapping[ModuleKey, T], load: Callable[[ModuleKey], T]) -> None:
        self.facts = facts
        self._load = load

    def __getitem__(self, key: ModuleKey) -> T:
        if key not in self.facts:
            raise KeyError(key)
        return self._load(key)

    def __iter__(self) -> Iterator[ModuleKey]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)

    def __contains__(self, key: object) -> bool:
        return key in self.facts


def basis_facts(
    path: Path, source: TensorSource, manifest: Manifest
) -> dict[ModuleKey, ModuleBasis]:
    """The basis of every module on the meta device.

    Raises:
        AdapterFormatError: If the file is no basis of the collection. All that is wrong is listed.
    """
    problems, facts = Problems(), {}
    known = {f"{entry.key}.{side}" for entry in manifest.modules for side in "UV"}
    for name in sorted(source.facts.keys() - known):
        problems.add(f"tensors are of no module in {COLLECTION_NAME}", name)
    for entry in manifest.modules:
        # A cluster whose adapters lack a module has no basis of it.
        U, V = (source.facts.get(f"{entry.key}.{side}") for side in "UV")
        if U is None and V is None and f"{entry.key}.U" not in source.facts:
            continue
        wanted = _basis_widths(entry, manifest)
        if not _fits(U, V, wanted, manifest):
            problems.add(
                f"U and V are not {manifest.dtype} of {list(wanted[0])} and {list(wanted[1])} with "
                "one number of columns each",
                str(entry.key),
            )
        elif U is not None and V is not None:
            facts[entry.key] = ModuleBasis(U=U, V=V)
    problems.raise_if_any(f"{path} is no basis of its collection")
    return facts


def _basis_widths(entry: ModuleEntry, manifest: Manifest) -> tuple[tuple[int, int], ...]:
    blocks = manifest.num_blocks
    outputs, inputs = entry.out_features, entry.in_features
    if blocked_factor(entry.name) == "B":
        outputs //= blocks
    else:
        inputs //= blocks
    return (blocks, outputs), (blocks, inputs)


def _fits(
    U: Tensor | None, V: Tensor | None, wanted: tuple[tuple[int, int], ...], manifest: Manifest
) -> bool:
    if U is None or V is None or U.dim() != 3 or V.dim() != 3:
        return False
    columns = {tensor.shape[2] for tensor in (U, V)}
    most = manifest.rank // manifest.num_blocks
    return (
        (tuple(U.shape[:2]), tuple(V.shape[:2])) == wanted
        and len(columns) == 1
        and 0 < min(columns) <= most
        and {U.dtype, V.dtype} == {manifest.torch_dtype}
    )


def core_facts_of(
    path: Path, source: TensorSource, one: OneCore, manifest: Manifest
) -> dict[ModuleKey, Tensor]:
    """The core of every module on the meta device.

    Raises:
        AdapterFormatError: If the file is no core of the collection. All that is wrong is listed.
    """
    problems, facts = Problems(), {}
    keys = [entry.key for entry in one.modules]
    for name in sorted(source.facts.keys() - {f"{key}.S" for key in keys}):
        problems.add(f"tensors are of no module in {CORE_NAME}", name)
    dims = 3 if manifest.core == "full" else 2
    for key in keys:
        core = source.facts.get(f"{key}.S")
        if (
            core is None
            or core.dim() != dims
            or core.shape[0] != manifest.num_blocks
            or len(set(core.shape[1:])) != 1
            or core.dtype != manifest.torch_dtype
        ):
            problems.add(
                f"there is no {manifest.core} core of {manifest.num_blocks} block(s) in "
                f"{manifest.dtype}",
                str(key),
            )
        else:
            facts[key] = core
    problems.raise_if_any(f"{path} is no core of its collection")
    return facts


def finite(path: Path, source: TensorSource, name: str) -> Tensor:
    """Read a tensor.

    Raises:
        AdapterFormatError: If it holds NaN or infinity.
    """
    tensor = source.load(name)
    if not all_finite(tensor):
        raise AdapterFormatError(f"{path} holds NaN or infinity in {name}; compress again")
    return tensor
