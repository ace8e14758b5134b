"""Whether the installed release has an inference engine that is known here; imports nothing of it.

The command line asks before anything heavy is imported, so files are looked at, not modules.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bdlora_megatron.errors import UnsupportedError

__all__ = ["prefix_caching", "require_engine"]

#: A file of ``megatron.core.inference`` that came with the first release known here, 0.16.
_WANTED = "batch_dimensions_utils.py"
#: One that came with the prefix cache, in 0.17.
_SHARES_BLOCKS = "contexts/kv_block_allocator.py"


def require_engine() -> None:
    """See that Megatron-Core's dynamic inference engine is one that is known here.

    Raises:
        UnsupportedError: It is not, or there is no Megatron-Core.
    """
    if _has(_WANTED):
        return
    raise UnsupportedError(
        f"the inference engine of the installed release is not known here: found {_found()}, "
        "wanted 0.16 to 0.19; run pip install 'megatron-core>=0.16' to serve (converting and "
        "training work with 0.14 too)"
    )


def prefix_caching(wanted: bool | None) -> bool:
    """Whether an engine has a prefix cache.

    Args:
        wanted: What was asked for; None for one where the installed release has it.

    Raises:
        UnsupportedError: One was asked for, and the installed release has none.
    """
    has = _has(_SHARES_BLOCKS)
    if wanted and not has:
        raise UnsupportedError(
            f"enable_prefix_caching=true wants megatron-core 0.17 or later: found {_found()}; run "
            "pip install 'megatron-core>=0.17', or leave enable_prefix_caching out"
        )
    return has if wanted is None else wanted


def _found() -> str:
    try:
        return f"megatron-core {version('megatron-core')}"
    except PackageNotFoundError:
        return "no megatron-core by that name"


def _has(file: str) -> bool:
    """Whether the installed release's inference package has a file."""
    try:
        core = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return False
    folders = [] if core is None else core.submodule_search_locations or []
    return any(Path(folder, "inference", file).is_file() for folder in folders)
