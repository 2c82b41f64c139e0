"""Prediction by regions and ensembles, compared with brute force and numbers computed by hand."""

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
PREPROCESSING = Preprocessing((16, 16), MEAN, STD)
IMAGE = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
# Best first. One leaves the image at two sides; one is too small for the released code's minimum of 8.
BOXES = np.array([[10, 5, 22, 20], [-6, -4, 14, 12], [30, 20, 34, 24], [20, 8, 39, 29]])


def network(image: Tensor) -> Tensor:
    """Map (N, 3, h, w) to (N, 4, h / 2, w / 2) scores of both signs that depend on position and colour."""
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return F.conv2d(image, weight, stride=2, padding=1)


def from_list(boxes: np.ndarray) -> Source:
    return lambda image, name: boxes


def layers(boxes: np.ndarray, image: np.ndarray = IMAGE) -> tuple[np.ndarray, np.ndarray]:
    """Compute (N, 4, H, W) scores of each box, 0 outside it, and (N, H, W) bool, True where it covers a pixel.

    The boxes are computed one by one, on a canvas large enough for all of them.
    """
    margin = 100
    scores, covered = [], []
    for x1, y1, x2, y2 in boxes:
        padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
        piece = padded[margin + y1 : margin + y2, margin + x1 : margin + x2]
        inputs = torch.from_numpy((resize_image(piece, (16, 16)) - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)
        back = F.interpolate(network(inputs[None]), size=(int(y2 - y1), int(x2 - x1)), mode="bilinear")[0].numpy()
        canvas = np.zeros((4, image.shape[0] + 2 * margin, image.shape[1] + 2 * margin), dtype=np.float32)
        canvas[:, margin + y1 : margin + y2, margin + x1 : margin + x2] = back
        inside = np.zeros(canvas.shape[1:], dtype=bool)
        inside[margin + y1 : margin + y2, margin + x1 : margin + x2] = True
        scores.append(canvas[:, margin:-margin, margin:-margin])
        covered.append(inside[margin:-margin, margin:-margin])
    return np.array(scores), np.array(covered)


def predicted(**settings: Any) -> np.ndarray:
    predictor = by_regions(network, PREPROCESSING, from_list(settings.pop("boxes", BOXES)), **settings)
    result = whole_image(predictor, IMAGE, "x").values
    assert result.shape == (1, 4, 30, 40)
    assert result.dtype == torch.float32
    return result[0].numpy()


EXPANDED = squared(expanded(BOXES, 1.2))


def test_regions_are_proposals_enlarged_by_context_and_made_square() -> None:
    batches: list[np.ndarray] = []
    predicted(on_scores=lambda name, boxes, scores: batches.append(boxes))
    np.testing.assert_array_equal(np.concatenate(batches), EXPANDED)
    # 12x15 -> 14.4x18 -> (8, 3, 24, 22), 16x19 -> (7, 3, 26, 22)
    assert EXPANDED[0].tolist() == [7, 3, 26, 22]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_paper_is_the_maximum_over_regions_that_are_0_outside_themselves(batch_size: int) -> None:
    scores, _ = layers(EXPANDED)
    np.testing.assert_allclose(predicted(batch_size=batch_size), scores.max(axis=0), atol=1e-5)


def test_paper_keeps_a_negative_score_only_where_all_regions_cover_a_pixel() -> None:
    box = np.array([[-5, -10, 45, 40]])
    both = np.concatenate([box, box])
    scores, _ = layers(squared(expanded(box, 1.2)))
    result = predicted(boxes=both)
    np.testing.assert_allclose(result, scores[0], atol=1e-5)
    assert result.min() < 0
    assert predicted(boxes=both, mode="released").min() == 0


def test_released_is_the_maximum_with_0_and_skips_small_boxes() -> None:
    large = EXPANDED[EXPANDED[:, 2] - EXPANDED[:, 0] >= 8]
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


def test_mean_averages_the_regions_that_cover_a_pixel() -> None:
    scores, covered = layers(EXPANDED)
    expected = scores.sum(axis=0) / np.maximum(covered.sum(axis=0), 1)
    np.testing.assert_allclose(predicted(mode="mean"), expected, atol=1e-5)
    np.testing.assert_array_equal(predicted(mode="mean").argmax(axis=0), scores.sum(axis=0).argmax(axis=0))


@pytest.mark.parametrize("mode", ["paper", "mean", "released"])
def test_pixels_outside_all_regions_are_0_for_every_class(mode: Any) -> None:
    _, covered = layers(EXPANDED)
    outside = ~covered.any(axis=0)
    assert outside.any()
    assert (predicted(mode=mode)[:, outside] == 0).all()
    assert (predicted(mode=mode, boxes=BOXES[:0]) == 0).all()
    assert (predicted(mode=mode, min_side=1000) == 0).all()


def test_the_whole_image_can_be_an_additional_region() -> None:
    alone = F.interpolate(network(PREPROCESSING(IMAGE)[None]), size=(30, 40), mode="bilinear")[0].numpy()
    np.testing.assert_allclose(predicted(boxes=BOXES[:0], with_whole=True), alone, atol=1e-6)
    scores, _ = layers(EXPANDED[:1])
    expected = np.maximum(alone, scores[0])
    np.testing.assert_allclose(predicted(num=1, with_whole=True), expected, atol=1e-5)


def test_the_scores_passed_to_on_scores_reproduce_the_result() -> None:
    batches: list[tuple[str, np.ndarray, Tensor]] = []
    result = predicted(batch_size=3, on_scores=lambda *batch: batches.append(batch))
    assert [(name, len(boxes), tuple(scores.shape)) for name, boxes, scores in batches] == [
        ("x", 3, (3, 4, 8, 8)),
        ("x", 1, (1, 4, 8, 8)),
    ]
    canvas = np.zeros((4, 4, 30, 40), dtype=np.float32)
    index = 0
    for _, boxes, scores in batches:
        for box, region_scores in zip(boxes, scores, strict=True):
            side = int(box[2] - box[0])
            full = F.interpolate(region_scores[None], size=(side, side), mode="bilinear")[0].numpy()
            for y, x in np.ndindex(30, 40):
                if box[1] <= y < box[3] and box[0] <= x < box[2]:
                    canvas[index, :, y, x] = full[:, y - box[1], x - box[0]]
            index += 1
    np.testing.assert_allclose(result, canvas.max(axis=0), atol=1e-6)


def test_pixels_outside_the_image_are_black_before_the_mean_is_subtracted() -> None:
    inputs: list[Tensor] = []

    def scorer(image: Tensor) -> Tensor:
        inputs.append(image)
        return network(image)

    predictor = by_regions(
        scorer, PREPROCESSING, from_list(np.array([[-16, -16, 0, 0], [24, 14, 40, 30]])), context=1.0
    )
    whole_image(predictor, IMAGE, "x")
    np.testing.assert_allclose(inputs[0][0, :, 3, 4], -np.array(MEAN) / STD, rtol=1e-6)
    inside = (cut(IMAGE, np.array([24, 14, 40, 30]), 0) - np.float32(MEAN)) / np.float32(STD)
    np.testing.assert_allclose(inputs[0][1].permute(1, 2, 0), inside, rtol=1e-5)


# Two networks


def test_an_ensemble_equals_one_computed_by_hand() -> None:
    def constant(*scores: float) -> Any:
        values = torch.tensor(scores)[None, :, None, None].expand(1, 3, 30, 40)
        return lambda image, name: iter([(whole((30, 40)), ClassScores(values, False))])

    first, second = constant(2.0, -1.0, 0.5), constant(1.0, 3.0, -2.0)  # the second's classes in another order: 2, 0, 1
    result = whole_image(ensemble(first, second, "paper", [2, 0, 1]), IMAGE, "x").values[0, :, 7, 9].tolist()
    a, b = (np.exp(scores) / np.exp(scores).sum() for scores in ([2.0, -1.0, 0.5], [-2.0, 1.0, 3.0]))
    np.testing.assert_allclose(result, (a + b) / 2, rtol=1e-6)
    result = whole_image(ensemble(first, second, "released", [2, 0, 1]), IMAGE, "x").values[0, :, 7, 9].tolist()
    product = np.array([2.0 * 0, 0 * 1.0, 0.5 * 3.0])
    np.testing.assert_allclose(result, np.exp(product) / np.exp(product).sum(), rtol=1e-6)


# From a checkpoint and arguments


def trained_on(folder: Path, **dataset: Any) -> Path:
    """Train a tiny network on a few shapes and return its checkpoint."""
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
    """The checkpoint of a network trained on crops of objects."""
    return trained_on(tmp_path_factory.mktemp("regions") / "run", examples="objects")


def settings_of(*words: str) -> PredictionSettings:
    """Parse prediction options as evaluate does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("overrides", nargs="*")
    add_prediction_options(parser)
    arguments = parser.parse_intermixed_args(["--precision=32-true", *words])
    return prediction_settings(arguments, split_overrides(arguments.overrides)[1])


def segmenter_of(path: Path, *words: str, overrides: tuple[str, ...] = ()) -> Segmenter:
    content = checkpoint.read(path, overrides=overrides)
    return Segmenter(content, settings_of(*words), device=torch.device("cpu"))


def probabilities_of(path: Path, *words: str, overrides: tuple[str, ...] = ()) -> Any:
    segmenter = segmenter_of(path, *words, overrides=overrides)
    return lambda image, name: whole_image(segmenter.predictor, image, name).probabilities()


def scores_of(path: Path, image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Compute the network's raw scores of an image resized to the input size `size`."""
    content = checkpoint.read(path)
    inputs = Preprocessing.from_dict({**content.facts["preprocessing"], "size": list(size)})(image)[None]
    with torch.no_grad():
        return F.interpolate(content.model()(inputs), size=image.shape[:2], mode="bilinear")


LARGER_IMAGE = np.random.default_rng(1).integers(0, 256, (50, 70, 3)).astype(np.uint8)


def test_regions_are_resized_to_the_training_crop(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_text("name,x1,y1,x2,y2\nx,-10,-10,60,60\n")
    words = ("--regions=5", f"--proposals={tmp_path / 'boxes.csv'}", f"--save-regions={tmp_path / 'kept'}")
    result = probabilities_of(trained, *words)(LARGER_IMAGE, "x")
    with np.load(tmp_path / "kept" / "x.npz") as saved:
        boxes, scores = saved["boxes"], saved["scores"]
    assert boxes.tolist() == [[-17, -17, 67, 67]]
    assert scores.shape == (1, 7, 32, 32)
    canvas = np.pad(LARGER_IMAGE, ((17, 17), (17, 0), (0, 0)))[:, :84]
    expected = scores_of(trained, canvas, (32, 32))[:, :, 17:67, 17:]
    expected = F.pad(expected, (0, 3))  # 0 where the region does not reach
    np.testing.assert_allclose(result[..., :67], expected.softmax(dim=1)[..., :67], atol=1e-5)
    assert torch.allclose(result[..., 67:], torch.tensor(1 / 7))


def test_two_networks_and_a_crf_are_combined(trained: Path, tmp_path: Path) -> None:
    other = trained_on(tmp_path / "other", data_seed=3)
    first, second = scores_of(trained, LARGER_IMAGE, (40, 40)), scores_of(other, LARGER_IMAGE, (40, 40))
    mean = (first.softmax(dim=1) + second.softmax(dim=1)) / 2
    words = (f"--ensemble={other}",)
    np.testing.assert_allclose(probabilities_of(trained, *words)(LARGER_IMAGE, "x"), mean, atol=1e-5)
    product = (first.clamp(min=0) * second.clamp(min=0)).softmax(dim=1)
    np.testing.assert_allclose(
        probabilities_of(trained, *words, "--ensemble-mode=released")(LARGER_IMAGE, "x"), product, atol=1e-5
    )
    refined = refine(mean[0], LARGER_IMAGE, settings=CRF(iterations=2, bilateral_weight=0))
    result = probabilities_of(trained, *words, "--crf", "crf.iterations=2", "crf.bilateral_weight=0")(LARGER_IMAGE, "x")
    np.testing.assert_allclose(result[0], refined, atol=1e-4)
    flipped = probabilities_of(trained, "--crf", "--flip", "crf.iterations=0")(LARGER_IMAGE, "x")
    content = checkpoint.read(trained)
    inputs = Preprocessing.from_dict(content.facts["preprocessing"])(LARGER_IMAGE)[None]
    with torch.no_grad():
        views = [content.model()(inputs).softmax(dim=1), content.model()(inputs.flip(-1)).softmax(dim=1).flip(-1)]
    expected = F.interpolate((views[0] + views[1]) / 2, size=(50, 70), mode="bilinear")
    np.testing.assert_allclose(flipped, expected, atol=1e-4)


def test_classes_of_an_ensemble_are_matched_by_name(trained: Path, tmp_path: Path) -> None:
    original = checkpoint.read(trained)
    content = {**original.content, "hyper_parameters": {"config": original.config, "facts": dict(original.facts)}}
    names = list(original.classes.names)
    reordered = [names[0], *reversed(names[1:])]
    metadata = content["hyper_parameters"]["facts"]
    metadata["classes"] = {**metadata["classes"], "names": reordered}
    path = tmp_path / "reordered.ckpt"
    checkpoint.write(content, path)
    probabilities = scores_of(trained, LARGER_IMAGE, (40, 40)).softmax(dim=1)
    both = (probabilities + probabilities[:, [0, 6, 5, 4, 3, 2, 1]]) / 2
    np.testing.assert_allclose(probabilities_of(trained, f"--ensemble={path}")(LARGER_IMAGE, "x"), both, atol=1e-5)
    metadata["classes"] = {**metadata["classes"], "names": [*reordered[:-1], "blob"]}
    checkpoint.write(content, path)
    with pytest.raises(
        UsageError, match=r"'disc' is in only one of them - an ensemble needs networks with the same classes"
    ):
        probabilities_of(trained, f"--ensemble={path}")


@pytest.mark.parametrize(
    ("words", "overrides", "message"),
    [
        (("--regions=5", "--flip"), (), "--samples and --flip average probabilities"),
        (("--crf", "--samples=3"), (), "--samples and --flip average probabilities"),
        (("--regions=-5",), (), "--regions=-5 is not a valid number of regions"),
        (("--regions=5", "--proposals=nothing"), (), "proposals nothing: file not found"),
        (("--regions=5",), ("dataset.crop=null", "dataset.size=null"), "set it, for example dataset.crop"),
        (("--crf", "crf.colour=3"), (), "unknown key crf.colour - did you mean 'colour_std'"),
        (("--crf", "crf.colour_std=-3"), (), "crf.colour_std=-3: input should be greater than 0"),
        (("--crf", "crf.colour_std=much"), (), "crf.colour_std=much: input should be a valid number"),
    ],
)
def test_settings_that_cannot_be_combined_are_an_error_message(
    trained: Path, words: tuple[str, ...], overrides: tuple[str, ...], message: str, monkeypatch
) -> None:
    monkeypatch.setattr("segdeconv.errors._in_command", True)
    with pytest.raises(UsageError) as caught:
        probabilities_of(trained, *words, overrides=overrides)
    assert message in str(caught.value)


def test_without_a_background_class_uncovered_pixels_are_refused(trained: Path, tmp_path: Path) -> None:
    path = trained_on(tmp_path / "run", label_map={"background": "ground"})
    with pytest.raises(UsageError, match="would become 'ground', the first class - add --with-whole"):
        probabilities_of(path, "--regions=5")
    assert probabilities_of(path, "--regions=2", "--with-whole")(LARGER_IMAGE, "x").shape == (1, 7, 50, 70)


def test_crf_settings_default_to_those_of_the_class() -> None:
    assert crf_settings([]) == CRF()
    assert crf_settings(["crf.iterations=3", "crf.spatial_std=1.5"]) == CRF(iterations=3, spatial_std=1.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("crf.iterations=3",), "crf.iterations=3 has no effect without --crf"),
        (("--with-whole",), "--with-whole has no effect without --regions N"),
        (("--region-mode=mean", "--crf"), "--region-mode has no effect without --regions N"),
        (("--ensemble-mode=released",), "--ensemble-mode has no effect without --ensemble CHECKPOINT"),
    ],
)
def test_an_argument_without_effect_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_of(*words)
    assert settings_of().single_pass
    assert not settings_of("--crf", "crf.iterations=3").single_pass


def test_evaluation_by_regions_counts_the_predicted_classes(trained: Path) -> None:
    words = ("--regions=6", "--region-mode=released")
    segmenter = segmenter_of(trained, *words, overrides=("dataset.examples=images",))
    data = restore_dataset(segmenter.checkpoint, "val")
    masks: dict[int, np.ndarray] = {}
    confusion = evaluate(segmenter, data, on_prediction=lambda image: masks.update({image.place: image.prediction}))
    expected = np.zeros((7, 7), dtype=np.int64)
    for index in range(len(data)):
        image, mask, name = data[index]
        prediction = whole_image(segmenter.predictor, image, name).values[0].argmax(dim=0).numpy()
        np.testing.assert_array_equal(masks[index], prediction)
        np.add.at(expected, (mask[mask != 255], prediction[mask != 255]), 1)
    np.testing.assert_array_equal(confusion, expected)
    assert len(data) == 2


@pytest.mark.slow
def test_the_commands_predict_by_regions(trained: Path, tmp_path: Path) -> None:
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

    stdout = command("evaluate", "--regions", 4, "--crf", "crf.iterations=1", "--masks", "masks", "--out", "out")
    assert "2 images of val" in stdout  # whole images, although the network was trained on crops
    from segdeconv.drawing import draw

    draw.save_image(LARGER_IMAGE, tmp_path / "photo.png")
    command("predict", "photo.png", "--regions", 4, "--out", "labelled", "--save-regions", "kept")
    assert fakes.opened(tmp_path / "labelled" / "photo.png").size == (70, 50)
    assert (tmp_path / "kept" / "photo.npz").is_file()


def test_regions_and_a_crf_of_16_bit_images_use_the_image_as_displayed(tmp_path: Path) -> None:
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
    predict = probabilities_of(tmp_path / "run/best.ckpt", "--regions=3", "--with-whole", "--crf", "crf.iterations=1")
    result = predict(np.load(tmp_path / "data/images/0.npy"), "0")
    assert result.shape == (1, 2, 40, 40)
    torch.testing.assert_close(result.sum(dim=1), torch.ones(1, 40, 40))
