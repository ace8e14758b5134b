"""Base models whose files are in FP8, dequantised slice by slice while they are loaded.

| published by | `quant_method` | scales |
|---|---|---|
| DeepSeek, Qwen | `fp8` with `weight_block_size` | `weight_scale_inv`, one for each block |
| AutoFP8 | `fp8` | `weight_scale`, one for the tensor |
| Llama by llm-compressor | `compressed-tensors` | `weight_scale` of the tensor, each row or block |
| Llama (Meta) | `fbgemm_fp8` | `weight_scale`, one for each row |

A weight is its number times its scale, whatever the scale is called.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from bdlora_megatron.errors import ShapeError
from bdlora_megatron.models.config import HFConfig
from bdlora_megatron.models.files import TensorFiles

__all__ = ["FP8Files", "open_weights"]

FP8 = "F8_E4M3"
_SCALES = ("_scale_inv", "_scale")
# Of activations and of the key-value cache, neither of which is quantised here.
_OTHER_SCALES = re.compile(
    r"\.(input_scale|input_scale_ub|activation_scale|output_scale|k_scale|v_scale|kv_scale|q_scale)$"
)


def open_weights(folder: str | Path, hf: HFConfig) -> TensorFiles:
    """A model's weights as its layers take them.

    Args:
        folder: The model's folder.
        hf: Its facts.

    Returns:
        The open files; ``FP8Files`` where the config says so.
    """
    return TensorFiles(folder) if hf.fp8_block is None else FP8Files(folder, hf.fp8_block)


class FP8Files(TensorFiles):
    """A model's files whose FP8 weights come out multiplied by their scales, in float32.

    The scales are no tensors of the model: ``shapes`` leaves them out.

    Attributes:
        summary: What is done with them, for people.
    """

    types = (*TensorFiles.types, FP8)

    def __init__(self, folder: str | Path, block: tuple[int, int]) -> None:
        """Open the files.

        Args:
            folder: As for ``TensorFiles``.
            block: Rows and columns of a block, as ``read_quantization`` gives them.

        Raises:
            ShapeError: A weight has no scale, or one of another shape. All are listed.
        """
        super().__init__(folder)
        self._block = block
        self._scale_of: dict[str, str] = {}
        problems = []
        for name, part in self._slices.items():
            if part.get_dtype() != FP8:
                continue
            scale = next((name + end for end in _SCALES if name + end in self.shapes), None)
            if scale is None:
                problems.append(f"{name} is FP8 and has no {name}{_SCALES[1]} or {_SCALES[0]}")
            elif not self._fits(self.shapes[name], self.shapes[scale]):
                problems.append(
                    f"{scale} is {list(self.shapes[scale])}; for {name} {list(self.shapes[name])} "
                    f"one number, one for each row, or one for each block of {list(block)} was "
                    "expected"
                )
            else:
                self._scale_of[name] = scale
        if problems:
            raise ShapeError(
                f"the FP8 weights in {folder} do not fit their scales; download the model again:"
                + "".join(f"\n- {line}" for line in problems)
            )
        unused = [name for name in self.shapes if _OTHER_SCALES.search(name)]
        for name in (*self._scale_of.values(), *unused):
            self.shapes.pop(name, None)
        self.summary = (
            f"{len(self._scale_of)} weights of {folder} are FP8 (E4M3) and are dequantised while "
            f"they are loaded; activations and cache are not quantised, and {len(unused)} scales "
            "for them are not used"
        )

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, ``[stop - start, ...]``."""
        part = super().rows(name, start, stop)
        if name not in self._scale_of:
            return part
        return part.float() * self._scale(name, slice(start, stop), slice(0, part.shape[1]))

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns ``start`` to ``stop`` of a matrix, ``[rows, stop - start]``."""
        part = super().columns(name, start, stop)
        if name not in self._scale_of:
            return part
        return part.float() * self._scale(name, slice(0, part.shape[0]), slice(start, stop))

    def _fits(self, weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
        if len(weight) != 2:
            return False
        if scale in ((), (1,), (1, 1), (weight[0],), (weight[0], 1)):
            return True
        blocks = [
            -(-size // max(block, 1)) for size, block in zip(weight, self._block, strict=True)
        ]
        return self._block != (0, 0) and scale == tuple(blocks)

    def _scale(self, name: str, rows: slice, columns: slice) -> Tensor:
        """The scale of each of these numbers, or what broadcasts to it."""
        scale: Tensor = self._slices[self._scale_of[name]][...].float()
        height, _ = self.shapes[name]
        if scale.numel() == 1:
            return scale.reshape(1, 1)
        if scale.numel() == height and scale.shape[0] == height:
            return scale.reshape(height, 1)[rows]
        down = torch.arange(rows.start, rows.stop) // self._block[0]
        across = torch.arange(columns.start, columns.stop) // self._block[1]
        return scale[down][:, across]
