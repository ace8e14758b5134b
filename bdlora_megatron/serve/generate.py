"""`bdlora generate`: a file of requests answered without a server."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.runtime.versions.known import require_engine
from bdlora_megatron.serve.cli import add_model_arguments, check_device, settings_of
from bdlora_megatron.serve.lines import json_line
from bdlora_megatron.serve.settings import ServeSettings

if TYPE_CHECKING:
    from bdlora_megatron.serve.api.schema import ChatRequest, CompletionRequest
    from bdlora_megatron.serve.api.state import APIServer

__all__ = ["add_parser", "run"]

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
#: A line being answered, and the fields of it that have no effect.
_Answering: TypeAlias = "asyncio.Task[tuple[dict[str, Any], tuple[str, ...]]]"

_LOOK_S = 0.2
_STOP_S = 10.0
#: Lines that are read ahead, per request that can run at once.
_AHEAD = 4


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="answer a file of requests",
        description="Answer a file of requests, in OpenAI's batch format: each line of INPUT has "
        "`custom_id`, `method`, `url` (/v1/completions or /v1/chat/completions) and `body`. A line "
        "may also be such a body alone. `model` names an adapter, or the base model where it is "
        "left out. OUTPUT gets one line per request, in the same order, with `custom_id` and the "
        "answer or refusal under `response`; where a line was no request, `error` tells why. Exit "
        "status: 0 all answered, 1 some not, 2 it could not begin.",
    )
    parser.add_argument("input", metavar="INPUT", type=Path, help="requests, JSON lines")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="answers, JSON lines")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is there")
    add_model_arguments(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Answer a file.

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
        # A byte-order mark is no part of the first line.
        with (
            arguments.input.open(encoding="utf-8-sig") as lines,
            partial.open("w", encoding="utf-8") as out,
        ):
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

    failed, without_effect = 0, Counter[str]()
    started: set[_Answering] = set()
    ahead: asyncio.Queue[_Answering | None] = asyncio.Queue(settings.max_num_seqs * _AHEAD)

    async def read(api: APIServer) -> None:
        for number, line in _numbered(lines):
            task = asyncio.create_task(_one(api, number, line))
            started.add(task)
            await ahead.put(task)
        await ahead.put(None)

    with tqdm(total=total, unit="request", file=sys.stderr) as bar:
        async with _running(settings) as api:
            reading = asyncio.create_task(read(api))
            try:
                while (task := await ahead.get()) is not None:
                    answer, ignored = await task
                    started.discard(task)
                    failed += (answer["response"] or {}).get("status_code") != 200
                    without_effect.update(ignored)
                    out.write(json_line(answer) + "\n")
                    out.flush()
                    bar.update()
            finally:
                for each in (reading, *started):
                    each.cancel()
                await asyncio.gather(reading, *started, return_exceptions=True)
        if without_effect:
            told = ", ".join(f"{name} (lines: {n})" for name, n in without_effect.items())
            bar.write(f"bdlora: fields without effect: {ascii(told)[1:-1]}", file=sys.stderr)
    return failed


def _numbered(lines: IO[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line


async def _one(api: APIServer, number: int, line: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """One line of the output, and the fields of the request that have no effect.

    Raises:
        ConfigError: Never; it becomes a line.
        EngineGoneError: The ranks have ended, and with them the whole run.
    """
    from bdlora_megatron.serve.api.client import EngineGoneError
    from bdlora_megatron.serve.api.errors import as_api_error
    from bdlora_megatron.serve.api.generation import answer
    from bdlora_megatron.serve.api.openai import plan_body

    head: dict[str, Any] = {"id": f"batch_req_{number}", "custom_id": None}
    try:
        asked = json.loads(line)
        if not isinstance(asked, dict):
            raise ConfigError("not a JSON object")
        head["custom_id"] = asked.pop("custom_id", None)
        url, body = _url_and_body(asked)
    except ValueError as error:
        wrong = {"code": "invalid_json_line", "message": f"line {number}: {error}"}
        return {**head, "response": None, "error": wrong}, ()
    ignored: tuple[str, ...] = ()
    try:
        if body.get("stream"):
            raise ConfigError("stream=true, and a file has no streams; leave it out")
        fields = _kind(url).model_validate({"model": api.base_name, **body})
        reply = plan_body(api, fields, api.resolve(fields.model, None))
        status, made = 200, reply.whole(await answer(api, reply.job))
        ignored = reply.ignored
    except EngineGoneError:
        raise
    except Exception as error:
        # Whatever it was, the other lines have theirs.
        refusal = as_api_error(error)
        status, made = refusal.status, refusal.body
    response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": made}
    return {**head, "response": response, "error": None}, ignored


def _url_and_body(asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a line's request would be sent, and what.

    Raises:
        ConfigError: It has parts of OpenAI's batch format, and not all.
    """
    if "body" not in asked:
        return (_CHAT if "messages" in asked else _TEXT), asked
    url, method = asked.get("url"), asked.get("method", "POST")
    if url not in (_CHAT, _TEXT) or method != "POST":
        raise ConfigError(f"{method} {url!r}; wanted POST to {_CHAT} or {_TEXT}")
    if not isinstance(asked["body"], dict):
        raise ConfigError("body is no JSON object")
    return url, asked["body"]


def _kind(url: str) -> type[ChatRequest] | type[CompletionRequest]:
    from bdlora_megatron.serve.api.schema import ChatRequest, CompletionRequest

    return ChatRequest if url == _CHAT else CompletionRequest


@asynccontextmanager
async def _running(settings: ServeSettings) -> AsyncIterator[APIServer]:
    """Ranks for the length of a block; a rank that dies ends it.

    Raises:
        ConfigError: The ranks did not come up, or did not stay.
    """
    from bdlora_megatron.serve.api.client import EngineGoneError
    from bdlora_megatron.serve.api.state import APIServer
    from bdlora_megatron.serve.api.text import Tokenizer
    from bdlora_megatron.serve.ranks import Ranks

    api = APIServer(settings, Tokenizer(settings.model))
    ranks = await asyncio.to_thread(Ranks, settings)

    async def watch() -> None:
        while not ranks.dead:
            await asyncio.sleep(_LOOK_S)
        api.client.detach()

    watching = asyncio.create_task(watch())
    try:
        api.client.attach(ranks.link)
        await api.come_up()
        yield api
    except EngineGoneError as error:
        raise ConfigError(f"a rank has ended ({ranks.dead}); its messages tell why") from error
    finally:
        watching.cancel()
        api.client.detach()
        await asyncio.to_thread(ranks.stop, timeout_s=_STOP_S)
