"""What lets NeMo's own training loop run without CUDA; nothing in the package uses it."""

from __future__ import annotations

import importlib
import importlib.metadata

import torch


def prepare() -> None:
    """Patch torch and Megatron-Core for the CPU; once, before NeMo is imported."""
    from tests.fakes import cuda_on_cpu, transformer_engine

    transformer_engine.install()
    _answer_for_transformer_engine(transformer_engine.VERSION)
    from bdlora_megatron import runtime

    runtime.enable_cpu()
    cuda_on_cpu.redirect()
    timers = importlib.import_module("megatron.core.timers")
    # The first rank alone gathers an empty tensor from all; gloo waits for the others, not NCCL.
    timers.Timers.get_all_timers_string = lambda *args, **kwargs: None
    # Ranks count through it whether they all read the same data.
    torch.cuda.LongTensor = torch.LongTensor
    pl = importlib.import_module("nemo.lightning.io.pl")
    # What was read from a checkpoint is moved to the current CUDA device.
    pl._fix_tensors_device = lambda checkpoint: checkpoint


def _answer_for_transformer_engine(version: str) -> None:
    """NeMo reads Transformer Engine's version from the installed package; a stand-in has none."""
    of_package = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        version if name == "transformer-engine" else of_package(name)
    )
