"""What the server that forks ranks imports once. No tensor operation runs in it."""

import atexit
import os
import signal
import warnings
from contextlib import suppress

from bdlora_megatron.runtime.launch import imported_for_forks

# Nothing here needs torch's tear-down, which takes a second.
atexit.register(os._exit, 0)
# What cannot be imported, each rank meets again, and says.
with warnings.catch_warnings(), imported_for_forks(), suppress(Exception):
    # Megatron-Core's, about Apex and Transformer Engine.
    warnings.simplefilter("ignore")
    import bdlora_megatron.serve.engine.rank  # noqa: F401
# The API server answers a SIGTERM to the whole process group: it drains, then ends the ranks. Set
# after torch's own handler, which prints a stack.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
