"""The web page to try a network: it shows the predictions of the Python interface, and serves nothing else."""

import asyncio
import contextlib
import http.client
import io
import json
import re
import runpy
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from browser import browser_page, needs_chromium
from PIL import Image
from served_page import NAMES, STAGES, error_message, image_file, request, running, write_checkpoint
from starlette.requests import Request

from segdeconv.analysis import switch_paths
from segdeconv.analysis.explanation import Explainer, Question, shown
from segdeconv.checkpoints import checkpoint
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.errors import UsageError
from segdeconv.evaluation.evaluate import evaluate
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.scorers import resized
from segdeconv.inference.segmenter import Segmenter, load
from segdeconv.serving import connection, predictor, server
from segdeconv.serving.predictor import ImagePredictor, pixel

ROOT = Path(__file__).parents[2]
# The pixels of the classes, by a copy: Chromium warns of a second reading of a canvas.
DRAWN = """() => {
    const copy = new OffscreenCanvas(121, 83).getContext("2d");
    copy.drawImage(document.getElementById("classes"), 0, 0);
    return [...copy.getImageData(0, 0, 121, 83).data];
}"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def trained(path):
    return checkpoint.read(path)


@pytest.fixture(scope="module")
def address(trained):
    """The address of a server in this process."""
    with serving(ImagePredictor(Segmenter(trained))) as local:
        yield f"127.0.0.1:{local.port}"


@pytest.mark.parametrize("size", [None, [32, 32]])
def test_a_network_without_an_input_size_sees_images_at_their_own_scale_everywhere(path, size, capsys, monkeypatch):
    monkeypatch.setattr("segdeconv.errors._warned", set())
    keys = (f"size={'null' if size is None else '[32,32]'}", "crop=[8,8]", "batch_size=1", "num_workers=0", "timeout=0")
    overrides = [f"dataset.{key}" for key in keys]
    segmenter = load(path, overrides=overrides, precision="32-true")
    seen = []
    segmenter.network.model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    image = image_file(size=(51, 38))  # of two odd sides
    array = np.array(Image.open(io.BytesIO(image)))
    own = array.shape[:2] if size is None else (32, 32)
    assert segmenter.predict(array).mask.shape == array.shape[:2]
    ImagePredictor(segmenter).predict(image)
    dataset = fakes.Uneven("val", num_val=1, side=48)
    dataset.classes = segmenter.classes
    evaluate(segmenter, dataset)
    assert seen == [own, own, (48, 48) if size is None else (32, 32)]
    assert capsys.readouterr().err.count("dataset.size: images are resized") == (size is not None)
    changed = 0 if size is None else 2  # of 51x38; 48x48 keeps its proportions, and shrinks by less than a factor of 2
    assert (segmenter.resized.count, segmenter.resized.changed) == (3, changed)


def unpacked(body):
    (length,) = struct.unpack_from("<I", body)
    metadata = json.loads(body[4 : 4 + length])
    shape, offset = (metadata["height"], metadata["width"]), 4 + length
    arrays = []
    for kind in ("u1", "<u2", "u1"):
        arrays.append(np.frombuffer(body, kind, shape[0] * shape[1], offset).reshape(shape))
        offset += arrays[-1].nbytes
    return metadata, *arrays, np.array(Image.open(io.BytesIO(body[offset:])))


def expected_probabilities(trained, image):
    """Compute the (C, H, W) probabilities of the plain network step by step."""
    settings = {**trained.facts["preprocessing"], "size": trained.config["dataset"]["size"]}
    normalised = Preprocessing.from_dict(settings)(image)
    with torch.no_grad():
        return resized(trained.model()(normalised[None]), image.shape[:2]).softmax(dim=1)[0]


def test_a_response_contains_the_prediction_of_every_pixel(address, trained):
    image = fakes.image_and_mask(3, 3, (83, 121))[0]
    status, _, body = request(address, "POST", "/look", image_file())
    assert status == 200
    metadata, labels, confidence, uncertainty, shown = unpacked(body)
    probabilities = expected_probabilities(trained, image)
    assert (shown == image).all()
    assert (labels == probabilities.argmax(0).numpy()).mean() >= 0.999
    np.testing.assert_allclose(confidence / 65535, probabilities.max(0).values, atol=1e-4)
    entropy = -(probabilities * probabilities.log()).sum(0) / np.log(3)
    np.testing.assert_allclose(uncertainty / 255, entropy, atol=0.003)
    assert 0.05 < entropy.min() < entropy.max() - 0.01
    np.testing.assert_allclose(metadata["areas"], [(labels == index).mean() for index in range(3)])
    assert (metadata["reduced_from"], metadata["network_size"], metadata["has_path"]) == (None, [40, 56], True)


def test_a_pixels_path_is_its_switch_path_in_pixels_of_the_image(address, trained):
    metadata, *_ = unpacked(request(address, "POST", "/look", image_file())[2])
    explanation = json.loads(request(address, "GET", f"/pixel?picture={metadata['picture']}&y=60&x=100")[2])
    image = fakes.image_and_mask(3, 3, (83, 121))[0]
    probabilities = expected_probabilities(trained, image)
    np.testing.assert_allclose(explanation["probabilities"], probabilities[:, 60, 100], atol=1e-4)
    normalised = Preprocessing.from_dict({**trained.facts["preprocessing"], "size": [40, 56]})(image)
    with torch.no_grad():
        pooled = trained.model().encoder(normalised[None]).pooled
    steps = switch_paths.path(pooled, (60 * 40 // 83, 100 * 56 // 121))
    cells = [(step["pool"], step["cell"]) for step in explanation["path"]]
    assert cells == [(step.level, step.cell) for step in steps]
    top, left, bottom, right = steps[-1].box
    box = [left * 121 / 56, top * 83 / 40, right * 121 / 56, bottom * 83 / 40]
    np.testing.assert_allclose(explanation["path"][-1]["box"], box)
    gone = request(address, "GET", f"/pixel?picture={metadata['picture'] - 1}&y=0&x=0")
    expected = (410, "another image was predicted in the meantime - drop this one again")
    assert (gone[0], error_message(gone)) == expected
    outside = request(address, "GET", f"/pixel?picture={metadata['picture']}&y=83&x=0")
    assert (outside[0], error_message(outside)) == (422, "pixel x=0, y=83 is outside the image of 121x83 pixels")
    assert request(address, "GET", "/pixel?picture=one")[0] == 400


def test_an_explanation_adds_up_and_shows_the_contributions_of_pixels(address, trained):
    metadata, labels, *_ = unpacked(request(address, "POST", "/look", image_file())[2])
    target = f"/explanation?picture={metadata['picture']}&y=60&x=100"
    status, _, body = request(address, "GET", target)
    assert status == 200
    (length,) = struct.unpack_from("<I", body)
    explanation = json.loads(body[4 : 4 + length])
    assert (explanation["exact"], explanation["limits"]) == (True, "")
    assert (explanation["height"], explanation["width"]) == (40, 56)
    of_class, of_difference = explanation["explained"]
    assert of_class["name"] == NAMES[labels[60, 100]]
    assert of_difference["name"].startswith(f"{of_class['name']} - ")
    for numbers in explanation["explained"]:
        assert numbers["sum"] == pytest.approx(numbers["logit"], abs=1e-4)
        assert sum(numbers["levels"].values()) == pytest.approx(numbers["sum"], abs=1e-4)
    maps = np.frombuffer(body, np.int8, offset=4 + length).reshape(2, 40, 56)
    explained = Explainer(trained.model().eval(), Preprocessing.from_dict(
        {**trained.facts["preprocessing"], "size": [40, 56]}), NAMES
    ).explain(fakes.image_and_mask(3, 3, (83, 121))[0], Question(60, 100))  # fmt: skip
    expected = shown(explained.of_difference.pixels, sigma=1)[0]
    np.testing.assert_allclose(maps[1] / 127, expected, atol=0.02)
    assert request(address, "GET", target.replace("x=100", "x=121"))[0] == 422
    assert request(address, "GET", target.replace("picture=", "picture=9"))[0] == 410
    missing = request(address, "GET", "/explanation?picture=1")
    assert (missing[0], error_message(missing)) == (400, "request /explanation?picture=NUMBER&y=ROW&x=COLUMN")


def test_images_of_every_kind_are_shown_upright_and_as_predict_reads_them(address):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = unpacked(request(address, "POST", "/look", image_file(kind="JPEG", exif=exif))[2])
    assert turned[-1].shape == (121, 83, 3)
    image = fakes.image_and_mask(3, 3, (83, 121))[0]
    for stored, expected in [
        (Image.fromarray(image[..., 0].astype(np.uint16) * 257), np.repeat(image[..., :1], 3, 2)),
        (Image.fromarray(image[..., 0]), np.repeat(image[..., :1], 3, 2)),
        (Image.fromarray(np.dstack([image, np.zeros(image.shape[:2], np.uint8)])), np.zeros_like(image)),
    ]:
        file = io.BytesIO()
        stored.save(file, format="PNG")
        assert (unpacked(request(address, "POST", "/look", file.getvalue())[2])[-1] == expected).all()


def test_a_file_that_is_not_an_image_or_too_large_is_an_error_message(address):
    for body, expected in [
        (b"not an image", "this file is not an image (empty, truncated or another format)"),
        (b"", "this file is not an image"),
        (image_file()[:900], "this file is damaged and cannot be decoded"),
        (
            image_file(size=(1001, 1000)),
            "this file has 1000x1001 pixels, more than 1000000 - shrink it or raise dataset.",
        ),
    ]:
        result = request(address, "POST", "/look", body)
        assert result[0] == 422
        assert expected in error_message(result)
        assert "/tmp" not in error_message(result)


def test_a_body_that_is_too_long_is_refused_before_it_is_read(address):
    result = request(address, "POST", "/look", b"", Content_Length=str(server.MAX_BYTES + 1))
    assert result[0] == 413
    assert error_message(result) == "this file is larger than 32 MB - reduce it, or use the command predict"
    assert request(address, "POST", "/look", b"", Content_Length="9" * 20)[0] == 413
    assert request(address, "POST", "/look", b"", Content_Length=None)[0] == 411
    assert request(address, "POST", "/look", b"0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked")[0] == 411


def test_a_body_is_counted_while_it_is_read():
    """No library below is trusted to deliver as many bytes as Content-Length announces."""
    sent = 0

    async def receive():
        nonlocal sent
        sent += 1 << 20
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    request = Request({"type": "http", "headers": [(b"content-length", b"5")]}, receive)
    with pytest.raises(server.Refused, match="this file is larger than 32 MB"):
        asyncio.run(server.read_body(request, server.MAX_BYTES, "this file is larger than 32 MB"))
    assert sent == server.MAX_BYTES + (1 << 20)


@pytest.mark.parametrize(
    "target",
    ["/../server.py", "/page.js/../server.py", "/%2e%2e/server.py", "/server.py", "//etc/passwd", "/etc/passwd",
     "/page.html", "/look", "http://127.0.0.1/etc/passwd"],
)  # fmt: skip
def test_nothing_but_the_page_is_served(address, target):
    result = request(address, "GET", target)
    assert (result[0], error_message(result)) == (404, f"page not found - open http://{address}/")


def test_requests_to_other_hosts_and_from_other_pages_are_refused(address):
    port = address.rpartition(":")[2]
    for host in (f"evil.example:{port}", "evil.example", f"127.0.0.1.evil.example:{port}", "", "[", "0x7f.1"):
        assert request(address, "GET", "/", Host=host)[0] == 403
        assert request(address, "POST", "/look", image_file(), Host=host)[0] == 403
    assert request(address, "GET", "/", Host=None)[0] == 400
    for host in (f"localhost:{port}", f"[::1]:{port}", address):
        assert request(address, "GET", "/", Host=host)[0] == 200
    for origin in ("http://evil.example", "null", f"https://{address}", "http://127.0.0.1:1"):
        assert request(address, "POST", "/look", image_file(), Origin=origin)[0] == 403
    assert request(address, "POST", "/look", image_file(), Origin=f"http://{address}")[0] == 200
    assert request(address, "POST", "/look", image_file(), Content_Type="text/plain")[0] == 415
    assert request(address, "POST", "/", image_file())[0] == 404
    for method in ("OPTIONS", "PUT", "DELETE", "TRACE"):
        status, headers, body = request(address, method, "/look")
        assert (status, body) == (501, b"")
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_every_response_has_security_headers(address):
    for target in ("/", "/page.js", "/page.css", "/network", "/nothing"):
        _, headers, body = request(address, "GET", target)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'; script-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Access-Control-Allow-Origin"] is None
        assert not re.search(rb"(src|href)=\"(https?:)?//", body)


@contextlib.contextmanager
def serving(predictor):
    """Run a server in this process and yield it."""
    local = server.Server(predictor, "127.0.0.1", 0)
    thread = threading.Thread(target=local.serve)
    thread.start()
    try:
        yield local
    finally:
        local.stop()
        thread.join()


def test_idle_and_slow_connections_are_closed(trained, monkeypatch):
    monkeypatch.setattr(connection, "IDLE_TIMEOUT", 0.2)
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT", 0.5)
    head = b"POST /look HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
    cut = head + b"Content-Length: 99\r\n\r\n"
    with serving(ImagePredictor(Segmenter(trained))) as local:
        for start, drip in ((b"", b""), (b"GET", b""), (cut, b""), (b"GET / HTTP/1.1\r\n", b"A: b\r\n"), (cut, b"a")):
            with socket.create_connection(("127.0.0.1", local.port), timeout=5) as client:
                started = time.monotonic()
                client.sendall(start)
                with contextlib.suppress(OSError):
                    while time.monotonic() - started < 4:
                        client.settimeout(0.1)
                        try:
                            if not client.recv(1000):
                                break
                        except TimeoutError:
                            client.sendall(drip)
                assert 0.1 < time.monotonic() - started < 2
        assert request(f"127.0.0.1:{local.port}", "GET", "/")[0] == 200


def test_a_client_that_does_not_read_its_response_is_disconnected(trained, monkeypatch):
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT", 0.7)
    body = image_file(size=(900, 1000))
    with serving(ImagePredictor(Segmenter(trained))) as local, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", local.port))
        client.sendall(
            b"POST /look HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        client.settimeout(30)
        assert client.recv(12) == b"HTTP/1.1 200"
        started = time.monotonic()
        while local.http.server_state.connections:
            assert time.monotonic() - started < 10
            time.sleep(0.05)
        assert time.monotonic() - started > 0.3


def test_connections_beyond_the_maximum_are_closed_and_the_others_answered(address):
    with contextlib.ExitStack() as stack:
        host, port = address.split(":")
        idle = [
            stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(connection.MAX_CONNECTIONS)
        ]
        time.sleep(0.3)
        late = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        with contextlib.suppress(ConnectionError):
            assert late.recv(1) == b""
        assert len(idle) == connection.MAX_CONNECTIONS
    for _ in range(50):
        with contextlib.suppress(OSError, http.client.HTTPException):
            if request(address, "GET", "/")[0] == 200:
                return
        time.sleep(0.1)
    pytest.fail("the server no longer answers")


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_the_server_even_during_a_prediction(path, number, code, message):
    with running(path, "dataset.size=[1000,1000]", "dataset.max_pixels=9000000") as (address, process):
        host, port = address.split(":")
        body = image_file(size=(1000, 1400))
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                f"POST /look HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/octet-stream\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            time.sleep(0.3)
            started = time.monotonic()
            process.send_signal(number)
            time.sleep(0.03)
            process.send_signal(signal.SIGTERM if number == signal.SIGINT else signal.SIGINT)  # changes nothing
            _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - started < 30  # generous for a busy machine; an interruption waits for one operation
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def command_line(monkeypatch, *words):
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, words)])
    runpy.run_path(str(ROOT / "scripts" / "serve.py"))["main"]()


def test_mistakes_are_error_messages(trained, address, monkeypatch):
    with pytest.raises(UsageError, match="--port 70000 is not a valid port - give 0 to 65535"):
        command_line(monkeypatch, trained.path, "--port", "70000")
    port, predictor = int(address.rpartition(":")[2]), ImagePredictor(Segmenter(trained))
    with pytest.raises(UsageError, match=f"port {port} is in use - choose another with --port, or 0 for any free port"):
        server.Server(predictor, "127.0.0.1", port)
    with pytest.raises(UsageError, match=r"cannot listen on --host 192.0.2.1 \(.*\) - give an address of this machine"):
        server.Server(predictor, "192.0.2.1", 0)
    with pytest.raises(UsageError, match=r"^samples=-1 is not a valid number of passes"):
        ImagePredictor(Segmenter(trained, PredictionSettings(samples=-1)))


@pytest.mark.parametrize("library", ["starlette", "uvicorn", "h11"])
def test_a_missing_library_is_an_error_message(trained, monkeypatch, library):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("starlette", "uvicorn", "h11")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("server", "local_server", "connection"):
        monkeypatch.delitem(sys.modules, f"segdeconv.serving.{name}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf'^serving the page needs {library} - pip install "segdeconv\[serve\]"$'):
        command_line(monkeypatch, trained.path)


@pytest.mark.slow
def test_a_host_that_other_machines_can_reach_prints_a_warning(path):
    with running(path, "--host", "0.0.0.0") as (address, process):
        port = address.rpartition(":")[2]
        assert request(f"127.0.0.1:{port}", "GET", "/", Host=f"192.0.2.7:{port}")[0] == 200
        assert request(f"127.0.0.1:{port}", "GET", "/", Host="evil.example")[0] == 403
        process.send_signal(signal.SIGINT)
        assert "warning: --host 0.0.0.0 lets everyone on your network" in process.communicate()[1]


def test_large_images_are_reduced_and_samples_averaged(trained, monkeypatch):
    monkeypatch.setattr(predictor, "MAX_PIXELS", 5000)
    averaging = ImagePredictor(Segmenter(trained, PredictionSettings(samples=3)))
    prediction = averaging.predict(image_file())
    assert prediction.reduced_from == (83, 121)
    assert 4800 < prediction.size[0] * prediction.size[1] <= 5000
    assert abs(prediction.size[1] / prediction.size[0] - 121 / 83) < 0.03
    assert torch.equal(prediction.probabilities, averaging.predict(image_file()).probabilities)
    single = ImagePredictor(Segmenter(trained)).predict(image_file()).probabilities
    assert 0.001 < (prediction.probabilities - single).abs().mean() < 0.2
    with pytest.raises(UsageError, match="pixel x=500, y=0 is outside the image"):
        pixel(prediction, 0, 500)


@needs_chromium
def test_the_page(address, trained, tmp_path):
    (tmp_path / "photo.png").write_bytes(image_file())
    probabilities = expected_probabilities(trained, fakes.image_and_mask(3, 3, (83, 121))[0])
    labels = probabilities.argmax(0)
    with browser_page() as page:
        page.goto(f"http://{address}/")
        page.wait_for_selector("body[data-ready]")
        assert page.text_content("#network") == "SegNet, 3 classes"
        # A file is dropped.
        page.evaluate(
            """bytes => {
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([new Uint8Array(bytes)], "photo.png", { type: "image/png" }));
                document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
            }""",
            list((tmp_path / "photo.png").read_bytes()),
        )
        page.wait_for_selector("#result:not([hidden])")
        order = sorted((index for index in range(3) if (labels == index).any()), key=lambda i: -(labels == i).sum())
        assert page.locator("#legend .name").all_text_contents() == [NAMES[index] for index in order]
        assert page.locator("#legend img").count() == 0  # HTML in a class name is shown as text
        expected_shares = [100 * float((labels == index).float().mean()) for index in order]
        shares = [float(text.strip("< %")) for text in page.locator("#legend .share").all_text_contents()]
        assert shares == pytest.approx(expected_shares, abs=0.1)
        # The pixel under the mouse.
        box = page.locator("#stage").bounding_box()
        y, x = 60, 100
        page.mouse.move(box["x"] + (x + 0.5) / 121 * box["width"], box["y"] + (y + 0.5) / 83 * box["height"])
        readout = page.text_content("#readout")
        assert readout.startswith(NAMES[labels[y, x]])
        assert readout.endswith(f"x {x}, y {y}")
        assert float(re.search(r" (\d+\.\d) % · uncertainty", readout)[1]) == pytest.approx(
            100 * float(probabilities[:, y, x].max()), abs=0.06
        )
        # The opacity of the classes.
        page.locator("#opacity").fill("25")
        assert page.evaluate("document.getElementById('classes').style.opacity") == "0.25"
        # The path of the pixel.
        page.mouse.down()
        page.mouse.up()
        page.wait_for_selector("#pixel:not([hidden])")
        assert page.locator("#steps li").count() == len(STAGES)
        assert page.locator("#path rect.over").count() == len(STAGES) + 1
        assert page.locator("#path polyline.over").count() == 1
        shown = [float(text.strip("< %")) for text in page.locator("#probabilities .share").all_text_contents()]
        assert shown == pytest.approx(sorted((100 * probabilities[:, y, x]).tolist(), reverse=True), abs=0.11)
        # The keyboard.
        page.focus("#stage")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Shift+ArrowUp")
        assert page.text_content("#readout").endswith(f"x {x + 1}, y {y - 10}")
        assert page.locator("#pixel").is_hidden()
        page.keyboard.press("Enter")
        page.wait_for_selector("#pixel:not([hidden])")
        page.keyboard.press("Escape")
        assert page.locator("#pixel").is_hidden()
        # The explanation of the class, by mouse and by keyboard.
        page.mouse.click(box["x"] + (x + 0.5) / 121 * box["width"], box["y"] + (y + 0.5) / 83 * box["height"])
        page.wait_for_selector("#pixel:not([hidden])")
        assert page.locator("#contributions").is_hidden()
        page.click("#explain")
        page.wait_for_selector("#explained:not([hidden])")
        assert page.locator("#contributions").is_visible()
        assert page.locator("#classes").is_hidden()
        numbers = [float(text) for text in re.findall(r"-?\d+\.\d+(?:e-\d+)?", page.text_content("#sum"))]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)
        levels = [float(text) for text in page.locator("#levels .share").all_text_contents()]
        assert sum(levels) == pytest.approx(numbers[0], abs=0.02)  # of three digits each
        assert page.locator("#levels li").count() == 7  # pixels, three levels of the encoder and three of the decoder
        names = page.locator("#numbers label").all_text_contents()
        assert names[0] == NAMES[labels[y, x]]
        page.locator("#numbers input").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.text_content("#signs").startswith(f"In the image: red pixels raise {names[1]}, blue ones lower it")
        page.focus("#stage")
        page.keyboard.press("Escape")
        assert page.locator("#contributions").is_hidden()
        assert page.locator("#classes").is_visible()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("e")
        page.wait_for_selector("#explained:not([hidden])")
        page.keyboard.press("Escape")
        # Only the largest class, in its colour.
        page.locator("#legend button").first.click()
        canvas = page.evaluate(DRAWN)
        expected = np.zeros((83, 121, 4), np.uint8)
        expected[labels == order[0]] = [*trained.classes.colours[order[0]], 255]
        assert (np.reshape(canvas, (83, 121, 4)) == expected).all()
        # Only its outlines: its pixels with another class in the square around them.
        page.check("#outlines")
        canvas = page.evaluate(DRAWN)
        padded = np.pad(labels.numpy(), 1, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
        expected[(windows == labels.numpy()[:, :, None, None]).all(axis=(2, 3))] = 0
        assert expected.any()
        assert (np.reshape(canvas, (83, 121, 4)) == expected).all()
        page.check("input[value=uncertainty]", force=True)
        assert page.locator("#classes").is_hidden()
        assert page.locator("#outlines").is_disabled()


@needs_chromium
def test_a_file_that_is_not_an_image_shows_an_error_and_the_next_image_is_shown(address, tmp_path):
    (tmp_path / "photo.png").write_bytes(image_file())
    (tmp_path / "bad.jpg").write_text("not an image")

    def try_both():
        with browser_page(dark=True) as page:
            page.goto(f"http://{address}/")
            page.wait_for_selector("body[data-ready]")
            page.set_input_files("#file", tmp_path / "bad.jpg")
            page.wait_for_selector("#error:not([hidden])")
            assert page.text_content("#error").startswith(
                "this file is not an image (empty, truncated or another format)"
            )
            assert page.locator("#result").is_hidden()
            page.set_input_files("#file", tmp_path / "photo.png")
            page.wait_for_selector("#result:not([hidden])")
            assert page.locator("#error").is_hidden()

    with pytest.raises(AssertionError, match="the server responded with a status of 422"):  # Chromium logs it
        try_both()
