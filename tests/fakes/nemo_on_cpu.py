"""What lets NeMo's own training loop run without CUDA; nothing in the package uses it."""

from __future__ import annotations


def prepare() -> None:
    """Patch torch and Megatron-Core for the CPU; once, before NeMo is imported."""
    from bdlora_megatron import runtime
    from tests.fakes.cuda_on_cpu import redirect

    runtime.enable_cpu()
    redirect()
