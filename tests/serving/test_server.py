"""The web page to try a network: it shows the predictions of the Python interface, and serves nothing else."""

import contextlib
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from browser import browser_page, needs_chromium
from checkpoint_files import content
from fresh_commands import child_environment
from PIL import Image

from segdeconv.analysis import switch_paths
from segdeconv.checkpoints import checkpoint
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.errors import UsageError
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.scorers import resized
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models import SegNet
from segdeconv.serving import predictor, server
from segdeconv.serving.predictor import ImagePredictor, pixel

ROOT = Path(__file__).parents[2]
EVIL = "<img src=x onerror=alert(1)>"
NAMES = ("sky", EVIL, "car")
STAGES = [[4], [8], [8]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The checkpoint of a random network with input size 40x56; the name of one class contains HTML."""
    torch.manual_seed(0)
    model = SegNet(len(NAMES), stages=tuple(map(tuple, STAGES)), dropout_at="central")
    written = content()
    metadata, config = written["hyper_parameters"]["facts"], written["hyper_parameters"]["config"]
    metadata["classes"] |= {
        "names": list(NAMES),
        "colours": [[250, 0, 0], [0, 250, 0], [0, 0, 250]],
        "labels": [0, 1, 2],
    }
    metadata["preprocessing"] = {"size": None, "mean": [120.0, 110.0, 100.0], "std": [60.0, 61.0, 62.0]}
    metadata["precision"] = "32-true"
    config["model"] = {"_target_": "segdeconv.models.SegNet", "stages": STAGES, "dropout_at": "central"}
    config["dataset"] = {"size": [40, 56], "crop": None, "max_pixels": 1_000_000}
    written["state_dict"] = {f"model.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("served") / "best.ckpt"
    checkpoint.write(written, path)
    return path


@pytest.fixture(scope="module")
def trained(path):
    return checkpoint.read(path)


@contextlib.contextmanager
def running(path, *words):
    """Run the real command and yield its address and process."""
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), str(path), "--port", "0", *words]
    environment = child_environment(ROOT, OMP_NUM_THREADS="1")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            assert "http://" in line, process.stderr.read()
            yield re.search(r"http://(\S+)/", line)[1], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(trained):
    """The address of a server in this process."""
    local = server.Server(ImagePredictor(Segmenter(trained)), "127.0.0.1", 0)
    threading.Thread(target=local.serve, daemon=True).start()
    yield f"127.0.0.1:{local.server_port}"
    local.shutdown()
    local.server_close()


def image_file(seed=3, size=(83, 121), kind="PNG", **settings):
    """Encode a random image and return the bytes of the file."""
    file = io.BytesIO()
    Image.fromarray(fakes.image_and_mask(seed, 3, size)[0]).save(file, format=kind, **settings)
    return file.getvalue()


def request(address, method, target, body=None, **headers):
    """Send a request and return status, headers and body of the response; a header of None is left out."""
    connection = http.client.HTTPConnection(address, timeout=30)
    sent = {"Content-Type": "application/octet-stream", "Host": address} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    if body is not None and "Content-Length" not in sent:
        sent["Content-Length"] = str(len(body))
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    result = response.status, response.headers, response.read()
    connection.close()
    return result


def error_message(result):
    return json.loads(result[2])["error"]


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
    assert request(address, "POST", "/look", b"", Content_Length="9" * 5000)[0] == 413
    assert request(address, "POST", "/look", b"", Content_Length=None)[0] == 411
    assert request(address, "POST", "/look", b"", Content_Length="-1")[0] == 411
    assert request(address, "POST", "/look", b"0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked")[0] == 411


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
    assert request(address, "GET", "/", Host=None)[0] == 403
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


def test_idle_and_slow_connections_are_closed(trained, monkeypatch):
    monkeypatch.setattr(server.Handler, "timeout", 0.2)
    monkeypatch.setattr(server, "REQUEST_TIMEOUT", 0.5)
    local = server.Server(ImagePredictor(Segmenter(trained)), "127.0.0.1", 0)
    threading.Thread(target=local.serve, daemon=True).start()
    address = ("127.0.0.1", local.server_port)
    head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
    cut = head + b"Content-Length: 99\r\n\r\n"
    for start, drip in ((b"GET", b""), (cut, b""), (b"GET / HTTP/1.1\r\n", b"A: b\r\n")):
        with socket.create_connection(address, timeout=5) as client:
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
            assert time.monotonic() - started < 2
    assert request(f"127.0.0.1:{local.server_port}", "GET", "/")[0] == 200
    local.shutdown()
    local.server_close()


def test_connections_beyond_the_maximum_are_closed_and_the_others_answered(address):
    with contextlib.ExitStack() as stack:
        host, port = address.split(":")
        idle = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(server.MAX_CONNECTIONS)]
        time.sleep(0.3)
        late = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        with contextlib.suppress(ConnectionError):
            assert late.recv(1) == b""
        assert len(idle) == server.MAX_CONNECTIONS
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
    with running(path, "dataset.size=[1500,1500]", "dataset.max_pixels=9000000") as (address, process):
        host, port = address.split(":")
        body = image_file(size=(1000, 1400))
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                f"POST /predict HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/octet-stream\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            time.sleep(0.3)
            started = time.monotonic()
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - started < 30  # generous for a busy machine; an interruption waits for one operation
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_mistakes_are_error_messages(trained, address, tmp_path, commands):
    done = commands("serve", trained.path, "--port", "70000", cwd=tmp_path)
    assert (done.code, done.error_message) == (2, "--port 70000 is not a valid port - give 0 to 65535")
    port, predictor = int(address.rpartition(":")[2]), ImagePredictor(Segmenter(trained))
    with pytest.raises(UsageError, match=f"port {port} is in use - choose another with --port, or 0 for any free port"):
        server.Server(predictor, "127.0.0.1", port)
    with pytest.raises(UsageError, match=r"cannot listen on --host 192.0.2.1 \(.*\) - give an address of this machine"):
        server.Server(predictor, "192.0.2.1", 0)
    with pytest.raises(UsageError, match="--samples=-1 is not a valid number of passes"):
        ImagePredictor(Segmenter(trained, PredictionSettings(samples=-1)))


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
        # Only the largest class, in its colour.
        page.locator("#legend button").first.click()
        canvas = page.evaluate(
            "[...document.getElementById('classes').getContext('2d').getImageData(0, 0, 121, 83).data]"
        )
        expected = np.zeros((83, 121, 4), np.uint8)
        expected[labels == order[0]] = [*trained.classes.colours[order[0]], 255]
        assert (np.reshape(canvas, (83, 121, 4)) == expected).all()
        page.check("input[value=uncertainty]", force=True)
        assert page.locator("#classes").is_hidden()


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
