"""The API server's end of the link to the ranks."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from multiprocessing.connection import Connection
from typing import Any

from bdlora_megatron.errors import BDLoRAError
from bdlora_megatron.serve.messages import (
    AdapterResult,
    Cancel,
    Command,
    Failed,
    LoadAdapter,
    Places,
    Ready,
    Sampling,
    Snapshot,
    StepReport,
    Submit,
    Token,
    UnloadAdapter,
    Vocabulary,
)

__all__ = ["EngineClient", "EngineGoneError", "RequestFailedError"]

logger = logging.getLogger(__name__)


class EngineGoneError(BDLoRAError):
    """The ranks have ended, or have not come up yet."""


class RequestFailedError(BDLoRAError):
    """The engine can't answer a request.

    Attributes:
        kind: The class of the engine's error.
    """

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.kind = kind


class EngineClient:
    """Requests to the ranks and what comes back, for one event loop.

    Attributes:
        snapshot: The engine after its last step.
        places: Where adapters are, up to half a second ago.
        outstanding: Requests that have not ended, by adapter; None stands for the base model.
    """

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self.places = Places()
        self.outstanding: Counter[str | None] = Counter()
        self._link: Connection | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._taught: set[str] = set()
        self._numbers = itertools.count(1)
        self._streams: dict[int, asyncio.Queue[Token | Failed | None]] = {}
        self._answers: dict[int, asyncio.Future[AdapterResult]] = {}

    def attach(self, link: Connection) -> None:
        """Take up a link to rank 0; called in the event loop."""
        loop = asyncio.get_running_loop()
        self._link = link
        self._taught.clear()
        self._ready = loop.create_future()
        loop.add_reader(link.fileno(), self._read)

    def detach(self) -> None:
        """Let go of the link; everything that waits on it fails."""
        if self._link is None:
            return
        asyncio.get_running_loop().remove_reader(self._link.fileno())
        self._link = None
        gone = EngineGoneError("the engine has ended; try again later")
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(gone)
            self._ready.exception()
        for stream in self._streams.values():
            stream.put_nowait(None)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(gone)
        self.snapshot, self.places = Snapshot(), Places()

    async def ready(self) -> Ready:
        """Wait until the model is loaded.

        Raises:
            EngineGoneError: The ranks ended first.
        """
        if self._ready is None:
            raise EngineGoneError("the engine has not been started")
        return await asyncio.shield(self._ready)

    @property
    def has_ended(self) -> bool:
        """Whether there were ranks and are none any more; not while they start."""
        return self._ready is not None and self._link is None

    @property
    def is_ready(self) -> bool:
        """Whether requests can be sent."""
        ready = self._ready
        return (
            self._link is not None
            and ready is not None
            and ready.done()
            and ready.exception() is None
        )

    @property
    def total_outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def stream(
        self,
        prompt: tuple[int, ...],
        sampling: Sampling,
        adapter: str | None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Token, None]:
        """Have a prompt answered. Leaving the iteration early cancels the request.

        Args:
            prompt: Token ids.
            sampling: How to go on.
            adapter: Its name; None for the base model.
            cache_salt: As in ``Submit``.

        Yields:
            The tokens; the last one says why it is the last.

        Raises:
            EngineGoneError: The ranks have ended.
            RequestFailedError: The request can't be answered.
        """
        request_id = next(self._numbers)
        stream: asyncio.Queue[Token | Failed | None] = asyncio.Queue()
        self._streams[request_id] = stream
        self.outstanding[adapter] += 1
        over = False
        try:
            self._send(
                Submit(
                    request_id=request_id,
                    prompt=prompt,
                    sampling=sampling,
                    adapter=adapter,
                    cache_salt=cache_salt,
                )
            )
            while not over:
                event = await stream.get()
                if not isinstance(event, Token):
                    over = True
                    if event is None:
                        raise EngineGoneError("the engine has ended; try again later")
                    raise RequestFailedError(event.reason, event.kind)
                over = event.finish is not None
                yield event
        finally:
            del self._streams[request_id]
            self.outstanding[adapter] -= 1
            if not self.outstanding[adapter]:
                del self.outstanding[adapter]
            if not over and self._link is not None:
                self._send(Cancel(request_id))

    def teach(self, vocabulary: Vocabulary) -> None:
        """Send the ranks a vocabulary that grammars name, unless these have it.

        Raises:
            EngineGoneError: The ranks have ended.
        """
        if vocabulary.key not in self._taught:
            self._send(vocabulary)
            self._taught.add(vocabulary.key)

    async def load(self, name: str, path: str, layout: str, *, wait: bool = True) -> AdapterResult:
        """Load an adapter.

        Returns:
            What became of it.
        """
        ticket = next(self._numbers)
        return await self._ask(
            LoadAdapter(ticket=ticket, name=name, path=path, layout=layout, wait=wait), ticket
        )

    async def unload(self, name: str) -> str | None:
        """Unload an adapter, once its requests have ended.

        Returns:
            Why it failed; None if it did not.
        """
        ticket = next(self._numbers)
        return (await self._ask(UnloadAdapter(ticket=ticket, name=name), ticket)).error

    async def _ask(self, command: Command, ticket: int) -> AdapterResult:
        future: asyncio.Future[AdapterResult] = asyncio.get_running_loop().create_future()
        self._answers[ticket] = future
        try:
            self._send(command)
            return await future
        finally:
            del self._answers[ticket]

    def _send(self, command: Command) -> None:
        if self._link is None:
            raise EngineGoneError("the engine is not running; try again later")
        try:
            self._link.send(command)
        except OSError as error:
            raise EngineGoneError("the engine has ended; try again later") from error

    def _read(self) -> None:
        link = self._link
        try:
            while link is not None and link.poll():
                self._take(link.recv())
        except (EOFError, OSError):
            self.detach()

    def _take(self, message: Any) -> None:
        if isinstance(message, Ready):
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(message)
            return
        assert isinstance(message, StepReport)
        self.snapshot = message.snapshot
        self.places = message.places or self.places
        for event in message.events:
            if isinstance(event, AdapterResult):
                future = self._answers.get(event.ticket)
                if future is not None and not future.done():
                    future.set_result(event)
                continue
            # A request that was cancelled meanwhile has no stream any more.
            stream = self._streams.get(event.request_id)
            if stream is not None:
                stream.put_nowait(event)
