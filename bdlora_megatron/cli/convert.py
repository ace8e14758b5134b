"""`bdlora convert SRC...`: many adapters into another format, structure or type."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from bdlora_megatron.cli import output
from bdlora_megatron.cli.jobs import ConversionJob, JobResult
from bdlora_megatron.cli.pool import run_jobs
from bdlora_megatron.cli.progress import progress
from bdlora_megatron.cli.records import locked
from bdlora_megatron.cli.sources import (
    Source,
    add_reading_options,
    base_config,
    find_sources,
    opened,
)
from bdlora_megatron.convert.adapter.problems import brief_causes
from bdlora_megatron.convert.adapter.tables import format_bytes, format_table
from bdlora_megatron.convert.peft.options import check_ignorable
from bdlora_megatron.convert.pipeline import Conversion
from bdlora_megatron.convert.registry import FORMATS
from bdlora_megatron.convert.structure import (
    Choices,
    Structure,
    StructureMode,
    choices_for_tp,
    plot_choices,
)
from bdlora_megatron.convert.write_options import WriteOptions
from bdlora_megatron.errors import BDLoRAError, ConfigError, explain

__all__ = ["DTYPES", "add_parser", "check_apart", "run"]

#: Types of factors, by the names that options have.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="convert adapters, or say what each structure would cost",
        description="Convert adapters into another format, structure or type; or, with --for-tp, "
        "say what each structure would cost. A result appears complete or not at all, and is "
        "skipped when it is there already, made from the same files and options. "
        "Exit status: 0 all converted or reported, 1 some failed, 2 nothing was begun.",
    )
    add = parser.add_argument
    add(
        "sources",
        metavar="SRC",
        nargs="+",
        type=Path,
        help="an adapter's folder, or a folder of such folders",
    )
    add("--to", choices=list(FORMATS), help="the format to write")
    add("--out", metavar="DIR", type=Path, help="where to put the results, under the same names")
    add("--tp", metavar="P", type=int, help="tensor-parallel size to serve at")
    add(
        "--structure",
        choices=get_args(StructureMode),
        default="keep",
        help="keep ranks and blocks (default); exact: fit P ranks without loss; reshard: exactly P "
        "blocks without loss; truncate: fit P ranks at a smaller rank, with loss",
    )
    add("--rank", metavar="R", type=int, help="for truncate: the largest total rank")
    add(
        "--budget-of-rank",
        metavar="R",
        type=int,
        help="for truncate: no more parameters than a vanilla LoRA of this rank",
    )
    add("--dtype", choices=list(DTYPES), help="type of the factors (default: as they are)")
    add("--dense", action="store_true", help="write vanilla LoRA, with zeros between the blocks")
    add("--fused", action="store_true", help="bridge: one A for q, k, v and one for gate, up")
    add_reading_options(parser)
    add("--workers", metavar="N", type=int, help="processes (default: one per core)")
    add("--overwrite", action="store_true", help="replace adapters that are in the way")
    add("--for-tp", metavar="P", type=int, help="convert nothing: say what each choice costs")
    add("--plot", metavar="FILE.png", type=Path, help="with --for-tp: draw error against rank")
    add(
        "--tolerance",
        type=float,
        default=0.01,
        help="with --for-tp: relative error to recommend a truncation at (default: %(default)g)",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Convert, or report."""
    sources = find_sources(arguments.sources)
    if arguments.for_tp is not None:
        return _report(arguments, sources)
    conversion = _conversion(arguments)
    out = arguments.out
    check_apart(sources, out)
    workers = min(_workers(arguments.workers), len(sources))
    jobs = [
        ConversionJob(
            source=source.path,
            out=out,
            conversion=conversion,
            debug=arguments.debug,
            label=source.name,
        )
        for source in sources
    ]
    with locked(out):
        results = list(
            progress(
                run_jobs(jobs, workers=workers),
                total=len(jobs),
                told=lambda result: f"{result.name}: {result.status}",
            )
        )
    order = {job.name: number for number, job in enumerate(jobs)}
    results.sort(key=lambda result: order[result.name])
    output.result(
        _summary(results, out), [asdict(result) for result in results], as_json=arguments.json
    )
    return 1 if any(result.status == "failed" for result in results) else 0


def _report(arguments: argparse.Namespace, sources: list[Source]) -> int:
    if arguments.to or arguments.out:
        raise ConfigError("--for-tp converts nothing; leave --to and --out out, or --for-tp")
    if arguments.plot and len(sources) > 1:
        raise ConfigError(f"--plot draws one adapter, got {len(sources)}; pass one SRC")
    check_ignorable(arguments.ignore_unknown)
    reports: dict[str, Choices] = {}
    refused: dict[str, tuple[str, list[str]]] = {}
    for source in sources:
        try:
            with opened(source.path, arguments) as adapter:
                reports[source.name] = choices_for_tp(
                    adapter, arguments.for_tp, tolerance=arguments.tolerance
                )
        except (BDLoRAError, OSError) as error:
            refused[source.name] = (explain(error, source.path), brief_causes(error, source.path))
    data = [
        reports[source.name].to_dict()
        if source.name in reports
        else {"adapter": source.name, "refused": refused[source.name][0]}
        for source in sources
    ]
    output.result(_report_text(sources, reports, refused), data, as_json=arguments.json)
    if arguments.plot and reports:
        output.note(f"wrote {plot_choices(next(iter(reports.values())), arguments.plot)}")
    return 1 if refused else 0


def _report_text(
    sources: list[Source],
    reports: Mapping[str, Choices],
    refused: Mapping[str, tuple[str, list[str]]],
) -> str:
    """One adapter's report whole; of several the recommendation, and why others are refused."""
    if len(sources) == 1:
        return "".join(report.table() for report in reports.values()) + "".join(
            f"{name} refused: {why}" for name, (why, _) in refused.items()
        )
    rows = []
    for source in sources:
        report = reports.get(source.name)
        if report is None:
            rows.append((source.name, "refused", "", "", "", ""))
            continue
        choice = report.choice
        rows.append(
            (
                source.name,
                choice.name,
                str(choice.rank),
                format_bytes(choice.bytes_per_rank),
                f"{choice.error:.3g}",
                choice.options,
            )
        )
    header = ("adapter", "recommended", "rank", "size per rank", "relative error", "options")
    lines = [format_table(header, rows), ""]
    lines += [f"{name} refused: {why}" for name, (why, _) in refused.items()]
    if refused:
        lines += ["", output.cause_table([causes for _, causes in refused.values()])]
    return "\n".join([*lines, "", f"{len(reports)} reported, {len(refused)} refused"])


def _conversion(arguments: argparse.Namespace) -> Conversion:
    if arguments.to is None or arguments.out is None:
        raise ConfigError("convert needs --to FORMAT and --out DIR, or --for-tp P to report only")
    if arguments.plot:
        raise ConfigError("--plot goes with --for-tp, which reports and converts nothing")
    if arguments.structure != "keep" and arguments.tp is None:
        raise ConfigError(f"--structure {arguments.structure} needs --tp P, the ranks to fit")
    tp = 1 if arguments.tp is None else arguments.tp
    return Conversion(
        format=arguments.to,
        structure=Structure(
            mode=arguments.structure,
            num_blocks=tp,
            rank=arguments.rank,
            budget_of_rank=arguments.budget_of_rank,
        ),
        options=WriteOptions(
            tp=tp,
            dtype=DTYPES.get(arguments.dtype),
            overwrite=arguments.overwrite,
            dense=arguments.dense,
            fused=arguments.fused,
        ),
        base=None if arguments.base is None else base_config(arguments.base),
        base_folder=arguments.base,
        allow_pickle=arguments.allow_pickle,
        ignore_unknown=tuple(arguments.ignore_unknown),
    )


def check_apart(sources: list[Source], out: Path) -> None:
    """Keep results out of sources.

    Raises:
        ConfigError: If they would be written over or into one.
    """
    target = out.resolve()
    for source in sources:
        folder = source.path.resolve()
        if target / source.name == folder or target.is_relative_to(folder):
            raise ConfigError(
                f"--out {out} would put results over or into the source {source.path}; pass another"
            )


def _workers(wanted: int | None) -> int:
    if wanted is None:
        return os.cpu_count() or 1
    if wanted < 1:
        raise ConfigError(f"--workers {wanted}; wanted 1 or more")
    return wanted


def _summary(results: list[JobResult], out: Path) -> str:
    rows = []
    for result in results:
        summary = result.summary or {"modules": [], "bytes": 0, "error": 0.0}
        ranks = sorted({module["rank"] for module in summary["modules"]})
        failed = result.summary is None
        rows.append(
            (
                result.name,
                result.status,
                "" if failed else " ".join(map(str, ranks)),
                "" if failed else format_bytes(summary["bytes"]),
                "" if failed else f"{summary['error']:.3g}",
                f"{result.seconds:.2f} s",
            )
        )
    header = ("adapter", "status", "rank", "size", "relative error", "time")
    counts = Counter(result.status for result in results)
    said = output.told_of({result.name: result.warnings for result in results})
    said += [
        f"{result.name} acts from the invocation tokens {tokens} on"
        for result in results
        if (tokens := (result.summary or {}).get("invocation_tokens"))
    ]
    failures = [
        f"{result.name} failed: {result.error}" for result in results if result.error is not None
    ]
    tally = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    lines = [format_table(header, rows), "", *said, *failures]
    if len(failures) > 1:
        lines += ["", output.cause_table([r.causes for r in results if r.error is not None]), ""]
    return "\n".join([*lines, f"{tally}; results in {out}"])
