"""What the forkserver imports once, so that a rank does not. Imports only: no tensor is made."""

import importlib

from bdlora_megatron.runtime.launch import imported_for_forks

for _name in (
    "megatron.core.parallel_state",
    "megatron.core.models.gpt",
    "megatron.core.dist_checkpointing",
    "bdlora_megatron.layers",
    "bdlora_megatron.runtime",
    "bdlora_megatron.train.loop",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
):
    try:
        with imported_for_forks():
            importlib.import_module(_name)
    except ImportError:
        # The test that needs it fails by itself and says more than a dead forkserver would.
        continue
