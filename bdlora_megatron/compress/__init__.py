"""Many adapters in bases that they share: `s_i B_i A_i ~ U S_i V^T`, module by module.

U and V belong to a cluster of adapters and only the small S_i to an adapter. The bases are fitted
through the factors alone; no update is ever formed. `read_collection` reads what is written.
"""

from bdlora_megatron.compress.driver import compress_adapters
from bdlora_megatron.compress.options import CompressOptions
from bdlora_megatron.compress.report import AdapterResult, ClusterResult, CompressReport
from bdlora_megatron.compress.sources import FolderSource, Source
from bdlora_megatron.convert.collection.reader import Collection, read_collection
from bdlora_megatron.convert.collection.tensors import LazyTensors, ModuleBasis

__all__ = [
    "AdapterResult",
    "ClusterResult",
    "Collection",
    "CompressOptions",
    "CompressReport",
    "FolderSource",
    "LazyTensors",
    "ModuleBasis",
    "Source",
    "compress_adapters",
    "read_collection",
]
