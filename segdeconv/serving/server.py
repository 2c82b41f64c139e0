"""The web server of the page: the page itself, prediction of an image, explanation of a pixel, and nothing else.

Images are predicted one at a time in the thread that runs `serve`, and accepted only from the server's own page.
"""

import io
import itertools
import json
import struct
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from segdeconv.serving.local_server import JSON, LocalServer, Refused, read_body, require_own_page
from segdeconv.serving.predictor import MAX_PIXELS, ImagePrediction, ImagePredictor, pixel

MAX_BYTES = 32 << 20  # of an image file
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/requests.js": ("requests.js", "text/javascript"),
}


class Server(LocalServer):
    """The server, which listens on host:port; `serve` answers requests until it is interrupted.

    Args:
        predictor: Predicts the images.
        host: An address or name of this machine.
        port: The port; 0 for any free port.

    Raises:
        UsageError: The server cannot listen on this address.
    """

    def __init__(self, predictor: ImagePredictor, host: str, port: int) -> None:
        self.predictor = predictor
        self.numbers = itertools.count(1)
        self.last: tuple[int, ImagePrediction] | None = None
        super().__init__(
            host,
            port,
            pages=PAGE,
            routes=[
                Route("/network", self._network),
                Route("/pixel", self._pixel),
                Route("/explanation", self._explanation),
                Route("/look", self._look, methods=["POST"]),
            ],
            way_out="send images to /look",
        )

    def predict(self, content: bytes) -> bytes:
        """Predict an image, keep the prediction for `pixel` until the next one, and return it `packed`."""
        self.last = (next(self.numbers), self.predictor.predict(content))
        return packed(*self.last)

    def pixel(self, number: int, y: int, x: int) -> dict[str, Any]:
        """Explain a pixel of the image of this number, see `predictor.pixel`.

        Raises:
            Refused: Another image has been predicted since.
        """
        return pixel(self._prediction(number), y, x)

    def explanation(self, number: int, y: int, x: int) -> bytes:
        """Explain a pixel of the image of this number, see `ImagePredictor.explain`, and encode the explanation.

        Returns:
            The length of the JSON in four bytes; the JSON; and the two maps int8 in -127..127, each (h, w).

        Raises:
            Refused: Another image has been predicted since.
        """
        numbers, maps = self.predictor.explain(self._prediction(number), y, x)
        text = json.dumps(numbers | {"height": maps.shape[1], "width": maps.shape[2]}).encode()
        return struct.pack("<I", len(text)) + text + np.round(maps * 127).astype(np.int8).tobytes()

    def _prediction(self, number: int) -> ImagePrediction:
        if self.last is None or self.last[0] != number:
            raise Refused(HTTPStatus.GONE, "another image was predicted in the meantime - drop this one again")
        return self.last[1]

    async def _network(self, request: Request) -> Response:
        return Response(json.dumps(about(self.predictor)), media_type=JSON)

    async def _pixel(self, request: Request) -> Response:
        place = _place(request)
        explanation = await self.run_in_main_thread(lambda: self.pixel(*place))
        return Response(json.dumps(explanation), media_type=JSON)

    async def _explanation(self, request: Request) -> Response:
        place = _place(request)
        explanation = await self.run_in_main_thread(lambda: self.explanation(*place))
        return Response(explanation, media_type="application/octet-stream")

    async def _look(self, request: Request) -> Response:
        require_own_page(request, "application/octet-stream", "send the image's bytes as application/octet-stream")
        content = await read_body(
            request, MAX_BYTES, f"this file is larger than {MAX_BYTES >> 20} MB - reduce it, or use the command predict"
        )
        prediction = await self.run_in_main_thread(lambda: self.predict(content))
        return Response(prediction, media_type="application/octet-stream")


def _place(request: Request) -> tuple[int, int, int]:
    """Return the number of the image, the row and the column that a request asks about.

    Raises:
        Refused: The query is invalid.
    """
    try:
        query = parse_qs(request.scope["query_string"].decode(), max_num_fields=3)
        number, y, x = (int(query[name][0]) for name in ("picture", "y", "x"))
    except (KeyError, ValueError):
        path = request.url.path
        raise Refused(HTTPStatus.BAD_REQUEST, f"request {path}?picture=NUMBER&y=ROW&x=COLUMN") from None
    return number, y, x


def about(predictor: ImagePredictor) -> dict[str, Any]:
    """Return the description of the network that the page loads first."""
    classes = zip(predictor.classes.names, predictor.classes.display_colours, strict=True)
    return {
        "network": predictor.name,
        "classes": [{"name": name, "colour": list(colour)} for name, colour in classes],
        "background": predictor.classes.background,
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
