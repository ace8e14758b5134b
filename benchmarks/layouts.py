"""The layouts' times that the documents speak of, on two ranks with `bdlora bench`'s defaults.

Run: `python -m benchmarks.layouts`; options of `bdlora bench` may follow. Writes
benchmarks/results/layouts.{json,md,png}; with `--tp 3` or `--tp 4`, layouts-tp3 or layouts-tp4, of
fewer settings: with more ranks than cores a report shows how layouts compare, not how fast they
are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bdlora_megatron.cli.main import main

RESULTS = Path(__file__).parent / "results"
#: A rank of 12 divides by two, three and four ranks.
FEWER = (
    *("--lora-ranks", "12"),
    *("--decode", "1x128,8x128"),
    *("--mixed", "8x128"),
    *("--adapters", "1,8"),
    *("--prefill", "1x64"),
    *("--train", "1x64"),
    *("--latency-ms", "0,1"),
    *("--repeats", "5"),
)


def arguments(given: Sequence[str]) -> list[str]:
    """What `bdlora` is called with: the defaults for as many ranks, then what was given."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tp", type=int, default=2)
    tp = parser.parse_known_args(given)[0].tp
    name, chosen = ("layouts", ()) if tp == 2 else (f"layouts-tp{tp}", FEWER)
    return ["bench", "--out", str(RESULTS / name), *chosen, *given]


if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:])))
