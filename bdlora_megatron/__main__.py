"""`python -m bdlora_megatron`, the same as the command `bdlora`."""

import sys

from bdlora_megatron.cli.main import main

sys.exit(main())
