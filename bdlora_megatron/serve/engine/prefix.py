"""Names for the blocks of a prompt's key-value cache.

Keys and values depend on the adapter, and Megatron-Core names a block by its tokens and those
before it alone. The same chain of hashes begins here with who asks: the adapter and its version,
and the request's ``cache_salt``. A version's weights never change (``AdapterFiles`` refuses files
that do), and a number that a name once had never comes back, so no file need be read to tell
versions apart. Python's own ``hash`` would not do: it differs between ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy

from bdlora_megatron.serve.store_types import AdapterKey

__all__ = ["block_hashes", "seed_of"]

_NONE = bytes(32)


def seed_of(key: AdapterKey | None, salt: str | None) -> bytes:
    """Where the chain of a request's hashes begins.

    Args:
        key: The version that it runs on; None for the base model.
        salt: What it asks to be kept apart by.

    Returns:
        32 bytes: zeros, as in Megatron-Core, for the base model without a salt.
    """
    if key is None and salt is None:
        return _NONE
    who = [None, 0] if key is None else [key.name, key.version]
    return hashlib.sha256(json.dumps([*who, salt]).encode()).digest()


def block_hashes(tokens: Sequence[int], block_size: int, seed: bytes) -> list[int]:
    """The names of a prompt's whole blocks.

    Args:
        tokens: The prompt.
        block_size: Tokens of a block.
        seed: What ``seed_of`` gave.

    Returns:
        Numbers from 1 to 2**63 - 1.
    """
    hashes, digest = [], seed
    whole = len(tokens) // block_size * block_size
    content = numpy.asarray(tokens[:whole], dtype="<i8").tobytes()
    size = 8 * block_size
    for start in range(0, len(content), size):
        digest = hashlib.sha256(digest + content[start : start + size]).digest()
        hashes.append(int.from_bytes(digest[:8], "little") % (2**63 - 1) + 1)
    return hashes
