"""The server with and without its prefix cache: 64 adapters whose prompts begin alike.

Two servers of the same model and adapters run at the same time, one with the cache and one without,
and each load visits both in turn, in an order that changes. Arrivals and popularity are those of
``benchmarks.serving``; every prompt begins with one of a few system prompts, which all adapters
share, and which each of them has to read for itself.

    python -m benchmarks.prefix

Writes benchmarks/results/prefix.{md,json}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bdlora_megatron.bench.report import machine
from benchmarks.serving import OUT, Arrival, Server, load, load_parser, make_files, measure

_KIND = "bdlora"


def alike(args: argparse.Namespace, seed: int) -> list[Arrival]:
    """A load whose prompts begin with system prompts that are the same in every round."""
    rng = random.Random("systems")
    systems = [
        [rng.randrange(2, args.vocab) for _ in range(args.system)] for _ in range(args.systems)
    ]
    rng = random.Random(seed)
    return [
        replace(arrival, prompt=rng.choice(systems) + arrival.prompt)
        for arrival in load(args, args.rate, seed)
    ]


async def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rounds on both servers."""
    found = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        make_files(args, Path(name))
        servers = {}
        for cached in (False, True):
            setting = f"enable_prefix_caching={str(cached).lower()}"
            servers[cached] = stack.enter_context(Server(args, Path(name), _KIND, 0.0, setting))
            await servers[cached].wait_ready()
            await measure(servers[cached], _KIND, load(args, args.rate, -1)[:8])
        for round_ in range(args.rounds):
            arrivals = alike(args, round_)
            for cached in (True, False) if round_ % 2 else (False, True):
                result = await measure(servers[cached], _KIND, arrivals)
                found.append({"cached": cached, "round": round_, **result})
                print(
                    f"round {round_}, cache {cached}: {result['took_s']:.1f} s, "
                    f"{result['prefix_cache_hits']} of {result['prefix_cache_queries']} tokens",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    return found


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each round's numbers, of one server and the other."""
    rows = []
    for round_ in sorted({one["round"] for one in found}):
        row: dict[str, Any] = {"round": round_}
        for one in found:
            if one["round"] != round_:
                continue
            made = one["requests"]
            name = "on" if one["cached"] else "off"
            row[f"tokens_per_s_{name}"] = sum(r["tokens"] for r in made) / one["took_s"]
            row[f"first_token_p50_s_{name}"] = median(r["first_s"] for r in made)
            row[f"whole_answer_p50_s_{name}"] = median(r["total_s"] for r in made)
            if one["cached"]:
                row["requests"] = len(made)
                row["hit_rate"] = one["prefix_cache_hits"] / one["prefix_cache_queries"]
        rows.append(row)
    return rows


def ratio(rows: list[dict[str, Any]], name: str) -> list[float]:
    """On over off, round by round."""
    return sorted(row[f"{name}_on"] / row[f"{name}_off"] for row in rows)


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The numbers and a table."""
    command = shlex.join(["python", "-m", "benchmarks.prefix", *sys.argv[1:]])
    names = ("tokens_per_s", "first_token_p50_s", "whole_answer_p50_s")
    ratios = {name: ratio(rows, name) for name in names}
    about = {k: v for k, v in vars(args).items() if k not in {"out", "more"}}
    report = {
        "command": command,
        "machine": machine(),
        "settings": about,
        "rounds": rows,
        "on_over_off": {name: median(values) for name, values in ratios.items()},
        "hit_rate": median(row["hit_rate"] for row in rows),
    }
    (args.out / "prefix.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    lines = [
        "# With and without the prefix cache\n",
        f"`{command}`; {args.adapters} adapters (popularity i ** -{args.alpha:g}), "
        f"{args.slots} slots, TP={args.tp}, {args.systems} system prompts of {args.system} tokens, "
        f"then {args.prompt[0]} to {args.prompt[1]} tokens of their own, blocks of 16 tokens, "
        f"{args.rate:g} requests a second for {args.seconds:g} s a round. Medians over "
        f"{len(rows)} rounds, in brackets the lowest and the highest round.\n",
        "| | off | on | on / off |",
        "|---|---|---|---|",
    ]
    for name, told in zip(names, ("tokens/s", "first token, s", "whole answer, s"), strict=True):
        off, on = (median(row[f"{name}_{end}"] for row in rows) for end in ("off", "on"))
        values = ratios[name]
        spread = f"{median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"
        lines.append(f"| {told} | {off:.3g} | {on:.3g} | {spread} |")
    lines.append(f"\nOf the prompts' tokens, {report['hit_rate']:.0%} were found in the cache.\n")
    (args.out / "prefix.md").write_text("\n".join(lines), "utf-8")
    print("\n".join(lines))


def main() -> None:
    """Measure and write the report."""
    parser = load_parser(__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=float, default=24.0)
    parser.add_argument("--systems", type=int, default=2)
    parser.add_argument("--system", type=int, default=256, help="tokens of a system prompt")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=OUT.parent, metavar="DIR")
    args = parser.parse_args()
    write(args, summary(asyncio.run(run(args))))


if __name__ == "__main__":
    main()
