"""The neutral adapter, which every format is read into and written from.

``neutral`` defines it, ``lazy`` reads one module at a time, ``problems`` collects what is wrong,
``invocation`` reads the tokens of Activated LoRA, ``compare`` says whether two compute the same,
``rows`` puts rows in a layer's order and back, ``scale`` and ``tables`` help formats and reports.
"""

from bdlora_megatron.convert.adapter.lazy import (
    LazyModules,
    in_memory,
    map_modules,
    module_facts,
)
from bdlora_megatron.convert.adapter.neutral import Adapter, BaseShape, ModuleKey

__all__ = [
    "Adapter",
    "BaseShape",
    "LazyModules",
    "ModuleKey",
    "in_memory",
    "map_modules",
    "module_facts",
]
