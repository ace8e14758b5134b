"""`bdlora serve` whose ranks have a slower link between them: each collective waits first.

    python -m benchmarks.slow_server 0.0005 --model DIR --tp 2 --cpu

The first argument is the wait in seconds, the others are those of `bdlora serve`.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from bdlora_megatron.serve.cli import add_parser, settings_of
from bdlora_megatron.serve.logs import configure_logging
from bdlora_megatron.serve.ranks import Ranks, enter_rank
from bdlora_megatron.serve.server import Server


def enter_slow_rank(latency_s: float, *args: Any) -> None:
    """One rank's process."""
    from bdlora_megatron.bench.latency import link_latency

    with link_latency(latency_s):
        enter_rank(*args)


def main() -> int:
    """Serve."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    settings = settings_of(parser.parse_args(["serve", *sys.argv[2:]]))
    configure_logging()
    enter = partial(enter_slow_rank, float(sys.argv[1]))
    server = Server(settings, partial(Ranks, enter=enter))
    print(f"listening on http://{settings.host}:{server.port}", file=sys.stderr)
    return server.run()


if __name__ == "__main__":
    sys.exit(main())
