"""Explanations of pixels, regions and errors, in Python and by the command."""

import json

import cv2
import fakes
import numpy as np
import pytest
import torch
from checkpoint_files import content
from fakes import opened
from PIL import Image

from segdeconv.analysis.explanation import Explainer, Question, region, shown
from segdeconv.checkpoints import checkpoint
from segdeconv.drawing.draw import diverging
from segdeconv.drawing.panels import signed_bars
from segdeconv.errors import UsageError
from segdeconv.inference.segmenter import load
from segdeconv.models import FPN, SegNet, SegNetBasic

NAMES = ("sky", "road, wet", "car")
NETWORKS = {
    "segnet": (SegNet, {"stages": [[4], [8], [8]]}),
    "segnet_basic": (SegNetBasic, {"width": 4}),
    "fpn": (FPN, {"stages": [[4], [8], [8]], "num_levels": 2, "channels": 16}),
}


def write_checkpoint(path, name):
    """Write a random network whose input is 40x56 and whose batch norms are not the identity."""
    torch.manual_seed(0)
    kind, arguments = NETWORKS[name]
    model = kind(3, **arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            module.bias.data.normal_(std=0.3)
    written = content()
    metadata, config = written["hyper_parameters"]["facts"], written["hyper_parameters"]["config"]
    colours = [[250, 0, 0], [0, 250, 0], [0, 0, 250]]
    metadata["classes"] |= {"names": list(NAMES), "colours": colours, "labels": [0, 1, 2]}
    metadata["preprocessing"] = {"size": None, "mean": [120.0, 110.0, 100.0], "std": [60.0, 61.0, 62.0]}
    metadata["precision"] = "32-true"
    config["model"] = {"_target_": f"segdeconv.models.{kind.__name__}", **arguments}
    config["dataset"] = {"size": [40, 56], "crop": None, "max_pixels": 1_000_000}
    written["state_dict"] = {f"model.{key}": value for key, value in model.state_dict().items()}
    checkpoint.write(written, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained")
    for name in NETWORKS:
        write_checkpoint(folder / f"{name}.ckpt", name)
    Image.fromarray(fakes.image_and_mask(3, 3, (83, 121))[0]).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def segmenter(place):
    return load(place / "segnet.ckpt", precision="32-true")


def photo(place):
    return np.array(Image.open(place / "photo.png"))


def explainer(segmenter):
    return Explainer(segmenter.float32_model, segmenter.preprocessing, segmenter.classes.names)


def test_the_explained_logits_are_those_that_decide_the_prediction(segmenter, place):
    image = photo(place)
    prediction = segmenter.predict(image)
    probabilities = prediction.probabilities()
    for y, x in ((0, 0), (60, 100), (82, 120)):
        answer = explainer(segmenter).explain(image, Question(y, x))
        assert answer.exact
        assert answer.predicted == answer.class_ == prediction.mask[y, x]
        order = np.argsort(-probabilities[:, y, x])
        assert (answer.class_, answer.other) == (order[0], order[1])
        np.testing.assert_allclose(torch.tensor(answer.logits).softmax(0), probabilities[:, y, x], atol=1e-5)
        assert answer.of_class.value == pytest.approx(answer.logits[answer.class_])
        assert answer.of_difference.value == pytest.approx(answer.logits[order[0]] - answer.logits[order[1]], abs=1e-5)
        assert answer.of_class.pixels.shape == (3, 40, 56)
        assert (answer.start, answer.limits) == ("", "")
    assert (answer.prediction == prediction.mask).all()


def test_the_contributions_of_a_region_are_the_sum_of_those_of_its_pixels(segmenter, place):
    image = photo(place)
    whole = explainer(segmenter)
    prediction = whole.explain(image, Question(0, 0)).prediction
    # The smallest region of more than one pixel, for speed.
    count, numbers = max(
        (cv2.connectedComponents((prediction == label).astype(np.uint8), connectivity=4) for label in range(3)),
        key=lambda found: found[0],
    )
    sizes = [(int((numbers == number).sum()), number) for number in range(1, count)]
    size, number = min(entry for entry in sizes if entry[0] > 1)
    inside = numbers == number
    places = list(zip(*map(np.ndarray.tolist, np.nonzero(inside)), strict=True))[:12]
    answer = whole.explain(image, Question(*places[0], region=True))
    assert (answer.inside == inside).all()
    assert answer.exact
    classes = (answer.class_, answer.other)
    if size <= 12:
        singles = whole.explain_all(image, [Question(y, x) for y, x in places], classes=classes)
        expected = sum(single.of_difference.pixels for single in singles)
        torch.testing.assert_close(answer.of_difference.pixels, expected, rtol=1e-3, atol=1e-5)
        assert answer.of_class.value == pytest.approx(sum(single.of_class.value for single in singles), rel=1e-4)


def test_a_region_is_connected_by_edges():
    prediction = np.array([[1, 0, 1], [1, 0, 0], [0, 1, 1]], dtype=np.uint8)
    assert region(prediction, Question(0, 0, region=True)).astype(int).tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert region(prediction, Question(1, 2, region=True)).sum() == 3
    assert region(prediction, Question(1, 2)).sum() == 1


def test_two_classes_are_compared_in_the_order_given(segmenter, place):
    one = explainer(segmenter).explain(photo(place), Question(50, 50), classes=(2, 0))
    other = explainer(segmenter).explain(photo(place), Question(50, 50), classes=(0, 2))
    assert list(one.named) == ["car", "car - sky"]
    torch.testing.assert_close(one.of_difference.pixels, -other.of_difference.pixels)
    assert one.of_class.total - other.of_class.total == pytest.approx(one.of_difference.total, abs=1e-4)


def test_float64_adds_up_to_twelve_digits(segmenter, place):
    model = load(place / "segnet.ckpt", precision="32-true").float32_model.double()
    answer = Explainer(model, segmenter.preprocessing, NAMES).explain(photo(place), Question(60, 100))
    assert answer.of_class.tolerance == 1e-12
    assert answer.exact
    single = explainer(segmenter).explain(photo(place), Question(60, 100))
    assert abs(answer.of_class.total - answer.of_class.value) < 1e-12 * answer.of_class.magnitude
    assert single.of_class.value == pytest.approx(answer.of_class.value, abs=1e-4)


def test_a_pixel_outside_the_image_is_refused(segmenter, place):
    with pytest.raises(UsageError, match=r"pixel y 83, x 0 is outside the image of 83x121 pixels \(HxW\)"):
        explainer(segmenter).explain(photo(place), Question(83, 0))


def test_the_command_writes_figure_numbers_and_maps(place, commands, tmp_path):
    words = ("--explain", "60,100", "--explain-region", "60,100", "--classes", "road, wet,car", "--out", "v")
    done = commands("visualize", place / "segnet.ckpt", place / "photo.png", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    names = [f"photo_{kind}_60_100.{suffix}" for kind in ("pixel", "region") for suffix in ("json", "npz", "png")]
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == ["index.html", *names]
    numbers = json.loads((tmp_path / "v/photo_pixel_60_100.json").read_text())
    explained = numbers["explained"]["road, wet - car"]
    assert explained["value"] == pytest.approx(numbers["logits"]["road, wet"] - numbers["logits"]["car"], abs=1e-5)
    assert f"road, wet - car: sum {explained['sum']:.6g}, logit {explained['value']:.6g}; they differ by" in done.out
    assert explained["exact"]
    with np.load(tmp_path / "v/photo_pixel_60_100.npz") as maps:
        total = maps["difference/pixels"].sum(dtype=np.float64) + explained["from_biases"]
        assert total == pytest.approx(explained["value"], abs=1e-4)
        assert maps["inside"].shape == (83, 121)
        assert maps["difference/unpool 1"].shape == (40, 56)
        assert [float(maps[f"difference/{entry['name']}"].sum()) for entry in explained["maps"]] == pytest.approx(
            [entry["through"] for entry in explained["maps"]], abs=1e-4
        )
    picture = np.asarray(opened(tmp_path / "v/photo_pixel_60_100.png"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 500


def test_an_explanation_that_does_not_add_up_exits_with_1_and_draws_nothing(place, commands, tmp_path):
    done = commands(
        "visualize", place / "fpn.ckpt", place / "photo.png", "--explain", "60,100", "--out", "v", cwd=tmp_path
    )
    assert done.code == 1
    assert "do not add up to the logits" in done.error_message
    assert "head.norm (GroupNorm)" in done.error_message
    assert "Traceback" not in done.err
    assert "logit" in done.out
    assert "not an exact explanation: head.norm (GroupNorm) is not affine" in done.out
    assert not list((tmp_path / "v").glob("*.png"))
    numbers = json.loads((tmp_path / "v/photo_pixel_60_100.json").read_text())
    assert not any(explained["exact"] for explained in numbers["explained"].values())


def test_a_network_that_normalises_its_input_is_explained_from_there(place, commands, tmp_path):
    words = ("--explain", "60,100", "--precision", "64-true", "--out", "v")
    done = commands("visualize", place / "segnet_basic.ckpt", place / "photo.png", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "exact from the output of normalise (LocalResponseNorm) on, which is not affine" in done.out
    numbers = json.loads((tmp_path / "v/photo_pixel_60_100.json").read_text())
    assert (numbers["start"], numbers["non_affine"]) == ("normalise", ["normalise (LocalResponseNorm)"])


@pytest.mark.parametrize(("words", "sentence"), [
    (["--explain", "5"], "--explain 5 is not a row and a column - give for example --explain 120,300"),
    (["--explain", "a,b"], "--explain a,b is not a list of numbers"),
    (["--explain-region", "-1,5"], "--explain-region"),
    (["--explain", "83,0"], "pixel y 83, x 0 is outside photo of 83x121 pixels (HxW)"),
    (["--classes", "sky,car"], "--classes has no effect without --explain Y,X"),
    (["--explain", "1,1", "--classes", "sky"], "--classes sky is not two classes"),
    (["--explain", "1,1", "--classes", "sky,cat"], "--classes cat is not a class of"),
    (["--explain", "1,1", "--classes", "sky,sky"], "--classes sky,sky names one class twice"),
    (["--explain", "1,1", "--precision", "bf16-mixed"], "--precision bf16-mixed: explanations add up"),
    (["--explain", "1,1", "--samples", "2"], "--samples has no effect on explanations"),
    (["--precision", "64-true"], "precision=64-true is unknown"),
])  # fmt: skip
def test_invalid_options_are_reported(place, commands, tmp_path, words, sentence):
    done = commands("visualize", place / "segnet.ckpt", place / "photo.png", *words, "--out", "bad", cwd=tmp_path)
    assert done.code == 2
    assert sentence in done.error_message
    assert not (tmp_path / "bad").exists()


def test_what_is_shown_keeps_signs_and_is_clipped():
    values = np.zeros((2, 20, 20))
    values[:, 5, 5], values[0, 10, 10] = 2.0, -1.0
    plane, top = shown(values, sigma=0)
    assert (plane[5, 5], plane[0, 0]) == (1.0, 0.0)
    assert plane[10, 10] == pytest.approx(-1 / top)
    blurred, _ = shown(values, sigma=2)
    assert blurred[5, 6] > 0 > blurred[10, 11]
    assert shown(np.zeros((4, 4)), sigma=1)[1] == 0


def test_colours_of_signs():
    colours = diverging(np.array([[-1.0, 0.0, 1.0, 2.0]]))[0]
    assert colours.tolist() == [[33, 94, 168], [255, 255, 255], [179, 69, 31], [179, 69, 31]]
    chart = signed_bars({"pixels": 1.0, "encoder 1/2": -0.5}, 400).astype(int)
    red, blue = ((chart == colour).all(axis=2).any(axis=0).nonzero()[0] for colour in ((179, 69, 31), (33, 94, 168)))
    assert blue.max() <= red.min()
    assert len(red) == pytest.approx(2 * len(blue), abs=2)
