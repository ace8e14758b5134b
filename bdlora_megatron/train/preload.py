"""What the server that forks ranks imports once. No tensor operation runs in it."""

import atexit
import os

# Nothing here needs torch's tear-down, which takes a second, or on a busy machine half a minute in
# which a launcher that is gone seems to have left something behind.
atexit.register(os._exit, 0)

from bdlora_megatron.runtime.launch import imported_for_forks  # noqa: E402

with imported_for_forks():
    import bdlora_megatron.train.loop  # noqa: F401
