"""The tensors of a PEFT adapter, from safetensors or, on request, from a pickle."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bdlora_megatron.convert.hints import file_hint, folder_hint, unreadable
from bdlora_megatron.convert.tensor_files import FLOATS, TensorSource, open_safetensors
from bdlora_megatron.errors import AdapterFormatError

__all__ = ["PICKLE_NAME", "SAFETENSORS_NAME", "open_tensors"]

SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


@contextmanager
def open_tensors(folder: Path, *, allow_pickle: bool) -> Iterator[TensorSource]:
    """Open an adapter's tensors.

    Args:
        folder: The adapter's folder.
        allow_pickle: Also read a pickle, where there are no safetensors.

    Raises:
        AdapterFormatError: If there is no file to read, or it is broken.
    """
    safe, pickled = folder / SAFETENSORS_NAME, folder / PICKLE_NAME
    if safe.is_file():
        with open_safetensors(safe) as source:
            yield source
    elif not pickled.is_file():
        hint = folder_hint(folder)
        why = f", {hint}" if hint else "; pass a folder as PEFT's save_pretrained writes it"
        raise AdapterFormatError(f"{folder} holds no {SAFETENSORS_NAME}{why}")
    elif not allow_pickle:
        hint = file_hint(pickled)
        why = f"it holds {PICKLE_NAME}, " + (
            hint
            or "and a pickle can run code when it is read; save the adapter again with a recent "
            "PEFT, or pass --allow-pickle (allow_pickle=True), which reads tensors alone"
        )
        raise AdapterFormatError(f"{folder} holds no {SAFETENSORS_NAME}, {why}")
    else:
        yield _pickle_source(pickled)


def _pickle_source(path: Path) -> TensorSource:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        why = unreadable(path, error, "save the adapter again as safetensors")
        raise AdapterFormatError(f"{path} cannot be read as tensors alone{why}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise AdapterFormatError(
            f"{path} holds more than named tensors; save the adapter again as safetensors"
        )
    facts = {
        name: tensor.to("meta") if tensor.dtype in FLOATS.values() else None
        for name, tensor in tensors.items()
    }
    types = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    return TensorSource(facts=facts, load=lambda name: tensors[name].clone(), types=types)
