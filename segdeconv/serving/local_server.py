"""The mechanisms of the local web servers: who may connect, what a request may hold, and who answers it when.

Starlette and uvicorn answer the requests in a thread of their own. Work on a network is done one request at a time in
the thread that runs `serve`. Requests must address this machine by IP address or as localhost, since another site could
make a domain name of its own resolve to this machine (DNS rebinding). Changes are accepted only from the server's own
page.
"""

import asyncio
import errno
import io
import ipaddress
import json
import logging
import queue
import socket
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from http import HTTPStatus
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from segdeconv.errors import UsageError
from segdeconv.serving.connection import MAX_CONNECTIONS, Connection

MAX_HEADERS, MAX_HEADER_BYTES = 100, 16 << 10
MAX_WAITING = 4  # requests that wait for the thread of `serve`
STOP_TIMEOUT = 2  # seconds for the connections to close

JSON = "application/json; charset=utf-8"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Connection": "close",  # one request per connection, see `Connection`
}


class Refused(Exception):
    """A request that is refused with an HTTP status and an error message."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class LocalServer:
    """A server, which listens on host:port; `serve` answers requests until it is interrupted.

    Args:
        host: An address or name of this machine.
        port: The port; 0 for any free port.
        pages: The file, below segdeconv/serving, and the media type of each path that serves one.
        routes: The other paths; their endpoints raise `Refused` or UsageError to refuse a request.
        way_out: What a POST to an unknown path should have been, for the error message.

    Raises:
        UsageError: The server cannot listen on this address.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        pages: Mapping[str, tuple[str, str]],
        routes: Sequence[Route],
        way_out: str,
    ) -> None:
        self.host, self.pages, self.way_out = host, pages, way_out
        self.work: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue(MAX_WAITING)
        self.socket = _listen(host, port)
        self.address, self.port = self.socket.getsockname()[:2]
        application = Starlette(
            routes=[*(Route(path, self._page) for path in pages), *routes],
            middleware=[Middleware(RequestChecks, server=self)],
            exception_handlers={
                Refused: _refused,
                UsageError: _refused,
                HTTPException: self._not_found,
                ClientDisconnect: _disconnected,
                Exception: _internal_error,
            },
        )
        application.router.redirect_slashes = False
        self.http = uvicorn.Server(
            uvicorn.Config(
                application,
                loop="asyncio",
                http=Connection,
                ws="none",
                lifespan="off",
                interface="asgi3",
                workers=1,  # None would read an environment variable
                log_config=None,
                log_level=logging.CRITICAL,  # nothing is logged, for privacy; `_internal_error` reports bugs
                access_log=False,
                proxy_headers=False,
                server_header=False,
                headers=list(HEADERS.items()),
                backlog=MAX_CONNECTIONS,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )

    @property
    def loopback(self) -> bool:
        """True if only this machine can reach the server."""
        return ipaddress.ip_address(self.address).is_loopback

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/"

    def serve(self, idle: Callable[[], bool] = lambda: False) -> None:
        """Answer requests until `stop`. Work is done in the calling thread, which a signal can interrupt.

        Args:
            idle: Called repeatedly while no request waits, until it returns False, and again after the next request.
        """
        thread = threading.Thread(target=self.http.run, args=([self.socket],), daemon=True)
        thread.start()
        try:
            while (item := self._next(idle)) is not None:
                work, result = item
                if not result.set_running_or_notify_cancel():
                    continue
                try:
                    result.set_result(work())
                except Exception as error:
                    result.set_exception(error)
        finally:
            self.http.should_exit = self.http.force_exit = True
            thread.join(STOP_TIMEOUT)

    def _next(self, idle: Callable[[], bool]) -> tuple[Callable[[], Any], Future[Any]] | None:
        while self.work.empty() and idle():
            pass
        return self.work.get()

    def stop(self) -> None:
        """Make `serve` return after the requests that wait for it; may be called from any thread."""
        self.work.put(None)

    async def run_in_main_thread(self, work: Callable[[], Any]) -> Any:
        """Run a function in the thread of `serve` and return its result.

        Raises:
            Refused: Too many requests are waiting.
        """
        result: Future[Any] = Future()
        try:
            self.work.put_nowait((work, result))
        except queue.Full:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many images are waiting - try again soon") from None
        return await asyncio.wrap_future(result)

    def check(self, request: Request) -> None:
        """Check the headers that every request has.

        Raises:
            Refused: There are too many headers, or they address another host.
        """
        headers = request.headers.raw
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too long or too many")
        name = ""
        try:
            name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
            allowed = ipaddress.ip_address(name).is_loopback or not self.loopback
        except ValueError:
            allowed = name in ("localhost", self.host, socket.gethostname().lower())
        if not allowed:
            raise Refused(HTTPStatus.FORBIDDEN, f"this host name is not allowed - open {self.url}")

    async def _page(self, request: Request) -> Response:
        name, kind = self.pages[request.url.path]
        return Response(resources.files(__package__).joinpath(name).read_bytes(), media_type=kind)

    async def _not_found(self, request: Request, error: Exception) -> Response:
        way_out = self.way_out if request.method == "POST" else f"open {self.url}"
        return await _refused(request, Refused(HTTPStatus.NOT_FOUND, f"page not found - {way_out}"))


class RequestChecks:
    """ASGI middleware that answers requests which no page of the server accepts.

    Args:
        app: Answers the other requests.
        server: Checks their headers.
    """

    def __init__(self, app: ASGIApp, server: LocalServer) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        answer: ASGIApp = self.app
        if scope["http_version"] not in ("1.0", "1.1"):
            answer = Response(status_code=HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
        elif request.method not in ("GET", "POST"):
            answer = Response(status_code=HTTPStatus.NOT_IMPLEMENTED)
        else:
            try:
                self.server.check(request)
            except Refused as error:
                answer = await _refused(request, error)
        await answer(scope, receive, send)


def require_own_page(request: Request, kind: str, way_out: str) -> None:
    """Check that a request that changes something comes from the server's own page.

    Args:
        request: The request.
        kind: The media type that its body must have; other sites cannot send it without CORS.
        way_out: What to send, for the error message.

    Raises:
        Refused: It does not.
    """
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{request.headers['host']}":
        raise Refused(HTTPStatus.FORBIDDEN, "changes are accepted only from this server's own page")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, way_out)


async def read_body(request: Request, largest: int, too_long: str) -> bytes:
    """Read the body of a request, of at most `largest` bytes; `too_long` is the message for a longer one.

    Raises:
        Refused: The length is missing or too large.
    """
    too_large = Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_long)
    length = request.headers.get("content-length")
    if length is None or "transfer-encoding" in request.headers:
        raise Refused(HTTPStatus.LENGTH_REQUIRED, "the Content-Length header is missing or invalid")
    if int(length) > largest:  # h11 accepts up to 20 digits only
        raise too_large
    body = io.BytesIO()
    async for chunk in request.stream():
        if body.tell() + len(chunk) > largest:  # however the body is framed
            raise too_large
        body.write(chunk)
    return body.getvalue()


async def _refused(request: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, Refused) else HTTPStatus.UNPROCESSABLE_ENTITY
    return Response(json.dumps({"error": str(error)}), status, media_type=JSON)


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response()  # nobody reads it


async def _internal_error(request: Request, error: Exception) -> Response:
    traceback.print_exception(error)
    message = "internal error in segdeconv - see the terminal"
    return Response(json.dumps({"error": message}), HTTPStatus.INTERNAL_SERVER_ERROR, media_type=JSON)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(MAX_CONNECTIONS)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(_bind_error(error, host, port)) from error
    return listener


def _bind_error(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use - choose another with --port, or 0 for any free port"
    if error.errno == errno.EACCES:
        return f"port {port} needs administrator rights - choose one above 1023 with --port"
    return f"cannot listen on --host {host} ({error.strerror or error}) - give an address of this machine"
