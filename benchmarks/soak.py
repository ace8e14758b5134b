"""Ten thousand requests at TP=2 while adapters come and go; exits with 1 if one answer is wrong.

Prompts begin alike, and the prefix cache is on: blocks of one adapter must not serve another.

    python -m benchmarks.soak

Writes benchmarks/results/soak.json. The suite runs the same with 400 requests
(tests/serve/test_adapters.py).
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

import httpx2 as httpx

from bdlora_megatron.bench.report import machine
from tests.serve import models, servers
from tests.serve.conftest import SIZES
from tests.serve.soak import soak

OUT = Path(__file__).parent / "results" / "soak.json"


def main() -> int:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = models.make(Path(name))
        adapters = [f"{name}={folder / 'adapters' / name}" for name in models.ADAPTERS]
        with servers.RunningServer(
            folder, folder / "server.log", "--tp", str(args.tp), "--adapters", *adapters,
            "--set", *SIZES, f"adapter_dirs=[{folder / 'adapters'}]",
        ) as server, httpx.Client(base_url=server.url, timeout=60) as http:  # fmt: skip
            begun_s = time.monotonic()
            counts = soak(http, folder, args.requests)
            seconds = time.monotonic() - begun_s
            metrics = http.get("/metrics").text
            status = server.stop()
    counters = r"^bdlora_(slot_\w+|host_\w+|preemptions|prefix_cache_\w+)_total (\S+)"
    engine = {name: int(float(value)) for name, value in re.findall(counters, metrics, re.M)}
    looked_up = engine["prefix_cache_queries"]
    found = {
        "command": shlex.join(["python", "-m", "benchmarks.soak", *sys.argv[1:]]),
        "machine": machine(),
        "tp": args.tp,
        "requests": args.requests,
        **counts,
        "seconds": round(seconds, 1),
        "exit_status": status,
        "prefix_cache_hit_rate": round(engine["prefix_cache_hits"] / max(looked_up, 1), 3),
        "engine": engine,
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))
    return 1 if counts["wrong"] or status else 0


if __name__ == "__main__":
    sys.exit(main())
