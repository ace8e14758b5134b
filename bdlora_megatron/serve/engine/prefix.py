"""Names for the blocks of a prompt's key-value cache.

Keys and values depend on the adapter, and Megatron-Core names a block by its tokens and those
before it alone. The same chain of hashes begins here with who asks: the adapter and its version,
and the request's ``cache_salt``. A version's weights never change (``AdapterFiles`` refuses files
that do), and a number that a name once had never comes back, so no file need be read to tell
versions apart. Python's own ``hash`` would not do: it differs between ranks.

An Activated LoRA's request asks for the base model's blocks up to where its adapter begins to act,
and for the adapter's own from there on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from bdlora_megatron.serve.store_types import AdapterKey

__all__ = ["Names", "block_hashes", "names_of", "seed_of"]

_NONE = bytes(32)


@dataclass(frozen=True, slots=True)
class Names:
    """How a request's blocks are named.

    Attributes:
        seed: Where the chain of hashes begins.
        first: The position from which its adapter acts.
        turn: Goes into the name of the block that holds this position, and so into all behind it;
            empty where ``seed`` tells who asks.
    """

    seed: bytes
    first: int = 0
    turn: bytes = b""


def names_of(key: AdapterKey | None, salt: str | None, first: int) -> Names:
    """How the blocks of a request are named.

    Args:
        key: The version that it runs on; None for the base model.
        salt: What it asks to be kept apart by.
        first: The position from which the version acts; 0 for all but Activated LoRA.
    """
    if key is None or not first:
        return Names(seed_of(key, salt))
    # The same tokens up to a block's end may stand before two beginnings: the last occurrence of
    # the invocation may run over that end.
    who = json.dumps([key.name, key.version, salt, first])
    return Names(seed_of(None, salt), first, hashlib.sha256(who.encode()).digest())


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


def block_hashes(tokens: Sequence[int], block_size: int, names: Names) -> list[int]:
    """The names of a prompt's whole blocks.

    Args:
        tokens: The prompt.
        block_size: Tokens of a block.
        names: What ``names_of`` gave.

    Returns:
        Numbers from 1 to 2**63 - 1.
    """
    hashes, digest = [], names.seed
    whole = len(tokens) // block_size * block_size
    content = numpy.asarray(tokens[:whole], dtype="<i8").tobytes()
    size = 8 * block_size
    for start in range(0, len(content), size):
        if names.turn and start // size == names.first // block_size:
            digest = hashlib.sha256(digest + names.turn).digest()
        digest = hashlib.sha256(digest + content[start : start + size]).digest()
        hashes.append(int.from_bytes(digest[:8], "little") % (2**63 - 1) + 1)
    return hashes
