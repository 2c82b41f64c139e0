"""The web server of the labelling page."""

import io
import json
import struct
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

import numpy as np
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from segdeconv.errors import UsageError, command
from segdeconv.serving.label.learning import Scope
from segdeconv.serving.label.network import train_words
from segdeconv.serving.label.photos import TILE, Photos
from segdeconv.serving.label.session import MAX_SECONDS, VIEW_PIXELS, Session
from segdeconv.serving.label.strokes import checked_stroke, flood
from segdeconv.serving.local_server import JSON, LocalServer, Refused, read_body, require_own_page
from segdeconv.system.plain_data import PlainDataError, parse_json

MAX_BYTES = 4 << 20  # of a stroke
BYTES = "application/octet-stream"
SCRIPTS = ("page.js", "strip.js", "canvas.js", "tools.js", "server.js", "classes.js")
PAGE = {
    "/": ("label/page.html", "text/html"),
    "/page.css": ("label/page.css", "text/css"),
    "/requests.js": ("requests.js", "text/javascript"),
    **{f"/{name}": (f"label/{name}", "text/javascript") for name in SCRIPTS},
}


class LabelServer(LocalServer):
    """The server of a labelling session.

    Args:
        session: The session.
        host: An address or name of this machine.
        port: The port; 0 for any free port.
        seconds: Time of learning after a stroke.
        scope: What learns at first.

    Raises:
        UsageError: The server cannot listen on this address.
    """

    def __init__(self, session: Session, host: str, port: int, *, seconds: float, scope: Scope) -> None:
        self.session, self.storage = session, session.storage
        self.seconds, self.scope = seconds, scope
        self.photos = Photos(session.storage.photos)
        self.storing = threading.Lock()  # what is stored is stored in the order in which it arrives
        super().__init__(
            host,
            port,
            pages=PAGE,
            routes=[
                Route("/state", self._state),
                Route("/photo", self._photo),
                Route("/tile", self._tile),
                Route("/thumbnail", self._thumbnail),
                Route("/preview", self._preview),
                Route("/mask", self._mask),
                Route("/proposal", self._proposal),
                *(
                    Route(f"/{name}", self._change(change), methods=["POST"])
                    for name, change in (
                        ("stroke", self._stroke),
                        ("undo", self._undo),
                        ("reopen", self._reopen),
                        ("classes", self._classes),
                    )
                ),
                Route("/learn", self._learn, methods=["POST"]),
                Route("/accept", self._accept, methods=["POST"]),
            ],
            way_out="send strokes to /stroke",
        )

    # Reading

    async def _state(self, request: Request) -> Response:
        state = await run_in_threadpool(self.session.state)
        state |= {"seconds": self.seconds, "scope": self.scope, "tile": TILE, "train": self.train_command()}
        return _json(state)

    def train_command(self) -> str:
        """Return the command that trains the full network on what was painted."""
        learned = self.session.saved or self.session.round > 0
        session = self.storage.session if learned else None
        return command("train", train_words(self.storage.folder, session, self.session.learner))

    def _about(self, number: int) -> dict[str, Any]:
        name = self.session.names[number]
        height, width = self.storage.size(name)
        log = self.storage.log(name)
        return {
            "number": number, "name": name, "height": height, "width": width, "status": log.status,
            "entries": [{key: value for key, value in entry.items() if key != "file"} for entry in log.entries],
        }  # fmt: skip

    async def _photo(self, request: Request) -> Response:
        (number,) = self._numbers(request, "number")
        return _json(await run_in_threadpool(self._about, number))

    async def _tile(self, request: Request) -> Response:
        number, *place = self._numbers(request, "number", "level", "row", "column")
        content = await run_in_threadpool(self.photos.tile, self.session.names[number], *place)
        return Response(content, media_type="image/jpeg")

    async def _thumbnail(self, request: Request) -> Response:
        (number,) = self._numbers(request, "number")
        content = await run_in_threadpool(self.photos.thumbnail, self.session.names[number])
        return Response(content, media_type="image/jpeg")

    async def _preview(self, request: Request) -> Response:
        """Answer with the mask of a thumbnail: what was accepted, else the proposal, as PNG; empty without any."""
        (number,) = self._numbers(request, "number")
        name = self.session.names[number]

        def draw() -> bytes:
            labels = self.session.preview(name)
            if labels is None:
                labels = np.full((1, 1), 255, dtype=np.uint8)
            palette = np.zeros((256, 4), dtype=np.uint8)
            palette[:, :3] = self.storage.classes.palette()
            palette[list(self.storage.classes.labels), 3] = 255
            file = io.BytesIO()
            Image.fromarray(palette[labels]).save(file, format="PNG", compress_level=1)
            return file.getvalue()

        return Response(await run_in_threadpool(draw), media_type="image/png")

    async def _mask(self, request: Request) -> Response:
        """Answer with the labels of the stored mask, reduced to what the page shows."""
        (number,) = self._numbers(request, "number")
        name = self.session.names[number]

        def read() -> bytes:
            height, width = self.storage.size(name)
            scale = min(1.0, (VIEW_PIXELS / (height * width)) ** 0.5)
            log = self.storage.log(name)
            mask = self.storage.mask(name, (max(1, round(scale * height)), max(1, round(scale * width))))
            return packed({"number": number, "status": log.status, "entries": len(log.entries)}, mask)

        return Response(await run_in_threadpool(read), media_type=BYTES)

    async def _proposal(self, request: Request) -> Response:
        (number,) = self._numbers(request, "number")
        proposal = await self.run_in_main_thread(lambda: self.session.proposal(self.session.names[number]))
        if proposal is None:
            return Response(status_code=HTTPStatus.NO_CONTENT)
        about = {"number": number, "round": proposal.number}
        return Response(packed(about, proposal.labels, proposal.uncertainty), media_type=BYTES)

    # Changing

    def _change(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        async def endpoint(request: Request) -> Response:
            content = await self._content(request)

            def store() -> dict[str, Any]:
                with self.storing:
                    return change(content)

            return _json(await run_in_threadpool(store))

        return endpoint

    def _stroke(self, content: dict[str, Any]) -> dict[str, Any]:
        number = self._number(content)
        name = self.session.names[number]
        stroke = checked_stroke(content.get("stroke"), self.storage.classes.labels)
        if stroke["tool"] == "flood":
            stroke = flood(self.photos.read(name), stroke)
        self.storage.add_stroke(name, stroke)
        return self._about(number)

    def _undo(self, content: dict[str, Any]) -> dict[str, Any]:
        number = self._number(content)
        self.storage.undo(self.session.names[number])
        return self._about(number)

    def _reopen(self, content: dict[str, Any]) -> dict[str, Any]:
        number = self._number(content)
        self.storage.reopen(self.session.names[number])
        return self._about(number)

    def _classes(self, content: dict[str, Any]) -> dict[str, Any]:
        action, label, name, colour = (content.get(key) for key in ("action", "label", "name", "colour"))
        if action == "add":
            self.storage.change_classes(lambda classes: classes.add(name, colour))
        elif action == "change":
            self.storage.change_classes(lambda classes: classes.change(label, name=name, colour=colour))
        elif action == "remove":
            used = self.storage.used_labels()
            self.storage.change_classes(lambda classes: classes.remove(label, used))
        else:
            raise UsageError(f"the action {action!r} is unknown - reload the page")
        return {"classes": self.storage.classes.to_list()}

    async def _learn(self, request: Request) -> Response:
        content = await self._content(request)
        name = self.session.names[self._number(content)]
        seconds, scope = content.get("seconds", self.seconds), content.get("scope", self.scope)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_SECONDS:
            raise UsageError(f"seconds={seconds!r} is not a time to learn - give up to {MAX_SECONDS:g}")
        if scope not in ("decoder", "all"):
            raise UsageError(f"scope={scope!r} is unknown - give decoder or all")
        learned = await self.run_in_main_thread(lambda: self.session.learn(name, seconds, scope))
        loss = learned.loss if np.isfinite(learned.loss) else None
        return _json({"steps": learned.steps, "seconds": learned.seconds, "loss": loss, "round": self.session.round})

    async def _accept(self, request: Request) -> Response:
        """Accept the proposal of the round that the page shows, at once; or the newest, once the network is free."""
        content = await self._content(request)
        number = self._number(content)
        name, shown = self.session.names[number], content.get("round")

        def accept_shown(round_: int) -> bool:
            with self.storing:
                return self.session.accept_shown(name, round_)

        if not isinstance(shown, int) or not await run_in_threadpool(accept_shown, shown):
            await self.run_in_main_thread(lambda: self.session.accept(name))
        return _json(await run_in_threadpool(self._about, number))

    # Requests

    async def _content(self, request: Request) -> dict[str, Any]:
        require_own_page(request, "application/json", "send a JSON object as application/json")
        body = await read_body(request, MAX_BYTES, f"this stroke exceeds {MAX_BYTES >> 20} MB - draw it in parts")
        try:
            content = parse_json(body)
        except PlainDataError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"the request {error} - reload the page") from error
        if not isinstance(content, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "the request is not a JSON object - reload the page")
        return content

    def _number(self, content: dict[str, Any]) -> int:
        number = content.get("number")
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self.session.names):
            raise Refused(HTTPStatus.NOT_FOUND, f"photo {number!r} does not exist - reload the page")
        return number

    def _numbers(self, request: Request, *names: str) -> list[int]:
        try:
            query = parse_qs(request.scope["query_string"].decode(), max_num_fields=8)
            numbers = [int(query[name][0]) for name in names]
        except (KeyError, ValueError):
            raise Refused(HTTPStatus.BAD_REQUEST, f"request {request.url.path}?{'&'.join(names)}") from None
        if not 0 <= numbers[0] < len(self.session.names):
            raise Refused(HTTPStatus.NOT_FOUND, f"photo {numbers[0]} does not exist - reload the page")
        return numbers


def packed(about: dict[str, Any], *maps: np.ndarray) -> bytes:
    """Encode (h, w) uint8 maps for the page: the length of the JSON in four bytes, the JSON with their size, maps."""
    height, width = maps[0].shape
    text = json.dumps({**about, "height": height, "width": width}).encode()
    return b"".join((struct.pack("<I", len(text)), text, *(map_.tobytes() for map_ in maps)))


def _json(content: Any) -> Response:
    return Response(json.dumps(content), media_type=JSON)
