"""How fast adapters are converted, beside a plain copy of the same bytes.

    python -m benchmarks.conversion            # throughput, a few minutes
    python -m benchmarks.conversion --large    # and a Llama-3.1-70B-shaped adapter for TP=8

Every way runs once per round, in turn, so that a disturbance hits all of them; medians and ranges
are over rounds. Throughput is bytes of the source adapter per second, whatever is written. Files
lie in the page cache before and after: this measures the software, not the disk. Peak memory is
that of a process of its own, without what importing torch takes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bdlora_megatron.bench.report import machine
from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.cli.jobs import ConversionJob, run_job
from bdlora_megatron.convert import Adapter, LazyModules, ModuleKey, write_adapter
from bdlora_megatron.convert.adapter.neutral import MODULE_NAMES, blocked_factor
from bdlora_megatron.convert.adapter.tables import format_bytes, format_table
from bdlora_megatron.convert.pipeline import Conversion, convert_adapter
from bdlora_megatron.convert.registry import detect_format
from bdlora_megatron.convert.structure import Structure

RESULTS = Path(__file__).parent / "results"
RANK, TP = 64, 8
#: Decoder layers, hidden size, width of all key-value heads, width inside the MLP.
MODELS = {"Llama-3.1-8B": (32, 4096, 1024, 14336), "Llama-3.1-70B": (80, 8192, 1024, 28672)}
WEIGHTS = "adapter_model.safetensors"


#: Runs the command and tells the peak of its resident memory. What `wait4` tells of a child is no
#: less than its parent had when it was forked.
RUN_AND_TELL_PEAK = """
import sys
from pathlib import Path
from bdlora_megatron.cli.main import main
status = main(sys.argv[1:])
print(Path("/proc/self/status").read_text(), file=sys.stderr)
sys.exit(status)
"""


def shapes(model: str) -> dict[ModuleKey, tuple[int, int]]:
    """In and out features of every linear module, by the model's published sizes."""
    layers, hidden, key_value, ffn = MODELS[model]
    sides = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, key_value),
        "v_proj": (hidden, key_value),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, ffn),
        "up_proj": (hidden, ffn),
        "down_proj": (ffn, hidden),
    }
    return {
        ModuleKey(layer=layer, name=name): sides[name]
        for layer in range(layers)
        for name in MODULE_NAMES
    }


def make_adapter(model: str, path: Path) -> Path:
    """Write a vanilla adapter of random bfloat16 numbers, module by module."""
    sizes = shapes(model)

    def module(key: ModuleKey, device: str) -> BlockFactors:
        width_in, width_out = sizes[key]
        A = torch.empty(RANK, width_in, dtype=torch.bfloat16, device=device)
        B = torch.empty(width_out, RANK, dtype=torch.bfloat16, device=device)
        if device == "cpu":
            generator = torch.Generator().manual_seed(hash((key.layer, len(key.name))))
            A.normal_(generator=generator)
            B.normal_(generator=generator)
        return BlockFactors(A=A, B=B, num_blocks=1, blocked=blocked_factor(key.name), scale=2.0)

    facts = {key: module(key, "meta") for key in sorted(sizes)}
    modules = LazyModules(facts, lambda key: module(key, "cpu"), subject="cannot make it")
    return write_adapter(Adapter(name=path.name, modules=modules), path, "peft")


def plain_copy(source: Path, target: Path) -> None:
    """What anyone would write: load all tensors, save them again."""
    target.mkdir()
    save_file(load_file(source / WEIGHTS), target / WEIGHTS)


def converting(**settings: object) -> Callable[[Path, Path], None]:
    """A conversion, read and written as the command does."""
    conversion = Conversion(**settings)

    def run(source: Path, target: Path) -> None:
        convert_adapter(source, target, conversion)

    return run


def whole_job(source: Path, target: Path) -> None:
    """The same with the source hashed and the result recorded."""
    result = run_job(ConversionJob(source=source, out=target, conversion=Conversion(format="peft")))
    if result.status != "converted":
        raise RuntimeError(f"the conversion {result.status}: {result.error}")


EXACT = Structure(mode="exact", num_blocks=TP)
WAYS: dict[str, Callable[[Path, Path], None]] = {
    "plain safetensors load and save": plain_copy,
    "PEFT to PEFT": converting(format="peft"),
    "PEFT to PEFT, hashed and recorded": whole_job,
    "PEFT to Megatron": converting(format="megatron"),
    "PEFT to PEFT, exact blocks for TP=8": converting(format="peft", structure=EXACT),
}
LARGE = {
    "exact": ["--structure", "exact"],
    "truncate to rank 64": ["--structure", "truncate", "--rank", "64"],
    "truncate to equal parameters": ["--structure", "truncate", "--budget-of-rank", "64"],
}


def throughput(source: Path, scratch: Path, rounds: int) -> list[dict[str, object]]:
    """Every way in turn, `rounds` times and once before that to warm up."""
    size = (source / WEIGHTS).stat().st_size
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, way in WAYS.items():
            target = scratch / "result"
            start, cpu_start = time.perf_counter(), time.process_time()
            way(source, target)
            taken, cpu_taken = time.perf_counter() - start, time.process_time() - cpu_start
            shutil.rmtree(target)
            if number:
                seconds[name].append(taken)
                cpu_seconds[name].append(cpu_taken)
    plain = statistics.median(seconds["plain safetensors load and save"])
    return [
        {
            "way": name,
            "gb_per_s": size / statistics.median(taken) / 1e9,
            "gb_per_s_range": [size / max(taken) / 1e9, size / min(taken) / 1e9],
            "of_plain": plain / statistics.median(taken),
            "cpu_seconds": statistics.median(cpu_seconds[name]),
            "peak_bytes": peak_of_way(name, source, scratch),
        }
        for name, taken in seconds.items()
    ]


def peak_of_way(name: str, source: Path, scratch: Path) -> int:
    """Peak resident memory of one way in a process of its own, over that before it began."""
    target = scratch / "peak"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.conversion", "--peak", name, source, target],
        check=True,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(target)
    return int(done.stdout)


def print_peak(name: str, source: Path, target: Path) -> None:
    """The child's part of `peak_of_way`."""
    torch.set_num_threads(1)
    detect_format(source)
    # Peaks start anew where the kernel is told so; VmHWM is the peak of resident memory.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    WAYS[name](source, target)
    print(_status_bytes("VmHWM") - before)


def _status_bytes(field: str, status: str | None = None) -> int:
    lines = (status or Path("/proc/self/status").read_text()).splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def large(scratch: Path) -> dict[str, object]:
    """Convert a 70B-shaped adapter with the command; time and peak of that process."""
    start = time.perf_counter()
    source = make_adapter("Llama-3.1-70B", scratch / "llama-70b")
    made_s = time.perf_counter() - start
    size = (source / WEIGHTS).stat().st_size
    runs = []
    for name, options in LARGE.items():
        out = scratch / "out"
        command = ["-c", RUN_AND_TELL_PEAK, "convert", str(source), "--to", "peft", "--tp", "8"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command, *options, "--workers", "1", "--out", str(out), "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stdout}{done.stderr}")
        (result,) = json.loads(done.stdout)
        summary = result["summary"]
        runs.append(
            {
                "way": name,
                "rank": max(module["rank"] for module in summary["modules"]),
                "bytes": summary["bytes"],
                "error": summary["error"],
                "seconds": seconds,
                "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                "peak_bytes": _status_bytes("VmHWM", done.stderr),
            }
        )
        shutil.rmtree(out)
    return {"bytes": size, "made_s": made_s, "runs": runs}


def environment(rounds: int) -> dict[str, object]:
    """Where, with what and by which command the numbers came about."""
    here = machine()
    return {
        "command": " ".join(["python", "-m", "benchmarks.conversion", *sys.argv[1:]]),
        "cpu": f"{here['processor']}, {here['cores']} cores",
        "load_average_before": os.getloadavg()[0],
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "python": here["versions"]["Python"],
        "safetensors": version("safetensors"),
        **{name: here["versions"][name] for name in ("torch", "bdlora-megatron")},
    }


def report(data: dict) -> str:
    """The results as Markdown."""
    rows = [
        (
            entry["way"],
            f"{entry['gb_per_s']:.2f}",
            "{:.2f} to {:.2f}".format(*entry["gb_per_s_range"]),
            f"{entry['of_plain']:.2f}",
            f"{entry['cpu_seconds']:.2f} s",
            format_bytes(entry["peak_bytes"]),
        )
        for entry in data["throughput"]
    ]
    facts = "\n".join(f"- {name}: {value}" for name, value in data["environment"].items())
    size = format_bytes(data["bytes"])
    parts = [
        "# Conversion\n\n"
        f"{__doc__.partition('    python')[0].strip()} The adapter is vanilla, of rank {RANK} on "
        f"all seven modules of {data['model']}, {size} in bfloat16. Times are medians.\n\n"
        f"{facts}\n",
        f"## Throughput\n\n```text\n{_throughput_table(rows)}\n```\n",
    ]
    if "large" in data:
        parts.append(_large_report(data["large"]))
    return "\n".join(parts)


def _throughput_table(rows: list) -> str:
    return format_table(("way", "GB/s", "range", "of plain copy", "CPU time", "peak memory"), rows)


def _large_report(data: dict) -> str:
    rows = [
        (
            run["way"],
            str(run["rank"]),
            format_bytes(run["bytes"]),
            f"{run['error']:.3f}",
            f"{run['seconds']:.0f} s",
            f"{run['cpu_seconds']:.0f} s",
            format_bytes(run["peak_bytes"]),
        )
        for run in data["runs"]
    ]
    header = ("structure", "rank", "size", "relative error", "time", "CPU time", "peak memory")
    return (
        f"## Llama-3.1-70B for TP=8\n\nThe same for Llama-3.1-70B, {format_bytes(data['bytes'])}, "
        "converted by the command in one process. The numbers are random, so truncation loses as "
        "much as it ever can; peak memory is that of the whole process, with torch.\n\n"
        f"```text\n{format_table(header, rows)}\n```\n"
    )


def main() -> None:
    """Run, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large", action="store_true", help="also the 70B-shaped adapter, 10 GB")
    parser.add_argument("--scratch", type=Path, help="where to put files (default: a new folder)")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, source, target = arguments.peak
        print_peak(name, Path(source), Path(target))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        source = make_adapter("Llama-3.1-8B", scratch / "llama-8b")
        data = {
            "environment": environment(arguments.rounds),
            "model": "Llama-3.1-8B",
            "bytes": (source / WEIGHTS).stat().st_size,
            "throughput": throughput(source, scratch, arguments.rounds),
        }
        shutil.rmtree(source)
        if arguments.large:
            data["large"] = large(scratch)
    text = report(data)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "conversion.json").write_text(json.dumps(data, indent=2) + "\n")
    (RESULTS / "conversion.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
