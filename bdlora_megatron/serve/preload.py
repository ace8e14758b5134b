"""What the server that forks ranks imports once. No tensor operation runs in it."""

import signal
import warnings

# A SIGTERM to the whole process group is the front's to answer: it drains, then ends the ranks.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with warnings.catch_warnings():
    # Megatron-Core's, about Apex and Transformer Engine.
    warnings.simplefilter("ignore")
    import bdlora_megatron.serve.engine.rank  # noqa: F401
