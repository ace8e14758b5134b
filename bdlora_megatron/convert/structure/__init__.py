"""Other ranks and block counts for a whole adapter, one module in memory at a time.

`restructure` gives the adapter another structure; `choices_for_tp` says what each would cost;
`plot_choices` draws the error against the rank.
"""

from bdlora_megatron.convert.structure.changes import ModuleChange, StructureReport
from bdlora_megatron.convert.structure.choices import Choices, ServingOption, choices_for_tp
from bdlora_megatron.convert.structure.plot import plot_choices
from bdlora_megatron.convert.structure.restructure import (
    Restructured,
    Structure,
    StructureMode,
    restructure,
)

__all__ = [
    "Choices",
    "ModuleChange",
    "Restructured",
    "ServingOption",
    "Structure",
    "StructureMode",
    "StructureReport",
    "choices_for_tp",
    "plot_choices",
    "restructure",
]
