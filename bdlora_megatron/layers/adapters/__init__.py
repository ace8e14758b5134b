"""The adapters of column- and row-parallel layers, in each of the three layouts.

An adapter is what a layer adds to its base product. It works in two steps, so that a layer can put
its base product between them: ``shrink`` maps the layer's input to the rank, ``expand`` maps that to
the layer's output and adds the base product.

Shapes: S sequence, b batch, I in, O out, R rank of one projection, K rank over all projections of
the layer, N blocks, P tensor-parallel ranks. Letters mean sizes over all ranks; a local size says
so by its division.

| layout | column A, B on a rank | row A, B on a rank | forward | backward |
|---|---|---|---|---|
| bdlora | ``[R/P, I]``, ``[O/P, R/N]`` | ``[R/P, I/N]``, ``[O, R/P]`` | none | none |
| slora | ``[R/P, I]``, ``[O/P, R]`` | ``[R, I/P]``, ``[O/P, R]`` | all-gather / all-reduce of K | reduce-scatter / all-reduce of K |
| half_sharded | ``[R, I]``, ``[O/P, R]`` | ``[R, I/P]``, ``[O, R]`` | none | all-reduce of the replicated factor's gradient |

A column layer multiplies each block of B by itself, straight into the base product's memory; where
query groups interleave the projections' rows on a rank, and in a row layer's A, the blocks are laid
out on a diagonal of zeros for one product.
"""  # noqa: E501

from bdlora_megatron.layers.adapters.base import Adapter, AdapterOptions, ProjectionPlan
from bdlora_megatron.layers.adapters.column import ColumnAdapter, column_adapter
from bdlora_megatron.layers.adapters.row import RowAdapter, row_adapter

__all__ = [
    "Adapter",
    "AdapterOptions",
    "ColumnAdapter",
    "ProjectionPlan",
    "RowAdapter",
    "column_adapter",
    "row_adapter",
]
