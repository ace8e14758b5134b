"""`bdlora compress ADAPTERS...`: many adapters in bases that they share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bdlora_megatron.cli import output
from bdlora_megatron.cli.convert import DTYPES, check_apart
from bdlora_megatron.cli.progress import progress
from bdlora_megatron.cli.sources import add_reading_options, base_config, find_sources
from bdlora_megatron.compress import CompressOptions, FolderSource, compress_adapters
from bdlora_megatron.compress.fit import CORES
from bdlora_megatron.compress.options import FORMS
from bdlora_megatron.convert.peft.options import check_ignorable

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compress",
        help="put a collection of adapters into bases that they share",
        description="Fit, module by module, bases that a cluster of adapters shares, and keep of "
        "each adapter a small core in them. The folder appears complete or not at all, and an "
        "interrupted run is taken up by the same command. `bdlora convert OUT/adapters/NAME --to "
        "peft` gives an ordinary adapter back.",
    )
    add = parser.add_argument
    add(
        "sources",
        metavar="ADAPTER",
        nargs="+",
        type=Path,
        help="an adapter's folder, of any format, or a folder of such folders",
    )
    add("--out", metavar="DIR", type=Path, required=True, help="the collection's new folder")
    add("--rank", metavar="K", type=int, required=True, help="columns of a basis")
    add(
        "--core",
        choices=CORES,
        default="full",
        help="an adapter's own share of a module: K x K numbers (default) or K",
    )
    add(
        "--form",
        choices=FORMS,
        default="shared",
        help="shared: a basis of the whole module (default); blocked: one of K / P for each "
        "tensor-parallel rank's slice",
    )
    add("--for-tp", metavar="P", type=int, help="for blocked: tensor-parallel size to serve at")
    add(
        "--clusters",
        metavar="C",
        type=int,
        default=1,
        help="the most clusters of adapters, each with bases of its own (default: %(default)s)",
    )
    add(
        "--cluster-modules",
        metavar="M",
        type=int,
        default=32,
        help="modules that clusters and outliers are found with; 0 for all (default: %(default)s)",
    )
    add(
        "--max-error",
        metavar="E",
        type=float,
        help="keep adapters whole that would lose more than this share of their norm",
    )
    add("--dtype", choices=list(DTYPES), help="type of bases and cores (default: the widest)")
    add_reading_options(parser)
    add("--workers", metavar="N", type=int, help="processes (default: one per core)")
    add("--overwrite", action="store_true", help="replace the collection that is in the way")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Compress and print what was lost and won."""
    options = CompressOptions(
        rank=arguments.rank,
        core=arguments.core,
        form=arguments.form,
        tp=arguments.for_tp,
        clusters=arguments.clusters,
        cluster_modules=arguments.cluster_modules,
        max_error=arguments.max_error,
        dtype=DTYPES.get(arguments.dtype),
    )
    check_ignorable(arguments.ignore_unknown)
    found = find_sources(arguments.sources)
    check_apart(found, arguments.out)
    base = None if arguments.base is None else base_config(arguments.base)
    sources = [
        FolderSource(
            name=source.name,
            path=source.path,
            base=base,
            base_folder=arguments.base,
            allow_pickle=arguments.allow_pickle,
            ignore_unknown=tuple(arguments.ignore_unknown),
        )
        for source in found
    ]
    workers = (os.cpu_count() or 1) if arguments.workers is None else arguments.workers
    report = compress_adapters(
        sources,
        arguments.out,
        options,
        workers=workers,
        overwrite=arguments.overwrite,
        show=_show,
    )
    text = f"{report.summary()}\nthe collection is in {arguments.out}; report.md has every adapter"
    output.result(text, report.to_dict(), as_json=arguments.json)
    return 0


def _show(results: Iterable[Any], total: int, unit: str) -> Iterable[Any]:
    return progress(results, total=total, unit=unit)
