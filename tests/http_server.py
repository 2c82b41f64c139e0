"""A local HTTP server with configurable good and bad answers, which records its requests."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """A server with one answer per path.

    Attributes:
        answers: the answer of each path.
        requests: the (path, Range header) of each request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, str | None]] = []

    def serve(self, path: str, answer: Answer) -> str:
        self.answers[path] = answer
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers["Range"]))
        self.close_connection = True
        self.server.answers[self.path](self)

    do_HEAD = do_POST = do_GET

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def whole(content: bytes) -> Answer:
    """Return an answer that sends all of the content and ignores the requested range."""

    def answer(handler: Handler) -> None:
        handler.head(200, Content_Length=len(content))
        handler.wfile.write(content)

    return answer


def status(code: int, **headers: object) -> Answer:
    return lambda handler: handler.head(code, Content_Length=0, **headers)


def in_pieces(content: bytes, piece: int | None = None) -> Answer:
    """Return an answer that sends the requested range, cut after `piece` bytes.

    Without `piece`, a range is complete, and a request without a range gets half of the content.
    """

    def answer(handler: Handler) -> None:
        requested = handler.headers["Range"]
        first = int(re.fullmatch(r"bytes=(\d+)-", requested)[1]) if requested else 0
        if first >= len(content):
            handler.head(416, Content_Length=0)
            return
        span = {"Content_Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if requested else {}
        handler.head(206 if requested else 200, Content_Length=len(content) - first, **span)
        length = piece if piece is not None else len(content) // (1 if requested else 2)
        handler.wfile.write(content[first : first + length])

    return answer
