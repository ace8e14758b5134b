"""The tensors of a model folder, read slice by slice from its safetensors files."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bdlora_megatron.errors import ConfigError, UnsupportedError

__all__ = ["TensorFiles"]

FilesT = TypeVar("FilesT", bound="TensorFiles")

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class TensorFiles:
    """Open safetensors files of one model, as a context manager.

    The files are mapped into memory, and a slice that is asked for is the only thing copied out.

    Attributes:
        shapes: Shape of every tensor by name.
        files: The names of the files that hold them.

    Args:
        folder: The model's folder, with one ``model.safetensors`` or an index of several files.

    Raises:
        ConfigError: Files are missing or broken, or the index does not match them.
        UnsupportedError: The weights are no safetensors, or are quantised.
    """

    #: Types of tensors that are read.
    types: ClassVar[tuple[str, ...]] = ("F64", "F32", "F16", "BF16")

    shapes: dict[str, tuple[int, ...]]
    files: tuple[str, ...]

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._slices: dict[str, Any] = {}
        self._stack = ExitStack()
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        self.shapes = {name: tuple(part.get_shape()) for name, part in self._slices.items()}

    def __enter__(self: FilesT) -> FilesT:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A slice keeps its file open.
        self._slices.clear()
        self._stack.close()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, ``[stop - start, ...]``."""
        part: Tensor = self._slices[name][start:stop]
        return part

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns ``start`` to ``stop`` of a matrix, ``[rows, stop - start]``."""
        part: Tensor = self._slices[name][:, start:stop]
        return part

    def _open(self, stack: ExitStack) -> None:
        named = self._file_of_each()
        unread: dict[str, str] = {}
        problems = []
        self.files = tuple(sorted(set(named.values()))) if named else (_SINGLE,)
        for file in self.files:
            if Path(file).name != file:
                unread[file] = "the index names a file outside the folder"
                continue
            try:
                handle = stack.enter_context(safe_open(self._folder / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                unread[file] = str(error)
                continue
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                self._slices[name] = handle.get_slice(name)
                if named and named.get(name) != file:
                    problems.append(f"{name} is in {file}, the index says {named.get(name)}")
        problems += [f"{file} cannot be read: {why}" for file, why in unread.items()]
        problems += [
            f"{name} is not in {file}, where the index says it is"
            for name, file in named.items()
            if name not in self._slices and file not in unread
        ]
        if problems:
            raise ConfigError(
                f"the weights in {self._folder} are incomplete; download them again:"
                + "".join(f"\n- {line}" for line in problems)
            )
        quantised = {
            kind for part in self._slices.values() if (kind := part.get_dtype()) not in self.types
        }
        if quantised:
            raise UnsupportedError(
                f"{self._folder} holds tensors of type {', '.join(sorted(quantised))}; supported "
                f"are {', '.join(self.types)}: use the model's unquantised weights"
            )

    def _file_of_each(self) -> dict[str, str]:
        # Empty where there is a single file and so no index.
        index = self._folder / _INDEX
        if index.is_file():
            try:
                mapping: dict[str, str] = dict(json.loads(index.read_text("utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{index} is not an index of weights: {error!r}") from error
            return mapping
        if (self._folder / _SINGLE).is_file():
            return {}
        pickles = sorted(path.name for path in self._folder.glob("*.bin"))
        if pickles:
            raise UnsupportedError(
                f"{self._folder} holds {', '.join(pickles)} and no safetensors; a pickle can run "
                "code when it is read: save the model again with transformers' save_pretrained"
            )
        raise ConfigError(
            f"{self._folder} holds neither {_SINGLE} nor {_INDEX}; pass the folder of a downloaded "
            "Hugging Face model"
        )
