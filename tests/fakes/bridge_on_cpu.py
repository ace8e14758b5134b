"""What lets Megatron-Bridge's own training loop run on a machine without CUDA.

For trying things out and for counting; nothing in the package uses it.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any


def _nothing(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


def prepare() -> None:
    """Make Bridge importable and runnable; once, before Megatron-Core is imported."""
    from tests.fakes import cuda_on_cpu, transformer_engine

    transformer_engine.install()
    from bdlora_megatron import runtime

    runtime.enable_cpu()
    cuda_on_cpu.redirect()
    setup = importlib.import_module("megatron.bridge.training.setup")
    setup.initialize_megatron = partial(setup.initialize_megatron, allow_no_cuda=True)
    setup.set_jit_fusion_options = _nothing
    initialize = importlib.import_module("megatron.bridge.training.initialize")
    # Megatron-Core's wheel brings the helpers compiled, and no makefile to compile them with.
    initialize.compile_helpers = _nothing
