"""Ranking of images to label next: its measures and its order, compared with computations by hand, and the command."""

import csv
import re

import fakes
import numpy as np
import pytest
import torch
from PIL import Image

from segdeconv.analysis.ranking import (
    EncoderFeatures,
    Measured,
    measure,
    pixel_uncertainty,
    rank,
    region_uncertainty,
)
from segdeconv.checkpoints import checkpoint
from segdeconv.inference.network import Network
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models import FCN, DeconvNet, SegNet, UNet

SHAPES = {"_target_": "segdeconv.data.Shapes", "num_train": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the checkpoint of a random network and photos, of which three are almost the same."""
    folder = tmp_path_factory.mktemp("unlabelled")
    fakes.untrained(folder / "best.ckpt", SHAPES, dropout_at="central")
    random = np.random.default_rng(0)
    for name in ("a/1", "a/2", "a/3", "b/1", "b/2", "b/3"):
        path = folder / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = fakes.image_and_mask(int(name[-1]) if name[0] == "a" else 7, 3)[0]
        noise = random.integers(0, 120 if name[0] == "a" else 2, size=image.shape)
        Image.fromarray((image + noise).clip(0, 255).astype(np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_the_uncertainty_of_an_image_is_the_mean_of_its_most_uncertain_cells(factor, turned):
    values = np.random.default_rng(0).gamma(1, 1, size=(48, 64)).astype(np.float32)
    cells = sorted(values[y : y + 4, x : x + 4].mean() for y in range(0, 48, 4) for x in range(0, 64, 4))
    enlarged = np.kron(values, np.ones((factor, factor), np.float32))
    expected = np.mean(cells[-19:])  # a tenth of 12 x 16 cells
    assert region_uncertainty(enlarged.T if turned else enlarged) == pytest.approx(expected, rel=1e-5)


def test_an_image_smaller_than_the_grid_has_the_uncertainty_of_its_pixels():
    assert region_uncertainty(np.array([[0.25, 1.0, 0.5]], np.float32)) == 1.0


def unit(vector):
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def images(folder, count, seed):
    random = np.random.default_rng(seed)
    return [
        Measured(folder / f"{index}.png", float(random.uniform(0.1, 2)), unit(random.uniform(0, 1, 4)))
        for index in range(count)
    ]


@pytest.mark.parametrize("diversity", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("num_labelled", [0, 3])
def test_each_image_is_the_best_given_those_before_it(tmp_path, diversity, num_labelled):
    pool, labelled = images(tmp_path / "pool", 12, 1), images(tmp_path / "labelled", num_labelled, 2)
    pairs = [np.linalg.norm(a.features - b.features) for a in pool for b in pool]
    typical = float(np.sqrt(np.mean(np.square(pairs))))
    earlier, remaining, expected = list(labelled), list(pool), []
    while remaining:
        scores = []
        for image in remaining:
            distances = [float(np.linalg.norm(image.features - other.features)) for other in earlier]
            novelty = min(1.0, min(distances) / typical) if distances else 1.0
            nearest = earlier[int(np.argmin(distances))].path if distances else None
            scores.append((image.uncertainty * novelty**diversity, novelty, nearest))
        best = max(range(len(remaining)), key=lambda index: scores[index][0])
        expected.append((remaining[best].path, *scores[best]))
        earlier.append(remaining.pop(best))
    ranked = rank(pool, labelled, diversity=diversity)
    assert [(image.path, image.nearest) for image in ranked] == [(path, nearest) for path, _, _, nearest in expected]
    for image, (_, score, novelty, _) in zip(ranked, expected, strict=True):
        assert (image.score, image.novelty) == pytest.approx((score, novelty), rel=1e-3, abs=1e-3)


def test_the_first_ten_of_a_video_differ(tmp_path):
    random = np.random.default_rng(0)
    frames = []  # ten of every scene; those of a few scenes are the most uncertain
    for scene in range(12):
        middle = unit(random.uniform(0, 1, 16))
        for number in range(10):
            features = unit(middle + 0.005 * random.normal(size=16))
            frames.append(Measured(tmp_path / f"{scene}_{number}.png", 2 / (1 + scene) + 0.01 * number, features))

    def scenes_of(ranked):
        return [image.path.stem.split("_")[0] for image in ranked[:10]]

    assert len(set(scenes_of(rank(frames)))) == 10
    assert len(set(scenes_of(rank(frames, diversity=0)))) == 1
    labelled = [frame for frame in frames if frame.path.name.startswith("0_")]
    assert "0" not in scenes_of(rank([frame for frame in frames if frame not in labelled], labelled))


def test_equal_images_are_ranked_by_uncertainty(tmp_path):
    features = unit(np.ones(4))
    pool = [Measured(tmp_path / f"{value}.png", value, features) for value in (0.5, 2.0, 1.0)]
    assert [image.uncertainty for image in rank(pool)] == [2.0, 1.0, 0.5]
    assert rank([]) == []


@pytest.mark.parametrize(
    ("network", "arguments", "channels"),
    [
        (SegNet, {"stages": ((4,), (6,))}, 6),
        (SegNet, {"stages": ((4,), (6,)), "encoder_addition": True}, 6),
        (UNet, {"stages": ((4,), (6,), (5,))}, 5),
        (FCN, {"depth": 11, "width": 0.0625, "fc_width": 40}, 40),
        (DeconvNet, {"depth": 11, "width": 0.0625, "fc_width": 24}, 32),
    ],
)
def test_the_features_are_the_mean_of_the_deepest_map(network, arguments, channels):
    torch.manual_seed(0)
    model = network(3, **arguments).eval()
    prepared = Network(model, torch.device("cpu"), "32-true")
    features = EncoderFeatures(prepared)
    image = torch.randn(1, 3, 224, 256)
    prepared.logits(image)
    mean = features.mean()
    assert mean.shape == (channels,)
    assert np.linalg.norm(mean) == pytest.approx(1)
    if network is SegNet:
        with torch.no_grad():
            expected = model.encoder(image).features.mean(dim=(0, 2, 3)).numpy()
        np.testing.assert_allclose(mean, unit(expected), rtol=1e-4, atol=1e-6)
    features.reset()
    for half in image.chunk(2, dim=3):  # tiles
        prepared.logits(half)
    assert float(features.mean() @ mean) > 0.9
    features.close()


def test_uncertainty_is_entropy_or_with_samples_mutual_information(place):
    path = place / "photos" / "a" / "1.png"
    loaded = checkpoint.read(place / "best.ckpt")
    segmenter = Segmenter(loaded)
    image = segmenter.open(path).image
    mask, values = pixel_uncertainty(segmenter, image, "a")
    prediction = segmenter.predict(path)
    probabilities = prediction.probabilities().astype(np.float64)
    assert (mask == prediction.mask).all()
    np.testing.assert_allclose(values, -(probabilities * np.log(probabilities)).sum(axis=0), rtol=1e-3, atol=1e-4)

    settings = PredictionSettings(samples=4)
    sampled = Segmenter(loaded, settings)
    _, values = pixel_uncertainty(sampled, image, "a")
    direct = sampled.network(sampled.preprocessing(image, "a")[None]).information
    expected = torch.nn.functional.interpolate(direct[None], size=image.shape[:2], mode="bilinear")[0, 0].numpy()
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)
    assert values.max() > 0


def test_copies_of_an_image_have_the_same_measures_and_a_broken_one_is_skipped(place, tmp_path):
    paths = [place / "photos" / "a" / "1.png", tmp_path / "broken.png", tmp_path / "copy.png"]
    paths[1].write_text("no image")
    paths[2].write_bytes(paths[0].read_bytes())
    messages = []
    first, second = measure(Segmenter(checkpoint.read(place / "best.ckpt")), paths, report=messages.append)
    assert (first.path, second.path) == (paths[0], paths[2])
    assert first.uncertainty == second.uncertainty
    assert (first.features == second.features).all()
    assert re.fullmatch(r"skipped: .*broken\.png.*", messages[0])


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_ranks_copies_and_repeats_itself(place, commands):
    words = ("rank", "best.ckpt", "photos", "--first", 3)
    done = commands(*words, "--copy", "next", cwd=place)
    assert done.code == 0, done.err
    rows = table(place / "ranking" / "ranking.csv")
    assert [row["rank"] for row in rows] == list("123456")
    assert {row["file"] for row in rows} == {f"photos/{folder}/{number}.png" for folder in "ab" for number in "123"}
    assert sum(row["file"].startswith("photos/b/") for row in rows[:3]) == 1  # three are almost the same
    assert rows[0]["nearest_earlier"] == ""
    for number, row in enumerate(rows[1:], start=1):
        assert row["nearest_earlier"] in {earlier["file"] for earlier in rows[:number]}
    copies = {path.relative_to(place / "next").as_posix() for path in (place / "next").rglob("*.png")}
    assert copies == {row["file"].removeprefix("photos/") for row in rows[:3]}
    page = (place / "ranking" / "ranking.html").read_text()
    assert page.count("<figure>") == 9
    assert all(row["file"] in page for row in rows[:3])
    assert commands(*words, "--out", "again", cwd=place).code == 0
    assert (place / "again" / "ranking.csv").read_bytes() == (place / "ranking" / "ranking.csv").read_bytes()


def test_labelled_images_are_not_ranked_and_similar_ones_come_last(place, commands):
    words = ("rank", "best.ckpt", "photos", "--labelled", "photos/b/1.png", "--out", "rest")
    done = commands(*words, cwd=place)
    assert done.code == 0, done.err
    assert "1 of 6 images are labelled, so they are not ranked" in done.err
    rows = table(place / "rest" / "ranking.csv")
    assert [row["file"][7] for row in rows] == list("aaabb")
    assert {row["nearest_earlier"] for row in rows[-2:]} <= {"photos/b/1.png", rows[-2]["file"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("photos", "--split", "val"), "--split has no effect without --suspects"),
        (("photos", "--suspects"), "photos: --suspects checks the data set of the checkpoint"),
        (("--suspects", "--labelled", "photos"), "--labelled has no effect with --suspects"),
        (("photos", "--diversity", "-1"), "--diversity=-1 is not a weight"),
        (("photos", "--first", "0"), "--first=0 is not a number of images"),
        (("photos", "--copy", "photos"), "--copy photos is not empty"),
        (("photos", "--labelled", "photos"), "all images are in --labelled"),
        ((), "no images given"),
        (("film.mp4",), "film.mp4 is a video"),
        (("--suspects", "--min-area", "0"), "--min-area=0 is not a number of pixels"),
    ],
)
def test_the_command_refuses_bad_arguments(place, commands, words, message):
    (place / "film.mp4").touch()
    done = commands("rank", "best.ckpt", *words, "--out", "refused", cwd=place)
    assert done.code == 2
    assert message in done.error_message
    assert not (place / "refused").exists()
