"""The labelling page: its server, a whole session in a browser, and a session that is killed."""

import contextlib
import io
import json
import re
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import checkpoint_files
import numpy as np
import pytest
import torch
from browser import browser_page, needs_chromium
from fresh_commands import child_environment
from page_checks import contrasts
from PIL import Image
from served_page import error_message, request
from torch import nn

from segdeconv.checkpoints import checkpoint
from segdeconv.cli import own_code
from segdeconv.data.datasets.folder import Folder
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.errors import CheckpointError, UsageError
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models import SegNet, vgg
from segdeconv.serving.label import learning
from segdeconv.serving.label import session as session_module
from segdeconv.serving.label.learning import Learner
from segdeconv.serving.label.network import STAGES, open_network, saved_network, train_words
from segdeconv.serving.label.photos import Photos
from segdeconv.serving.label.server import LabelServer
from segdeconv.serving.label.session import Session
from segdeconv.serving.label.storage import Storage
from segdeconv.training.config_check import check_config

ROOT = Path(__file__).parents[2]
NAMES = ("grass", "<img src=x onerror=alert(1)>")
SIZE = (96, 128)


def scene(seed):
    """A photo of grass on the left and stone on the right of a random border."""
    random = np.random.default_rng(seed)
    border = int(random.integers(48, 80))
    image = random.integers(60, 110, (*SIZE, 3), dtype=np.uint8)
    image[:, :border, 1] += 110
    mask = np.ones(SIZE, dtype=np.uint8)
    mask[:, :border] = 0
    return image, mask


def write_photos(folder, count=5):
    folder.mkdir()
    for seed in range(count):
        Image.fromarray(scene(seed)[0]).save(folder / f"photo{seed}.png")
    return {path.stem: path for path in sorted(folder.iterdir())}


def learner():
    torch.manual_seed(0)
    preprocessing = Preprocessing(None, (120.0, 110.0, 100.0), (60.0, 61.0, 62.0))
    network = SegNet(2, stages=((8,), (8,), (16,)))
    return Learner(network, (), preprocessing, device=torch.device("cpu"), pretrained_decoder=False)


@contextlib.contextmanager
def serving(tmp_path, photos, names=NAMES):
    storage = Storage(tmp_path / "out", photos)
    for name in names:
        if name not in storage.classes.names.values():
            storage.change_classes(lambda classes, name=name: classes.add(name))
    session = Session(storage, learner())
    server = LabelServer(session, "127.0.0.1", 0, seconds=1.0, scope="all")
    thread = threading.Thread(target=server.serve, args=(session.sweep,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.port}", session
    finally:
        server.stop()
        thread.join()
        storage.close()


def get(address, target):
    status, _, body = request(address, "GET", target)
    assert status == 200, body
    return body


def post(address, target, content, **headers):
    body = json.dumps(content).encode()
    return request(address, "POST", target, body, **{"Content_Type": "application/json", **headers})


def brush(label, points, radius=4):
    return {"tool": "brush", "class": label, "radius": radius, "points": points}


def labels_of(body):
    (length,) = struct.unpack_from("<I", body)
    about = json.loads(body[4 : 4 + length])
    size = (about["height"], about["width"])
    maps = np.frombuffer(body, np.uint8, offset=4 + length).reshape(-1, *size)
    return about, maps


def test_strokes_are_learned_proposed_and_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "LEARNING_RATE", 0.005)  # a tiny network with random weights has more to learn
    with serving(tmp_path, write_photos(tmp_path / "photos")) as (address, session):
        assert json.loads(get(address, "/state"))["photos"] == 5
        tile = Image.open(io.BytesIO(get(address, "/tile?number=0&level=1&row=0&column=0")))
        assert (tile.height, tile.width) == (48, 64)
        assert request(address, "GET", "/proposal?number=1")[0] == 204
        refused = post(address, "/learn", {"number": 0})
        assert (refused[0], error_message(refused).partition(" - ")[0]) == (422, "there are no strokes to learn from")
        for label, x in ((0, 20), (1, 110)):
            stroke = brush(label, [[x, 20], [x, 80]])
            about = json.loads(post(address, "/stroke", {"number": 0, "stroke": stroke})[2])
        assert (about["status"], len(about["entries"])) == ("strokes", 2)
        for round_ in range(1, 30):
            learned = json.loads(post(address, "/learn", {"number": 0, "seconds": 0.5, "scope": "all"})[2])
            assert (learned["round"], learned["steps"] > 0) == (round_, True)
            about, (labels, uncertainty) = labels_of(get(address, "/proposal?number=3"))
            if (labels == scene(3)[1]).mean() > 0.9:
                break
        assert (labels == scene(3)[1]).mean() > 0.9
        assert (about["number"], about["round"]) == (3, round_)
        assert uncertainty.max() > uncertainty.min()
        assert json.loads(post(address, "/accept", {"number": 3})[2])["status"] == "accepted"
        assert post(address, "/accept", {"number": 3})[0] == 422
        deadline = time.monotonic() + 20
        while session.state()["current"] < 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        order = json.loads(get(address, "/state"))["order"]
        assert (order[0], order[-1], sorted(order)) == (0, 3, [0, 1, 2, 3, 4])
        assert np.array(Image.open(io.BytesIO(get(address, "/preview?number=3")))).shape == (96, 128, 4)
    mask = np.array(Image.open(tmp_path / "out" / "masks" / "photo3.png"))
    assert (mask == labels).all()
    assert set(Folder("train", str(tmp_path / "out")).classes.names) == set(NAMES)
    saved = checkpoint.read(saved_network(tmp_path / "out" / "session"))
    predicted = Segmenter(saved).predict(scene(4)[0]).mask
    assert (predicted == scene(4)[1]).mean() > 0.8
    again, classes = open_network(tmp_path / "out" / "session", "camvid-small-286e5fc")
    assert (again.names, classes) == (list(NAMES), dict(enumerate(NAMES)))


def taught(address):
    """Paint a stroke of each class on photo 0 and learn a round."""
    for label, x in ((0, 20), (1, 110)):
        assert post(address, "/stroke", {"number": 0, "stroke": brush(label, [[x, 20], [x, 80]])})[0] == 200
    return json.loads(post(address, "/learn", {"number": 0, "seconds": 0.1, "scope": "all"})[2])["round"]


def test_the_mask_that_was_shown_is_accepted_also_while_the_network_learns_another(tmp_path):
    with serving(tmp_path, write_photos(tmp_path / "photos", 2)) as (address, session):
        round_ = taught(address)
        about, (labels, _) = labels_of(get(address, "/proposal?number=1"))
        with torch.no_grad():  # what the network would propose now
            bias = session.learner.network.decoder.classifier.bias
            bias += torch.tensor([1e3, 0.0]) if (labels == 1).mean() > 0.5 else torch.tensor([0.0, 1e3])
        learning_ = threading.Thread(target=post, args=(address, "/learn", {"number": 0, "seconds": 1.5}))
        learning_.start()
        time.sleep(0.2)
        accepted = post(address, "/accept", {"number": 1, "round": about["round"]})
        assert (accepted[0], learning_.is_alive(), about["round"]) == (200, True, round_)
        learning_.join()
    assert (np.array(Image.open(tmp_path / "out" / "masks" / "photo1.png")) == labels).all()


def add_class(session, name):
    session.storage.change_classes(lambda classes: classes.add(name))


def test_classes_that_the_network_knows_are_proposed_as_they_are_named(tmp_path):
    """In any order, and not while there is one that it does not know."""
    storage = Storage(tmp_path / "out", write_photos(tmp_path / "photos", 1))
    teacher = learner()
    teacher.set_classes(["sky", "road", "car"])
    with torch.no_grad():  # whatever the photo, cars are most probable, then roads
        teacher.network.decoder.classifier.bias.copy_(torch.tensor([0.0, 1e3, 2e3]))
    session = Session(storage, teacher)
    assert session.proposal("photo0") is None
    for added, expected in (("road", None), ("sky", 0), ("car", 2), ("lamp", None)):
        add_class(session, added)
        proposal = session.proposal("photo0")
        assert (proposal is not None, session.learned) == ((expected is not None,) * 2)
        if proposal is not None:
            assert set(np.unique(proposal.labels)) == {expected}
        named = storage.classes.names.values()
        assert session.state()["suggestions"] == [name for name in ("sky", "road", "car") if name not in named]
        while session.sweep():  # the strip shows what the page does
            pass
        assert session.state()["current"] == 1
        preview = session.preview("photo0")
        assert (None if preview is None else set(np.unique(preview))) == (None if expected is None else {expected})
    storage.close()


@pytest.mark.parametrize("restart", [False, True])
def test_a_class_that_is_renamed_keeps_what_the_network_has_learned_of_it(tmp_path, restart):
    photos = write_photos(tmp_path / "photos", 2)
    with serving(tmp_path, photos) as (address, session):
        taught(address)
        before = labels_of(get(address, "/proposal?number=1"))[1]
        deadline = time.monotonic() + 20
        while session.unsaved is not None or saved_network(session.storage.session) is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        change = {"action": "change", "label": 0, "name": "meadow"}
        assert post(address, "/classes", change)[0] == 200
        if not restart:
            assert (labels_of(get(address, "/proposal?number=1"))[1] == before).all()
    if restart:
        storage = Storage(tmp_path / "out", photos)
        again, saved = open_network(storage.session, "camvid-small-286e5fc", precision="32-true")
        assert saved == dict(enumerate(NAMES))
        proposal = Session(storage, again, saved=saved).proposal("photo1")
        assert (proposal.labels == before[0]).mean() > 0.98
        storage.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stages": STAGES},
         ["model=segnet", "model.stages=[[32,32],[64,64],[128,128],[192,192],[192,192,192]]"]),
        ({"depth": 11}, ["model=segnet", "model.depth=11"]),
        ({"stages": ((4,), (8, 8)), "dropout_at": "central"},
         ["model=segnet", "model.stages=[[4],[8,8]]", 'model.dropout_at="central"']),
    ],
)  # fmt: skip
def test_the_command_that_trains_starts_from_what_was_learned(arguments, words):
    preprocessing = Preprocessing(None, (0.0,) * 3, (1.0,) * 3)
    teacher = Learner(SegNet(2, **arguments), (), preprocessing, device=torch.device("cpu"))
    root = ["dataset=folder", "dataset.root=out"]
    assert train_words(Path("out"), None, teacher) == root
    typed = train_words(Path("out"), Path("out/session"), teacher)
    assert typed == [*root, *words, "init_from=out/session/network"]
    assert check_config(own_code.compose([*root, *words])[0])["model"] == teacher.network.node


def test_photos_are_read_once_also_when_the_encoder_learns(tmp_path, monkeypatch):
    read = []
    original = session_module.read_upright
    monkeypatch.setattr(session_module, "read_upright", lambda path, **k: read.append(path) or original(path, **k))
    with serving(tmp_path, write_photos(tmp_path / "photos", 3)) as (address, _):
        for _ in range(2):
            taught(address)
        get(address, "/proposal?number=1")
    assert len(read) == len(set(read)) > 0


def test_the_network_is_saved_when_nobody_waits_and_at_the_end(tmp_path):
    storage = Storage(tmp_path / "out", write_photos(tmp_path / "photos", 2))
    for name in NAMES:
        storage.change_classes(lambda classes, name=name: classes.add(name))
    session = Session(storage, learner())
    for label, x in ((0, 20), (1, 110)):
        storage.add_stroke("photo0", brush(label, [[x, 20], [x, 80]]))
    session.learn("photo0", 0.01, "all")
    assert saved_network(storage.session) is None
    storage.change_classes(lambda classes: classes.add("sky"))  # a class that the network does not know yet
    session.save()
    assert checkpoint.read(saved_network(storage.session)).classes.names == (*NAMES, "sky")
    session.learn("photo0", 0.01, "all")
    assert session.sweep()
    assert session.unsaved is None
    storage.close()


def test_tiles_are_the_photo_and_its_means(tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (35, 55, 1), dtype=np.uint8)
    image = np.kron(grey, np.ones((20, 20, 3), dtype=np.uint8))  # areas of grey, which JPEG keeps but for borders
    Image.fromarray(image).save(tmp_path / "photo.png")
    photos = Photos({"photo": tmp_path / "photo.png"})

    def tile(level, row, column):
        return np.array(Image.open(io.BytesIO(photos.tile("photo", level, row, column)))).astype(int)

    rows = [np.concatenate([tile(0, row, column) for column in range(3)], axis=1) for row in range(2)]
    whole = np.concatenate(rows)
    assert whole.shape == image.shape
    assert np.abs(whole - image).mean() < 6
    means = image.reshape(175, 4, 275, 4, 3).mean(axis=(1, 3))
    assert np.abs(tile(2, 0, 0) - means).mean() < 6


def test_ten_thousand_photos_are_listed_without_reading_one(tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "read_upright", lambda *_, **__: pytest.fail("a photo was read"))
    storage = Storage(tmp_path / "out", {f"photo{n:05d}": tmp_path / "missing.jpg" for n in range(10_000)})
    session = Session(storage, learner())
    assert session.state()["order"] == list(range(10_000))
    storage.close()


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("nowhere.pth", "nowhere.pth not found - give the path of a torchvision VGG file"),
        ("other.pth", "other.pth is not a torchvision VGG: it has 1 convolutions named features"),
        ("encoder_addition.ckpt", "is a SegNet with encoder_addition, and label needs a SegNet whose decoder learns"),
        ("encoder_concatenation.ckpt", "is a SegNet with encoder_concatenation, and label needs a SegNet whose"),
    ],
)
def test_a_start_that_cannot_learn_from_strokes_is_refused(tmp_path, monkeypatch, start, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3)}, "other.pth")
    written = checkpoint_files.content()
    options = {Path(start).stem: True} if start.endswith(".ckpt") else {}
    written["hyper_parameters"]["config"]["model"] = {
        "_target_": "segdeconv.models.SegNet", "stages": [[4], [8]], **options,
    }  # fmt: skip
    names = written["hyper_parameters"]["facts"]["classes"]["names"]
    network = SegNet(len(names), stages=((4,), (8,)), **options)
    written["hyper_parameters"]["config"]["dataset"] = {"size": [32, 32]}
    written["state_dict"] = {f"model.{name}": value for name, value in network.state_dict().items()}
    checkpoint.write(written, Path(f"{Path(start).stem}.ckpt"))
    with pytest.raises((UsageError, CheckpointError), match=message):
        open_network(tmp_path / "session", start)


def test_the_weights_of_torchvision_are_those_of_the_encoder(tmp_path, monkeypatch):
    stages = {depth: ((4,), (4,)) if depth == 16 else stages for depth, stages in vgg.VGG_STAGES.items()}
    monkeypatch.setattr(vgg, "VGG_STAGES", stages)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
              nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]  # fmt: skip
    for norm in (layers[1], layers[5]):
        norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    expected = nn.Sequential(*layers).eval()
    state = {f"features.{name}": value for name, value in expected.state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 4)}, tmp_path / "vgg16_bn.pth")
    opened, saved = open_network(tmp_path / "session", str(tmp_path / "vgg16_bn.pth"), precision="32-true")
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(opened.network.encoder(image).features, expected(image))
    assert (saved, opened.calibrated, opened.encoder_calibrated) == (None, False, True)


def test_without_network_imagenet_is_one_clear_line(tmp_path, monkeypatch):
    def refused(name):
        raise UsageError("could not download https://example.org/vgg.pth: no route - as train would put it")

    monkeypatch.setattr(vgg, "_download", refused)
    with pytest.raises(UsageError) as raised:
        open_network(tmp_path / "session", "imagenet")
    assert str(raised.value) == (
        "could not download https://example.org/vgg.pth: no route - give the path of a torchvision VGG file (.pth), "
        "or start from camvid-small-286e5fc or nothing"
    )


def test_requests_that_the_page_would_not_send_are_refused(tmp_path):
    with serving(tmp_path, write_photos(tmp_path / "photos", 2)) as (address, _):
        good = {"number": 0, "stroke": brush(0, [[5, 5]])}
        for content, status in [
            ({**good, "number": 2}, 404), ({**good, "number": -1}, 404), ({**good, "number": "../0"}, 404),
            ({**good, "stroke": brush(9, [[5, 5]])}, 422), ({**good, "stroke": brush(0, [["a", 5]])}, 422),
            ({**good, "stroke": None}, 422), ([good], 400),
        ]:  # fmt: skip
            assert post(address, "/stroke", content)[0] == status
        assert request(address, "POST", "/stroke", b'{"a":', Content_Type="application/json")[0] == 400
        assert post(address, "/stroke", good, Content_Type="text/plain")[0] == 415
        assert post(address, "/stroke", good, Origin="http://evil.example")[0] == 403
        assert post(address, "/stroke", good, Host="evil.example")[0] == 403
        assert (
            request(address, "POST", "/stroke", b"", Content_Type="application/json", Content_Length=str(1 << 23))[0]
            == 413
        )
        for content in (
            {"action": "add", "name": "../x\0"}, {"action": "add", "name": ["a"]}, {"action": "shout"},
            {"action": "change", "label": 0, "colour": "red"}, {"action": "remove", "label": [0]},
        ):  # fmt: skip
            assert post(address, "/classes", content)[0] == 422
        for seconds in (0, -1, 1e9, "5", True):
            assert post(address, "/learn", {"number": 0, "seconds": seconds})[0] == 422
        for target in ("/tile?number=0&level=0&row=9&column=0", "/tile?number=0&level=99&row=0&column=0"):
            assert request(address, "GET", target)[0] == 422
        for target in ("/thumbnail?number=7", "/storage.py", "/../storage.py", "/photo?number=%2e%2e"):
            assert request(address, "GET", target)[0] in (400, 404)
    assert not (tmp_path / "out" / "masks").exists()


def test_a_photo_that_cannot_be_read_does_not_stop_the_others(tmp_path):
    photos = write_photos(tmp_path / "photos", 2)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    with serving(tmp_path, {"broken": tmp_path / "photos" / "broken.png", **photos}) as (address, session):
        for target in ("/photo", "/thumbnail", "/mask"):
            assert request(address, "GET", f"{target}?number=0")[0] == 422
        assert post(address, "/stroke", {"number": 0, "stroke": brush(0, [[5, 5]])})[0] == 422
        deadline = time.monotonic() + 20
        while not session.unreadable or len(session.measured) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert list(json.loads(get(address, "/state"))["unreadable"]) == ["0"]


def draw(page, points, key):
    """Choose a class and draw a line, in shares of the photo."""
    page.keyboard.press(key)
    box = page.locator("#stage").bounding_box()
    scale = min((box["width"] - 16) / SIZE[1], (box["height"] - 16) / SIZE[0])
    left, top = (box[side] + (box[length] - scale * pixels) / 2 for side, length, pixels in
                 (("x", "width", SIZE[1]), ("y", "height", SIZE[0])))  # fmt: skip
    places = [(left + x * scale * SIZE[1], top + y * scale * SIZE[0]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_person_names_paints_accepts_and_undoes_on_the_page(tmp_path, dark):
    with (
        serving(tmp_path, write_photos(tmp_path / "photos"), ()) as (address, session),
        browser_page(dark=dark) as page,
    ):
        page.goto(f"http://{address}/")
        page.wait_for_selector("body[data-ready=true]")
        assert page.locator("#hint").inner_text().startswith("Name what you want to find")
        for name in NAMES:
            page.keyboard.type(name)
            page.keyboard.press("Enter")
            page.wait_for_function("name => document.getElementById('classes').innerText.includes(name)", arg=name)
        assert page.locator("#hint").inner_text().startswith("Paint a little of")
        page.locator("#stage").focus()
        draw(page, [(0.1, 0.2), (0.15, 0.8)], "1")
        draw(page, [(0.9, 0.2), (0.85, 0.8)], "2")
        page.wait_for_selector("body[data-round]")
        page.wait_for_function("() => (document.body.dataset.shown || '').includes('proposal')")
        first = session.names[int(page.evaluate("() => document.body.dataset.shown").partition(":")[0])]
        assert [entry["class"] for entry in session.storage.log(first).entries] == [0, 1]
        assert contrasts(page) == []
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.getElementById('progress').innerText.startsWith('1 accepted')")
        page.wait_for_function(
            "shown => !document.body.dataset.shown.startsWith(shown)", arg=f"{session.numbers[first]}:"
        )
        assert session.storage.log(first).status == "accepted"
        page.wait_for_function("() => (document.body.dataset.shown || '').includes('proposal')")
        second = session.names[int(page.evaluate("() => document.body.dataset.shown").partition(":")[0])]
        assert second != first
        page.keyboard.press("ArrowRight")  # a stroke by keyboard alone
        page.keyboard.press("Space")
        for _ in range(3):
            page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Space")
        page.wait_for_function("() => document.getElementById('progress').innerText.includes('1 begun')")
        (entry,) = session.storage.log(second).entries
        assert (entry["class"], len(entry["points"])) == (1, 4)
        page.keyboard.press("z")
        page.wait_for_function("() => document.getElementById('progress').innerText.includes('0 begun')")
        assert not page.evaluate("() => document.documentElement.scrollWidth > innerWidth")


@contextlib.contextmanager
def opened_page(tmp_path, count=2):
    """Serve photos with two classes, without learning after each stroke; yield the page, its CDP session and logs."""
    with serving(tmp_path, write_photos(tmp_path / "photos", count)) as (address, session), browser_page() as page:
        page.goto(f"http://{address}/")
        page.wait_for_selector("body[data-ready=true]")
        page.locator("#automatic").uncheck()
        page.locator("#stage").focus()
        yield page, page.context.new_cdp_session(page), session


def stored_strokes(page, session, count, name="photo0"):
    """Wait until a photo has this many strokes, and return them."""
    deadline = time.monotonic() + 10
    while len(session.storage.log(name).entries) < count:
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)
    page.wait_for_timeout(200)  # no other may follow
    entries = session.storage.log(name).entries
    assert len(entries) == count
    return entries


def on_stage(page, *shares):
    """Return places on the stage in CSS pixels, of shares of its width and height."""
    box = page.locator("#stage").bounding_box()
    return [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in shares]


def touch(cdp, kind, *places):
    points = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(places)]
    cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def pen(cdp, kind, place, **settings):
    event = {"type": kind, "x": place[0], "y": place[1], "button": "left", "buttons": 1, "clickCount": 1}
    cdp.send("Input.dispatchMouseEvent", {**event, "pointerType": "pen", **settings})


@pytest.mark.slow
@needs_chromium
def test_fingers_paint_zoom_and_move_without_a_stray_stroke(tmp_path):
    with opened_page(tmp_path) as (page, cdp, session):
        a, b, c, d = on_stage(page, (0.4, 0.5), (0.6, 0.5), (0.3, 0.5), (0.7, 0.5))
        touch(cdp, "touchStart", a)
        for step in range(1, 6):
            touch(cdp, "touchMove", (a[0] + step * (b[0] - a[0]) / 5, a[1]))
        touch(cdp, "touchEnd")
        (stroke,) = stored_strokes(page, session, 1)
        assert (stroke["tool"], stroke["class"]) == ("brush", 0)
        before = stroke["points"]
        for tool in ("b", "f", "p"):  # two fingers: apart by half, then both to the right; no stroke, flood or corner
            page.keyboard.press(tool)
            touch(cdp, "touchStart", a)
            touch(cdp, "touchStart", a, b)
            touch(cdp, "touchMove", c, d)
            touch(cdp, "touchMove", (c[0] + 60, c[1] + 30), (d[0] + 60, d[1] + 30))
            touch(cdp, "touchEnd", (c[0] + 60, c[1] + 30))
            touch(cdp, "touchMove", (c[0] + 160, c[1] + 30))  # the finger that is left moves nothing
            touch(cdp, "touchEnd")
            stored_strokes(page, session, 1)
            if tool == "b":
                page.keyboard.press("b")
                moved = (a[0] + 60 - (a[0] - c[0]), a[1] + 30)  # where the pixel under finger a is now
                touch(cdp, "touchStart", moved)
                touch(cdp, "touchEnd")
                dot = stored_strokes(page, session, 2)[1]
                assert dot["points"][0] == pytest.approx(before[0], abs=1.0)
                assert stroke["radius"] / dot["radius"] == pytest.approx(2.0, rel=0.02)
                page.keyboard.press("z")
                stored = time.monotonic() + 5
                while len(session.storage.log("photo0").entries) == 2:
                    assert time.monotonic() < stored
                    page.wait_for_timeout(20)
            page.keyboard.press("0")
        page.keyboard.press("f")
        touch(cdp, "touchStart", a)
        touch(cdp, "touchEnd")
        assert stored_strokes(page, session, 2)[1]["tool"] == "polygon"
        page.keyboard.press("p")
        corners = on_stage(page, (0.45, 0.45), (0.55, 0.45), (0.5, 0.6), (0.45, 0.45))
        for number, corner in enumerate(corners):  # the last one is the first, and closes the polygon
            touch(cdp, "touchStart", corner)
            touch(cdp, "touchEnd")
            if number == 1:  # zooming keeps the corners
                touch(cdp, "touchStart", a)
                touch(cdp, "touchStart", a, b)
                touch(cdp, "touchEnd")
        polygon = stored_strokes(page, session, 3)[2]
        assert (polygon["tool"], [len(ring) for ring in polygon["rings"]]) == ("polygon", [3])


@pytest.mark.slow
@needs_chromium
def test_a_pen_paints_and_erases_and_a_palm_beside_it_does_nothing(tmp_path):
    with opened_page(tmp_path) as (page, cdp, session):
        a, b, palm = on_stage(page, (0.4, 0.4), (0.6, 0.4), (0.6, 0.8))
        pen(cdp, "mousePressed", a)
        pen(cdp, "mouseMoved", ((a[0] + b[0]) / 2, a[1]))
        touch(cdp, "touchStart", palm)
        touch(cdp, "touchMove", (palm[0] + 40, palm[1]))
        pen(cdp, "mouseMoved", b)
        touch(cdp, "touchEnd")
        pen(cdp, "mouseReleased", b, buttons=0)
        (stroke,) = stored_strokes(page, session, 1)
        assert stroke["class"] == 0
        assert len(stroke["points"]) == 3
        (x0, y0), _, (x1, y1) = stroke["points"]
        assert (x1 > x0, y1) == (True, pytest.approx(y0, abs=0.5))
        touch(cdp, "touchStart", a)  # once a pen was seen, a finger moves the photo
        touch(cdp, "touchMove", b)
        touch(cdp, "touchEnd")
        stored_strokes(page, session, 1)
        pen(cdp, "mousePressed", b)
        pen(cdp, "mouseReleased", b, buttons=0)
        dot = stored_strokes(page, session, 2)[1]
        assert dot["points"][0] == pytest.approx([x0, y0], abs=1.0)
        page.evaluate(
            """([x, y]) => { for (const type of ["pointerdown", "pointerup"]) {
              const init = { pointerId: 1, pointerType: "pen", clientX: x, clientY: y, button: 5, buttons: 32 };
              const stage = document.getElementById("stage");
              stage.setPointerCapture = () => {};
              stage.dispatchEvent(new PointerEvent(type, init));
            } }""",
            list(b),
        )  # its other end
        assert stored_strokes(page, session, 3)[2]["class"] is None


@pytest.mark.slow
@needs_chromium
def test_the_mouse_zooms_moves_erases_and_a_key_learns(tmp_path):
    with opened_page(tmp_path) as (page, _, session):
        (a, b) = on_stage(page, (0.4, 0.5), (0.6, 0.5))
        page.mouse.move(*a)
        page.mouse.down()
        page.mouse.move(*b, steps=4)
        page.mouse.up()
        (stroke,) = stored_strokes(page, session, 1)
        page.mouse.move(*a)
        page.mouse.wheel(0, -400 * np.log(2))  # about the place under the mouse, by two
        page.mouse.down(button="right")  # moves the photo
        page.mouse.move(a[0] + 60, a[1] + 30)
        page.mouse.up(button="right")
        page.keyboard.press("2")
        page.mouse.click(a[0] + 60, a[1] + 30)
        dot = stored_strokes(page, session, 2)[1]
        assert dot["points"][0] == pytest.approx(stroke["points"][0], abs=0.5)
        assert stroke["radius"] / dot["radius"] == pytest.approx(2.0, rel=0.02)
        page.keyboard.press("0")
        page.keyboard.press("e")
        page.mouse.click(*b)
        assert stored_strokes(page, session, 3)[2]["class"] is None
        mask = session.storage.mask("photo0")
        x, y = (int(value) for value in stroke["points"][-1])
        assert (mask[y, x], set(np.unique(mask))) == (255, {0, 1, 255})
        assert session.round == 0  # nothing learns without being told to
        page.keyboard.press("l")
        page.wait_for_selector("body[data-round='1']")
        page.wait_for_function("() => (document.body.dataset.shown || '').includes('proposal')")
        assert re.match(r"\d+ steps? in \d+\.\d s", page.locator("#learned").inner_text())
        page.keyboard.press("u")
        assert page.locator("#uncertain").is_checked()


@pytest.mark.slow
@needs_chromium
def test_classes_are_renamed_recoloured_and_removed_on_the_page(tmp_path):
    with opened_page(tmp_path) as (page, _, session):

        def classes_are(*expected):
            shown = "() => [...document.querySelectorAll('.class .text')].map((each) => each.innerText)"
            page.wait_for_function(f"names => ({shown})().join() === names.join()", arg=list(expected))
            assert tuple(entry["name"] for entry in session.storage.classes.to_list()) == expected

        classes_are(*NAMES)
        page.locator("#classes .text").first.dblclick()
        page.keyboard.type("meadow")
        page.keyboard.press("Enter")
        classes_are("meadow", NAMES[1])
        page.locator("#classes input[type=color]").first.evaluate(
            "picker => { picker.value = '#123456'; picker.dispatchEvent(new Event('change')); }"
        )
        page.wait_for_function("() => document.querySelector('#classes input').value === '#123456'")
        deadline = time.monotonic() + 10
        while session.storage.classes.colours[0] != (0x12, 0x34, 0x56):
            assert time.monotonic() < deadline
            page.wait_for_timeout(50)
        page.keyboard.press("n")
        page.keyboard.type("lamp")
        page.keyboard.press("Enter")
        classes_are("meadow", NAMES[1], "lamp")
        page.locator("#stage").focus()
        page.keyboard.press("3")
        assert page.locator("#classes [aria-checked=true]").inner_text().startswith("lamp")
        page.locator("#classes .class").nth(2).hover()
        page.locator("#classes .drop").nth(2).click()
        classes_are("meadow", NAMES[1])


@pytest.mark.slow
@needs_chromium
def test_a_stroke_that_was_not_stored_does_not_stay_on_the_page(tmp_path):
    def lose_a_stroke():
        with browser_page() as page:
            with serving(tmp_path, write_photos(tmp_path / "photos", 2)) as (address, _):
                page.goto(f"http://{address}/")
                page.wait_for_selector("body[data-ready=true]")
            draw(page, [(0.1, 0.2), (0.15, 0.8)], "1")
            page.wait_for_function("() => document.getElementById('error').innerText.includes('is not saved')")
            page.wait_for_function("() => document.getElementById('undo').disabled")

    with pytest.raises(AssertionError, match="ERR_CONNECTION_REFUSED"):  # which the browser logs
        lose_a_stroke()


@pytest.mark.slow
@needs_chromium
def test_the_strip_holds_what_can_be_seen_of_ten_thousand_photos(tmp_path):
    (photo,) = write_photos(tmp_path / "photos", 1).values()
    photos = {f"photo{number:05d}": photo for number in range(10_000)}
    with serving(tmp_path, photos) as (address, session), browser_page() as page:
        page.goto(f"http://{address}/")
        page.wait_for_selector("body[data-ready=true]")
        assert page.locator(".photo").count() < 40
        page.evaluate("() => { document.getElementById('strip').scrollLeft = 5000 * 108; }")
        page.wait_for_function(
            "() => [...document.querySelectorAll('.photo')].some((each) => each.dataset.number > 4900)"
        )
        assert page.locator(".photo").count() < 40
        page.locator(".photo").nth(8).click()
        page.wait_for_function("() => document.getElementById('name').innerText.includes('photo0')")
        page.locator("#train-open").click()
        assert "train" in page.locator("#command").inner_text()
        assert page.locator("#folder").inner_text() == str(session.storage.folder)


@pytest.mark.slow
def test_train_learns_from_what_was_painted(tmp_path, commands):
    storage = Storage(tmp_path / "out", write_photos(tmp_path / "photos", 4))
    for name in NAMES:
        storage.change_classes(lambda classes, name=name: classes.add(name))
    for name in ("photo0", "photo1", "photo2"):
        storage.add_stroke(name, brush(0, [[20, 20], [20, 80]]))
        storage.add_stroke(name, brush(1, [[110, 20], [110, 80]]))
    storage.accept("photo3", scene(3)[1])
    storage.close()
    done = commands(
        "train", "dataset=folder", "dataset.root=out", "model.stages=[[4],[8]]", "trainer.max_steps=2",
        "dataset.batch_size=2", "dataset.num_workers=0", "dataset.size=[96,128]", "hydra.run.dir=run", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert checkpoint.read(tmp_path / "run" / "best.ckpt").classes.names == NAMES


@pytest.mark.slow
def test_a_killed_command_resumes_with_every_stroke(tmp_path):
    write_photos(tmp_path / "photos")
    words = [
        sys.executable,
        str(ROOT / "scripts" / "label.py"),
        "photos",
        "nothing",
        "--classes",
        "grass,stone",
        "--port",
        "0",
    ]

    @contextlib.contextmanager
    def running():
        environment = child_environment(ROOT, OMP_NUM_THREADS="1")
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
            try:
                lines = [process.stdout.readline() for _ in range(5)]
                yield lines, lines[-1].partition("http://")[2].strip().rstrip("/")
            finally:
                process.kill()

    with running() as (lines, address):
        assert lines[0] == "photos:   5 in photos, 0 with strokes\n"
        for label, x in ((0, 20), (1, 110)):
            assert post(address, "/stroke", {"number": 2, "stroke": brush(label, [[x, 20], [x, 80]])})[0] == 200
    mask = np.array(Image.open(tmp_path / "photos-labels" / "masks" / "photo2.png"))
    assert set(np.unique(mask)) == {0, 1, 255}
    with running() as (lines, address):
        assert lines[0] == "photos:   5 in photos, 1 with strokes\n"
        about = json.loads(get(address, "/photo?number=2"))
        assert (about["name"], len(about["entries"])) == ("photo2", 2)
