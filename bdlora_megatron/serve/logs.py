"""Structured logs: one JSON object a line, on stderr."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
import warnings

__all__ = ["JSONLines", "configure_logging"]

_OWN = set(vars(logging.makeLogRecord({})))


class JSONLines(logging.Formatter):
    """A log record as one line of JSON; what is passed as ``extra`` becomes fields."""

    def __init__(self, rank: int | None = None) -> None:
        """Make a formatter.

        Args:
            rank: Which rank's process this is; None for the API server.
        """
        super().__init__()
        self._where = "api" if rank is None else f"rank {rank}"

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "from": self._where,
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _OWN},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(*, rank: int | None = None, level: int = logging.INFO) -> None:
    """Send this process's logs to stderr.

    Args:
        rank: Which rank's process this is; None for the API server.
        level: Of this package's messages; others' are shown from WARNING on.
    """
    _unbuffer()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines(rank))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("bdlora_megatron").setLevel(level)
    logging.captureWarnings(True)
    # Theirs, about settings that are not ours to change, at every start.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")


def _unbuffer() -> None:
    """Keep nothing back that could not be written.

    On a full disk it would stay in the streams' buffers, which a process flushes before it starts
    another one: the ranks could not be started.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):
            raw = open(number, "wb", buffering=0, closefd=False)  # noqa: SIM115
            stream = io.TextIOWrapper(raw, "utf-8", errors="backslashreplace", write_through=True)
            setattr(sys, name, stream)
