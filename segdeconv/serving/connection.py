"""The limits of a connection, which uvicorn does not have: how many there are, and how long a request may take."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_TIMEOUT = 10  # seconds without any data of an incomplete request
REQUEST_TIMEOUT = 60  # seconds to receive a whole request, and again to send its response
MAX_CONNECTIONS = 16


class Connection(H11Protocol):
    """A connection that is closed if there are too many, and if its browser is too slow in sending or receiving.

    It expects the header `Connection: close` in every response, so that it serves one request. A prediction takes as
    long as it takes: no timer runs between the end of the request and the response.
    """

    idle: asyncio.TimerHandle
    deadline: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timers, or close the connection if there are too many."""
        super().connection_made(transport)
        self.idle = self.loop.call_later(IDLE_TIMEOUT, transport.abort)
        self.deadline = self.loop.call_later(REQUEST_TIMEOUT, transport.abort)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Restart the idle timer, or stop both timers at the end of the request."""
        self.idle.cancel()
        super().data_received(data)
        if self._request_complete():
            self.deadline.cancel()
        else:
            self.idle = self.loop.call_later(IDLE_TIMEOUT, self.transport.abort)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Close the connection, unless its request is complete: the client may still read the response."""
        return self._request_complete()

    def on_response_complete(self) -> None:
        """Limit the time in which the client reads the response."""
        super().on_response_complete()
        self._stop_timers()
        self.deadline = self.loop.call_later(REQUEST_TIMEOUT, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_timers()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse a malformed request with an empty body, and close the connection."""
        headers: list[tuple[bytes, bytes]] = [*self.server_state.default_headers, (b"content-length", b"0")]
        for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True  # its application must not send a second response
        self.transport.close()

    def shutdown(self) -> None:
        """Close the connection when the server stops; no response follows, because predictions have stopped."""
        self.transport.abort()

    def _request_complete(self) -> bool:
        cycle: Any = self.cycle  # None before the first request
        return cycle is not None and not cycle.more_body

    def _stop_timers(self) -> None:
        self.idle.cancel()
        self.deadline.cancel()
