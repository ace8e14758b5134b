"""Plain algebra that tests hold the package to; nothing in the package needs it."""

from tests.reference.partition import shard, unshard
from tests.reference.product import dense_update, forward

__all__ = ["dense_update", "forward", "shard", "unshard"]
