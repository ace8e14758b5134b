"""Run the core on every release and write benchmarks/results/compatibility.{md,json}.

Run: `python -m tests.compat`, or with `--only 0.14.0` to bring one row up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.compat.environment import ROOT, Result, load_results, save_results, try_release
from tests.compat.releases import CORE, RELEASES, Release

OUT = ROOT / "benchmarks" / "results" / "compatibility"


def main() -> int:
    """Exit status: 0 where every release that was run passed whole."""
    arguments = _parse()
    chosen = [r for r in RELEASES if not arguments.only or r.version in arguments.only]
    kept = load_results(arguments.out.with_suffix(".json"))
    clean = True
    for release in chosen:
        print(f"megatron-core {release.version} ...", flush=True)
        result = try_release(release, arguments.cache, arguments.pytest)
        clean = clean and not (result.failures or result.problem)
        print(f"  {_verdict(result)} in {result.seconds:.0f} s", flush=True)
        # At once: the rows so far hold if a later release is interrupted.
        kept[release.version] = result
        _write(arguments.out, kept)
    print(arguments.out.with_suffix(".md"))
    return 0 if clean else 1


def _write(out: Path, kept: Mapping[str, Result]) -> None:
    rows = [(release, kept[release.version]) for release in RELEASES if release.version in kept]
    save_results(out.with_suffix(".json"), [result for _, result in rows])
    out.with_suffix(".md").write_text("\n".join(_report(rows)) + "\n", "utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    known = [release.version for release in RELEASES]
    parser.add_argument("--only", action="append", choices=known, help="this release; repeatable")
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / ".compat",
        help="where environments are kept, about 2 GB for each release (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="STEM", help="of the report")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    return parser.parse_args()


def _verdict(result: Result) -> str:
    if result.problem:
        return result.problem
    failed = len(result.failures)
    return f"{result.passed} passed, {failed} failed, {result.skipped} skipped"


def _report(results: Sequence[tuple[Release, Result]]) -> Iterator[str]:
    yield "# Compatibility with Megatron-Core"
    yield ""
    yield (
        "Made by `make compat` (`python -m tests.compat`), which makes one environment for each "
        f"release and runs there: `{' '.join(CORE)}`. On CPUs, with gloo."
    )
    yield ""
    columns = ("megatron-core", "Python", "torch", "numpy", "passed", "failed", "skipped")
    yield f"| {' | '.join(columns)} | commit, date | remarks |"
    yield "|---" * (len(columns) + 2) + "|"
    for release, result in results:
        versions = [result.versions.get(name, "") for name in ("python", "torch", "numpy")]
        counts = [result.passed, len(result.failures), result.skipped]
        cells = [result.version, *versions, *counts, f"{result.commit}, {result.date}"]
        yield f"| {' | '.join(map(str, cells))} | {_remarks(release, result)} |"
    for _, result in results:
        yield from _failures(result)


def _remarks(release: Release, result: Result) -> str:
    remarks = [result.problem, release.note]
    used = tuple(int(part) for part in result.versions.get("python", "").split(".")[:2] if part)
    if used and used < release.python:
        oldest = ".".join(map(str, release.python))
        remarks.append(f"says it wants Python {oldest}; installed with --ignore-requires-python")
    return "; ".join(filter(None, remarks))


def _failures(result: Result) -> Iterator[str]:
    if not result.failures:
        return
    yield ""
    yield f"## What fails on {result.version}"
    yield ""
    reasons = Counter(result.failures.values())
    for reason, count in reasons.most_common():
        example = next(name for name, why in result.failures.items() if why == reason)
        yield f"- {count} x `{reason}`, such as `{example}`"


if __name__ == "__main__":
    sys.exit(main())
