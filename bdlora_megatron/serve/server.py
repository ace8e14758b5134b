"""One server: the ranks, the API server, and their common end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import uvicorn

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.serve.api.app import make_app
from bdlora_megatron.serve.api.client import EngineGoneError
from bdlora_megatron.serve.api.connection import TimedProtocol
from bdlora_megatron.serve.api.state import APIServer
from bdlora_megatron.serve.api.text import Tokenizer
from bdlora_megatron.serve.ranks import Ranks
from bdlora_megatron.serve.settings import ServeSettings
from bdlora_megatron.serve.torchrun import OwnRank

__all__ = ["Server"]

logger = logging.getLogger(__name__)

_STOP_S = 10.0
_LOOK_S = 0.1
#: What the kernel keeps for a client that does not read; left to itself it grows to megabytes.
_SEND_BUFFER_BYTES = 2**18


class Server:
    """Starts the ranks, answers HTTP, and ends both together."""

    def __init__(
        self,
        settings: ServeSettings,
        start_ranks: Callable[[ServeSettings], Ranks | OwnRank] = Ranks,
    ) -> None:
        """Read the tokenizer and take the port; nothing is started yet.

        Raises:
            ConfigError: The model's folder has no tokenizer, or the port is taken.
        """
        self.settings = settings
        self.api = APIServer(settings, Tokenizer(settings.model))
        self._start_ranks = start_ranks
        self._ranks: Ranks | OwnRank | None = None
        self._stopping = asyncio.Event()
        self._status = 0
        self._socket = socket.socket(
            socket.AF_INET6 if ":" in settings.host else socket.AF_INET, socket.SOCK_STREAM
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit both. Without the second, a piece of an answer waits until the client
        # has acknowledged the one before, which it puts off for 40 ms.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._socket.bind((settings.host, settings.port))
            # Who connects from now on waits for the API server instead of being refused.
            self._socket.listen(2048)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.host}:{settings.port}: {error}; choose another port"
            ) from error

    @property
    def port(self) -> int:
        """The port that it listens on."""
        port: int = self._socket.getsockname()[1]
        return port

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT comes, or a rank dies.

        Returns:
            The exit status: 0 after a drain, 1 after a rank's death.
        """
        return asyncio.run(self.serve())

    async def serve(self) -> int:
        """As ``run``, in a running event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        protocol: Any = partial(TimedProtocol, timeout_s=self.settings.client_timeout_s)
        config = uvicorn.Config(
            make_app(self.api),
            http=protocol,
            log_config=None,
            access_log=False,
            # Streams that outlive the drain are cut then.
            timeout_graceful_shutdown=int(_STOP_S),
            timeout_keep_alive=30,
            server_header=False,
        )
        http = _Uvicorn(config)
        watch = asyncio.create_task(self._keep_ranks())
        listening = asyncio.create_task(http.serve(sockets=[self._socket]))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((watch, listening, stopping), return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set() and not watch.done():
                await self._drain(watch)
            if watch.done() and not self._stopping.is_set():
                self._status = 1
        finally:
            self.api.draining = True
            self.api.client.detach()
            http.should_exit = True
            for task in (watch, stopping):
                task.cancel()
            await asyncio.gather(watch, stopping, return_exceptions=True)
            if self._ranks is not None:
                well = await asyncio.to_thread(self._ranks.stop, timeout_s=_STOP_S)
                if not well:
                    self._status = 1
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(listening, _STOP_S)
            self._socket.close()
        logger.info("ended", extra={"status": self._status})
        return self._status

    async def _drain(self, watch: asyncio.Task[None]) -> None:
        """Take nothing new, and let what is in flight come to its end."""
        self.api.draining = True
        client = self.api.client
        logger.info("draining", extra={"in_flight": client.total_outstanding})
        deadline = asyncio.get_running_loop().time() + self.settings.drain_s
        while client.total_outstanding and not watch.done():
            if asyncio.get_running_loop().time() > deadline:
                logger.warning("drain_s is over", extra={"cut_off": client.total_outstanding})
                return
            await asyncio.sleep(_LOOK_S)

    async def _keep_ranks(self) -> None:
        """Start the ranks, and again as often as is allowed; returns when they are dead."""
        for attempt in range(self.settings.restarts + 1):
            async with self._running_ranks() as ranks:
                if attempt:
                    logger.warning("ranks are started again", extra={"attempt": attempt})
                await self._come_up()
                while not ranks.dead:
                    await asyncio.sleep(_LOOK_S)
                logger.critical("a rank has died", extra={"dead": ranks.dead})

    @asynccontextmanager
    async def _running_ranks(self) -> AsyncIterator[Ranks | OwnRank]:
        self._ranks = ranks = await asyncio.to_thread(self._start_ranks, self._with_adapters())
        self.api.client.attach(ranks.link)
        try:
            yield ranks
        finally:
            if ranks.dead:
                self.api.client.detach()
                self._ranks = None
                await asyncio.to_thread(ranks.kill)

    def _with_adapters(self) -> ServeSettings:
        """The settings with the adapters as they are now, for ranks that start again."""
        adapters = {name: str(card.path) for name, card in self.api.adapters.items()}
        return replace(self.settings, adapters=adapters)

    async def _come_up(self) -> None:
        with suppress(EngineGoneError):
            ready = await self.api.come_up()
            logger.info(
                "ready",
                extra={
                    "url": f"http://{self.settings.host}:{self.port}",
                    "model": self.settings.base_name,
                    "adapters": len(self.api.adapters),
                    "refused": list(self.api.refused),
                    "tensor_parallel": self.settings.tensor_parallel_size,
                    "max_model_len": ready.max_model_len,
                },
            )


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the server: it drains first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
