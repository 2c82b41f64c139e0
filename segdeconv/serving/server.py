"""The web server of the page: the page itself, prediction of an image, explanation of a pixel, and nothing else.

It uses only the standard library. Images are predicted one at a time in the thread that runs `serve`; the threads of
the connections only read and write. Requests must address this machine by IP address or as localhost, since another
site could make a domain name of its own resolve to this machine (DNS rebinding). Images are accepted only from the
server's own page.
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
from segdeconv.serving.predictor import MAX_PIXELS, ImagePrediction, ImagePredictor, pixel

MAX_BYTES = 32 << 20  # of an image file
IDLE_TIMEOUT, REQUEST_TIMEOUT = 10, 60  # seconds: without any data from the browser, and for a whole request
MAX_CONNECTIONS = 16
MAX_WAITING = 4  # requests that wait for the thread of `serve`
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
    """A request that is refused with an HTTP status and an error message."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """The server, which listens on host:port; `serve` answers requests until it is interrupted.

    Args:
        predictor: Predicts the images.
        host: An address or name of this machine.
        port: The port; 0 for any free port.

    Raises:
        UsageError: The server cannot listen on this address.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, predictor: ImagePredictor, host: str, port: int) -> None:
        self.predictor, self.host = predictor, host
        self.work: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue(MAX_WAITING)
        self.connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.numbers = itertools.count(1)
        self.last: tuple[int, ImagePrediction] | None = None
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.address_family = addresses[0][0]
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UsageError(_bind_error(error, host, port)) from error

    def server_bind(self) -> None:
        """Bind the socket without HTTPServer's lookup of the host name, which would send a network request."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def loopback(self) -> bool:
        """True if only this machine can reach the server."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.server_port}/"

    def serve(self) -> None:
        """Answer requests forever. Images are predicted in the calling thread, so that an interruption stops it."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        while True:
            work, result = self.work.get()
            if not result.set_running_or_notify_cancel():
                continue
            try:
                result.set_result(work())
            except Exception as error:
                result.set_exception(error)

    def run_in_main_thread(self, work: Callable[[], Any]) -> Any:
        """Run a function in the thread of `serve` and return its result.

        Raises:
            Refused: Too many requests are waiting.
        """
        result: Future[Any] = Future()
        try:
            self.work.put_nowait((work, result))
        except queue.Full:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many images are waiting - try again soon") from None
        return result.result()

    def predict(self, content: bytes) -> tuple[int, ImagePrediction]:
        """Predict an image and keep the prediction, for `pixel`, until the next one; return its number and itself."""
        self.last = (next(self.numbers), self.predictor.predict(content))
        return self.last

    def pixel(self, number: int, y: int, x: int) -> dict[str, Any]:
        """Explain a pixel of the image of this number, see `predictor.pixel`.

        Raises:
            Refused: Another image has been predicted since.
        """
        if self.last is None or self.last[0] != number:
            raise Refused(HTTPStatus.GONE, "another image was predicted in the meantime - drop this one again")
        return pixel(self.last[1], y, x)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or close it if there are too many."""
        if not self.connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of an error, unless the browser closed the connection."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    """The handler of one request, after which the connection is closed (HTTP/1.0)."""

    server: Server
    timeout = IDLE_TIMEOUT

    def setup(self) -> None:
        """Start the timer that closes the connection if the request takes too long, even if data keeps arriving."""
        super().setup()
        self.timer = threading.Timer(REQUEST_TIMEOUT, self._disconnect)
        self.timer.daemon = True
        self.timer.start()

    def finish(self) -> None:
        """Stop the timer and finish the request."""
        self.timer.cancel()
        super().finish()

    def _disconnect(self) -> None:
        with contextlib.suppress(OSError):  # already closed
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """Answer a request for the page, the network's description or a pixel."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Answer a request to predict an image."""
        self._answer(self._post)

    def _answer(self, respond: Callable[[], tuple[str, bytes]]) -> None:
        try:
            self._require_address()
            kind, body = respond()
            status = HTTPStatus.OK
        except (Refused, UsageError) as error:
            status = error.status if isinstance(error, Refused) else HTTPStatus.UNPROCESSABLE_ENTITY
            kind, body = "application/json", json.dumps({"error": str(error)}).encode()
        except OSError:
            self.close_connection = True  # the browser closed the connection or timed out
            return
        except Exception:
            traceback.print_exc()
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json"
            body = json.dumps({"error": "internal error in segdeconv - see the terminal"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind if kind.endswith("-stream") else f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        """Add the security headers to every response."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send the status of a request that http.server itself refuses, without its HTML page."""
        self.close_connection = True
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _require_address(self) -> None:
        name, host = "", self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            allowed = ipaddress.ip_address(name).is_loopback or not self.server.loopback
        except ValueError:
            allowed = name in ("localhost", self.server.host, socket.gethostname().lower())
        if not allowed:
            raise Refused(HTTPStatus.FORBIDDEN, f"this host name is not allowed - open {self.server.url}")

    def _get(self) -> tuple[str, bytes]:
        parts = urlsplit(self.path)
        if parts.path in PAGE:
            name, kind = PAGE[parts.path]
            return kind, resources.files("segdeconv.serving").joinpath(name).read_bytes()
        if parts.path == "/network":
            return "application/json", json.dumps(about(self.server.predictor)).encode()
        if parts.path == "/pixel":
            try:
                query = parse_qs(parts.query, max_num_fields=3)
                number, y, x = (int(query[name][0]) for name in ("picture", "y", "x"))
            except (KeyError, ValueError):
                raise Refused(HTTPStatus.BAD_REQUEST, "request /pixel?picture=NUMBER&y=ROW&x=COLUMN") from None
            self.timer.cancel()
            explanation = self.server.run_in_main_thread(lambda: self.server.pixel(number, y, x))
            return "application/json", json.dumps(explanation).encode()
        raise Refused(HTTPStatus.NOT_FOUND, f"page not found - open {self.server.url}")

    def _post(self) -> tuple[str, bytes]:
        if urlsplit(self.path).path != "/look":
            raise Refused(HTTPStatus.NOT_FOUND, "page not found - send images to /look")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers['Host']}":
            raise Refused(HTTPStatus.FORBIDDEN, "images are accepted only from this server's own page")
        if self.headers.get_content_type() != "application/octet-stream":  # other sites cannot send it without CORS
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the image's bytes as application/octet-stream")
        content = self._body()
        number, prediction = self.server.run_in_main_thread(lambda: self.server.predict(content))
        return "application/octet-stream", packed(number, prediction)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the Content-Length header is missing or invalid")
        if int(length[:20]) > MAX_BYTES:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"this file is larger than {MAX_BYTES >> 20} MB - reduce it, or use the command predict",
            )
        body, remaining = io.BytesIO(), int(length)
        while remaining:
            chunk = self.rfile.read(min(CHUNK, remaining))
            if not chunk:
                raise ConnectionAbortedError("the image is truncated")
            remaining -= body.write(chunk)
        self.timer.cancel()
        return body.getvalue()

    def log_message(self, *_: object) -> None:
        """Log nothing, for privacy."""


def about(predictor: ImagePredictor) -> dict[str, Any]:
    """Return the description of the network that the page loads first."""
    classes = zip(predictor.classes.names, predictor.classes.colours, strict=True)
    return {
        "network": predictor.name,
        "classes": [{"name": name, "colour": list(colour)} for name, colour in classes],
        "max_bytes": MAX_BYTES,
        "largest": MAX_PIXELS,
        "size": predictor.segmenter.preprocessing.size,
    }


def packed(number: int, prediction: ImagePrediction) -> bytes:
    """Encode a prediction for the page.

    Returns:
        The length of the JSON in four bytes; the JSON; labels uint8, confidence uint16 in 0..65535 and uncertainty
        uint8 in 0..255, each (H, W); and the image as PNG. Numbers are little-endian.
    """
    height, width = prediction.size
    areas = np.bincount(prediction.labels.ravel(), minlength=prediction.probabilities.shape[0]) / prediction.labels.size
    metadata = {
        "picture": number,
        "height": height,
        "width": width,
        "reduced_from": prediction.reduced_from,
        "network_size": prediction.network_size,
        "areas": areas.tolist(),
        "mean_confidence": float(prediction.confidence.mean()),
        "has_path": bool(prediction.pooled),
        "seconds": round(prediction.seconds, 3),
    }
    text = json.dumps(metadata).encode()
    png = io.BytesIO()
    Image.fromarray(prediction.image).save(png, format="PNG", compress_level=1)
    return b"".join(
        (
            struct.pack("<I", len(text)),
            text,
            prediction.labels.tobytes(),
            np.round(prediction.confidence * 65535).astype("<u2").tobytes(),
            np.round(prediction.uncertainty * 255).astype(np.uint8).tobytes(),
            png.getvalue(),
        )
    )


def _bind_error(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use - choose another with --port, or 0 for any free port"
    if error.errno == errno.EACCES:
        return f"port {port} needs administrator rights - choose one above 1023 with --port"
    return f"cannot listen on --host {host} ({error.strerror or error}) - give an address of this machine"
