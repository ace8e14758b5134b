"""The layouts' times that the documents speak of, with every default of `bdlora bench`.

Run: `python -m benchmarks.layouts`; options of `bdlora bench` may follow. Writes
benchmarks/results/layouts.{json,md,png}.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bdlora_megatron.cli.main import main

OUT = Path(__file__).parent / "results" / "layouts"

if __name__ == "__main__":
    sys.exit(main(["bench", "--out", str(OUT), *sys.argv[1:]]))
