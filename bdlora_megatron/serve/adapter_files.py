"""Reading an adapter's folder time and again, and never two versions of it."""

from __future__ import annotations

import logging
from pathlib import Path

from bdlora_megatron.convert import Adapter
from bdlora_megatron.convert.adapter import BaseShape
from bdlora_megatron.convert.registry import read_adapter
from bdlora_megatron.errors import AdapterFormatError
from bdlora_megatron.serve.files import Fingerprint, fingerprint

__all__ = ["AdapterFiles"]

logger = logging.getLogger(__name__)


class AdapterFiles:
    """A folder whose files are read as long as they are those that they were at first.

    A version is read again whenever it comes back from disk, and all of its requests must get the
    same weights.
    """

    def __init__(self, folder: Path, name: str, base: BaseShape | None = None) -> None:
        """Note what the files are like.

        What is wrong with the folder is told when it is read: registering an adapter must not fail
        on one rank alone.
        """
        self._folder = folder
        self._base = base
        self._name = name
        self._seen: Fingerprint | None = None
        self._problem = ""
        try:
            self._seen = fingerprint(folder)
        except (AdapterFormatError, OSError) as error:
            self._problem = f"{error}, or was not when it was registered; load it again"
            logger.warning("adapter %r will be refused until it is loaded again: %s", name, error)

    def read(self) -> Adapter:
        """The adapter; its modules may be read when they are looked up.

        Raises:
            AdapterFormatError: The files have changed, or can't be read.
        """
        self.check()
        return read_adapter(self._folder, base=self._base)

    def check(self) -> None:
        """See that the files are what they were.

        Raises:
            AdapterFormatError: They are not.
        """
        if self._seen is None:
            raise AdapterFormatError(self._problem)
        if fingerprint(self._folder) != self._seen:
            raise AdapterFormatError(
                f"the files of adapter {self._name!r} have changed since it was loaded or "
                "registered; put them back with the times that they had, or load it again to "
                "serve what is there now"
            )
