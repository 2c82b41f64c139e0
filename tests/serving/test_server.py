"""The page to try a network: what it shows is what Python says, and it answers nobody else and nothing else."""

import contextlib
import http.client
import io
import json
import os
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
from segdeconv.serving.predictor import PicturePredictor, pixel

ROOT = Path(__file__).parents[2]
EVIL = "<img src=x onerror=alert(1)>"
NAMES = ("sky", EVIL, "car")
STAGES = [[4], [8], [8]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint of a network with random weights that sees pictures at 40x56; one class is named with HTML."""
    torch.manual_seed(0)
    model = SegNet(len(NAMES), stages=tuple(map(tuple, STAGES)), dropout_at="central")
    whole = content()
    facts, config = whole["hyper_parameters"]["facts"], whole["hyper_parameters"]["config"]
    facts["classes"] |= {"names": list(NAMES), "colours": [[250, 0, 0], [0, 250, 0], [0, 0, 250]], "labels": [0, 1, 2]}
    facts["preprocessing"] = {"size": None, "mean": [120.0, 110.0, 100.0], "std": [60.0, 61.0, 62.0]}
    facts["precision"] = "32-true"
    config["model"] = {"_target_": "segdeconv.models.SegNet", "stages": STAGES, "dropout_at": "central"}
    config["dataset"] = {"size": [40, 56], "crop": None, "max_pixels": 1_000_000}
    whole["state_dict"] = {f"model.{name}": value for name, value in model.state_dict().items()}
    place = tmp_path_factory.mktemp("served") / "best.ckpt"
    checkpoint.write(whole, place)
    return place


@pytest.fixture(scope="module")
def read(path):
    return checkpoint.read(path)


@contextlib.contextmanager
def running(path, *words):
    """(address, process) of the real command."""
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), str(path), "--port", "0", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            said = process.stdout.readline()
            assert "http://" in said, process.stderr.read()
            yield re.search(r"http://(\S+)/", said)[1], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(read):
    """Where a server in this process answers."""
    one = server.Server(PicturePredictor(Segmenter(read)), "127.0.0.1", 0)
    threading.Thread(target=one.serve, daemon=True).start()
    yield f"127.0.0.1:{one.server_port}"
    one.shutdown()
    one.server_close()


def picture(seed=3, size=(83, 121), kind="PNG", **settings):
    made = io.BytesIO()
    Image.fromarray(fakes.image_and_mask(seed, 3, size)[0]).save(made, format=kind, **settings)
    return made.getvalue()


def asked(address, method, target, body=None, **headers):
    """(status, headers, body) of one request, in which a header of None is left out."""
    connection = http.client.HTTPConnection(address, timeout=30)
    given = {"Content-Type": "application/octet-stream", "Host": address} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    if body is not None and "Content-Length" not in given:
        given["Content-Length"] = str(len(body))
    for name, value in given.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    result = answer.status, answer.headers, answer.read()
    connection.close()
    return result


def sentence(result):
    return json.loads(result[2])["error"]


def unpacked(body):
    (length,) = struct.unpack_from("<I", body)
    said = json.loads(body[4 : 4 + length])
    shape, place = (said["height"], said["width"]), 4 + length
    arrays = []
    for kind in ("u1", "<u2", "u1"):
        arrays.append(np.frombuffer(body, kind, shape[0] * shape[1], place).reshape(shape))
        place += arrays[-1].nbytes
    return said, *arrays, np.array(Image.open(io.BytesIO(body[place:])))


def by_hand(read, image):
    """(C, H, W) probabilities of the plain network, by its own steps."""
    ready = Preprocessing.from_dict({**read.facts["preprocessing"], "size": read.config["dataset"]["size"]})(image)
    with torch.no_grad():
        return resized(read.model()(ready[None]), image.shape[:2]).softmax(dim=1)[0]


def test_an_answer_holds_what_the_network_says_of_every_pixel(address, read):
    image = fakes.image_and_mask(3, 3, (83, 121))[0]
    status, _, body = asked(address, "POST", "/look", picture())
    assert status == 200
    said, labels, confidence, uncertainty, shown = unpacked(body)
    likely = by_hand(read, image)
    assert (shown == image).all()
    assert (labels == likely.argmax(0).numpy()).mean() >= 0.999
    np.testing.assert_allclose(confidence / 65535, likely.max(0).values, atol=1e-4)
    entropy = -(likely * likely.log()).sum(0) / np.log(3)
    np.testing.assert_allclose(uncertainty / 255, entropy, atol=0.003)
    assert 0.05 < entropy.min() < entropy.max() - 0.01
    np.testing.assert_allclose(said["areas"], [(labels == index).mean() for index in range(3)])
    assert (said["reduced_from"], said["network_size"], said["has_path"]) == (None, [40, 56], True)


def test_a_pixels_path_is_that_of_flow_in_pixels_of_the_picture(address, read):
    said, *_ = unpacked(asked(address, "POST", "/look", picture())[2])
    answer = json.loads(asked(address, "GET", f"/pixel?picture={said['picture']}&y=60&x=100")[2])
    image = fakes.image_and_mask(3, 3, (83, 121))[0]
    likely = by_hand(read, image)
    np.testing.assert_allclose(answer["probabilities"], likely[:, 60, 100], atol=1e-4)
    ready = Preprocessing.from_dict({**read.facts["preprocessing"], "size": [40, 56]})(image)
    with torch.no_grad():
        pooled = read.model().encoder(ready[None]).pooled
    steps = switch_paths.path(pooled, (60 * 40 // 83, 100 * 56 // 121))
    assert [(one["pool"], one["cell"]) for one in answer["path"]] == [(one.level, one.cell) for one in steps]
    top, left, bottom, right = steps[-1].box
    box = [left * 121 / 56, top * 83 / 40, right * 121 / 56, bottom * 83 / 40]
    np.testing.assert_allclose(answer["path"][-1]["box"], box)
    gone = asked(address, "GET", f"/pixel?picture={said['picture'] - 1}&y=0&x=0")
    assert (gone[0], sentence(gone)) == (410, "another picture was looked at since - drop this one again")
    outside = asked(address, "GET", f"/pixel?picture={said['picture']}&y=83&x=0")
    assert (outside[0], sentence(outside)) == (422, "pixel x=0, y=83 is not in a picture of 121x83")
    assert asked(address, "GET", "/pixel?picture=one")[0] == 400


def test_pictures_of_every_kind_are_shown_upright_and_as_predict_reads_them(address):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = unpacked(asked(address, "POST", "/look", picture(kind="JPEG", exif=exif))[2])
    assert turned[-1].shape == (121, 83, 3)
    image = fakes.image_and_mask(3, 3, (83, 121))[0]
    for stored, expected in [
        (Image.fromarray(image[..., 0].astype(np.uint16) * 257), np.repeat(image[..., :1], 3, 2)),
        (Image.fromarray(image[..., 0]), np.repeat(image[..., :1], 3, 2)),
        (Image.fromarray(np.dstack([image, np.zeros(image.shape[:2], np.uint8)])), np.zeros_like(image)),
    ]:
        made = io.BytesIO()
        stored.save(made, format="PNG")
        assert (unpacked(asked(address, "POST", "/look", made.getvalue())[2])[-1] == expected).all()


def test_what_is_no_picture_or_too_large_is_one_sentence(address):
    for body, expected in [
        (b"no picture", "this file is not an image (empty, truncated or another format)"),
        (b"", "this file is not an image"),
        (picture()[:900], "this file is damaged and cannot be decoded"),
        (picture(size=(1001, 1000)), "this file has 1000x1001 pixels, more than 1000000 - shrink it or raise dataset."),
    ]:
        result = asked(address, "POST", "/look", body)
        assert result[0] == 422
        assert expected in sentence(result)
        assert "/tmp" not in sentence(result)


def test_a_body_that_is_too_long_is_refused_before_it_is_read(address):
    result = asked(address, "POST", "/look", b"", Content_Length=str(server.MAX_BYTES + 1))
    assert result[0] == 413
    assert sentence(result) == "this file is larger than 32 MB - shrink it, or use the command predict"
    assert asked(address, "POST", "/look", b"", Content_Length="9" * 5000)[0] == 413
    assert asked(address, "POST", "/look", b"", Content_Length=None)[0] == 411
    assert asked(address, "POST", "/look", b"", Content_Length="-1")[0] == 411
    assert asked(address, "POST", "/look", b"0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked")[0] == 411


@pytest.mark.parametrize(
    "target",
    ["/../look.py", "/page.js/../look.py", "/%2e%2e/look.py", "/look.py", "//etc/passwd", "/etc/passwd", "/page.html",
     "/look", "http://127.0.0.1/etc/passwd"],
)  # fmt: skip
def test_nothing_is_served_but_the_page(address, target):
    result = asked(address, "GET", target)
    assert (result[0], sentence(result)) == (404, f"there is nothing here but http://{address}/")


def test_only_this_machine_and_the_page_itself_are_answered(address):
    port = address.rpartition(":")[2]
    for host in (f"evil.example:{port}", "evil.example", f"127.0.0.1.evil.example:{port}", "", "[", "0x7f.1"):
        assert asked(address, "GET", "/", Host=host)[0] == 403
        assert asked(address, "POST", "/look", picture(), Host=host)[0] == 403
    assert asked(address, "GET", "/", Host=None)[0] == 403
    for host in (f"localhost:{port}", f"[::1]:{port}", address):
        assert asked(address, "GET", "/", Host=host)[0] == 200
    for origin in ("http://evil.example", "null", f"https://{address}", "http://127.0.0.1:1"):
        assert asked(address, "POST", "/look", picture(), Origin=origin)[0] == 403
    assert asked(address, "POST", "/look", picture(), Origin=f"http://{address}")[0] == 200
    assert asked(address, "POST", "/look", picture(), Content_Type="text/plain")[0] == 415
    assert asked(address, "POST", "/", picture())[0] == 404
    for method in ("OPTIONS", "PUT", "DELETE", "TRACE"):
        status, headers, body = asked(address, method, "/look")
        assert (status, body) == (501, b"")
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_every_answer_says_what_a_browser_may_do_with_it(address):
    for target in ("/", "/page.js", "/page.css", "/network", "/nothing"):
        _, headers, body = asked(address, "GET", target)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'; script-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Access-Control-Allow-Origin"] is None
        assert not re.search(rb"(src|href)=\"(https?:)?//", body)


def test_who_says_nothing_or_takes_too_long_is_cut_off(read, monkeypatch):
    monkeypatch.setattr(server.Handler, "timeout", 0.2)
    monkeypatch.setattr(server, "REQUEST", 0.5)
    one = server.Server(PicturePredictor(Segmenter(read)), "127.0.0.1", 0)
    threading.Thread(target=one.serve, daemon=True).start()
    address = ("127.0.0.1", one.server_port)
    head = b"POST /look HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
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
    assert asked(f"127.0.0.1:{one.server_port}", "GET", "/")[0] == 200
    one.shutdown()
    one.server_close()


def test_connections_beyond_the_places_are_closed_and_the_others_answered(address):
    with contextlib.ExitStack() as stack:
        host, port = address.split(":")
        idle = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(server.CONNECTIONS)]
        time.sleep(0.3)
        late = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        with contextlib.suppress(ConnectionError):
            assert late.recv(1) == b""
        assert len(idle) == server.CONNECTIONS
    for _ in range(50):
        with contextlib.suppress(OSError, http.client.HTTPException):
            if asked(address, "GET", "/")[0] == 200:
                return
        time.sleep(0.1)
    pytest.fail("it does not answer any more")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_it_at_once_also_while_it_looks(path, number, code, said):
    with running(path, "dataset.size=[1500,1500]", "dataset.max_pixels=9000000") as (address, process):
        host, port = address.split(":")
        body = picture(size=(1000, 1400))
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                f"POST /look HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/octet-stream\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            time.sleep(0.3)
            started = time.monotonic()
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - started < 30  # of a busy machine; an interruption waits for one operation
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err


def test_mistakes_are_one_sentence(read, address, tmp_path, commands):
    done = commands("serve", read.path, "--port", "70000", cwd=tmp_path)
    assert (done.code, done.sentence) == (2, "--port 70000 is no port - give 0 to 65535")
    port, predictor = int(address.rpartition(":")[2]), PicturePredictor(Segmenter(read))
    with pytest.raises(UsageError, match=f"port {port} is in use - choose another with --port, or 0 for any that is"):
        server.Server(predictor, "127.0.0.1", port)
    with pytest.raises(UsageError, match=r"cannot listen on --host 192.0.2.1 \(.*\) - give an address of this machine"):
        server.Server(predictor, "192.0.2.1", 0)
    with pytest.raises(UsageError, match="--samples=-1 is no number of passes"):
        PicturePredictor(Segmenter(read, PredictionSettings(samples=-1)))


@pytest.mark.slow
def test_a_host_that_others_reach_is_a_warning(path):
    with running(path, "--host", "0.0.0.0") as (address, process):
        port = address.rpartition(":")[2]
        assert asked(f"127.0.0.1:{port}", "GET", "/", Host=f"192.0.2.7:{port}")[0] == 200
        assert asked(f"127.0.0.1:{port}", "GET", "/", Host="evil.example")[0] == 403
        process.send_signal(signal.SIGINT)
        assert "warning: --host 0.0.0.0 lets everyone on your network" in process.communicate()[1]


def test_large_pictures_are_reduced_and_samples_averaged(read, monkeypatch):
    monkeypatch.setattr(predictor, "LARGEST", 5000)
    averaging = PicturePredictor(Segmenter(read, PredictionSettings(samples=3)))
    seen = averaging.predict(picture())
    assert seen.reduced_from == (83, 121)
    assert 4800 < seen.size[0] * seen.size[1] <= 5000
    assert abs(seen.size[1] / seen.size[0] - 121 / 83) < 0.03
    assert torch.equal(seen.probabilities, averaging.predict(picture()).probabilities)
    alone = PicturePredictor(Segmenter(read)).predict(picture()).probabilities
    assert 0.001 < (seen.probabilities - alone).abs().mean() < 0.2
    with pytest.raises(UsageError, match="pixel x=500, y=0 is not in a picture"):
        pixel(seen, 0, 500)


@needs_chromium
def test_the_page(address, read, tmp_path):
    (tmp_path / "photo.png").write_bytes(picture())
    likely = by_hand(read, fakes.image_and_mask(3, 3, (83, 121))[0])
    labels = likely.argmax(0)
    with browser_page() as page:
        page.goto(f"http://{address}/")
        page.wait_for_selector("body[data-ready]")
        assert page.text_content("#network") == "SegNet, 3 classes"
        # A file is dropped.
        page.evaluate(
            """bytes => {
                const given = new DataTransfer();
                given.items.add(new File([new Uint8Array(bytes)], "photo.png", { type: "image/png" }));
                document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: given, bubbles: true }));
            }""",
            list((tmp_path / "photo.png").read_bytes()),
        )
        page.wait_for_selector("#result:not([hidden])")
        order = sorted((index for index in range(3) if (labels == index).any()), key=lambda i: -(labels == i).sum())
        assert page.locator("#legend .name").all_text_contents() == [NAMES[index] for index in order]
        assert page.locator("#legend img").count() == 0  # the name with HTML is text
        shares = [100 * float((labels == index).float().mean()) for index in order]
        found = [float(text.strip("< %")) for text in page.locator("#legend .share").all_text_contents()]
        assert found == pytest.approx(shares, abs=0.1)
        # The pixel under the mouse.
        box = page.locator("#stage").bounding_box()
        y, x = 60, 100
        page.mouse.move(box["x"] + (x + 0.5) / 121 * box["width"], box["y"] + (y + 0.5) / 83 * box["height"])
        said = page.text_content("#readout")
        assert said.startswith(NAMES[labels[y, x]])
        assert said.endswith(f"x {x}, y {y}")
        assert float(re.search(r" (\d+\.\d) % · uncertainty", said)[1]) == pytest.approx(
            100 * float(likely[:, y, x].max()), abs=0.06
        )
        # Its opacity.
        page.locator("#opacity").fill("25")
        assert page.evaluate("document.getElementById('classes').style.opacity") == "0.25"
        # Its path.
        page.mouse.down()
        page.mouse.up()
        page.wait_for_selector("#pixel:not([hidden])")
        assert page.locator("#steps li").count() == len(STAGES)
        assert page.locator("#path rect.over").count() == len(STAGES) + 1
        assert page.locator("#path polyline.over").count() == 1
        shown = [float(text.strip("< %")) for text in page.locator("#likely .share").all_text_contents()]
        assert shown == pytest.approx(sorted((100 * likely[:, y, x]).tolist(), reverse=True), abs=0.11)
        # By keyboard.
        page.focus("#stage")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Shift+ArrowUp")
        assert page.text_content("#readout").endswith(f"x {x + 1}, y {y - 10}")
        assert page.locator("#pixel").is_hidden()
        page.keyboard.press("Enter")
        page.wait_for_selector("#pixel:not([hidden])")
        page.keyboard.press("Escape")
        assert page.locator("#pixel").is_hidden()
        # The largest class alone, in its colour.
        page.locator("#legend button").first.click()
        found = page.evaluate(
            "[...document.getElementById('classes').getContext('2d').getImageData(0, 0, 121, 83).data]"
        )
        expected = np.zeros((83, 121, 4), np.uint8)
        expected[labels == order[0]] = [*read.classes.colours[order[0]], 255]
        assert (np.reshape(found, (83, 121, 4)) == expected).all()
        page.check("input[value=doubt]", force=True)
        assert page.locator("#classes").is_hidden()


@needs_chromium
def test_a_file_that_is_no_picture_is_one_sentence_on_the_page_and_the_next_is_shown(address, tmp_path):
    (tmp_path / "photo.png").write_bytes(picture())
    (tmp_path / "bad.jpg").write_text("no picture")

    def try_both():
        with browser_page(dark=True) as page:
            page.goto(f"http://{address}/")
            page.wait_for_selector("body[data-ready]")
            page.set_input_files("#file", tmp_path / "bad.jpg")
            page.wait_for_selector("#trouble:not([hidden])")
            assert page.text_content("#trouble").startswith("this file is not an image (empty, truncated or ")
            assert page.locator("#result").is_hidden()
            page.set_input_files("#file", tmp_path / "photo.png")
            page.wait_for_selector("#result:not([hidden])")
            assert page.locator("#trouble").is_hidden()

    with pytest.raises(AssertionError, match="the server responded with a status of 422"):  # Chromium logs it
        try_both()
