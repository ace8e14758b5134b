"""The grouped product: a batch whose tokens use different adapters, or none.

`GroupedBatch` describes a step once; `SlotFactors` says where a layer's adapters lie; `add_grouped`
adds what they make of the tokens to the base output, by the implementation that `choose` names.
`shrink` and `expand` are its halves, for layouts that communicate in between.
"""

from bdlora_megatron.ops.batch import GroupedBatch, Segment
from bdlora_megatron.ops.grouped import Implementation, add_grouped, choose, expand, shrink
from bdlora_megatron.ops.table import Columns, SlotFactors, SlotTable, SlotTables

__all__ = [
    "Columns",
    "GroupedBatch",
    "Implementation",
    "Segment",
    "SlotFactors",
    "SlotTable",
    "SlotTables",
    "add_grouped",
    "choose",
    "expand",
    "shrink",
]
