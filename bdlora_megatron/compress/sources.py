"""The adapters of a collection: where they are, what they are, and whether they fit together."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.compress.options import CompressOptions
from bdlora_megatron.compress.stack import gram_norm2, slices_of
from bdlora_megatron.convert.adapter import Adapter, BaseShape, ModuleKey
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.pipeline import open_fitting
from bdlora_megatron.convert.structure.restructure import check_fits
from bdlora_megatron.errors import BDLoRAError, ConfigError, explain
from bdlora_megatron.models.config import HFConfig

__all__ = ["AdapterFacts", "FolderSource", "ModuleFacts", "Source", "check_collection", "look_at"]


class Source(Protocol):
    """An adapter that can be opened in any process."""

    @property
    def name(self) -> str:
        """The adapter's name in the collection."""

    def open(self) -> AbstractContextManager[Adapter]:
        """Open the adapter, lazily."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource:
    """An adapter in a folder, of any format.

    Attributes:
        name: Its name in the collection.
        path: Its folder.
        base: The base model that it must fit, if one is given.
        base_folder: Where that is.
        allow_pickle: Also read pickles, tensors and plain values only.
        ignore_unknown: Unknown options of adapters that change no update, by name.
    """

    name: str
    path: Path
    base: HFConfig | None = None
    base_folder: Path | None = None
    allow_pickle: bool = False
    ignore_unknown: tuple[str, ...] = ()

    @contextmanager
    def open(self) -> Iterator[Adapter]:
        """Open the adapter.

        Raises:
            AdapterFormatError: If it cannot be read.
            ShapeError: If it is for another base model.
        """
        with open_fitting(
            self.path,
            self.base,
            allow_pickle=self.allow_pickle,
            base_folder=self.base_folder,
            ignore_unknown=self.ignore_unknown,
        ) as adapter:
            yield adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleFacts:
    """What is known of an adapter's module once it was read.

    Attributes:
        in_features: I.
        out_features: O.
        rank: Its rank.
        scale: Its scale.
        norm2: The square of the update's Frobenius norm.
        bytes: The size of its factors.
    """

    in_features: int
    out_features: int
    rank: int
    scale: float
    norm2: float
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFacts:
    """What is known of an adapter once it was read.

    Attributes:
        digest: A hash of its numbers and structure, whatever the file's format.
        base: What is known of its base model.
        metadata: Its own.
        dtype: The widest type of its factors.
        modules: Every module.
        problem: Why it cannot be compressed; the rest means nothing then.
    """

    digest: str = ""
    base: BaseShape = field(default_factory=BaseShape)
    metadata: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    modules: Mapping[ModuleKey, ModuleFacts] = field(default_factory=dict)
    problem: str | None = None

    @property
    def norm2(self) -> float:
        """The square of the Frobenius norm of all updates together."""
        return sum(module.norm2 for module in self.modules.values())


def look_at(source: Source, options: CompressOptions) -> AdapterFacts:
    """Read an adapter once, module by module, and see that it can be compressed at all.

    Args:
        source: The adapter.
        options: What will be made of it.

    Returns:
        What is known of it then; what is wrong with it is told and not raised.
    """
    digest = hashlib.blake2b(digest_size=20)
    modules = {}
    dtypes = []
    try:
        with source.open() as adapter:
            if adapter.invocation_tokens is not None:
                return AdapterFacts(
                    problem="it acts from its invocation tokens on (Activated LoRA), which a "
                    "collection cannot say; leave it out"
                )
            if options.form == "blocked":
                check_fits(adapter, options.num_blocks, "cannot be cut for the blocked form")
            for key in sorted(adapter.modules):
                factors = adapter.modules[key]
                _hash(digest, key, factors)
                modules[key] = _facts(factors)
                dtypes.append(factors.dtype)
            base, metadata = adapter.base, dict(adapter.metadata)
    except (BDLoRAError, OSError) as error:
        return AdapterFacts(problem=explain(error))
    if not modules:
        return AdapterFacts(problem="it has no modules")
    return AdapterFacts(
        digest=digest.hexdigest(),
        base=base,
        metadata=metadata,
        dtype=widest(dtypes),
        modules=modules,
    )


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The type that holds all of them."""
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _hash(digest: hashlib.blake2b, key: ModuleKey, factors: BlockFactors) -> None:
    structure = (factors.num_blocks, factors.blocked, factors.scale, factors.parts)
    for factor in (factors.A, factors.B):
        digest.update(f"{key} {structure} {factor.dtype} {list(factor.shape)}\n".encode())
        digest.update(_memory(factor))


def _memory(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _facts(factors: BlockFactors) -> ModuleFacts:
    (whole,) = slices_of(factors, 1)
    return ModuleFacts(
        in_features=factors.in_features,
        out_features=factors.out_features,
        rank=factors.rank,
        scale=factors.scale,
        norm2=factors.scale**2 * gram_norm2(whole),
        bytes=factors.num_parameters * factors.dtype.itemsize,
    )


def check_collection(
    sources: Sequence[Source], facts: Sequence[AdapterFacts], options: CompressOptions
) -> None:
    """See that adapters can share bases.

    Raises:
        ConfigError: Adapters cannot be read, are of different base models or of one name, or the
            options do not fit them. All that is wrong is listed.
    """
    problems = Problems()
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            problems.add(f"{count} adapters are named {name!r}; rename one")
        if name != os.path.basename(name) or name.startswith(".") or not name:
            problems.add(f"an adapter is named {name!r}, which is no name of a folder; rename it")
    readable = []
    for source, fact in zip(sources, facts, strict=True):
        if fact.problem is None:
            readable.append((source.name, fact))
        else:
            problems.add(f"{source.name}: {fact.problem}")
    _check_base(readable, problems)
    _check_rank([fact for _, fact in readable], options, problems)
    if options.clusters > len(sources):
        problems.add(f"{options.clusters} clusters are wanted of {len(sources)} adapters")
    if problems:
        try:
            problems.raise_if_any("cannot compress these adapters")
        except BDLoRAError as error:
            raise ConfigError(str(error)) from None


def merged_base(facts: Sequence[AdapterFacts]) -> BaseShape:
    """All that some adapter knows of the base model."""
    known: dict[str, int | None] = {}
    for fact in facts:
        known |= {side: width for side, width in asdict(fact.base).items() if width is not None}
    return BaseShape(**known)


def _check_base(readable: Sequence[tuple[str, AdapterFacts]], problems: Problems) -> None:
    for side in fields(BaseShape):
        names: dict[int, list[str]] = {}
        for name, fact in readable:
            width = getattr(fact.base, side.name)
            if width is not None:
                names.setdefault(width, []).append(name)
        if len(names) < 2:
            continue
        usual = max(names, key=lambda width: len(names[width]))
        for width, having in names.items():
            if width != usual:
                problems.add(
                    f"adapters are of other base models: {side.name} is {width} and not {usual} as "
                    f"in {names[usual][0]}; compress the adapters of each base model by themselves",
                    *having,
                )


def _check_rank(
    facts: Sequence[AdapterFacts], options: CompressOptions, problems: Problems
) -> None:
    small: dict[int, set[str]] = {}
    for fact in facts:
        for key, module in fact.modules.items():
            most = min(module.in_features, module.out_features)
            if options.rank > most:
                small.setdefault(most, set()).add(str(key))
    for most, keys in sorted(small.items()):
        problems.add(
            f"rank {options.rank} is more than {most}, the smaller side of modules; a basis of "
            "that many columns would be the whole space: use a smaller rank",
            *keys,
        )
