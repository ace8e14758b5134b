"""Block-diagonal LoRA for Megatron-Core: tensor-parallel adapters that add no communication.

Import what you need from the subpackages; this module imports none of them, so that the algebra and
the converters can be used where Megatron-Core is slow to import or of no use.
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("bdlora-megatron")
except PackageNotFoundError:
    # A source tree that was never installed.
    __version__ = "0+unknown"
