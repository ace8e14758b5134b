"""`bdlora generate`: a file of requests answered without a server."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bdlora_megatron.errors import BDLoRAError, ConfigError
from bdlora_megatron.runtime.versions.known import require_engine
from bdlora_megatron.serve.cli import add_model_arguments, check_device, settings_of
from bdlora_megatron.serve.lines import json_line
from bdlora_megatron.serve.settings import ServeSettings

if TYPE_CHECKING:
    from bdlora_megatron.serve.front.state import Front

__all__ = ["add_parser", "run"]

_LOOK_S = 0.2
_STOP_S = 10.0
#: Lines that are read ahead, per request that can run at once.
_AHEAD = 4


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser.

    Args:
        commands: What `add_subparsers` returned.

    Returns:
        The command's own parser.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="answer a file of requests",
        description="Answer a file of requests. Each line of INPUT is the body of a request to "
        "/v1/completions, or, with `messages`, to /v1/chat/completions, in JSON; `model` names an "
        "adapter, or the base model where it is left out, and `custom_id` is copied. OUTPUT gets "
        "one line per request, in the same order, with the answer under `response` or what was "
        "wrong under `error`. Exit status: 0 all answered, 1 some not, 2 it could not begin.",
    )
    parser.add_argument("input", metavar="INPUT", type=Path, help="requests, JSON lines")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="answers, JSON lines")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is there")
    add_model_arguments(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Answer a file.

    Args:
        arguments: The parsed command line.

    Returns:
        The exit status.

    Raises:
        ConfigError: OUTPUT is there already or can't be written, or INPUT is not there.
    """
    require_engine()
    settings = settings_of(arguments)
    check_device(settings)
    if not arguments.input.is_file():
        raise ConfigError(f"{arguments.input} is no file; give one with a request on each line")
    if arguments.output.exists() and not arguments.overwrite:
        raise ConfigError(f"{arguments.output} is there already; --overwrite replaces it")
    # Beside it, so that OUTPUT is whole or not there.
    partial = arguments.output.with_name(arguments.output.name + ".partial")
    # Nobody is refused here: what waits is bounded by what is read ahead.
    settings = replace(settings, max_queue=2**31, request_timeout_s=10.0**9)
    try:
        with arguments.input.open() as lines, partial.open("w") as out:
            total = sum(1 for line in lines if line.strip())
            lines.seek(0)
            failed = asyncio.run(_answer_all(settings, lines, out, total))
        os.replace(partial, arguments.output)
    except OSError as error:
        raise ConfigError(
            f"{arguments.output} could not be written: {error}; mend that and begin again. The "
            f"answers so far are in {partial}"
        ) from error
    return 1 if failed else 0


async def _answer_all(settings: ServeSettings, lines: IO[str], out: IO[str], total: int) -> int:
    """Answer every line in order; returns how many failed."""
    from tqdm import tqdm

    failed = 0
    started: set[asyncio.Task[dict[str, Any]]] = set()
    ahead: asyncio.Queue[asyncio.Task[dict[str, Any]] | None] = asyncio.Queue(
        settings.max_num_seqs * _AHEAD
    )

    async def read(front: Front) -> None:
        for number, line in _numbered(lines):
            task = asyncio.create_task(_one(front, number, line))
            started.add(task)
            await ahead.put(task)
        await ahead.put(None)

    with tqdm(total=total, unit="request", file=sys.stderr) as bar:
        async with _running(settings) as front:
            reading = asyncio.create_task(read(front))
            try:
                while (task := await ahead.get()) is not None:
                    answer = await task
                    started.discard(task)
                    failed += "error" in answer
                    out.write(json_line(answer) + "\n")
                    out.flush()
                    bar.update()
            finally:
                for each in (reading, *started):
                    each.cancel()
                await asyncio.gather(reading, *started, return_exceptions=True)
    return failed


def _numbered(lines: IO[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line


async def _one(front: Front, number: int, line: str) -> dict[str, Any]:
    """One line of the output.

    Raises:
        ConfigError: Never; it becomes a line.
        EngineGoneError: The ranks have ended, and with them the whole run.
    """
    from pydantic import ValidationError

    from bdlora_megatron.serve.front.client import EngineGoneError
    from bdlora_megatron.serve.front.errors import APIError, as_api_error
    from bdlora_megatron.serve.front.generation import answer
    from bdlora_megatron.serve.front.openai import plan_body
    from bdlora_megatron.serve.front.schema import ChatRequest, CompletionRequest

    head: dict[str, Any] = {"line": number}
    try:
        body = json.loads(line)
        if not isinstance(body, dict):
            raise ConfigError("not a JSON object")
        if "custom_id" in body:
            head["custom_id"] = body.pop("custom_id")
        kind = ChatRequest if "messages" in body else CompletionRequest
        fields = kind.model_validate({"model": front.base_name, **body, "stream": False})
        form = plan_body(front, fields, front.resolve(fields.model, None))
        return {**head, "response": form.whole(await answer(front, form.job))}
    except EngineGoneError:
        raise
    except json.JSONDecodeError as error:
        return {**head, "error": {"message": f"not JSON: {error}"}}
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        return {**head, "error": {"message": problems}}
    except (APIError, BDLoRAError) as error:
        return {**head, **as_api_error(error).body}


@asynccontextmanager
async def _running(settings: ServeSettings) -> AsyncIterator[Front]:
    """Ranks for the length of a block; a rank that dies ends it.

    Raises:
        ConfigError: The ranks did not come up, or did not stay.
    """
    from bdlora_megatron.serve.front.client import EngineGoneError
    from bdlora_megatron.serve.front.state import Front
    from bdlora_megatron.serve.front.text import Tokenizer
    from bdlora_megatron.serve.ranks import Ranks

    front = Front(settings, Tokenizer(settings.model))
    ranks = await asyncio.to_thread(Ranks, settings)

    async def watch() -> None:
        while not ranks.dead:
            await asyncio.sleep(_LOOK_S)
        front.client.detach()

    watching = asyncio.create_task(watch())
    try:
        front.client.attach(ranks.link)
        await front.client.ready()
        yield front
    except EngineGoneError as error:
        raise ConfigError(f"a rank has ended ({ranks.dead}); its messages tell why") from error
    finally:
        watching.cancel()
        front.client.detach()
        await asyncio.to_thread(ranks.stop, timeout_s=_STOP_S)
