"""Connections of clients that send or read too slowly."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from bdlora_megatron.serve.api.errors import APIError

__all__ = ["TimedProtocol"]

logger = logging.getLogger(__name__)


class TimedProtocol(H11Protocol):
    """Uvicorn's protocol, with an end to its patience.

    Uvicorn itself waits for ever: for the rest of a request, and for a client to read on. Here a
    request has to be whole ``timeout_s`` after its first byte (or after the connection was made),
    however its bytes trickle in; and a client with a full buffer of answers has as long to read
    enough of them.
    """

    def __init__(self, *args: Any, timeout_s: float, **kwargs: Any) -> None:
        """Begin a connection.

        Args:
            *args: As for ``H11Protocol``.
            timeout_s: See above.
            **kwargs: As for ``H11Protocol``.
        """
        super().__init__(*args, **kwargs)
        self._timeout_s = timeout_s
        self._heard = False
        self._sending: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._stop_sending()
        self._stop_reading()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client has sent."""
        self._heard = True
        super().data_received(data)
        self._watch_request()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        if self._reading is None:
            self._reading = self.loop.call_later(self._timeout_s, self._stopped_reading)

    def resume_writing(self) -> None:
        """The client has read enough."""
        self._stop_reading()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, with what its client has not read."""
        if self.transport.get_write_buffer_size():
            # To close would be to wait until it is read.
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _watch_request(self) -> None:
        """Let the clock run while a request is not whole; more bytes do not set it back."""
        cycle = self.cycle
        partial = cycle is None or cycle.response_complete or cycle.more_body
        if self.transport.is_closing() or not partial:
            self._stop_sending()
        elif self._sending is None:
            self._sending = self.loop.call_later(self._timeout_s, self._never_came)

    def _never_came(self) -> None:
        self._sending = None
        cycle = self.cycle
        if self.transport.is_closing():
            return
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.abort()
            return
        if self._heard and (cycle is None or not cycle.response_complete):
            logger.warning("a request did not arrive in time", extra={"limit_s": self._timeout_s})
            self.transport.write(_late(self._timeout_s))
        self.transport.close()

    def _stopped_reading(self) -> None:
        self._reading = None
        logger.warning("a client does not read its answer", extra={"limit_s": self._timeout_s})
        self.transport.abort()


def _late(timeout_s: float) -> bytes:
    """A whole answer: the request is no good to the app any more."""
    error = APIError(408, f"the request was not whole after {timeout_s:g} s; send it faster")
    body = bytes(error.response().body)
    head = (
        "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
