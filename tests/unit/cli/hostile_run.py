"""Runs `bdlora` on hostile folders in little memory; started by `test_hostile`.

Reads a JSON list of argument lists on stdin, and writes for each: status, what was printed,
seconds, and by how many bytes the peak of resident memory rose.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import time

import torch

from bdlora_megatron.cli.main import main

_MORE_BYTES = 1 << 30


def _peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _address_space_bytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def run_all():
    # What torch sets up at its first use is not the hostile file's.
    torch.ones(8, 8).double().isfinite().all()
    limit = _address_space_bytes() + _MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    told = []
    for arguments in json.load(sys.stdin):
        printed = io.StringIO()
        start, before = time.monotonic(), _peak_bytes()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                status = main(arguments)
            except BaseException as error:
                status = f"{type(error).__name__}: {error}"
        told.append(
            {
                "status": status,
                "printed": printed.getvalue(),
                "seconds": time.monotonic() - start,
                "more_bytes": _peak_bytes() - before,
            }
        )
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    run_all()
