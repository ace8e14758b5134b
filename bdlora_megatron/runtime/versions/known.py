"""Whether the installed release has an inference engine that is known here; imports nothing of it.

The command line asks before anything heavy is imported, so files are looked at, not modules.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bdlora_megatron.errors import UnsupportedError

__all__ = ["require_engine"]

#: A file of ``megatron.core.inference`` that came with the first release known here, 0.16.
_WANTED = "batch_dimensions_utils.py"


def require_engine() -> None:
    """See that Megatron-Core's dynamic inference engine is one that is known here.

    Raises:
        UnsupportedError: It is not, or there is no Megatron-Core.
    """
    if _is_known():
        return
    try:
        found = f"megatron-core {version('megatron-core')}"
    except PackageNotFoundError:
        found = "no megatron-core by that name"
    raise UnsupportedError(
        f"the inference engine of the installed release is not known here: found {found}, wanted "
        "0.16 to 0.19; run pip install 'megatron-core>=0.16' to serve (converting and training "
        "work with 0.14 too)"
    )


def _is_known() -> bool:
    try:
        core = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return False
    folders = [] if core is None else core.submodule_search_locations or []
    return any(Path(folder, "inference", _WANTED).is_file() for folder in folders)
