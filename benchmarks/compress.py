"""How long 1,000 adapters of Llama-3.1-8B's shapes take to compress, and in how much memory.

    python -m benchmarks.compress                      # a module of each size, ten minutes or so

Adapters of rank 16 are made as they are read: groups that share a space of 64 columns in every
module, with a little of their own beside it. One module of each size is compressed in a process of
its own, by one worker on one thread; a whole model is the sum over its modules and is extrapolated,
not run. Times of a module are of reading (and making) the adapters, finding clusters with it, and
fitting it for good. Clusters are found with 32 modules of a model, all modules are read and fitted.
Trained adapters have less in common: this measures time, memory and size, and errors only to show
that what was planted is found.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlora_megatron.bench.report import machine
from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.compress import CompressOptions, compress_adapters
from bdlora_megatron.convert import Adapter, LazyModules, ModuleKey
from bdlora_megatron.convert.adapter.neutral import blocked_factor, infer_base_shape
from bdlora_megatron.convert.adapter.tables import format_bytes, format_table

RESULTS = Path(__file__).parent / "results"
RANK, BASIS, NOISE, LAYERS, SAMPLED = 16, 64, 0.02, 32, 32
#: In and out features by projection, and how many modules of a layer stand behind it: o_proj is as
#: large as q_proj, v_proj as k_proj, up_proj and down_proj as gate_proj.
SHAPES = {
    "k_proj": (4096, 1024, 2),
    "q_proj": (4096, 4096, 2),
    "gate_proj": (4096, 14336, 3),
}
PHASES = ("read", "cluster", "fit")


@dataclass(frozen=True, kw_only=True)
class Planted:
    """An adapter of one module, made whenever it is read.

    Attributes:
        number: Tells it from the others.
        group: Whose space it lies in.
        module: The projection.
    """

    number: int
    group: int
    module: str

    @property
    def name(self) -> str:
        """Its name."""
        return f"adapter-{self.number:05}"

    @contextmanager
    def open(self) -> Iterator[Adapter]:
        """The adapter, made when its module is looked up."""
        wide, high, _ = SHAPES[self.module]
        key = ModuleKey(layer=0, name=self.module)
        settings = {"num_blocks": 1, "blocked": blocked_factor(self.module), "scale": 2.0}
        kind = {"dtype": torch.bfloat16, "device": "meta"}
        facts = BlockFactors(
            A=torch.empty(RANK, wide, **kind), B=torch.empty(high, RANK, **kind), **settings
        )

        def load(_: ModuleKey) -> BlockFactors:
            U, V = space(self.module, self.group)
            chance = torch.Generator().manual_seed(self.number)
            B = U @ torch.randn(BASIS, RANK, generator=chance)
            A = torch.randn(RANK, BASIS, generator=chance) @ V.t()
            # Columns of U have norm 1: a number of B is about the root of BASIS / high.
            B += NOISE * (BASIS / high) ** 0.5 * torch.randn(high, RANK, generator=chance)
            A += NOISE * (BASIS / wide) ** 0.5 * torch.randn(RANK, wide, generator=chance)
            return BlockFactors(A=A.bfloat16(), B=B.bfloat16(), **settings)

        yield Adapter(
            name=self.name,
            modules=LazyModules({key: facts}, load, subject="cannot make it"),
            base=infer_base_shape([(key, wide, high)]),
        )


@functools.lru_cache(maxsize=64)
def space(module: str, group: int) -> tuple[Tensor, Tensor]:
    """The space of a group in a module, `[O, 64]` and `[I, 64]`."""
    wide, high, _ = SHAPES[module]
    seed = int.from_bytes(hashlib.sha256(f"{module} {group}".encode()).digest()[:4], "little")
    chance = torch.Generator().manual_seed(seed)
    frames = (torch.linalg.qr(torch.randn(w, BASIS, generator=chance)).Q for w in (high, wide))
    U, V = frames
    return U, V


def measure(module: str, count: int, groups: int) -> dict[str, Any]:
    """Compress one module of all adapters in this process."""
    torch.set_num_threads(1)
    sources = [Planted(number=i, group=i % groups, module=module) for i in range(count)]
    stages: list[dict[str, float]] = []

    def show(results: Iterable[Any], _: int, __: str) -> Iterator[Any]:
        start, cpu = time.perf_counter(), time.process_time()
        yield from results
        stages.append(
            {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        )

    options = CompressOptions(rank=BASIS, clusters=groups)
    with tempfile.TemporaryDirectory() as folder:
        report = compress_adapters(sources, Path(folder) / "out", options, show=show)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors"))
    of = {adapter.name: adapter.cluster for adapter in report.adapters}
    pairs = Counter((of[source.name], source.group) for source in sources)
    errors = sorted(adapter.error or 0.0 for adapter in report.adapters)
    phases = {"read": stages[:1], "cluster": stages[1:-1], "fit": stages[-1:]}
    return {
        "module": module,
        **{
            f"{phase}_{unit}": sum(stage[unit] for stage in own)
            for phase, own in phases.items()
            for unit in ("seconds", "cpu_seconds")
        },
        "rounds": len(stages) - 3,
        "whole_seconds": report.seconds,
        "peak_bytes": report.peak_bytes,
        "bytes_before": report.bytes_before,
        "bytes_after": size,
        "error": [errors[0], errors[len(errors) // 2], errors[-1]],
        "groups_found": len(pairs) == groups == len(set(of.values())),
    }


def whole_model(rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """The sum over all modules of a model, of what was measured on one of each size."""
    per_layer = {row["module"]: SHAPES[row["module"]][2] for row in rows}
    modules = LAYERS * sum(per_layer.values())

    def total(field: str) -> float:
        return LAYERS * sum(row[field] * per_layer[row["module"]] for row in rows)

    cluster = total("cluster_cpu_seconds") * SAMPLED / modules
    hours = (total("read_cpu_seconds") + cluster + total("fit_cpu_seconds")) / 3600
    return {
        "adapters": count,
        "modules": modules,
        "cpu_hours": hours,
        "bytes_before": total("bytes_before"),
        "bytes_after": total("bytes_after"),
    }


def report(data: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        (
            f"{row['module']} ({SHAPES[row['module']][0]} to {SHAPES[row['module']][1]})",
            *(f"{row[f'{phase}_cpu_seconds']:.0f} s" for phase in PHASES),
            f"{row['whole_seconds']:.0f} s",
            format_bytes(row["peak_bytes"]),
            format_bytes(row["bytes_before"]),
            format_bytes(row["bytes_after"]),
            f"{row['error'][1]:.3f}",
            "all" if row["groups_found"] else "not all",
        )
        for row in data["modules"]
    ]
    header = ("module", "read", "clusters", "fit", "elapsed", "peak memory", "before", "after")
    header += ("median error", "groups found")
    facts = "\n".join(f"- {name}: {value}" for name, value in data["environment"].items())
    model = data["model"]
    before, after = (format_bytes(model[f"bytes_{when}"]) for when in ("before", "after"))
    return (
        "# Compression\n\n"
        f"{__doc__.partition('    python')[0].strip()} "
        f"{__doc__.partition('or so')[2].strip()}\n\n{facts}\n\n"
        f"## One module of {data['adapters']} adapters in {data['groups']} groups\n\n"
        "CPU seconds of one thread, but for *elapsed*, which has the waiting for cores that other "
        "processes used; peak memory is that of the whole process, with torch. Nothing is read "
        f"from a disk.\n\n```text\n{format_table(header, rows)}\n```\n\n"
        "## A whole model, extrapolated\n\n"
        f"{model['modules']} modules of {model['adapters']} adapters: {before} before, {after} "
        f"after, in about {model['cpu_hours']:.1f} CPU hours, which workers share; clusters are "
        f"found with {SAMPLED} modules. Each worker needs the memory of one module.\n"
    )


def main() -> None:
    """Run, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--module", choices=SHAPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.module:
        print(json.dumps(measure(arguments.module, arguments.adapters, arguments.groups)))
        return
    here = machine()
    rows = []
    options = ["--adapters", str(arguments.adapters), "--groups", str(arguments.groups)]
    for module in SHAPES:
        command = [sys.executable, "-m", "benchmarks.compress", "--module", module, *options]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    data = {
        "environment": {
            "command": " ".join(["python", "-m", "benchmarks.compress", *sys.argv[1:]]),
            "cpu": f"{here['processor']}, {here['cores']} cores",
            "load_average_after": round(os.getloadavg()[0], 2),
            "python": here["versions"]["Python"],
            **{name: here["versions"][name] for name in ("torch", "bdlora-megatron")},
        },
        "adapters": arguments.adapters,
        "groups": arguments.groups,
        "modules": rows,
        "model": whole_model(rows, arguments.adapters),
    }
    text = report(data)
    (RESULTS / "compress.json").write_text(json.dumps(data, indent=2) + "\n")
    (RESULTS / "compress.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
