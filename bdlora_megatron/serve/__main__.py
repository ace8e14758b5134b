"""`python -m bdlora_megatron.serve`, the same as `bdlora serve`."""

from __future__ import annotations

import argparse
import sys

from bdlora_megatron.errors import BDLoRAError
from bdlora_megatron.serve import cli


def main() -> int:
    """Run the command `serve` without the rest of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bdlora_megatron")
    commands = parser.add_subparsers(required=True)
    cli.add_parser(commands)
    try:
        return cli.run(parser.parse_args(["serve", *sys.argv[1:]]))
    except BDLoRAError as error:
        print(f"bdlora: error: {error}", file=sys.stderr)  # noqa: T201
        return 2


if __name__ == "__main__":
    sys.exit(main())
