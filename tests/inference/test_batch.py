"""Batch prediction: tiles, resuming, videos, polygons and tables, by the command predict and from Python."""

import base64
import csv
import io
import json
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import cv2
import fakes
import numpy as np
import pytest
import torch
from fresh_commands import child_environment
from PIL import Image

import segdeconv
from segdeconv.checkpoints import checkpoint
from segdeconv.classes import Classes, voc_colours
from segdeconv.cli import predict
from segdeconv.data.annotations.polygons import regions, signed_area
from segdeconv.data.pixels import as_image
from segdeconv.drawing import draw
from segdeconv.drawing.png import Png
from segdeconv.errors import UsageError
from segdeconv.inference import submission
from segdeconv.inference.inputs import find_images
from segdeconv.inference.output_folder import LocalFolder
from segdeconv.inference.outputs import Outputs
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.progress_log import ProgressLog
from segdeconv.inference.segmenter import Prediction, Segmenter
from segdeconv.inference.small_regions import merge_small_regions
from segdeconv.inference.tiling_check import compare_tiling
from segdeconv.inference.video import open_video
from segdeconv.inference.video_writer import video_suffix
from segdeconv.inference.views import Tiler
from segdeconv.models import SegNet
from segdeconv.system.devices import resolve_precision

ROOT = Path(__file__).parents[2]
CLASSES = Classes(("ground", "thing", "sky, high"), voc_colours(3))
MODEL = {"stages": ((4,), (8,)), "dropout_at": "central"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images and the checkpoint of a random network, which has dropout and keeps the images' size."""
    folder = tmp_path_factory.mktemp("anywhere")
    torch.manual_seed(3)
    model = SegNet(3, **MODEL)
    config = {
        "model": {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]], "dropout_at": "central"},
        "dataset": {"size": None, "crop": None, "batch_size": 1},
    }
    facts = {
        "classes": CLASSES.to_dict(),
        "preprocessing": {"size": None, "mean": [120.0, 110, 100], "std": [60.0, 60, 60]},
        "precision": "32-true",
    }
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {"config": config, "facts": facts},
        "segdeconv": {"format": 1},
    }
    checkpoint.write(content, folder / "best.ckpt")
    random = np.random.default_rng(0)
    for name, size in {"a": (130, 171), "deep/b": (40, 60), "deep/c": (17, 300)}.items():
        path = folder / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (size[0] // 6 + 1, size[1] // 6 + 1, 3), dtype=np.uint8)
        noise = random.integers(-20, 20, (*size, 3))
        image = np.kron(coarse, np.ones((6, 6, 1), int))[: size[0], : size[1]] + noise
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rasterised(polygon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Rasterise a polygon along pixel edges: (H, W) bool, True where the pixel's centre is inside (even-odd rule)."""
    inside = np.zeros((size[0], size[1] + 1), dtype=bool)
    for (x, y), (to_x, to_y) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        low, high = sorted((int(y), int(to_y)))
        rows = np.arange(low, high)
        if len(rows):
            crossing = x + (to_x - x) * (rows + 0.5 - y) / (to_y - y)
            inside[rows, np.ceil(crossing - 0.5).astype(int).clip(0, size[1])] ^= True
    return np.logical_xor.accumulate(inside, axis=1)[:, :-1]


# From Python.


FROM_PYTHON = """
import os, signal, sys
from PIL import Image
import albumentations, torchvision
def state(): return (
    Image.MAX_IMAGE_PIXELS, list(sys.path), [signal.getsignal(number) for number in (2, 15)],
    {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"})
before = state()
import segdeconv
segdeconv.load(sys.argv[1]).predict(sys.argv[2]).save(sys.argv[3])
assert state() == before, (before, state())
"""


@pytest.mark.slow
def test_prediction_from_python_changes_no_process_wide_state(place, tmp_path):
    words = [sys.executable, "-c", FROM_PYTHON, str(place / "best.ckpt"), str(place / "photos" / "a.png")]
    environment = child_environment(ROOT, NO_ALBUMENTATIONS_UPDATE="1")
    done = subprocess.run([*words, str(tmp_path / "mask.png")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_device_is_chosen_by_name(place):
    assert segdeconv.load(place / "best.ckpt", device="cpu").network.device == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpux", ""])
def test_a_device_that_is_not_there_is_named(place, device):
    with pytest.raises(UsageError, match=rf"device={device} is not available here \(.*\) - leave it out for c"):
        segdeconv.load(place / "best.ckpt", device=device)


@pytest.mark.parametrize(
    "name",
    ["mask.jpg", "mask.JPEG", "mask.webp", "mask.npy", "mask.tif", "mask.bmp", "mask.pdf", "mask.txt", "mask", ".png"],
)
def test_a_mask_is_not_saved_in_a_format_that_changes_labels(place, tmp_path, name):
    prediction = segdeconv.load(place / "best.ckpt").predict(place / "photos" / "a.png")
    with pytest.raises(UsageError, match=rf"{name}: masks are PNGs"):
        prediction.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_mask_is_not_saved_without_a_name(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prediction = segdeconv.load(place / "best.ckpt").predict(place / "photos" / "a.png")
    with pytest.raises(UsageError, match="'': masks are PNGs"):
        prediction.save("")


@pytest.mark.parametrize("labels", ["colour", "Index", "", None, 5, ["index"]])
def test_unknown_labels_of_a_saved_mask_are_refused(place, tmp_path, labels):
    prediction = segdeconv.load(place / "best.ckpt").predict(place / "photos" / "a.png")
    with pytest.raises(UsageError, match=re.escape(f"labels={labels!r} is unknown - give 'index' or 'dataset'")):
        prediction.save(tmp_path / "mask.png", labels=labels)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("orientation", [0, 9, -1, 1.5, "6", None])
@pytest.mark.parametrize("several", [False, True])
def test_an_orientation_that_exif_lacks_is_refused_before_the_prediction(place, orientation, several):
    image = np.zeros((8, 9, 3), np.uint8)
    with pytest.raises(UsageError, match=re.escape(f"orientation={orientation!r} is not an EXIF orientation - give 1")):
        segdeconv.load(place / "best.ckpt").predict([image] if several else image, orientation=orientation)


def test_the_fast_precision_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    assert [resolve_precision("auto", device=torch.device(name)) for name in ("cuda", "cpu")] == [
        "bf16-mixed",
        "32-true",
    ]


def test_an_unknown_setting_is_a_type_error(place):
    with pytest.raises(TypeError, match=r"has no setting flips - did you mean 'flip'\?"):
        segdeconv.load(place / "best.ckpt", flips=True)


def test_prediction_from_python_gives_the_networks_result(place):
    path = place / "photos" / "a.png"
    prediction = segdeconv.load(place / "best.ckpt").predict(path)
    image = np.asarray(fakes.opened(path))
    normalised = (image.astype(np.float32) - [120, 110, 100]) / 60
    with torch.no_grad():
        logits = checkpoint.read(place / "best.ckpt").model()(torch.tensor(normalised).permute(2, 0, 1)[None].float())
    mask = prediction.mask
    assert np.array_equal(mask, logits[0].argmax(0).numpy())
    assert np.allclose(prediction.probabilities(), logits[0].softmax(0).numpy(), atol=1e-5)
    assert prediction.pixels() == {name: int((mask == index).sum()) for index, name in enumerate(CLASSES.names)}
    assert prediction.overlay().ndim == 3
    prediction.save(place / "mask.png")
    assert np.array_equal(np.asarray(fakes.opened(place / "mask.png")), mask)


FORMS = {
    "Pillow": Image.fromarray,
    "array": np.asarray,
    "array, channels first": lambda image: image.transpose(2, 0, 1),
    "Fortran order": np.asfortranarray,
    "read only": lambda image: np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape),
    "fractions": lambda image: image / 255,
    "tensor, channels first": lambda image: torch.tensor(image).permute(2, 0, 1),
    "tensor, channels last": torch.tensor,
    "tensor of fractions": lambda image: (torch.tensor(image).permute(2, 0, 1) / 255).half().float(),
    "tensor with a gradient": lambda image: (torch.tensor(image) / 255).requires_grad_(),
}
GREY_FORMS = {
    "Pillow": Image.fromarray,
    "(H, W)": np.asarray,
    "(H, W, 1)": lambda image: image[:, :, None],
    "(1, H, W)": lambda image: image[None],
    "tensor (H, W)": torch.tensor,
    "tensor (1, H, W)": lambda image: torch.tensor(image)[None],
    "16 bit Pillow": lambda image: Image.fromarray(image.astype(np.uint16) * 257),
    "16 bit PGM": lambda image: opened_again(Image.fromarray(image.astype(np.uint16) * 257).convert("I"), "PPM"),
}
SIXTEEN_BIT_FORMS = {
    "array": lambda pixels: pixels,
    "big-endian": lambda pixels: pixels.astype(">u2"),
    "tensor": torch.from_numpy,
    "fractions of 32 bits": lambda pixels: pixels / np.float32(65535),
    "big-endian fractions": lambda pixels: (pixels / 65535).astype(">f8"),
    "Pillow": Image.fromarray,
    "Pillow, I": lambda pixels: Image.fromarray(pixels.astype(np.int32)),
    "PNG": lambda pixels: opened_again(Image.fromarray(pixels), "PNG"),
    "TIFF": lambda pixels: opened_again(Image.fromarray(pixels), "TIFF"),
    "PGM": lambda pixels: opened_again(Image.fromarray(pixels.astype(np.int32)), "PPM"),
}
# Powers of two are exact in these.
HALVES = {
    "float16": lambda pixels: (pixels / 65536).astype(np.float16),
    "float16 tensor": lambda pixels: (torch.from_numpy(pixels.astype(np.float32)) / 65536).half(),
    "bfloat16 tensor": lambda pixels: (torch.from_numpy(pixels.astype(np.float32)) / 65536).bfloat16(),
}


def opened_again(image, form):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return Image.open(buffer)


@pytest.mark.parametrize("form", SIXTEEN_BIT_FORMS)
def test_the_forms_of_a_16_bit_image_are_the_same_pixels(form):
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7)).astype(np.uint16)
    pixels[0, :3] = 0, 255, 65535
    image = as_image(SIXTEEN_BIT_FORMS[form](pixels), "the image", channels=1, bits=16)
    assert image.dtype == np.uint16
    assert np.array_equal(image[:, :, 0], pixels)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("known", ["channels", "size"])
@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy])
def test_what_is_known_of_an_image_decides_between_channels_first_and_last(form, known, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 11, channels), np.uint8)
    expected = {"channels": channels} if known == "channels" else {"size": (7, 11)}
    for stored in (pixels, pixels.transpose(2, 0, 1)):
        assert np.array_equal(as_image(form(stored), "the image", **expected), pixels)


@pytest.mark.parametrize("known", [{"channels": 3}, {"size": (3, 3)}])
def test_of_two_possible_layouts_a_tensor_has_its_channels_first_and_an_array_last(known):
    pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(as_image(pixels, "the image", **known), pixels)
    assert np.array_equal(as_image(torch.from_numpy(pixels), "the image", **known), pixels.transpose(1, 2, 0))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("form", HALVES)
def test_floats_of_16_bits_are_fractions_of_the_largest_pixel(form, bits):
    powers = 2 ** np.arange(17)[:, None]
    image = as_image(HALVES[form](powers), "the image", channels=1, bits=bits)
    assert np.array_equal(image[:, :, 0], np.rint(powers * ((2**bits - 1) / 65536)))


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_an_image_give_the_same_prediction(place, form):
    segmenter = segdeconv.load(place / "best.ckpt")
    image = np.asarray(fakes.opened(place / "photos" / "a.png"))
    predicted = segmenter.predict(FORMS[form](image))
    if form != "tensor of fractions":  # half precision rounds them
        assert np.array_equal(predicted.image, image)
        assert np.array_equal(predicted.mask, segmenter.predict(place / "photos" / "a.png").mask)
    assert np.abs(predicted.image.astype(int) - image).max() <= 1


@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy, lambda image: torch.from_numpy(image).permute(2, 0, 1)])
def test_a_prediction_keeps_its_image_when_the_buffer_gets_the_next_one(place, form):
    segmenter = segdeconv.load(place / "best.ckpt")
    image = np.array(fakes.opened(place / "photos" / "a.png"))
    expected = segmenter.predict(image.copy())
    buffer = image.copy()
    prediction = segmenter.predict(form(buffer))
    buffer[:] = 0
    assert np.array_equal(prediction.probabilities(), expected.probabilities())
    assert np.array_equal(prediction.overlay(), expected.overlay())


def test_a_sink_can_predict_with_the_same_segmenter(place):
    segmenter = segdeconv.load(place / "best.ckpt", tile=(64, 64))
    image = np.array(fakes.opened(place / "photos" / "a.png"))
    parts, other = [], segmenter.predict(image[:40, :50]).mask

    def sink(part, values):
        parts.append((part, values))
        assert np.array_equal(segmenter.predict(image[:40, :50]).mask, other)

    expected, prediction = segmenter.predict(image).probabilities(), segmenter.predict(image, sink=sink)
    assert len(parts) > 1
    for part, values in parts:
        assert np.array_equal(values, expected[:, slice(*part[0]), slice(*part[1])])
    assert np.array_equal(prediction.mask, expected.argmax(axis=0))


@pytest.mark.parametrize("form", GREY_FORMS)
def test_a_grey_image_is_predicted_as_the_rgb_image_with_equal_channels(place, form):
    segmenter = segdeconv.load(place / "best.ckpt")
    grey = np.asarray(fakes.opened(place / "photos" / "a.png"))[:, :, 1]
    expected = segmenter.predict(np.dstack([grey] * 3)).mask
    assert np.array_equal(segmenter.predict(GREY_FORMS[form](grey)).mask, expected)


class FileName:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


class OnePass(io.RawIOBase):
    """A file that cannot be read again, like the response of a server."""

    def __init__(self, path):
        self.file = path.open("rb")

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.file.readinto(buffer)

    def close(self):
        self.file.close()
        super().close()


def written(path):
    buffer = io.BytesIO()
    buffer.write(path.read_bytes())  # its position is the end
    return buffer


FILE_FORMS = {
    "str": str,
    "path-like": FileName,
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "buffer": written,
    "one pass": OnePass,
    "open file": lambda path: path.open("rb"),
}


@pytest.mark.parametrize("form", FILE_FORMS)
@pytest.mark.parametrize("kind", ["png", "tif", "jpg"])
def test_the_forms_of_a_file_give_the_same_prediction(place, tmp_path, form, kind):
    path = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = 6
    fakes.opened(place / "photos" / "a.png").save(path, exif=exif)
    segmenter = segdeconv.load(place / "best.ckpt")
    expected = segmenter.predict(path)
    given = FILE_FORMS[form](path)
    with given if isinstance(given, io.IOBase) else nullcontext():
        predicted = segmenter.predict(given)
    assert np.array_equal(predicted.mask, expected.mask)
    assert predicted.orientation == expected.orientation == 6


def closed(path):
    file = written(path)
    file.close()
    return file


WRONG_FILES = {
    "text": (
        lambda path: path.open(encoding="latin-1"),
        "the image: TextIOWrapper gives no bytes - open the file with",
    ),
    "UTF-8": (lambda path: path.open(encoding="utf-8"), "the image: TextIOWrapper cannot be read ("),
    "text in memory": (lambda _: io.StringIO("x"), "the image: StringIO gives no bytes"),
    "closed": (closed, "the image: BytesIO cannot be read (I/O operation on closed file.) - give a path"),
    "no bytes": (lambda _: b"", "the image is not an image (empty, truncated or another format)"),
    "half": (lambda path: path.read_bytes()[:1000], "the image is damaged and cannot be decoded"),
    "too large": (lambda path: path.read_bytes(), "the image has 171x130 pixels, more than 20000"),
    "missing": (lambda _: "nope.png", "'nope.png' is not a file - give the path of an image, or a list of paths, such"),
    "empty name": (lambda _: "", "'' is not a file - give the path"),
    "pattern": (lambda path: str(path.parent / "*.png"), "*.png' is not a file - give the path of an image, or a list"),
    "folder": (lambda path: path.parent, "photos' is a folder - give the path of an image, or a list of paths"),
    "device": (lambda _: os.devnull, "is not a file - give the path"),
    "odd name": (lambda _: "a\0.png", "'a\\x00.png' is not a file"),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_what_is_not_the_file_of_an_image_gets_one_line(place, wrong):
    form, message = WRONG_FILES[wrong]
    given = form(place / "photos" / "a.png")
    overrides = ["dataset.max_pixels=20000"] if wrong == "too large" else []
    opened = isinstance(given, io.IOBase) and not given.closed
    with given if opened else nullcontext(), pytest.raises(UsageError) as caught:
        segdeconv.load(place / "best.ckpt", overrides=overrides).predict(given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_of_images_gives_a_list_of_predictions(place):
    segmenter = segdeconv.load(place / "best.ckpt")
    path = place / "photos" / "a.png"
    array = np.asarray(fakes.opened(path))
    first, second, third = segmenter.predict([path, array[:30], str(path)], confidence=True)
    assert np.array_equal(first.mask, third.mask)
    assert second.mask.shape == (30, array.shape[1])
    assert second.confidence is not None
    assert segmenter.predict([]) == []
    with pytest.raises(UsageError, match="the image 1 has shape"):
        segmenter.predict([array, array[0, 0]])


def test_a_notebook_shows_the_overlay_with_the_share_of_each_class(place):
    prediction = segdeconv.load(place / "best.ckpt").predict(place / "photos" / "a.png")
    shown = np.asarray(Image.open(io.BytesIO(prediction._repr_png_())))
    assert np.array_equal(shown, prediction.overlay())
    page = prediction._repr_html_()
    for name, count in prediction.pixels().items():
        assert (f"{name} {100 * count / prediction.mask.size:.1f}&nbsp;%" in page) == (count > 0)
    picture = base64.b64decode(re.search('base64,([^"]+)', page)[1])
    assert Image.open(io.BytesIO(picture)).size == prediction.mask.shape[::-1]
    assert len(repr(prediction)) < 200


def test_a_notebook_shows_a_large_image_reduced_and_names_escaped(place):
    prediction = segdeconv.load(place / "best.ckpt").predict(place / "photos" / "a.png")
    names = tuple(f"<b>{name}" for name in CLASSES.names)
    large = replace(
        prediction, classes=Classes(names, CLASSES.colours), image=np.zeros((700, 3000, 3), np.uint8),
        mask=np.ones((700, 3000), np.uint8),
    )  # fmt: skip
    page = large._repr_html_()
    assert Image.open(io.BytesIO(large._repr_png_())).width == 1024
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


WRONG_IMAGES = {
    "normalised": (np.full((4, 4, 3), -1.5, np.float32), "float values in -1.5..-1.5, but floats must be in 0..1"),
    "0..255 as float": (np.full((4, 4, 3), 200.0), "or 0..255 as uint8"),
    "not finite": (np.full((4, 4, 3), np.nan), "floats must be in 0..1"),
    "32-bit Pillow": (Image.fromarray(np.full((4, 4), 200, np.int32)), "is a PIL image of mode I, whose range is unkn"),
    "integers": (np.zeros((4, 4, 3), np.int64), "has int64 values - give pixels as uint8"),
    "batch": (torch.zeros(2, 3, 8, 8), "has shape (2, 3, 8, 8), a batch - give a list of its images"),
    "row": (np.zeros(9, np.uint8), "has shape (9,) - give (H, W), (H, W, C) or a tensor (C, H, W)"),
    "empty": (np.zeros((0, 4, 3), np.uint8), "has shape (0, 4, 3)"),
    "channels in the middle": (np.zeros((8, 3, 9), np.uint8), "has 9 channel(s) of 8 bit, but the network needs 3"),
    "four channels first": (
        torch.zeros(4, 8, 9),
        "the image of shape (4, 8, 9) has 4 channel(s) of 8 bit, but the net",
    ),
    "four channels of three rows": (np.zeros((3, 9, 4), np.uint8), "the image of shape (3, 9, 4) has 4 channel(s)"),
    "four channels": (np.zeros((8, 9, 4), np.uint8), "has 4 channel(s) of 8 bit"),
    "16 bit": (np.zeros((8, 9, 3), np.uint16), "has 3 channel(s) of 16 bit"),
    "URL": ("https://host/photo.jpg", "https://host/photo.jpg is a URL - download it first: urllib.request.urlretr"),
    "number": (5, "the image is of type int, not an image - give a path, a PIL image, an array"),
    "none": (None, "the image is of type NoneType, not an image"),
}


@pytest.mark.parametrize("wrong", WRONG_IMAGES)
def test_what_is_not_an_image_gets_one_line(place, wrong):
    image, message = WRONG_IMAGES[wrong]
    with pytest.raises(UsageError) as caught:
        segdeconv.load(place / "best.ckpt").predict(image)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_error_messages(place):
    with pytest.raises(UsageError, match=r"leave one out"):
        segdeconv.load(place / "best.ckpt", samples=2, scales=(1, 2))
    with pytest.raises(AttributeError, match="module 'segdeconv' has no attribute 'laod'"):
        segdeconv.laod  # noqa: B018


def test_importing_the_package_imports_no_torch():
    probe = "import sys, segdeconv; print([n for n in ('torch', 'numpy', 'pytorch_lightning') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Tiles.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flip": True},
        {"scales": (0.5, 1, 1.3)},
        {"scales": (0.7, 1.1), "flip": True},
        {"overrides": ["dataset.size=[101,140]"]},
    ],
    ids=str,
)
def test_prediction_in_tiles_equals_prediction_of_the_whole_image(place, options):
    path = place / "photos" / "a.png"
    whole = segdeconv.load(place / "best.ckpt", precision="32-true", **options).predict(path, uncertainty=True)
    segmenter = segdeconv.load(place / "best.ckpt", precision="32-true", tile=(70, 64), **options)
    sizes = []
    score = segmenter.network.logits
    segmenter.network.logits = lambda image: sizes.append(image.shape[-2:]) or score(image)
    tiled = segmenter.predict(path, uncertainty=True)
    assert len(sizes) > 5
    assert max(height for height, _ in sizes) <= 72
    assert max(width for _, width in sizes) <= 68
    assert (whole.mask == tiled.mask).mean() >= 0.999
    assert np.abs(whole.probabilities() - tiled.probabilities()).max() < 1e-4
    assert np.abs(whole.uncertainty.astype(float) - tiled.uncertainty).max() < 2e-3  # float16


def test_several_scales_give_the_mean_of_the_single_scales(place):
    path = place / "photos" / "a.png"
    both = segdeconv.load(place / "best.ckpt", scales=(0.5, 1)).predict(path).probabilities()
    half = segdeconv.load(place / "best.ckpt", overrides=["dataset.size=[65,86]"]).predict(path)
    logits = torch.tensor(half.probabilities()).log()  # of the enlarged scores, up to a constant
    full = segdeconv.load(place / "best.ckpt").predict(path).probabilities()
    assert np.allclose(both, (logits.softmax(0).numpy() + full) / 2, atol=1e-4)


@pytest.mark.slow
def test_samples_can_be_combined_with_tiles(place):
    path = place / "photos" / "a.png"
    whole, tiled = (
        segdeconv.load(place / "best.ckpt", samples=30, tile=tile, precision="32-true") for tile in (None, (70, 64))
    )
    first, second = whole.predict(path), tiled.predict(path)
    assert first.uncertainty.shape == second.uncertainty.shape == first.mask.shape
    assert np.abs(first.probabilities() - second.probabilities()).mean() < 0.05  # 30 samples of different dropout


def test_small_memory_gives_small_tiles_and_the_same_mask(place):
    path = place / "photos" / "a.png"
    whole = segdeconv.load(place / "best.ckpt").predict(path)
    segmenter = segdeconv.load(place / "best.ckpt", memory=1 << 18)
    step = segmenter.predictor.tiler.step((130, 171))
    assert step is not None
    assert segmenter.predictor.tiler.geometry.needed((step[0] + 32, step[1] + 32)) < 1 << 18
    assert (segmenter.predict(path).mask == whole.mask).mean() >= 0.999


def test_out_of_memory_gives_smaller_tiles_down_to_the_smallest(place):
    messages = []
    content = checkpoint.read(place / "best.ckpt")
    segmenter = Segmenter(content, PredictionSettings(precision="32-true"), report=messages.append)
    score = segmenter.network.logits

    def scarce(limit):
        def limited_score(image):
            if image.shape[-2] * image.shape[-1] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return score(image)

        return limited_score

    whole = segmenter.predict(place / "photos" / "a.png").mask
    segmenter.network.logits = scarce(6000)
    tiled = segmenter.predict(place / "photos" / "a.png").mask
    assert (tiled == whole).mean() >= 0.999
    assert messages[0] == "memory ran out at 130x171 pixels: continuing with tiles of 130x85"
    assert len(messages) < 5
    count = len(messages)
    segmenter.predict(place / "photos" / "a.png")
    assert len(messages) == count  # the smaller tiles are kept
    segmenter.network.logits = scarce(100)
    with pytest.raises(UsageError, match=r"memory ran out on 36x36 pixels, the smallest tile of SegNet"):
        segmenter.predict(place / "photos" / "a.png")


def test_verify_tiling_reports_the_agreement_and_detects_wrong_tiles(place, commands, monkeypatch):
    words = ("predict", "best.ckpt", "photos/a.png", "--verify-tiling", "--tile", "72")
    done = commands(*words, cwd=place)
    assert done.code == 0, done.err
    assert "12 tiles of at most 72x72 compared with the whole image of 130x171" not in done.out
    expected = "of at most 72x72 compared with the whole image of 130x171, float32: 100.0000 % of the pixels have the "
    assert expected in done.out
    assert not (place / "predictions").exists()
    segmenter = segdeconv.load(place / "best.ckpt", tile=(72, 72), precision="32-true")
    original = type(segmenter.predictor.tiler.geometry).window
    monkeypatch.setattr(type(segmenter.predictor.tiler.geometry), "window", lambda self, part, size: part)
    assert not compare_tiling(segmenter, place / "photos" / "a.png").same
    monkeypatch.setattr(type(segmenter.predictor.tiler.geometry), "window", original)
    assert compare_tiling(segmenter, place / "photos" / "a.png").same
    assert segmenter.predictor.tiler.tile == (72, 72)  # as given, for the next image


# The command.


def test_small_regions_are_merged_in_every_output(place, commands):
    words = ("predict", "best.ckpt", "photos/a.png", "--polygons", "--class-masks", "--out", "merged")
    done = commands(*words, "--min-area", "6", cwd=place)
    assert done.code == 0, done.err
    out = place / "merged"
    raw = segdeconv.load(place / "best.ckpt").predict(place / "photos" / "a.png").mask
    expected = merge_small_regions(raw, 6)
    assert (expected != raw).any()
    mask = np.asarray(fakes.opened(out / "a.png"))
    assert np.array_equal(mask, expected)
    assert np.array_equal(np.asarray(fakes.opened(out / "a_thing.png")), (mask == 1) * 255)
    rows = csv.DictReader(io.StringIO((out / "statistics.csv").read_text()))
    assert [int(row["pixels"]) for row in rows] == np.bincount(mask.ravel(), minlength=3).tolist()
    areas = [entry["area"] for entry in json.loads((out / "regions.json").read_text())["annotations"]]
    assert min(areas) >= 6
    assert sum(areas) == mask.size
    expected = draw.overlay_with_legend(np.asarray(fakes.opened(place / "photos" / "a.png")), mask, CLASSES)
    assert np.array_equal(np.asarray(fakes.opened(out / "a_overlay.png")), expected)
    refused = commands(*words, cwd=place)
    assert (refused.code, "made with min_area=6, not 1" in refused.error_message) == (2, True)
    # A folder of an earlier version, where the option left regions out of the polygons only.
    log = out / "predictions.jsonl"
    log.write_text(log.read_text().replace(', "min_area_of": "masks"', ""))
    refused = commands(*words, "--min-area", "6", cwd=place)
    assert (refused.code, "made with min_area_of=" in refused.error_message) == (2, True)


def test_all_outputs_are_written_and_agree(place, commands):
    words = ("--probabilities", "--uncertainty", "--class-masks", "--polygons", "--scales", "1,1.5")
    done = commands("predict", "best.ckpt", "photos", "--out", "full", *words, cwd=place)
    assert done.code == 0, done.err
    out = place / "full"
    table = list(csv.DictReader(io.StringIO((out / "statistics.csv").read_text())))
    coco = json.loads((out / "regions.json").read_text())
    assert [category["name"] for category in coco["categories"]] == list(CLASSES.names)
    assert [annotation["id"] for annotation in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for number, name in enumerate(("a", "deep/b", "deep/c"), start=1):
        mask = np.asarray(fakes.opened(out / f"{name}.png"))
        probabilities = np.load(out / f"{name}.npy")
        assert probabilities.dtype == np.float16
        assert np.allclose(probabilities.astype(float).sum(axis=0), 1, atol=2e-3)
        best = probabilities.astype(float).max(axis=0)
        assert np.take_along_axis(probabilities, mask[None].astype(int), axis=0)[0] == pytest.approx(best, abs=1e-3)
        assert fakes.opened(out / f"{name}_uncertainty.png").size == mask.shape[::-1]
        for index, class_name in enumerate(("ground", "thing", "sky_high")):
            assert np.array_equal(np.asarray(fakes.opened(out / f"{name}_{class_name}.png")), (mask == index) * 255)
        rows = [row for row in table if row["name"] == name]
        assert [int(row["pixels"]) for row in rows] == np.bincount(mask.ravel(), minlength=3).tolist()
        assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-5)
        image = coco["images"][number - 1]
        assert (image["height"], image["width"]) == mask.shape
        back = np.full(mask.shape, 255)
        for annotation in (entry for entry in coco["annotations"] if entry["image_id"] == number):
            inside = rasterised(np.array(annotation["segmentation"][0]).reshape(-1, 2), mask.shape)
            assert inside.sum() == annotation["area"]
            assert annotation["score"] == pytest.approx(best[inside].mean(), abs=2e-3)
            back[inside] = annotation["category_id"] - 1
        drawn = back != 255
        assert np.array_equal(back[drawn], mask[drawn])
        assert drawn.mean() > 0.5


def test_a_second_run_predicts_what_is_missing_and_another_checkpoint_is_refused(place, commands):
    words = ("predict", "best.ckpt", "photos", "--out", "again")
    assert commands(*words, cwd=place).code == 0
    out = place / "again"
    before = files(out)
    (out / "a.png").unlink()
    (out / "deep" / "b_overlay.png").write_bytes(b"cut")
    done = commands(*words, cwd=place)
    assert "1 of 3 is already done and skipped" in done.out
    after = files(out)
    assert {name: after[name] for name in after if name != "predictions.jsonl"} == {
        name: before[name] for name in before if name != "predictions.jsonl"
    }
    done = commands(*words, "--flip", cwd=place)
    assert done.code == 2
    expected = "again contains predictions made with flip=False, not True - choose another --out, or add --overwrite"
    assert expected in done.error_message
    content = checkpoint.load_plain(place / "best.ckpt")
    checkpoint.write({**content, "other": 1}, place / "other.ckpt")
    done = commands("predict", "other.ckpt", "photos", "--out", "again", cwd=place)
    assert "again contains predictions of a different checkpoint - choose another --out" in done.error_message
    assert commands("predict", "other.ckpt", "photos", "--out", "again", "--overwrite", cwd=place).code == 0


@pytest.mark.slow
def test_a_batch_prediction_killed_repeatedly_ends_like_an_uninterrupted_one(commands, place, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(1)
    for number in range(40):
        Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(photos / f"{number:02d}.png")
    words = ("predict", place / "best.ckpt", "photos", "--polygons", "--out")
    kills = 0
    for delay in (0.05, 0.15, 0.3, 0.5, 60):
        ended = commands.start(*words, "killed", cwd=tmp_path).end(timeout=delay)
        kills += ended.code == -signal.SIGKILL
        progress_log = tmp_path / "killed" / "predictions.jsonl"
        for line in (progress_log.read_bytes() if progress_log.exists() else b"").splitlines(keepends=True)[1:]:
            if line.endswith(b"\n"):
                for name, size in json.loads(line)["files"].items():
                    assert (tmp_path / "killed" / name).stat().st_size == size
    assert kills >= 2
    assert commands(*words, "whole", cwd=tmp_path).code == 0
    left, right = files(tmp_path / "killed"), files(tmp_path / "whole")
    del left["predictions.jsonl"], right["predictions.jsonl"]
    assert left == right
    assert len(right) == 3 * 40 + 3


def test_a_progress_log_is_truncated_to_its_last_complete_line_and_locked(tmp_path):
    source = tmp_path / "a.png"
    source.write_bytes(b"image")
    out = tmp_path / "out"
    progress_log = ProgressLog(LocalFolder(out), {"checkpoint": "x"})
    (out / "a.png").write_bytes(b"mask")
    progress_log.add("a", source, [out / "a.png"], size=[1, 1], pixels={})
    holder = f"process {os.getpid()} on {platform.node()}"
    with pytest.raises(UsageError, match=f"out is in use by {holder} - wait for it, or choose another --out"):
        ProgressLog(LocalFolder(out), {"checkpoint": "x"})
    progress_log.close()
    whole = (out / "predictions.jsonl").read_bytes()
    for cut in range(len(whole)):
        (out / "predictions.jsonl").write_bytes(whole[:cut])
        again = ProgressLog(LocalFolder(out), {"checkpoint": "x"})
        assert not again.has("a", source)
        again.add("a", source, [out / "a.png"], size=[1, 1], pixels={})
        again.close()
        assert (out / "predictions.jsonl").read_bytes() == whole
    again = ProgressLog(LocalFolder(out), {"checkpoint": "x"})
    assert again.has("a", source)
    source.write_bytes(b"another image")
    assert not again.has("a", source)
    again.close()


def test_a_list_keeps_the_folders_of_its_images(place, commands, tmp_path):
    (tmp_path / "photos").symlink_to(place / "photos")
    (tmp_path / "list.txt").write_text("photos/deep/b.png\n\nphotos/a.png\n")
    done = commands("predict", place / "best.ckpt", "list.txt", "--no-overlay", "--out", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    assert sorted(files(tmp_path / "out")) == [
        ".segdeconv-files", "photos/a.png", "photos/deep/b.png", "predictions.jsonl", "statistics.csv",
    ]  # fmt: skip


def test_a_missing_line_of_a_list_is_passed_over_like_a_damaged_picture(place, commands, tmp_path):
    (tmp_path / "photos").symlink_to(place / "photos")
    (tmp_path / "list.txt").write_text("photos/a.png\nphotos/none.png\nphotos/deep/b.png\n")
    words = (place / "best.ckpt", "list.txt", "--no-overlay", "--out", "out")
    for _ in range(2):
        done = commands("predict", *words, cwd=tmp_path)
        assert done.code == 2
        assert "skipped: list.txt, line 2: photos/none.png not found - give paths relative" in done.out
        assert done.error_message.startswith("1 of 3 files could not be read, see the messages above - repair them")
        assert {"photos/a.png", "photos/deep/b.png", "statistics.csv"} < set(files(tmp_path / "out"))
    (tmp_path / "list.txt").write_text("none.png\nneither.png\n")
    done = commands("predict", place / "best.ckpt", "list.txt", "--out", "out2", cwd=tmp_path)
    assert done.error_message.startswith("list.txt, line 1: none.png not found - give paths relative")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("road/street", "road street"),
            "class 'road street' and class 'road/street' have the same output file",
        ),
        (("car", "overlay"), "class 'overlay' and the overlay have the same output file NAME_overlay.png"),
        (("car", "<car>?"), None),
        (("x" * 300, "x" * 299 + "y"), None),
        (("Car", "car"), "1 output file(s) differ from another only in case or accents, such as those of class 'Car'"),
        (("caf\u00e9", "cafe\u0301"), "1 output file(s) differ from another only in case or accents"),
    ],
)
def test_two_class_masks_of_one_file_are_refused(names, message, capsys, tmp_path):
    outputs = Outputs(LocalFolder(tmp_path), Classes(names, voc_colours(2)), class_masks=True)
    if message is None or "differ" in message:
        endings = outputs.endings()
        for ending in endings:
            outputs.path("a", ending).touch()
        assert len(list(tmp_path.iterdir())) == len(set(endings)) == 6
        assert (message or "") in capsys.readouterr().err
    else:
        with pytest.raises(UsageError, match=re.escape(f"--class-masks: {message}")):
            outputs.endings()


def test_names_that_are_one_file_elsewhere_are_refused_there(monkeypatch, capsys, tmp_path):
    for name in ("a.png", "A.png"):
        (tmp_path / name).touch()
    assert len(find_images([str(tmp_path)], Path("out"), [".png"])) == 2
    assert "segdeconv: warning: 1 output file(s) differ from another only in case or accents" in capsys.readouterr().err
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match=r"a\.png and .*A\.png have the same output file out/a\.png - use two --out"):
        find_images([str(tmp_path)], Path("out"), [".png"])


@pytest.mark.parametrize(
    ("existing", "words"),
    [
        ("out/a.png", ()),
        ("out/a.npy", ("--probabilities",)),
        ("out/a_overlay.png", ()),
        ("out/a_uncertainty.png", ("--uncertainty",)),
        ("out/a_thing.png", ("--class-masks",)),
        ("out/a_regions.json", ("--polygons",)),
        ("out/regions.json", ("--polygons",)),
        ("out/statistics.csv", ()),
        ("out/predictions.jsonl", ()),
        ("out/.lock", ()),
        (f"out/film_overlay{video_suffix()}", ()),
        ("out/film/000003.png", ("--frames",)),
        ("kept/a.npz", ("--save-regions", "kept", "--regions", "2", "dataset.size=[16,16]")),
    ],
)
def test_a_file_of_someone_else_is_never_written_over(place, commands, tmp_path, existing, words):
    path = tmp_path / existing
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    (tmp_path / "film.mp4").touch()
    inputs = (place / "photos" / "a.png", "film.mp4")
    done = commands("predict", place / "best.ckpt", *inputs, *words, "--out", "out", "--overwrite", cwd=tmp_path)
    assert done.code == 2, done.err
    assert done.error_message.startswith(f"{existing} ")
    assert f"choose another --{'save-regions' if 'kept' in existing else 'out'}" in done.error_message
    assert files(tmp_path) == {existing: b"mine", "film.mp4": b""}


def test_own_predictions_are_resumed_and_replaced_with_files_of_someone_else_beside_them(place, commands, tmp_path):
    words = ("predict", place / "best.ckpt", place / "photos", "--no-overlay", "--out", "out")
    out = tmp_path / "out"
    assert commands(*words, cwd=tmp_path).code == 0
    (out / "deep" / "b.png").write_bytes(b"cut")
    (out / "a.npy").write_text("mine")
    assert "2 of 3 are already done" in commands(*words, cwd=tmp_path).out
    assert commands(*words, "--flip", "--overwrite", cwd=tmp_path).code == 0
    done = commands(*words, "--probabilities", "--overwrite", cwd=tmp_path)
    assert done.error_message.startswith("out/a.npy exists and was not written by segdeconv; it would be overwritten")
    (out / "a.npy").unlink()
    (out / "predictions.jsonl").unlink()  # as when it was lost
    assert commands(*words, "--probabilities", cwd=tmp_path).code == 0
    (out / ".segdeconv-files").unlink()  # a folder of an earlier release, stopped before its last log line
    log = (out / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "predictions.jsonl").write_bytes(b"".join(log[:-1]))
    assert "2 of 3 are already done" in commands(*words, "--probabilities", cwd=tmp_path).out


def test_an_input_is_never_an_output(place, commands, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text("deep/b.png\n")
    words = ("predict", place / "best.ckpt", "--no-overlay", "--out", ".")
    shutil.copytree(place / "photos" / "deep", tmp_path / "deep")
    before = files(tmp_path)
    done = commands(*words, "lists/list.txt", cwd=tmp_path)
    assert done.error_message == "deep/b.png is an input, which would be overwritten - choose another --out"
    assert files(tmp_path) == before


def test_a_prediction_into_a_sub_folder_of_another_one_leaves_it_alone(place, commands, tmp_path):
    words = ("predict", place / "best.ckpt", place / "photos", "--no-overlay", "--out")
    inner = ProgressLog(LocalFolder(tmp_path / "out" / "inner"), {"checkpoint": "x"})
    kept = ["out/inner/.tmp-1234567-0123abcd-a.png", "out/.tmp-x", "out/.tmp-dir/file"]
    for name in kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "out" / ".tmp-1234567-0123abcd-a.png").write_text("x")  # of a killed process
    assert commands(*words, "out", cwd=tmp_path).code == 0
    inner.close()
    assert {*kept, "out/a.png"} < set(files(tmp_path))
    assert "out/.tmp-1234567-0123abcd-a.png" not in files(tmp_path)


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        (("film.mp4", "film/000001.png"), ("--frames",), "film/000001.png would be the output of an image and a frame"),
        (("a.jpg", "a.png/b.jpg"), (), "a.png would be an output file and a folder of other outputs"),
        (("a.jpg", "a_overlay.jpg"), (), "have the same output file"),
        (("x.jpg", "statistics.csv/b.jpg"), (), "statistics.csv would be an output file and a folder of other"),
    ],
)
def test_outputs_that_collide_are_refused_before_the_first_image(place, commands, tmp_path, names, words, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("\n".join(names))
    done = commands("predict", place / "best.ckpt", "list.txt", *words, "--out", "out", cwd=tmp_path)
    assert done.code == 2
    assert message in done.error_message
    assert not (tmp_path / "out").exists()


def test_images_that_differ_only_in_the_suffix_are_predicted_and_their_names_stay(place, commands, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copyfile(place / "photos" / "deep" / "b.png", photos / "a.png")
    words = ("predict", place / "best.ckpt", "photos", "--out", "out")
    assert commands(*words, cwd=tmp_path).code == 0
    first = files(tmp_path / "out")
    Image.open(photos / "a.png").save(photos / "a.jpg")
    done = commands(*words, cwd=tmp_path)
    assert (done.code, files(tmp_path / "out")) == (2, first)
    assert "out has the mask of photos/a.png as a.png, which is now called a.png.png, since" in done.error_message
    assert commands(*words, "--overwrite", cwd=tmp_path).code == 0
    both = files(tmp_path / "out")
    assert {"a.png.png", "a.jpg.png", "a.png_overlay.png", "a.jpg_overlay.png"} < set(both)
    assert both["a.png.png"] == first["a.png"]
    names = [line.split(b",")[0] for line in both["statistics.csv"].splitlines()[1:]]
    assert names == [b"a.jpg"] * 3 + [b"a.png"] * 3
    (photos / "a.jpg").unlink()
    done = commands(*words, cwd=tmp_path)
    assert "out has the mask of photos/a.png as a.png.png, which is now called a.png, since" in done.error_message


def test_masks_have_the_labels_of_the_data_set_on_request(place, commands, tmp_path):
    content = checkpoint.load_plain(place / "best.ckpt")
    content["hyper_parameters"]["facts"]["classes"] |= {"labels": [7, 11, 26], "ignored_labels": [0]}
    checkpoint.write(content, tmp_path / "sparse.ckpt")
    words = ("predict", tmp_path / "sparse.ckpt", place / "photos" / "a.png", "--no-overlay", "--class-masks")
    for labels in ("index", "dataset"):
        done = commands(*words, "--labels", labels, "--out", labels, cwd=tmp_path)
        assert done.code == 0, done.err
    indices, labels = (np.array(fakes.opened(tmp_path / folder / "a.png")) for folder in ("index", "dataset"))
    assert set(np.unique(labels)) <= {7, 11, 26}
    assert np.array_equal(np.array([7, 11, 26])[indices], labels)
    assert np.array_equal(
        *(np.array(fakes.opened(tmp_path / folder / "a.png").convert("RGB")) for folder in ("index", "dataset"))
    )
    first, second = files(tmp_path / "index"), files(tmp_path / "dataset")
    assert {name for name in first if first[name] != second[name]} == {"a.png", "predictions.jsonl"}
    done = commands(*words, "--out", "dataset", cwd=tmp_path)
    assert "dataset contains predictions made with labels=dataset, not the default" in done.error_message


def test_a_submission_is_written_after_the_masks_and_later_on_request(place, commands, tmp_path, monkeypatch, capsys):
    words = ["predict", str(place / "best.ckpt"), str(place / "photos"), "--no-overlay", "--out", str(tmp_path / "out")]
    for option, message in (
        (("--submission", "voc"), "the checkpoint has 3 classes"),
        (("--submission", "mapillary"), "--submission mapillary: 3 images instead of 5000; "),
        (("--submission", "mapillary", "--labels", "dataset"), "leave out --labels"),
    ):
        done = commands(*words, *option, cwd=tmp_path)
        assert (done.code, (tmp_path / "out").exists()) == (2, False)
        assert message in done.error_message
    assert commands(*words, cwd=tmp_path).code == 0
    rules = submission.SERVERS["mapillary"]
    monkeypatch.setitem(submission.SERVERS, "mapillary", rules._replace(num_images=3))
    monkeypatch.setattr(sys, "argv", [*words, "--submission", "mapillary"])
    predict.run("")
    assert f"3 masks for Mapillary Vistas in {tmp_path / 'out' / 'mapillary.zip'}" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "out" / "mapillary.zip") as archive:
        assert archive.namelist() == ["a.png", "b.png", "c.png"]
        mask = Image.open(io.BytesIO(archive.read("b.png")))
    assert np.array_equal(np.asarray(mask), np.asarray(fakes.opened(tmp_path / "out" / "deep" / "b.png")))


def test_file_names_that_are_not_utf8_reach_every_output(place, commands, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(place / "photos" / "deep" / "b.png", tmp_path / "in" / os.fsdecode(b"caf\xe9.png"))
    words = ("--class-masks", "--polygons", "--probabilities", "--uncertainty", "--out", "out")
    for _ in range(2):  # the second time from the progress log
        done = commands("predict", place / "best.ckpt", "in", *words, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
        assert done.code == 0, done.err
    lines = (tmp_path / "out" / "statistics.csv").read_text(encoding="utf-8").splitlines()
    assert [line.partition(",")[0] for line in lines] == ["name", *[r"caf\udce9"] * 3]
    (image,) = json.loads((tmp_path / "out" / "regions.json").read_text())["images"]
    assert os.fsencode(image["file_name"]).endswith(b"in/caf\xe9.png")
    assert len(list((tmp_path / "out").glob(os.fsdecode(b"caf\xe9*")))) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tile", "large"), "--tile=large is not a size - write for example 1024, 768x1024 or auto"),
        (("--tile", "20"), "tiles of 20x20 are too small: the receptive field of SegNet extends"),
        (("--memory", "much"), "--memory=much is not an amount of memory - write for example 500M or 2G"),
        (("--scales", "1,b"), "--scales=1,b: expected numbers - write for example 0.75,1,1.25"),
        (("--scales", "0"), "scales=[0.0] are not valid scales"),
        (("--min-area", "0"), "--min-area=0 is not a valid number of pixels - give 1 or more"),
        (("--outlines", "--no-overlay"), "--outlines has no effect with --no-overlay - leave out one of them"),
        (("--window=1,2", "--no-overlay"), "--window has no effect with --no-overlay - leave out one of them"),
        (("--window=2,1",), "--window=2,1 is not two increasing numbers - write for example --window=400,2000"),
        (("--window=400,2000",), "images that are read as 8 bits - give two of them, or train with dataset.channels"),
        (("--crf", "--tile", "64"), "--regions, --ensemble and --crf cannot be combined with --scales or --tile"),
        (("--samples", "2", "--scales", "1,2"), "--samples and --scales cannot be combined"),
        (("dataset.max_pixels=100",), "files could not be read"),
    ],
)
def test_invalid_arguments_are_an_error_message(place, commands, words, message):
    done = commands("predict", "best.ckpt", "photos/a.png", "--out", "refused", *words, cwd=place)
    assert done.code == 2
    assert message in done.error_message
    assert "dataset.max_pixels" not in message or "raise dataset.max_pixels" in done.out


# Videos.


def video(path, frames, rate=5.0, code="mp4v"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()


def test_a_video_keeps_its_length_and_rate_and_a_truncated_one_its_readable_frames(place, commands, tmp_path):
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (12, 10, 13, 3), dtype=np.uint8)
    frames = [np.kron(frame, np.ones((8, 8, 1), np.uint8)) for frame in coarse]
    video(tmp_path / "film.mp4", frames)
    video(tmp_path / "whole.avi", frames, code="MJPG")
    content = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    paths = ("film.mp4", "cut.avi", "text.mp4")
    done = commands("predict", place / "best.ckpt", *paths, "--frames", "--out", "out", cwd=tmp_path)
    assert done.code == 2
    assert "1 of 3 files could not be read" in done.error_message
    assert "skipped: text.mp4 is not a readable video - convert it to MP4" in done.out
    capture = cv2.VideoCapture(str(tmp_path / "out" / f"film_overlay{video_suffix()}"))
    assert capture.get(cv2.CAP_PROP_FPS) == 5
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 12
    success, first = capture.read()
    assert success
    assert first.shape[1] >= 256  # enlarged, so that the legend can be read
    decoded = cv2.VideoCapture(str(tmp_path / "film.mp4"))
    segmenter = segdeconv.load(place / "best.ckpt")
    masks = sorted((tmp_path / "out" / "film").glob("*.png"))
    assert [path.stem for path in masks] == [f"{number:06d}" for number in range(1, 13)]
    for path in masks[:2]:
        frame = decoded.read()[1]
        assert np.array_equal(np.asarray(fakes.opened(path)), segmenter.predict(frame[:, :, ::-1]).mask)
    left = len(list((tmp_path / "out" / "cut").glob("*.png")))
    assert 3 <= left < 12
    assert f"cut.avi: only {left} of 12 frames can be read, the file is truncated or damaged" in done.out
    assert f"{12 + left} frames of 2 videos in out, with statistics.csv" in done.out
    again = commands("predict", place / "best.ckpt", *paths[:2], "--frames", "--out", "out", cwd=tmp_path)
    assert "2 of 2 are already done" in again.out


def test_without_ffmpeg_the_overlay_is_an_mp4_file_and_one_line_says_so(place, commands, tmp_path):
    video(tmp_path / "film.mp4", [np.full((48, 64, 3), 99, np.uint8)])
    shutil.copyfile(place / "photos" / "deep" / "b.png", tmp_path / "b.png")
    words = ("predict", place / "best.ckpt", "film.mp4", "b.png", "--out", "out")
    done = commands(*words, cwd=tmp_path, env={"PATH": str(tmp_path)})
    assert done.code == 0, done.err
    assert "1 mask and 1 frame of 1 video in out, with statistics.csv" in done.out
    assert done.err.count("no program ffmpeg that encodes VP9 is on PATH, so the overlays of videos are MP4 files") == 1
    assert (tmp_path / "out" / "film_overlay.mp4").is_file()


def test_a_video_stored_turned_is_read_upright(tmp_path):
    frame = np.zeros((48, 96, 3), np.uint8)
    frame[:, :48] = 255
    video(tmp_path / "lying.mp4", [frame] * 3)
    content = bytearray((tmp_path / "lying.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # ISO/IEC 14496-12, 8.3.2: the track header's transformation matrix
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(content)
    first = next(open_video(tmp_path / "turned.mp4", 10_000).frames()).image
    assert first.shape == (96, 48, 3)
    assert first[10, 20].min() > 200  # what lay on the left is above
    assert first[90, 20].max() < 60
    with pytest.raises(UsageError, match="more than 100 - shrink it"):
        open_video(tmp_path / "turned.mp4", 100)


# Full disks.


@pytest.mark.parametrize("limit", ["full disk", "file size"])
@pytest.mark.parametrize("kind", ["video", "probabilities", "masks"])
def test_a_full_disk_is_one_line_and_the_next_run_resumes(place, commands, tmp_path, kind, limit):
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (96, 128, 3), dtype=np.uint8) for _ in range(25)]
    if kind == "video":
        video(tmp_path / "film.mp4", noise)
    else:
        for number in range(12 if kind == "masks" else 1):
            Image.fromarray(np.tile(noise[0], (8, 8, 1)) if kind != "masks" else noise[number]).save(
                tmp_path / f"{number:02d}.png"
            )
    (tmp_path / "out").mkdir()
    sizes = {"video": 150_000, "probabilities": 400_000, "masks": 3_000 if limit == "file size" else 60_000}
    limits = {"file_size": sizes[kind]} if limit == "file size" else {"tmpfs": {str(tmp_path / "out"): sizes[kind]}}
    option = ["--no-overlay", "--probabilities"] if kind == "probabilities" else []
    words = ("predict", place / "best.ckpt", "film.mp4" if kind == "video" else "*.png", "--out", "out", *option)
    done = commands(*words, cwd=tmp_path, limits=limits)
    assert done.code == 5, (done.code, done.err)
    assert "out/" in done.error_message
    if limit == "file size":  # the small disk is gone with its process
        assert "film" not in (tmp_path / "out" / "predictions.jsonl").read_text()
        assert not list((tmp_path / "out").glob("*.np*")) + list((tmp_path / "out").glob(".tmp-*"))
    done = commands(*words, cwd=tmp_path)
    assert done.code == 0, done.err
    if kind == "probabilities":
        assert np.load(tmp_path / "out" / "00.npy").sum(axis=0) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("out", "code"), [("/proc/x", 2), ("/dev/null/x", 2), ("file", 2), ("file/x", 2), ("/proc/self/task/x", 2)]
)
def test_a_folder_that_cannot_be_created_is_one_line(place, commands, tmp_path, out, code):
    (tmp_path / "file").write_text("mine")
    words = (place / "photos" / "a.png", "--out", out)
    done = commands("predict", place / "best.ckpt", *words, cwd=tmp_path)
    assert done.code == code, done.err
    assert out in done.error_message


@pytest.mark.parametrize("words", [(), ("--probabilities",), ("--polygons",)])
def test_a_folder_removed_during_the_prediction_is_one_line(commands, place, tmp_path, words):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(400):
        shutil.copyfile(place / "photos" / "deep" / "b.png", photos / f"{number}.png")
    started = commands.start("predict", place / "best.ckpt", "photos", *words, "--out", "out", cwd=tmp_path)
    while not (tmp_path / "out" / "0.png").exists():
        time.sleep(0.001)
    (tmp_path / "out").rename(tmp_path / "moved")
    ended = started.end()
    assert ended.code == 5, ended.err
    assert ended.error_message.startswith("out")
    assert "removed" in ended.error_message
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


# Components.


@pytest.mark.parametrize("size", [(1, 1), (37, 61), (5, 300)])
@pytest.mark.parametrize("kind", ["photo", "grey", "palette"])
def test_pillow_reads_a_png_written_row_by_row(size, kind):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (*size, 3) if kind == "photo" else size, dtype=np.uint8)
    file = io.BytesIO()
    palette = CLASSES.palette if kind == "palette" else None
    png = Png(file, size, channels=3 if kind == "photo" else 1, palette=palette)
    for top in range(0, size[0], 7):
        png.write(image[top : top + 7])
    png.close()
    decoded = Image.open(io.BytesIO(file.getvalue()))
    assert decoded.mode == {"photo": "RGB", "grey": "L", "palette": "P"}[kind]
    assert np.array_equal(np.asarray(decoded), image)


def test_polygons_cover_the_pixels_of_their_regions_with_holes_and_corners():
    random = np.random.default_rng(0)
    for trial in range(30):
        mask = random.integers(0, 3, random.integers(1, 20, 2), dtype=np.uint8)
        mask = np.kron(mask, np.ones((1 + trial % 2, 1 + trial % 3), np.uint8))
        back = np.full(mask.shape, 255)
        count = 0
        for region in regions(mask):
            inside = rasterised(region.polygon, mask.shape)
            assert inside.sum() == region.area
            assert (back[inside] == 255).all()
            back[inside] = region.class_index
            count += 1
        assert np.array_equal(back, mask)
        expected = sum(
            cv2.connectedComponents((mask == index).astype(np.uint8), connectivity=4)[0] - 1 for index in range(3)
        )
        assert count == expected


def test_rings_are_simple_and_enclose_the_pixels_of_their_region():
    random = np.random.default_rng(1)
    for _ in range(40):
        mask = random.integers(0, 2, random.integers(1, 16, 2), dtype=np.uint8)
        for region in regions(mask, without=[0]):
            outer, *holes = region.rings
            inside = rasterised(outer, mask.shape)
            assert all(len({tuple(corner) for corner in ring}) == len(ring) for ring in region.rings)
            for hole in holes:
                assert not (rasterised(hole, mask.shape) & ~inside).any()
                inside ^= rasterised(hole, mask.shape)
            assert inside.sum() == region.area
            assert (mask[inside] == 1).all()
            areas = [signed_area(ring) for ring in region.rings]
            assert (sum(areas), sum(area > 0 for area in areas), areas[0] > 0) == (region.area, 1, True)


def test_a_ring_is_one_polygon_whose_area_opencv_confirms():
    mask = np.zeros((9, 9), np.uint8)
    mask[1:8, 1:8] = 1
    mask[3:6, 3:6] = 0
    (ring,) = [region for region in regions(mask) if region.class_index == 1]
    assert (ring.area, ring.box) == (49 - 9, (1, 1, 7, 7))
    assert cv2.contourArea(ring.polygon.astype(np.float32)) == 40
    large = cv2.fillPoly(np.zeros((90, 90), np.uint8), [ring.polygon * 10], 1)
    differs = large != np.kron(mask, np.ones((10, 10), np.uint8))
    outline = np.zeros((90, 90), np.uint8)
    cv2.polylines(outline, [ring.polygon * 10], True, 1, thickness=3)
    assert not (differs & (outline == 0)).any()


@pytest.mark.parametrize("keep", [False, True])
def test_polygons_leave_out_the_background_and_name_the_file(tmp_path, keep):
    classes = Classes(("background", "thing"), voc_colours(2))
    mask = np.zeros((9, 9), np.uint8)
    mask[1:8, 1:8] = 1
    mask[3:6, 3:6] = 0
    mask[0, 0] = 255  # without data
    prediction = Prediction(np.zeros((9, 9, 3), np.uint8), mask, classes, None, None, 1, lambda sink: None)
    outputs = Outputs(LocalFolder(tmp_path), classes, overlay=False, polygons=("coco", "geojson"), keep_background=keep)
    written = outputs.write("a", Path("photos/a.jpg"), prediction, True)
    assert [path.name for path in written] == ["a.png", "a_regions.json", "a_regions.geojson"]
    coco = json.loads(written[1].read_text())
    assert coco["image"]["file_name"] == "photos/a.jpg"
    areas = [(region["category_id"], region["area"]) for region in coco["annotations"]]
    assert areas == ([(1, 31), (1, 9)] if keep else []) + [(2, 40)]
    collection = json.loads(written[2].read_text())
    assert (collection["type"], "crs" in collection) == ("FeatureCollection", False)
    thing = collection["features"][-1]
    assert len(collection["features"]) == len(areas)
    assert thing["properties"] == {
        "class": "thing", "class_index": 1, "pixels": 40, "area_m2": None, "score": 1.0, "image": "photos/a.jpg",
    }  # fmt: skip
    assert [sorted(map(tuple, ring[1:])) for ring in thing["geometry"]["coordinates"]] == [
        [(1, 1), (1, 8), (8, 1), (8, 8)], [(3, 3), (3, 6), (6, 3), (6, 6)],
    ]  # fmt: skip


def test_ordinary_images_have_polygons_in_pixels_and_a_table_with_files(place, commands):
    words = ("best.ckpt", "photos/deep/b.png", "--out", "tables", "--polygon-format", "geojson")
    done = commands("predict", *words, cwd=place)
    assert done.code == 0
    assert "1 of 1 images has no coordinate reference system that can be read, such as photos/deep/b.png" in done.err
    collection = json.loads((place / "tables" / "b_regions.geojson").read_text())
    assert collection["description"] == "pixel coordinates: x to the right, y downwards"
    assert sum(feature["properties"]["pixels"] for feature in collection["features"]) == 40 * 60
    assert not (place / "tables" / "regions.json").exists()
    rows = list(csv.DictReader((place / "tables" / "statistics.csv").read_text().splitlines()))
    assert [(row["name"], row["file"], row["area_m2"]) for row in rows] == 3 * [("b", "photos/deep/b.png", "")]
    with pytest.raises(UsageError, match="--polygon-format=geojson,shp: 'shp' is not a format - write some of coco,"):
        predict.polygon_formats("geojson,shp")


def test_an_image_that_fits_into_memory_is_not_tiled(place):
    tiler = Tiler(SegNet(3, **MODEL).eval().to("meta"), memory=1 << 20)
    assert tiler.step((10, 10)) is None
    assert "geometry" not in vars(tiler)  # the network was not traced
    assert tiler.step((1000, 1000)) is not None
