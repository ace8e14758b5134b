"""One adapter's conversion, from looking whether it is done to recording that it is."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any, Literal, TypeAlias

from bdlora_megatron.cli.records import (
    Record,
    content_hash,
    listing,
    read_record,
    write_record,
)
from bdlora_megatron.convert.adapter.problems import brief_causes
from bdlora_megatron.convert.pipeline import Conversion, convert_adapter
from bdlora_megatron.errors import BDLoRAError, ConfigError, explain

__all__ = ["ConversionJob", "JobResult", "run_job"]

Status: TypeAlias = Literal["converted", "skipped", "failed"]
# A change of what a conversion writes must make old records void.
_VERSION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionJob:
    """One adapter to convert.

    Attributes:
        source: Its folder.
        out: The folder of all results.
        conversion: What to make.
        debug: Keep tracebacks of errors.
        label: The adapter's name where it is not the folder's.
    """

    source: Path
    out: Path
    conversion: Conversion
    debug: bool = False
    label: str | None = None

    @property
    def name(self) -> str:
        """The adapter's name, which its result has too."""
        return self.label or os.path.basename(os.path.abspath(self.source))

    @property
    def target(self) -> Path:
        """The result's folder."""
        return self.out / self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResult:
    """How a job went.

    Attributes:
        name: The adapter's name.
        status: Whether it was converted now, had been before, or could not be.
        seconds: Time taken.
        summary: The structure report as JSON takes it; None where it failed.
        error: What went wrong.
        warnings: What was said on the way.
        causes: `error` in few words, as it is counted over adapters.
    """

    name: str
    status: Status
    seconds: float
    summary: dict[str, Any] | None = None
    error: str | None = None
    warnings: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)


def run_job(job: ConversionJob) -> JobResult:
    """Convert one adapter, unless it is done. Never raises for what one adapter can cause."""
    start = time.monotonic()
    causes: list[str] = []
    with _kept_warnings() as warnings:
        try:
            status, summary, error = *_convert_once(job), None
        except (BDLoRAError, OSError) as caught:
            status, summary, error = "failed", None, _told(caught, job)
            causes = brief_causes(caught, job.source)
        except Exception as caught:  # one adapter must not stop the others, whatever it holds
            known = isinstance(caught, MemoryError) or "allocate memory" in str(caught)
            kind = "not enough memory" if known else f"internal error, {type(caught).__name__}"
            status, summary, error = "failed", None, f"{kind}: {_told(caught, job)}"
            causes = [kind]
    return JobResult(
        name=job.name,
        status=status,
        seconds=time.monotonic() - start,
        summary=summary,
        error=error,
        # The adapter's name stands beside them.
        warnings=[text.removeprefix(f"{job.source.resolve()}: ") for text in warnings],
        causes=causes,
    )


def _convert_once(job: ConversionJob) -> tuple[Status, dict[str, Any]]:
    request = _request(job.conversion)
    record = read_record(job.out, job.name)
    source = None
    if record is not None and record.holds_for(job.target):
        source = content_hash(job.source)
        if (record.source, record.request) == (source, request):
            return "skipped", record.summary
    conversion = _replacing(job, record)
    write_record(job.out, job.name, Record(source=None))
    stop = Event()
    try:
        # Hashing leaves the interpreter free, so another core does it meanwhile.
        with ThreadPoolExecutor(1) as threads:
            hashing = threads.submit(content_hash, job.source, stop=stop) if not source else None
            try:
                report = convert_adapter(job.source, job.target, conversion)
            except BaseException:
                stop.set()
                raise
            source = hashing.result() if hashing else source
    except BaseException:
        # The folder is as it was before, and so is its record.
        write_record(job.out, job.name, record)
        raise
    summary = report.to_dict()
    write_record(
        job.out,
        job.name,
        Record(source=source, request=request, files=listing(job.target), summary=summary),
    )
    return "converted", summary


def _replacing(job: ConversionJob, record: Record | None) -> Conversion:
    """Allow to replace what an unfinished run of ours left, or what the user said.

    Raises:
        ConfigError: If something else is in the way.
    """
    options = job.conversion.options
    if options.overwrite or not job.target.exists():
        return job.conversion
    if record is None or record.source is not None:
        raise ConfigError(
            f"{job.target} is there already and {_whose(job.target, record)}; "
            "pass --overwrite to replace it, or another --out"
        )
    # Killed between finishing the folder and recording it.
    return replace(job.conversion, options=replace(options, overwrite=True))


def _whose(target: Path, record: Record | None) -> str:
    if record is None:
        return "was not made by this command"
    if record.holds_for(target):
        return "was made from other files or with other options"
    return "was changed since it was made"


def _request(conversion: Conversion) -> dict[str, Any]:
    """All that decides the result, as JSON takes it and gives it back."""
    request = asdict(conversion)
    request["options"]["dtype"] = str(request["options"]["dtype"])
    del request["options"]["overwrite"]
    # Where copies of base weights were recognised; the result does not depend on it.
    del request["base_folder"], request["options"]["companions"]
    # Tuples come back from a record as lists.
    return dict(json.loads(json.dumps({**request, "version": _VERSION})))


def _told(error: BaseException, job: ConversionJob) -> str:
    if job.debug:
        return "".join(traceback.format_exception(error))
    return explain(error, job.target)


class _Keeper(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _kept_warnings() -> Iterator[list[str]]:
    """Keep what this package logs, to be told beside the adapter's name."""
    keeper, logger = _Keeper(), logging.getLogger("bdlora_megatron")
    propagate = logger.propagate
    logger.addHandler(keeper)
    logger.propagate = False
    try:
        yield keeper.messages
    finally:
        logger.removeHandler(keeper)
        logger.propagate = propagate
