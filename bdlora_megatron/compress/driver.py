"""Compressing a collection: look at the adapters, find clusters, fit every module, write."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bdlora_megatron.compress.assemble import Finished, write_collection
from bdlora_megatron.compress.clusters import Assignment, after_round, seeded
from bdlora_megatron.compress.options import CompressOptions
from bdlora_megatron.compress.report import CompressReport, write_report
from bdlora_megatron.compress.sources import (
    AdapterFacts,
    Source,
    check_collection,
    merged_base,
    widest,
)
from bdlora_megatron.compress.tasks import FinishTask, RoundTask, SeedTask, Task
from bdlora_megatron.compress.work import Show, Workers, file_name, work_folder
from bdlora_megatron.convert.adapter import ModuleKey
from bdlora_megatron.convert.collection.manifest import COLLECTION_NAME
from bdlora_megatron.convert.folders import new_folder
from bdlora_megatron.errors import ConfigError

__all__ = ["compress_adapters"]

#: A change of what is computed must make what an older release left unfinished void.
_VERSION = 1
_CANDIDATES, _ROUNDS = 256, 20


def compress_adapters(
    sources: Sequence[Source],
    out: str | Path,
    options: CompressOptions,
    *,
    workers: int = 1,
    overwrite: bool = False,
    show: Show | None = None,
) -> CompressReport:
    """Compress a collection of adapters into bases that they share.

    The result is the same for any order of the adapters and any number of workers. The folder
    appears complete or not at all; what an interrupted run finished is kept beside it and taken up
    by the next run of the same adapters and options. One module of one cluster is in memory at a
    time, in each worker.

    Args:
        sources: The adapters.
        out: The collection's new folder.
        options: What to make.
        workers: Processes.
        overwrite: Replace the collection that is there.
        show: Wraps the results of each stage, as a progress bar does.

    Returns:
        What each adapter loses, and what is won.

    Raises:
        ConfigError: The adapters do not fit together or the options do not fit them, all listed;
            or something is at `out`, or another process writes there.
        AdapterFormatError: An adapter changed while it was read.
        CapacityError: A worker process died.
    """
    start = time.monotonic()
    target = Path(out).absolute()
    if not sources:
        raise ConfigError("there are no adapters to compress; pass their folders")
    if workers < 1:
        raise ConfigError(f"workers={workers}; wanted 1 or more")
    _check_target(target, overwrite=overwrite)
    staff = Workers(count=workers) if show is None else Workers(count=workers, show=show)
    facts = staff.look(sources, options)
    check_collection(sources, facts, options)
    order = sorted(range(len(sources)), key=lambda i: (facts[i].digest, sources[i].name))
    if options.dtype is None:
        options = replace(options, dtype=widest([fact.dtype for fact in facts]))
    plan = _Plan(
        sources=[sources[i] for i in order],
        facts=[facts[i] for i in order],
        options=options,
        staff=staff,
    )
    with work_folder(target, plan.fingerprint()) as work:
        assignment = plan.assigned(work)
        finished = plan.finished(work, assignment)
        with new_folder(target, overwrite=overwrite) as folder:
            report = write_collection(folder, finished)
            report = replace(report, seconds=time.monotonic() - start, peak_bytes=staff.peak_bytes)
            write_report(report, folder)
    return report


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Replace collections only: a mistyped path must not cost a home directory.

    Raises:
        ConfigError: If something else is there, or a collection and it may not be replaced.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / COLLECTION_NAME).is_file():
        raise ConfigError(
            f"{target} is there already and is no collection; it is left as it is: pass another "
            "path"
        )
    if not overwrite:
        raise ConfigError(
            f"{target} is there already and is left as it is; pass another path, or --overwrite "
            "(overwrite=True)"
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Plan:
    """Adapters in the order of their contents, and how their tasks follow from each other."""

    sources: Sequence[Source]
    facts: Sequence[AdapterFacts]
    options: CompressOptions
    staff: Workers

    def fingerprint(self) -> str:
        """Of all that the result follows from."""
        names = [
            (fact.digest, source.name)
            for fact, source in zip(self.facts, self.sources, strict=True)
        ]
        text = json.dumps([_VERSION, names, {k: str(v) for k, v in asdict(self.options).items()}])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def having(self, key: ModuleKey) -> tuple[int, ...]:
        """The adapters that have a module."""
        return tuple(i for i, fact in enumerate(self.facts) if key in fact.modules)

    def keys(self) -> list[ModuleKey]:
        """Every module that an adapter has."""
        return sorted({key for fact in self.facts for key in fact.modules})

    def assigned(self, work: Path) -> Assignment:
        """Find clusters and outliers."""
        everyone = len(self.facts)
        assignment = Assignment(cluster=(0,) * everyone, active=(True,) * everyone)
        if self.options.clusters == 1 and self.options.max_error is None:
            return assignment
        keys = self._looked_at()
        if self.options.clusters > 1:
            assignment = seeded(self._distances(work, keys), self.options.clusters)
        for _ in range(_ROUNDS):
            errors, shares = self._round(work, keys, assignment)
            following = after_round(assignment, errors, shares, self.options.max_error)
            if following == assignment:
                break
            assignment = following
        return assignment

    def finished(self, work: Path, assignment: Assignment) -> Finished:
        """Fit every module of every cluster."""
        tasks: dict[tuple[int, ModuleKey], FinishTask] = {}
        for cluster in range(assignment.count):
            active = assignment.members(cluster, active=True)
            if not active:
                continue
            members = set(assignment.members(cluster))
            for key in self.keys():
                own = tuple(i for i in self.having(key) if i in members)
                if own:
                    task = FinishTask(
                        key=key,
                        target=work / file_name("finish", key, own, active),
                        adapters=own,
                        active=active,
                    )
                    tasks[cluster, key] = task
        self._run(tasks.values(), "module")
        return Finished(
            sources=self.sources,
            facts=self.facts,
            options=self.options,
            fingerprint=self.fingerprint(),
            base=merged_base(self.facts),
            assignment=assignment,
            tasks=tasks,
        )

    def _looked_at(self) -> list[ModuleKey]:
        """The modules to find clusters with: chosen blindly, and one at least of each adapter."""
        keys, most = self.keys(), self.options.cluster_modules
        if not most or len(keys) <= most:
            return keys
        chance = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
        chosen = {keys[i] for i in chance[:most].tolist()}
        for fact in self.facts:
            if not chosen & fact.modules.keys():
                chosen.add(min(fact.modules))
        return sorted(chosen)

    def _distances(self, work: Path, keys: Sequence[ModuleKey]) -> Tensor:
        """`[c, n]`: the share that a candidate's own space loses, averaged over modules."""
        everyone = len(self.facts)
        step = -(-everyone // _CANDIDATES)
        candidates = tuple(range(0, everyone, step))
        tasks = [
            SeedTask(
                key=key,
                target=work / file_name("seed", key),
                adapters=self.having(key),
                candidates=candidates,
            )
            for key in keys
        ]
        self._run(tasks, "module")
        distances = torch.zeros(len(candidates), everyone, dtype=torch.float64)
        counts = torch.zeros(everyone, dtype=torch.float64)
        for task in tasks:
            columns = list(task.adapters)
            distances[:, columns] += 1 - load_file(task.target)["held"]
            counts[columns] += 1
        return distances / counts.clamp(min=1)

    def _round(
        self, work: Path, keys: Sequence[ModuleKey], assignment: Assignment
    ) -> tuple[Tensor, Tensor]:
        """Errors and shares `[n, C]`, as `after_round` takes them."""
        clusters = tuple(
            assignment.members(cluster, active=True) for cluster in range(assignment.count)
        )
        tasks = [
            RoundTask(
                key=key,
                target=work / file_name("round", key, clusters),
                adapters=self.having(key),
                clusters=clusters,
            )
            for key in keys
        ]
        self._run(tasks, "module")
        errors = torch.zeros(len(self.facts), len(clusters), dtype=torch.float64)
        lost2, norm2 = torch.zeros_like(errors), torch.zeros(len(self.facts), 1).double()
        for task in tasks:
            rows, found = list(task.adapters), load_file(task.target)
            own = found["norm2"][:, None]
            # A module without an update loses nothing.
            errors[rows] += found["lost2"] / own.clamp(min=torch.finfo(own.dtype).tiny)
            lost2[rows] += found["lost2"]
            norm2[rows] += own
        shares = (lost2 / norm2.clamp(min=torch.finfo(norm2.dtype).tiny)).sqrt()
        for cluster, active in enumerate(clusters):
            if not active:
                errors[:, cluster] = shares[:, cluster] = torch.inf
        return errors, shares

    def _run(self, tasks: Iterable[Task], unit: str) -> None:
        self.staff.run(list(tasks), self.sources, self.options, unit)
