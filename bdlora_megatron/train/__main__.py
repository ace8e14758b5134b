"""``python -m bdlora_megatron.train CONFIG.yaml [key=value...]``."""

from __future__ import annotations

import argparse
import sys

from bdlora_megatron.errors import BDLoRAError
from bdlora_megatron.train import cli

_TROUBLE, _INTERRUPTED = 2, 130


def main() -> int:
    """Parse the arguments, run, and turn this package's errors into one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m bdlora_megatron.train", allow_abbrev=False)
    cli.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="end with the result as JSON")
    try:
        return cli.run(parser.parse_args())
    except BDLoRAError as error:
        sys.stderr.write(f"error: {error}\n")
        return _TROUBLE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the last checkpoint is kept\n")
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
