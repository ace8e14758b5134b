"""The tensors of a PEFT adapter, from safetensors or, on request, from a pickle."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bdlora_megatron.errors import AdapterFormatError

__all__ = ["TensorSource", "open_tensors"]

SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSource:
    """Named tensors whose facts are known before any data is read.

    Attributes:
        facts: Every tensor by name, without data (on the meta device); None in place of a tensor
            whose type is no float.
        load: Read one tensor by name into memory of its own.
    """

    facts: Mapping[str, Tensor | None]
    load: Callable[[str], Tensor]


@contextmanager
def open_tensors(folder: Path, *, allow_pickle: bool) -> Iterator[TensorSource]:
    """Open an adapter's tensors; safetensors are mapped into memory while open.

    Args:
        folder: The adapter's folder.
        allow_pickle: Also read a pickle, where there are no safetensors.

    Yields:
        The tensors.

    Raises:
        AdapterFormatError: If there is no file to read, or it is broken.
    """
    safe, pickled = folder / SAFETENSORS_NAME, folder / PICKLE_NAME
    if safe.is_file():
        try:
            handle = safe_open(safe, framework="pt")
        except (OSError, SafetensorError) as error:
            raise AdapterFormatError(
                f"{safe} cannot be read: {error}; copy or save the adapter again"
            ) from error
        with handle:
            yield _safetensors_source(handle)
    elif not pickled.is_file():
        raise AdapterFormatError(
            f"{folder} holds no {SAFETENSORS_NAME}; "
            "pass a folder as PEFT's save_pretrained writes it"
        )
    elif not allow_pickle:
        raise AdapterFormatError(
            f"{folder} holds {PICKLE_NAME} and no {SAFETENSORS_NAME}; a pickle can run code when "
            "it is read: save the adapter again with a recent PEFT, or pass allow_pickle=True"
        )
    else:
        yield _pickle_source(pickled)


def _safetensors_source(handle: Any) -> TensorSource:
    facts: dict[str, Tensor | None] = {}
    for name in handle.keys():  # noqa: SIM118 - not a mapping
        part = handle.get_slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        shape = part.get_shape()
        facts[name] = None if dtype is None else torch.empty(shape, dtype=dtype, device="meta")

    def load(name: str) -> Tensor:
        # A copy: what stays mapped would change or crash with the file behind it.
        tensor: Tensor = handle.get_tensor(name)
        return tensor.clone()

    return TensorSource(facts=facts, load=load)


def _pickle_source(path: Path) -> TensorSource:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise AdapterFormatError(
            f"{path} cannot be read as tensors alone: {error}; "
            "save the adapter again as safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise AdapterFormatError(
            f"{path} holds more than named tensors; save the adapter again as safetensors"
        )
    facts = {
        name: tensor.to("meta") if tensor.dtype in _DTYPES.values() else None
        for name, tensor in tensors.items()
    }
    return TensorSource(facts=facts, load=lambda name: tensors[name].clone())
