"""The verdict and the baseline, against values worked by hand and a constant prediction counted pixel by pixel."""

import numpy as np
import pytest
import torch

from segdeconv.classes import Classes, voc_colours
from segdeconv.evaluation.metrics import ConfusionMatrix, scores
from segdeconv.evaluation.report import report
from segdeconv.evaluation.verdict import Overlap, constant_prediction, verdict


def named(*names):
    return Classes(names, voc_colours(len(names)))


def test_the_baseline_equals_a_count_of_a_constant_prediction():
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([0, 1, 1, 1, 3, 255])[torch.randint(0, 6, (20, 30), generator=generator)]
    network, constant = (ConfusionMatrix(4, 255) for _ in range(2))
    network.update(torch.randint(0, 4, (20, 30), generator=generator), mask)
    constant.update(torch.ones_like(mask), mask)
    commonest, baseline = constant_prediction(network.compute())
    assert commonest == 1
    for field, expected in vars(scores(constant.compute())).items():
        np.testing.assert_array_equal(vars(baseline)[field], expected, err_msg=field)


# Rows are the truth. Worked by hand: the IoU of a constant prediction is its share of the truth, here 90 of 100 pixels.
TWO, THREE = named("wall", "crack"), named("sky", "road", "pole")
CASES = {
    "better": (
        [[85, 5], [2, 8]],  # IoUs 85/92 and 8/15, mean 72.9 %; the baseline is 90 % / 2
        TWO,
        True,
        "Better than predicting 'wall' everywhere: mean IoU 72.9 % against 45.0 % (+27.9 points).",
        "'crack': IoU 53.3 %, Dice 69.6 %.",
    ),
    "better only where classes count equally": (
        [[75, 15], [0, 10]],  # IoUs 75/90 and 10/25; 85 pixels are correct, of the baseline 90
        TWO,
        True,
        "Better than predicting 'wall' everywhere: mean IoU 61.7 % against 45.0 % (+16.7 points), "
        "though fewer pixels are correct (85.0 % against 90.0 %).",
        "'crack': IoU 40.0 %, Dice 57.1 %.",
    ),
    "worse": (
        [[45, 45], [10, 0]],
        TWO,
        False,
        "Not better than predicting 'wall' everywhere: mean IoU 22.5 % against 45.0 %.",
        "'crack': IoU 0.0 %, Dice 0.0 %.",
    ),
    "collapsed to the most frequent class": (
        [[90, 0], [10, 0]],
        TWO,
        False,
        "The network predicts 'wall' for every pixel: mean IoU 45.0 %.",
        "'crack': IoU 0.0 %, Dice 0.0 %.",
    ),
    "collapsed to another class": (
        [[0, 90], [0, 10]],
        TWO,
        False,
        "The network predicts 'crack' for every pixel: mean IoU 5.0 % against 45.0 % of predicting 'wall' everywhere.",
        "'crack': IoU 10.0 %, Dice 18.2 %.",
    ),
    "better by less than can be printed": (
        [[899_990, 10], [99_970, 30]],  # IoU of the crack 30 / 100 010
        TWO,
        False,
        "Not better than predicting 'wall' everywhere: mean IoU 45.0 % against 45.0 %.",
        "'crack': IoU 0.0 %, Dice 0.1 %.",
    ),
    "three classes": (
        [[50, 0, 0], [10, 30, 0], [5, 5, 0]],  # IoUs 50/65, 30/45 and 0, mean 47.9 %; the baseline is 50 % / 3
        THREE,
        True,
        "Better than predicting 'sky' everywhere: mean IoU 47.9 % against 16.7 % (+31.2 points).",
        "Worst class: 'pole', IoU 0.0 %.",
    ),
    "one class in the truth": (
        [[8, 2, 0], [0, 0, 0], [0, 0, 0]],
        THREE,
        None,
        "The masks contain only 'sky', so the scores do not show whether the network tells classes apart: "
        "mean IoU 40.0 %.",
        "",
    ),
    "a class only in the prediction": (
        [[60, 10, 10], [8, 12, 0], [0, 0, 0]],  # IoUs 60/88, 12/30 and 0, mean 36.1 %; the baseline is (80 % + 0) / 2
        THREE,
        False,
        "Not better than predicting 'sky' everywhere: mean IoU 36.1 % against 40.0 %.",
        "Worst class: 'road', IoU 40.0 %.",
    ),
    "nothing scored": (
        [[0, 0, 0]] * 3,
        THREE,
        None,
        "Nothing could be scored: every pixel of the masks is ignored.",
        "",
    ),
}


@pytest.mark.parametrize(("confusion", "classes", "better", "sentence", "of_classes"), CASES.values(), ids=CASES)
def test_the_verdict_compares_with_the_baseline(confusion, classes, better, sentence, of_classes):
    result = verdict(np.array(confusion), classes, num_images=200)
    assert (result.better, result.sentence) == (better, sentence)
    assert result.details == (*filter(None, [of_classes]), "Measured on 200 images.")
    content = report(np.array(confusion), 200, classes)
    assert content["verdict"] == {
        "better_than_baseline": better,
        "sentence": sentence,
        "details": list(result.details),
    }
    assert (content["baseline"] is None) == (not np.any(confusion))


@pytest.mark.parametrize(("names", "expected"), [(("defect", "Background"), "defect"), (("a", "b"), "b")])
def test_the_foreground_is_the_class_that_is_not_called_background(names, expected):
    result = verdict(np.array([[3, 1], [1, 3]]), named(*names), num_images=200)
    assert result.details[0].startswith(f"'{expected}': IoU")


@pytest.mark.parametrize(
    ("split", "num", "trained_on", "selected", "sentences"),
    [
        ("test", 100, 0, False, ["Measured on 100 images of test."]),
        ("test", 1, 0, False, ["Measured on only 1 image of test, so the scores are rough."]),
        ("val", 100, 0, True, ["Measured on 100 images of val.", "val also selects the best checkpoint"]),
        ("val", 100, 0, False, ["Measured on 100 images of val."]),
        ("val", 100, None, False, ["Measured on 100 images of val."]),
        ("val", 100, 100, False, ["Measured on 100 images of val.", "The network was trained on them"]),
        ("train", 100, 100, False, ["Measured on 100 images of train.", "The network was trained on them"]),
        ("test", 100, 7, False, ["Measured on 100 images of test.", "The network was trained on 7 of them"]),
    ],
)
def test_the_verdict_states_what_it_was_measured_on(split, num, trained_on, selected, sentences):
    matrix = np.array([[3, 1], [1, 3]])
    used = Overlap(num, trained_on, selected)
    measured = verdict(matrix, TWO, num_images=num, split=split, overlap=used).details[1:]
    assert len(measured) == len(sentences)
    assert all(sentence.startswith(expected) for sentence, expected in zip(measured, sentences, strict=True))
