"""Region-wise prediction and ensembles, against brute force and numbers worked by hand."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import fakes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.checkpoints import checkpoint
from segdeconv.cli.options import add_prediction_options, crf_settings, prediction_settings, split_overrides
from segdeconv.data.boxes import cut, expanded, squared
from segdeconv.data.preprocessing import Preprocessing, resize_image
from segdeconv.data.proposals import Source
from segdeconv.errors import UsageError
from segdeconv.evaluation.evaluate import evaluate, restore_dataset
from segdeconv.inference.crf import CRF, refine
from segdeconv.inference.predictors import PredictionSettings, ensemble, whole_image
from segdeconv.inference.regions import by_regions
from segdeconv.inference.scorers import ClassScores
from segdeconv.inference.segmenter import Segmenter
from segdeconv.inference.tiling import whole
from segdeconv.train import train

ROOT = Path(__file__).parents[2]
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
SEEN = Preprocessing((16, 16), MEAN, STD)
IMAGE = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
# In front to behind: one inside, one that leaves the image at two sides, one too small for the released code's 8.
BOXES = np.array([[10, 5, 22, 20], [-6, -4, 14, 12], [30, 20, 34, 24], [20, 8, 39, 29]])


def network(image: Tensor) -> Tensor:
    """(N, 3, h, w) -> (N, 4, h / 2, w / 2) scores of both signs that depend on place and colour."""
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return F.conv2d(image, weight, stride=2, padding=1)


def from_list(boxes: np.ndarray) -> Source:
    return lambda image, name: boxes


def layers(boxes: np.ndarray, image: np.ndarray = IMAGE) -> tuple[np.ndarray, np.ndarray]:
    """For each box as it is cut: (N, 4, H, W) scores, 0 outside it, and (N, H, W) whether it covers a pixel.

    Every box one by one, on a canvas so large that none leaves it.
    """
    margin = 100
    scores, covered = [], []
    for x1, y1, x2, y2 in boxes:
        padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
        piece = padded[margin + y1 : margin + y2, margin + x1 : margin + x2]
        seen = torch.from_numpy((resize_image(piece, (16, 16)) - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)
        back = F.interpolate(network(seen[None]), size=(int(y2 - y1), int(x2 - x1)), mode="bilinear")[0].numpy()
        canvas = np.zeros((4, image.shape[0] + 2 * margin, image.shape[1] + 2 * margin), dtype=np.float32)
        canvas[:, margin + y1 : margin + y2, margin + x1 : margin + x2] = back
        inside = np.zeros(canvas.shape[1:], dtype=bool)
        inside[margin + y1 : margin + y2, margin + x1 : margin + x2] = True
        scores.append(canvas[:, margin:-margin, margin:-margin])
        covered.append(inside[margin:-margin, margin:-margin])
    return np.array(scores), np.array(covered)


def predicted(**settings: Any) -> np.ndarray:
    predictor = by_regions(network, SEEN, from_list(settings.pop("boxes", BOXES)), **settings)
    found = whole_image(predictor, IMAGE, "x").values
    assert found.shape == (1, 4, 30, 40)
    assert found.dtype == torch.float32
    return found[0].numpy()


CUT = squared(expanded(BOXES, 1.2))


def test_regions_are_proposals_in_their_context_made_square() -> None:
    seen: list[np.ndarray] = []
    predicted(keep=lambda name, boxes, scores: seen.append(boxes))
    np.testing.assert_array_equal(np.concatenate(seen), CUT)
    # 12x15 -> 14.4x18 -> (8, 3, 24, 22), 16x19 -> (7, 3, 26, 22)
    assert CUT[0].tolist() == [7, 3, 26, 22]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_papers_maximum_is_over_layers_that_are_0_outside_their_region(batch_size: int) -> None:
    scores, _ = layers(CUT)
    np.testing.assert_allclose(predicted(batch_size=batch_size), scores.max(axis=0), atol=1e-5)


def test_a_negative_score_counts_in_the_papers_maximum_only_where_all_regions_cover() -> None:
    one = np.array([[-5, -10, 45, 40]])
    both = np.concatenate([one, one])
    scores, _ = layers(squared(expanded(one, 1.2)))
    found = predicted(boxes=both)
    np.testing.assert_allclose(found, scores[0], atol=1e-5)
    assert found.min() < 0
    assert predicted(boxes=both, mode="released").min() == 0


def test_the_released_codes_maximum_starts_at_0_and_skips_small_boxes() -> None:
    large = CUT[CUT[:, 2] - CUT[:, 0] >= 8]
    assert len(large) == 3
    scores, _ = layers(large)
    np.testing.assert_allclose(predicted(mode="released"), scores.max(axis=0).clip(min=0), atol=1e-5)


def test_skipped_boxes_do_not_count_towards_the_number() -> None:
    order = np.concatenate([BOXES[2:3], BOXES[:2]])
    scores, _ = layers(squared(expanded(order[1:2], 1.2)))
    np.testing.assert_allclose(
        predicted(boxes=order, mode="released", num=1), scores[0].clip(min=0), atol=1e-5
    )  # the first is too small
    scores, _ = layers(squared(expanded(order[:1], 1.2)))
    np.testing.assert_allclose(predicted(boxes=order, num=1), scores[0].clip(min=0) + scores[0].clip(max=0), atol=1e-5)
    assert (predicted(boxes=order, num=1, min_side=8) == predicted(boxes=order[1:], num=1)).all()


def test_the_mean_is_over_the_regions_that_cover_a_pixel() -> None:
    scores, covered = layers(CUT)
    expected = scores.sum(axis=0) / np.maximum(covered.sum(axis=0), 1)
    np.testing.assert_allclose(predicted(mode="mean"), expected, atol=1e-5)
    np.testing.assert_array_equal(predicted(mode="mean").argmax(axis=0), scores.sum(axis=0).argmax(axis=0))


@pytest.mark.parametrize("mode", ["paper", "mean", "released"])
def test_what_no_region_covers_is_0_for_every_class(mode: Any) -> None:
    _, covered = layers(CUT)
    outside = ~covered.any(axis=0)
    assert outside.any()
    assert (predicted(mode=mode)[:, outside] == 0).all()
    assert (predicted(mode=mode, boxes=BOXES[:0]) == 0).all()
    assert (predicted(mode=mode, min_side=1000) == 0).all()


def test_the_whole_image_may_be_a_region_beside_the_others() -> None:
    alone = F.interpolate(network(SEEN(IMAGE)[None]), size=(30, 40), mode="bilinear")[0].numpy()
    np.testing.assert_allclose(predicted(boxes=BOXES[:0], with_whole=True), alone, atol=1e-6)
    scores, _ = layers(CUT[:1])
    expected = np.maximum(alone, scores[0])
    np.testing.assert_allclose(predicted(num=1, with_whole=True), expected, atol=1e-5)


def test_what_was_kept_of_the_regions_gives_the_result_again() -> None:
    kept: list[tuple[str, np.ndarray, Tensor]] = []
    found = predicted(batch_size=3, keep=lambda *region: kept.append(region))
    assert [(name, len(boxes), tuple(scores.shape)) for name, boxes, scores in kept] == [
        ("x", 3, (3, 4, 8, 8)),
        ("x", 1, (1, 4, 8, 8)),
    ]
    canvas = np.zeros((4, 4, 30, 40), dtype=np.float32)
    place = 0
    for _, boxes, scores in kept:
        for box, one in zip(boxes, scores, strict=True):
            side = int(box[2] - box[0])
            full = F.interpolate(one[None], size=(side, side), mode="bilinear")[0].numpy()
            for y, x in np.ndindex(30, 40):
                if box[1] <= y < box[3] and box[0] <= x < box[2]:
                    canvas[place, :, y, x] = full[:, y - box[1], x - box[0]]
            place += 1
    np.testing.assert_allclose(found, canvas.max(axis=0), atol=1e-6)


def test_what_lies_outside_the_image_is_black_before_the_mean_is_subtracted() -> None:
    seen: list[Tensor] = []

    def scorer(image: Tensor) -> Tensor:
        seen.append(image)
        return network(image)

    predictor = by_regions(scorer, SEEN, from_list(np.array([[-16, -16, 0, 0], [24, 14, 40, 30]])), context=1.0)
    whole_image(predictor, IMAGE, "x")
    np.testing.assert_allclose(seen[0][0, :, 3, 4], -np.array(MEAN) / STD, rtol=1e-6)
    inside = (cut(IMAGE, np.array([24, 14, 40, 30]), 0) - np.float32(MEAN)) / np.float32(STD)
    np.testing.assert_allclose(seen[0][1].permute(1, 2, 0), inside, rtol=1e-5)


# Two networks


def test_an_ensemble_by_hand() -> None:
    def says(*scores: float) -> Any:
        values = torch.tensor(scores)[None, :, None, None].expand(1, 3, 30, 40)
        return lambda image, name: iter([(whole((30, 40)), ClassScores(values, False))])

    first, second = says(2.0, -1.0, 0.5), says(1.0, 3.0, -2.0)  # the second's classes in another order: 2, 0, 1
    found = whole_image(ensemble(first, second, "paper", [2, 0, 1]), IMAGE, "x").values[0, :, 7, 9].tolist()
    a, b = (np.exp(scores) / np.exp(scores).sum() for scores in ([2.0, -1.0, 0.5], [-2.0, 1.0, 3.0]))
    np.testing.assert_allclose(found, (a + b) / 2, rtol=1e-6)
    found = whole_image(ensemble(first, second, "released", [2, 0, 1]), IMAGE, "x").values[0, :, 7, 9].tolist()
    product = np.array([2.0 * 0, 0 * 1.0, 0.5 * 3.0])
    np.testing.assert_allclose(found, np.exp(product) / np.exp(product).sum(), rtol=1e-6)


# From a checkpoint and arguments


def trained_on(folder: Path, **dataset: Any) -> Path:
    """A checkpoint of a tiny network that has seen a few shapes."""
    data = {"_target_": "segdeconv.data.Shapes", "num_train": 4, "num_val": 2, "batch_size": 4, "num_workers": 0}
    train(
        {
            "dataset": {**data, "size": [40, 40], "crop": [32, 32], **dataset},
            "model": {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]},
            "trainer": {"max_epochs": 1},
            "logger": {},
        },
        folder,
    )
    return folder / "best.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On crops of objects."""
    return trained_on(tmp_path_factory.mktemp("regions") / "run", examples="objects")


def settings_of(*words: str) -> PredictionSettings:
    """As evaluate parses them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("overrides", nargs="*")
    add_prediction_options(parser)
    arguments = parser.parse_intermixed_args(["--precision=32-true", *words])
    return prediction_settings(arguments, split_overrides(arguments.overrides)[1])


def segmenter_of(path: Path, *words: str, overrides: tuple[str, ...] = ()) -> Segmenter:
    read = checkpoint.read(path, overrides=overrides)
    return Segmenter(read, settings_of(*words), device=torch.device("cpu"))


def looking(path: Path, *words: str, overrides: tuple[str, ...] = ()) -> Any:
    segmenter = segmenter_of(path, *words, overrides=overrides)
    return lambda image, name: whole_image(segmenter.predictor, image, name).probabilities()


def scores_of(path: Path, image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The network's raw scores of an image resized to what it sees."""
    read = checkpoint.read(path)
    seen = Preprocessing.from_dict({**read.facts["preprocessing"], "size": list(size)})(image)[None]
    with torch.no_grad():
        return F.interpolate(read.model()(seen), size=image.shape[:2], mode="bilinear")


PICTURE = np.random.default_rng(1).integers(0, 256, (50, 70, 3)).astype(np.uint8)


def test_regions_are_seen_at_the_size_of_the_training_crop(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_text("name,x1,y1,x2,y2\nx,-10,-10,60,60\n")
    words = ("--regions=5", f"--proposals={tmp_path / 'boxes.csv'}", f"--save-regions={tmp_path / 'kept'}")
    found = looking(trained, *words)(PICTURE, "x")
    with np.load(tmp_path / "kept" / "x.npz") as kept:
        boxes, scores = kept["boxes"], kept["scores"]
    assert boxes.tolist() == [[-17, -17, 67, 67]]
    assert scores.shape == (1, 7, 32, 32)
    canvas = np.pad(PICTURE, ((17, 17), (17, 0), (0, 0)))[:, :84]
    expected = scores_of(trained, canvas, (32, 32))[:, :, 17:67, 17:]
    expected = F.pad(expected, (0, 3))  # 0 where the region does not reach
    np.testing.assert_allclose(found[..., :67], expected.softmax(dim=1)[..., :67], atol=1e-5)
    assert torch.allclose(found[..., 67:], torch.tensor(1 / 7))


def test_two_networks_and_a_crf_are_put_together_as_asked(trained: Path, tmp_path: Path) -> None:
    other = trained_on(tmp_path / "other", data_seed=3)
    one, two = scores_of(trained, PICTURE, (40, 40)), scores_of(other, PICTURE, (40, 40))
    mean = (one.softmax(dim=1) + two.softmax(dim=1)) / 2
    words = (f"--ensemble={other}",)
    np.testing.assert_allclose(looking(trained, *words)(PICTURE, "x"), mean, atol=1e-5)
    product = (one.clamp(min=0) * two.clamp(min=0)).softmax(dim=1)
    np.testing.assert_allclose(looking(trained, *words, "--ensemble-mode=released")(PICTURE, "x"), product, atol=1e-5)
    refined = refine(mean[0], PICTURE, settings=CRF(iterations=2, bilateral_weight=0))
    found = looking(trained, *words, "--crf", "crf.iterations=2", "crf.bilateral_weight=0")(PICTURE, "x")
    np.testing.assert_allclose(found[0], refined, atol=1e-4)
    flipped = looking(trained, "--crf", "--flip", "crf.iterations=0")(PICTURE, "x")
    read = checkpoint.read(trained)
    seen = Preprocessing.from_dict(read.facts["preprocessing"])(PICTURE)[None]
    with torch.no_grad():
        views = [read.model()(seen).softmax(dim=1), read.model()(seen.flip(-1)).softmax(dim=1).flip(-1)]
    expected = F.interpolate((views[0] + views[1]) / 2, size=(50, 70), mode="bilinear")
    np.testing.assert_allclose(flipped, expected, atol=1e-4)


def test_classes_of_an_ensemble_are_matched_by_name(trained: Path, tmp_path: Path) -> None:
    read = checkpoint.read(trained)
    content = {**read.content, "hyper_parameters": {"config": read.config, "facts": dict(read.facts)}}
    names = list(read.classes.names)
    turned = [names[0], *reversed(names[1:])]
    facts = content["hyper_parameters"]["facts"]
    facts["classes"] = {**facts["classes"], "names": turned}
    path = tmp_path / "turned.ckpt"
    checkpoint.write(content, path)
    one = scores_of(trained, PICTURE, (40, 40)).softmax(dim=1)
    both = (one + one[:, [0, 6, 5, 4, 3, 2, 1]]) / 2
    np.testing.assert_allclose(looking(trained, f"--ensemble={path}")(PICTURE, "x"), both, atol=1e-5)
    facts["classes"] = {**facts["classes"], "names": [*turned[:-1], "blob"]}
    checkpoint.write(content, path)
    with pytest.raises(UsageError, match=r"'disc' is in one only - an ensemble needs networks of the same classes"):
        looking(trained, f"--ensemble={path}")


@pytest.mark.parametrize(
    ("words", "overrides", "message"),
    [
        (("--regions=5", "--flip"), (), "--samples and --flip give mean probabilities"),
        (("--crf", "--samples=3"), (), "--samples and --flip give mean probabilities"),
        (("--regions=-5",), (), "--regions=-5 is no number of regions"),
        (("--regions=5", "--proposals=nothing"), (), "proposals nothing: file not found"),
        (("--regions=5",), ("dataset.crop=null", "dataset.size=null"), "say which, for example dataset.crop"),
        (("--crf", "crf.colour=3"), (), "there is no key crf.colour - did you mean 'colour_std'"),
        (("--crf", "crf.colour_std=-3"), (), "crf.colour_std=-3: input should be greater than 0"),
        (("--crf", "crf.colour_std=much"), (), "crf.colour_std=much: input should be a valid number"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    trained: Path, words: tuple[str, ...], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        looking(trained, *words, overrides=overrides)
    assert message in str(caught.value)


def test_without_a_background_what_is_uncovered_would_be_a_class(trained: Path, tmp_path: Path) -> None:
    path = trained_on(tmp_path / "run", label_map={"background": "ground"})
    with pytest.raises(UsageError, match="would become 'ground', the first class - add --with-whole"):
        looking(path, "--regions=5")
    assert looking(path, "--regions=2", "--with-whole")(PICTURE, "x").shape == (1, 7, 50, 70)


def test_the_settings_of_the_crf_are_its_defaults_unless_said() -> None:
    assert crf_settings([]) == CRF()
    assert crf_settings(["crf.iterations=3", "crf.spatial_std=1.5"]) == CRF(iterations=3, spatial_std=1.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("crf.iterations=3",), "crf.iterations=3 does nothing without --crf"),
        (("--with-whole",), "--with-whole does nothing without --regions N"),
        (("--region-mode=mean", "--crf"), "--region-mode does nothing without --regions N"),
        (("--ensemble-mode=released",), "--ensemble-mode does nothing without --ensemble CHECKPOINT"),
    ],
)
def test_an_argument_that_would_do_nothing_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_of(*words)
    assert settings_of().single_pass
    assert not settings_of("--crf", "crf.iterations=3").single_pass


def test_evaluation_by_regions_counts_the_labels_that_prediction_gives(trained: Path) -> None:
    words = ("--regions=6", "--region-mode=released")
    segmenter = segmenter_of(trained, *words, overrides=("dataset.examples=images",))
    data = restore_dataset(segmenter.checkpoint, "val")
    masks: dict[int, np.ndarray] = {}
    confusion = evaluate(segmenter, data, on_prediction=lambda one: masks.update({one.place: one.prediction}))
    expected = np.zeros((7, 7), dtype=np.int64)
    for index in range(len(data)):
        image, mask, name = data[index]
        prediction = whole_image(segmenter.predictor, image, name).values[0].argmax(dim=0).numpy()
        np.testing.assert_array_equal(masks[index], prediction)
        np.add.at(expected, (mask[mask != 255], prediction[mask != 255]), 1)
    np.testing.assert_array_equal(confusion, expected)
    assert len(data) == 2


@pytest.mark.slow
def test_the_commands_see_images_through_regions(trained: Path, tmp_path: Path) -> None:
    def command(script: str, *words: Any) -> str:
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / f"{script}.py"), str(trained), *map(str, words)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = command("evaluate", "--regions", 4, "--crf", "crf.iterations=1", "--masks", "masks", "--out", "out")
    assert "2 images of val" in said  # whole ones, though it was trained on crops
    from segdeconv.drawing import draw

    draw.save_image(PICTURE, tmp_path / "photo.png")
    command("predict", "photo.png", "--regions", 4, "--out", "labelled", "--save-regions", "kept")
    assert fakes.opened(tmp_path / "labelled" / "photo.png").size == (70, 50)
    assert (tmp_path / "kept" / "photo.npz").is_file()


def test_images_that_are_no_pictures_are_cut_and_refined_as_they_are_shown(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for index in range(6):
        image = generator.integers(0, 2**16, (40, 40, 2)).astype(np.uint16)
        np.save(tmp_path / "data/images" / f"{index}.npy", image)
        mask = (np.arange(40) > 20).astype(np.uint8)[:, None].repeat(40, axis=1)
        cv2.imwrite(str(tmp_path / "data/masks" / f"{index}.png"), mask)
    config = {
        "dataset": {
            "_target_": "segdeconv.data.Folder", "root": str(tmp_path / "data"), "channels": 2, "size": [32, 32],
            "batch_size": 2, "num_workers": 0,
        },
        "model": {"_target_": "segdeconv.models.SegNet", "stages": [[4]]},
        "trainer": {"max_epochs": 1},
        "logger": {},
    }  # fmt: skip
    train(config, tmp_path / "run")
    look = looking(tmp_path / "run/best.ckpt", "--regions=3", "--with-whole", "--crf", "crf.iterations=1")
    found = look(np.load(tmp_path / "data/images/0.npy"), "0")
    assert found.shape == (1, 2, 40, 40)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(1, 40, 40))
