"""The block-diagonal algebra: pure tensors, no process group, no Megatron.

`BlockFactors` holds one module's update `s * B A`; everything else here reads it or makes another.
Exact operations move, repeat or zero-fill numbers and never round them: `reshard`, `compact`,
`pad_rank`, `replicate`. One operation is lossy, and reports by how much: `truncate`.
"""

from bdlora_megatron.blocks.counts import ModuleShape, matching_rank, num_parameters, rank_within
from bdlora_megatron.blocks.factors import Blocked, BlockFactors, in_blocks, in_rows
from bdlora_megatron.blocks.finite import all_finite
from bdlora_megatron.blocks.norms import output_distances, output_norms, subtract, update_norm
from bdlora_megatron.blocks.reshard import compact, pad_rank, replicate, reshard, resharded_rank
from bdlora_megatron.blocks.truncate import singular_values, truncate

__all__ = [
    "BlockFactors",
    "Blocked",
    "ModuleShape",
    "all_finite",
    "compact",
    "in_blocks",
    "in_rows",
    "matching_rank",
    "num_parameters",
    "output_distances",
    "output_norms",
    "pad_rank",
    "rank_within",
    "replicate",
    "reshard",
    "resharded_rank",
    "singular_values",
    "subtract",
    "truncate",
    "update_norm",
]
