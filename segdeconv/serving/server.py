"""The page's server: one page, two questions, and nothing else of this machine.

Standard library only. Pictures are looked at in the thread that runs `serve`, one at a time; the threads that talk to
browsers only read and write. It answers whoever addresses this machine by number or as localhost, since a page of
somebody else's could point a name of its own here (DNS rebinding), and takes pictures from its own page alone.
"""

import contextlib
import errno
import io
import ipaddress
import itertools
import json
import queue
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from segdeconv.errors import UsageError
from segdeconv.serving.predictor import LARGEST, PicturePrediction, PicturePredictor, pixel

MAX_BYTES = 32 << 20  # of a picture's file
SILENCE, REQUEST = 10, 60  # seconds that a browser may say nothing, and take for all that it has to say
CONNECTIONS = 16
WAITING = 4  # pictures that may wait for their turn
CHUNK = 1 << 16

PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that gets a status and one sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Server(ThreadingHTTPServer):
    """Listens on host:port; `serve` answers until it is interrupted.

    host: an address or name of this machine. port: 0 for any that is free.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, predictor: PicturePredictor, host: str, port: int) -> None:
        self.predictor, self.host = predictor, host
        self.work: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue(WAITING)
        self.places = threading.BoundedSemaphore(CONNECTIONS)
        self.numbers = itertools.count(1)
        self.seen: tuple[int, PicturePrediction] | None = None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.address_family = found[0][0]
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UsageError(_why_not(error, host, port)) from error

    def server_bind(self) -> None:
        """Without HTTPServer's question for the name of this machine, which goes out to the network."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.server_port}/"

    def serve(self) -> None:
        """Answer for ever. Looks at pictures here, in the caller's thread, which an interruption then ends."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        while True:
            work, answer = self.work.get()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(work())
            except Exception as error:
                answer.set_exception(error)

    def ask(self, work: Callable[[], Any]) -> Any:
        """Have something done in the thread of `serve`, and wait for it."""
        answer: Future[Any] = Future()
        try:
            self.work.put_nowait((work, answer))
        except queue.Full:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many pictures wait already - try again soon") from None
        return answer.result()

    def look(self, content: bytes) -> tuple[int, PicturePrediction]:
        """Look at a picture and remember it, in place of the one before, for questions about its pixels."""
        self.seen = (next(self.numbers), self.predictor.predict(content))
        return self.seen

    def pixel(self, number: int, y: int, x: int) -> dict[str, Any]:
        """See `predictor.pixel`; of the picture of this number, if it is still the last."""
        if self.seen is None or self.seen[0] != number:
            raise Refused(HTTPStatus.GONE, "another picture was looked at since - drop this one again")
        return pixel(self.seen[1], y, x)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each connection, as long as there are places."""
        if not self.places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The whole of one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no fault; anything else is one of ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    """One request: the connection ends with it (HTTP/1.0)."""

    server: Server
    timeout = SILENCE

    def setup(self) -> None:
        """Whoever is not done with his request in time is cut off, however often he says something."""
        super().setup()
        self.clock = threading.Timer(REQUEST, self._cut_off)
        self.clock.daemon = True
        self.clock.start()

    def finish(self) -> None:
        """The end, whatever came before."""
        self.clock.cancel()
        super().finish()

    def _cut_off(self) -> None:
        with contextlib.suppress(OSError):  # it ended by itself
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """The page, and what it asks."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A picture."""
        self._answer(self._post)

    def _answer(self, what: Callable[[], tuple[str, bytes]]) -> None:
        try:
            self._require_address()
            kind, body = what()
            status = HTTPStatus.OK
        except (Refused, UsageError) as error:
            status = error.status if isinstance(error, Refused) else HTTPStatus.UNPROCESSABLE_ENTITY
            kind, body = "application/json", json.dumps({"error": str(error)}).encode()
        except OSError:
            self.close_connection = True  # the browser went away, or said nothing for too long
            return
        except Exception:
            traceback.print_exc()
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json"
            body = json.dumps({"error": "a fault of segdeconv's - see the terminal"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind if kind.endswith("-stream") else f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        """With every answer: what a browser may do with it, which is little."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself, without its page of HTML."""
        self.close_connection = True
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _require_address(self) -> None:
        name, given = "", self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{given}").hostname or ""
            known = ipaddress.ip_address(name).is_loopback or not self.server.loopback
        except ValueError:
            known = name in ("localhost", self.server.host, socket.gethostname().lower())
        if not known:
            raise Refused(HTTPStatus.FORBIDDEN, f"this page is at {self.server.url}")

    def _get(self) -> tuple[str, bytes]:
        parts = urlsplit(self.path)
        if parts.path in PAGE:
            name, kind = PAGE[parts.path]
            return kind, resources.files("segdeconv.serving").joinpath(name).read_bytes()
        if parts.path == "/network":
            return "application/json", json.dumps(about(self.server.predictor)).encode()
        if parts.path == "/pixel":
            try:
                asked = parse_qs(parts.query, max_num_fields=3)
                number, y, x = (int(asked[name][0]) for name in ("picture", "y", "x"))
            except (KeyError, ValueError):
                raise Refused(HTTPStatus.BAD_REQUEST, "ask /pixel?picture=NUMBER&y=ROW&x=COLUMN") from None
            self.clock.cancel()
            return "application/json", json.dumps(self.server.ask(lambda: self.server.pixel(number, y, x))).encode()
        raise Refused(HTTPStatus.NOT_FOUND, f"there is nothing here but {self.server.url}")

    def _post(self) -> tuple[str, bytes]:
        if urlsplit(self.path).path != "/look":
            raise Refused(HTTPStatus.NOT_FOUND, "pictures go to /look")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers['Host']}":
            raise Refused(HTTPStatus.FORBIDDEN, "pictures are taken from this page alone")
        if self.headers.get_content_type() != "application/octet-stream":  # what another page cannot send unasked
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send a picture's bytes as application/octet-stream")
        content = self._body()
        number, seen = self.server.ask(lambda: self.server.look(content))
        return "application/octet-stream", packed(number, seen)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "say how long the picture is")
        if int(length[:20]) > MAX_BYTES:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"this file is larger than {MAX_BYTES >> 20} MB - shrink it, or use the command predict",
            )
        body, left = io.BytesIO(), int(length)
        while left:
            part = self.rfile.read(min(CHUNK, left))
            if not part:
                raise ConnectionAbortedError("the picture is cut")
            left -= body.write(part)
        self.clock.cancel()
        return body.getvalue()

    def log_message(self, *_: object) -> None:
        """Nothing is logged: what is looked at is nobody's business."""


def about(predictor: PicturePredictor) -> dict[str, Any]:
    """What the page has to know before a picture comes."""
    classes = zip(predictor.classes.names, predictor.classes.colours, strict=True)
    return {
        "network": predictor.name,
        "classes": [{"name": name, "colour": list(colour)} for name, colour in classes],
        "max_bytes": MAX_BYTES,
        "largest": LARGEST,
        "size": predictor.segmenter.preprocessing.size,
    }


def packed(number: int, seen: PicturePrediction) -> bytes:
    """An answer for the page: four bytes, the length of the JSON that follows, little-endian as all numbers; then, each
    (H, W), labels uint8, confidence uint16 in 0..65535 and uncertainty uint8 in 0..255; then the picture as PNG.
    """
    height, width = seen.size
    areas = np.bincount(seen.labels.ravel(), minlength=seen.probabilities.shape[0]) / seen.labels.size
    said = {
        "picture": number,
        "height": height,
        "width": width,
        "reduced_from": seen.reduced_from,
        "network_size": seen.network_size,
        "areas": areas.tolist(),
        "mean_confidence": float(seen.confidence.mean()),
        "has_path": bool(seen.pooled),
        "seconds": round(seen.seconds, 3),
    }
    text = json.dumps(said).encode()
    picture = io.BytesIO()
    Image.fromarray(seen.picture).save(picture, format="PNG", compress_level=1)
    return b"".join(
        (
            struct.pack("<I", len(text)),
            text,
            seen.labels.tobytes(),
            np.round(seen.confidence * 65535).astype("<u2").tobytes(),
            np.round(seen.uncertainty * 255).astype(np.uint8).tobytes(),
            picture.getvalue(),
        )
    )


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use - choose another with --port, or 0 for any that is free"
    if error.errno == errno.EACCES:
        return f"port {port} is not for users of this machine - choose one above 1023 with --port"
    return f"cannot listen on --host {host} ({error.strerror or error}) - give an address of this machine"
