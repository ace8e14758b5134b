"""Putting a collection together from what was fitted, module by module."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from bdlora_megatron.compress.clusters import Assignment
from bdlora_megatron.compress.options import CompressOptions
from bdlora_megatron.compress.report import (
    AdapterResult,
    ClusterResult,
    CompressReport,
    Reason,
)
from bdlora_megatron.compress.sources import AdapterFacts, FolderSource, Source
from bdlora_megatron.compress.tasks import FinishTask
from bdlora_megatron.convert.adapter import BaseShape, ModuleKey
from bdlora_megatron.convert.collection.manifest import (
    COLLECTION_NAME,
    CORE_NAME,
    AdapterEntry,
    Manifest,
    ModuleCore,
    ModuleEntry,
    OneCore,
    cluster_folder,
    write_json,
)
from bdlora_megatron.convert.collection.reader import ADAPTERS, BASIS_FILE, CORE_FILE
from bdlora_megatron.convert.peft.tensors import SAFETENSORS_NAME
from bdlora_megatron.convert.pipeline import companions
from bdlora_megatron.convert.registry import write_adapter
from bdlora_megatron.convert.tensor_files import write_safetensors

__all__ = ["Finished", "write_collection"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Finished:
    """All that is fitted, and the files that hold it.

    Attributes:
        sources: The adapters, in their order.
        facts: What is known of each.
        options: What was made of them.
        fingerprint: Of adapters and options.
        base: The base model of all.
        assignment: Which cluster each belongs to.
        tasks: The finished task of each cluster and module.
    """

    sources: Sequence[Source]
    facts: Sequence[AdapterFacts]
    options: CompressOptions
    fingerprint: str
    base: BaseShape
    assignment: Assignment
    tasks: Mapping[tuple[int, ModuleKey], FinishTask]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loss:
    """What an adapter loses, altogether and in each module; None where no basis was fitted."""

    error: float | None
    modules: Mapping[ModuleKey, float]


def write_collection(folder: Path, finished: Finished) -> CompressReport:
    """Write bases, cores, whole adapters and `collection.json` into an empty folder.

    Args:
        folder: The folder.
        finished: What was fitted.

    Returns:
        What each adapter loses, without time and memory.
    """
    losses = _losses(finished)
    whole = _whole(finished, losses)
    kept = [
        cluster
        for cluster in range(finished.assignment.count)
        if set(finished.assignment.members(cluster)) - whole.keys()
    ]
    number = {cluster: i for i, cluster in enumerate(kept)}
    (folder / ADAPTERS).mkdir()
    results: dict[int, AdapterResult] = {}
    clusters, modules = [], set[ModuleKey]()
    for cluster in kept:
        members = [i for i in finished.assignment.members(cluster) if i not in whole]
        # What whole adapters alone have needs no basis.
        keys = sorted({key for i in members for key in finished.facts[i].modules})
        modules.update(keys)
        size = _write_basis(folder / cluster_folder(number[cluster]), finished, cluster, keys)
        clusters.append(ClusterResult(bytes=size, adapters=len(members)))
        for i, size in _write_cores(folder, finished, cluster, members, losses, number[cluster]):
            results[i] = _result(finished, i, losses[i], number[cluster], size)
    for i, reason in whole.items():
        size = _write_whole(folder, finished.sources[i])
        results[i] = replace(_result(finished, i, losses[i], None, size), reason=reason)
    adapters = sorted(results.values(), key=lambda result: result.name)
    write_json(folder / COLLECTION_NAME, _manifest(finished, modules, len(kept), adapters))
    return CompressReport(
        options=finished.options, clusters=tuple(clusters), adapters=tuple(adapters)
    )


def _whole(finished: Finished, losses: Sequence[_Loss]) -> dict[int, Reason]:
    """The adapters to keep whole, and why; all are compressed where no limit is set."""
    limit = finished.options.max_error
    whole: dict[int, Reason] = {
        i: "error"
        for i, loss in enumerate(losses)
        if loss.error is None or (limit is not None and loss.error > limit)
    }
    if limit is None:
        return whole
    for cluster in range(finished.assignment.count):
        members = [i for i in finished.assignment.members(cluster) if i not in whole]
        if members and not _saves_room(finished, cluster, members):
            whole |= dict.fromkeys(members, "room")
    return whole


def _saves_room(finished: Finished, cluster: int, members: Sequence[int]) -> bool:
    """Whether basis and cores of a cluster take less than the factors of its adapters."""
    dtype = finished.options.dtype
    assert dtype is not None, "the driver has chosen one"
    numbers, before = 0, 0
    for key in {key for i in members for key in finished.facts[i].modules}:
        own = [i for i in members if key in finished.facts[i].modules]
        before += sum(finished.facts[i].modules[key].bytes for i in own)
        with safe_open(finished.tasks[cluster, key].target, framework="pt") as file:
            U, V, S = (file.get_slice(name).get_shape() for name in "UVS")
        numbers += math.prod(U) + math.prod(V) + len(own) * math.prod(S[1:])
    return numbers * dtype.itemsize < before


def _losses(finished: Finished) -> list[_Loss]:
    lost2: list[dict[ModuleKey, float]] = [{} for _ in finished.facts]
    for (_, key), task in finished.tasks.items():
        with safe_open(task.target, framework="pt") as file:
            own = file.get_tensor("lost2").tolist()
        for i, lost in zip(task.adapters, own, strict=True):
            lost2[i][key] = lost
    return [
        _Loss(
            error=_share(sum(lost2[i].values()), fact.norm2) if lost2[i] else None,
            modules={key: _share(lost, fact.modules[key].norm2) for key, lost in lost2[i].items()},
        )
        for i, fact in enumerate(finished.facts)
    ]


def _share(lost2: float, norm2: float) -> float:
    return math.sqrt(lost2 / norm2) if norm2 > 0 else 0.0


def _write_basis(folder: Path, finished: Finished, cluster: int, keys: Sequence[ModuleKey]) -> int:
    folder.mkdir()
    path = folder / BASIS_FILE
    files = {key: finished.tasks[cluster, key].target for key in keys}
    facts = {}
    for key, target in files.items():
        with safe_open(target, framework="pt") as file:
            for side in "UV":
                shape = file.get_slice(side).get_shape()
                facts[f"{key}.{side}"] = torch.empty(
                    shape, dtype=finished.options.dtype, device="meta"
                )
    with write_safetensors(path, facts, {"format": "pt"}) as write:
        for key, target in files.items():
            with safe_open(target, framework="pt") as file:
                for side in "UV":
                    write(f"{key}.{side}", file.get_tensor(side))
    return path.stat().st_size


def _write_cores(
    folder: Path,
    finished: Finished,
    cluster: int,
    members: Sequence[int],
    losses: Sequence[_Loss],
    number: int,
) -> list[tuple[int, int]]:
    """Write the folder of every adapter of a cluster; each with its bytes."""
    sizes = []
    for i in members:
        own = folder / ADAPTERS / finished.sources[i].name
        own.mkdir()
        path = own / CORE_FILE
        keys = sorted(finished.facts[i].modules)
        tensors = {}
        for key in keys:
            task = finished.tasks[cluster, key]
            with safe_open(task.target, framework="pt") as file:
                tensors[f"{key}.S"] = file.get_slice("S")[task.adapters.index(i)]
        with write_safetensors(
            path, {name: t.to("meta") for name, t in tensors.items()}, {"format": "pt"}
        ) as write:
            for name, tensor in tensors.items():
                write(name, tensor)
        write_json(own / CORE_NAME, _one_core(finished, i, losses[i], number))
        _copy_companions(finished.sources[i], own)
        sizes.append((i, path.stat().st_size))
    return sizes


def _one_core(finished: Finished, i: int, loss: _Loss, number: int) -> OneCore:
    fact = finished.facts[i]
    return OneCore(
        name=finished.sources[i].name,
        collection=finished.fingerprint,
        cluster=number,
        metadata=dict(fact.metadata),
        modules=tuple(
            ModuleCore(
                layer=key.layer,
                name=key.name,
                rank=module.rank,
                scale=module.scale,
                error=loss.modules[key],
            )
            for key, module in sorted(fact.modules.items())
        ),
    )


def _write_whole(folder: Path, source: Source) -> int:
    target = folder / ADAPTERS / source.name
    with source.open() as adapter:
        write_adapter(replace(adapter, name=source.name), target, "peft")
    _copy_companions(source, target)
    return (target / SAFETENSORS_NAME).stat().st_size


def _copy_companions(source: Source, folder: Path) -> None:
    if not isinstance(source, FolderSource):
        return
    for path in companions(source.path):
        copy = folder / path.relative_to(source.path)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _result(
    finished: Finished, i: int, loss: _Loss, cluster: int | None, size: int
) -> AdapterResult:
    return AdapterResult(
        name=finished.sources[i].name,
        cluster=cluster,
        error=loss.error,
        bytes_before=sum(module.bytes for module in finished.facts[i].modules.values()),
        bytes_after=size,
        modules={str(key): error for key, error in sorted(loss.modules.items())},
    )


def _manifest(
    finished: Finished,
    keys: set[ModuleKey],
    clusters: int,
    adapters: Sequence[AdapterResult],
) -> Manifest:
    options = finished.options
    widths = {
        key: (module.in_features, module.out_features)
        for fact in finished.facts
        for key, module in fact.modules.items()
    }
    return Manifest(
        fingerprint=finished.fingerprint,
        form=options.form,
        num_blocks=options.num_blocks,
        rank=options.rank,
        core=options.core,
        dtype=str(options.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        clusters=clusters,
        base=finished.base,
        modules=tuple(
            ModuleEntry(
                layer=key.layer,
                name=key.name,
                in_features=widths[key][0],
                out_features=widths[key][1],
            )
            for key in sorted(keys)
        ),
        adapters=tuple(
            AdapterEntry(name=result.name, cluster=result.cluster, error=result.error)
            for result in adapters
        ),
    )
