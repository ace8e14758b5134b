"""Matplotlib, where a picture is asked for; it is an optional dependency."""

from __future__ import annotations

from typing import Any

from bdlora_megatron.errors import MissingDependencyError

__all__ = ["figure_class"]


def figure_class(cure: str = "pip install 'bdlora-megatron[plot]'") -> Any:
    """Matplotlib's figure.

    Args:
        cure: How to get it, or do without.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        # The figure alone, without pyplot's windows and global state.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"drawing needs matplotlib ({error}); install the extra: {cure}"
        ) from error
    return Figure
