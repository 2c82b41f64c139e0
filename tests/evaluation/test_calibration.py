"""Calibration against numbers worked by hand, every pixel kept, and torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from segdeconv.evaluation.calibration import BINS, Calibration
from segdeconv.inference.scorers import ClassScores, labels, labels_and_confidence

IGNORED = 255


def counted(confidences, right, uncertainty=None, *, ignored=()):
    """A Calibration of pixels of one image, of which class 1 is predicted everywhere."""
    mask = torch.tensor([[1 if one else 0 for one in right]], dtype=torch.uint8)
    mask[0, list(ignored)] = IGNORED
    calibration = Calibration(IGNORED)
    calibration.update(
        torch.ones_like(mask),
        torch.tensor([confidences], dtype=torch.float32),
        mask,
        None if uncertainty is None else torch.tensor([uncertainty], dtype=torch.float32),
    )
    return calibration


def random_pixels(count, *, classes=5, seed=0):
    """(logits, mask) of a network that is a little too sure."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(classes, (1, 1, count), generator=generator)
    logits = torch.randn(1, classes, 1, count, generator=generator) * 2
    logits.scatter_add_(1, mask[:, None], torch.full((1, 1, 1, count), 1.5))
    mask[torch.rand(mask.shape, generator=generator) < 0.1] = IGNORED
    return logits, mask


def confidence(logits):
    return labels_and_confidence(ClassScores(logits, False))[1]


def calibrated(logits, mask, uncertainty=None, *, pieces=1):
    calibration = Calibration(IGNORED)
    extra = uncertainty.chunk(pieces, dim=2) if uncertainty is not None else [None] * pieces
    for one, part, unsure in zip(logits.chunk(pieces, dim=3), mask.chunk(pieces, dim=2), extra, strict=True):
        calibration.update(one.argmax(dim=1), confidence(one), part, unsure)
    return calibration


def test_error_worked_by_hand():
    # Bins of 1/15: (0.4, 0.4667] has 0.45 right and 0.45 wrong: |0.45 - 0.5| = 0.05, two pixels.
    # (0.8667, 0.9333] has 0.9 right three times: |0.9 - 1| = 0.1. (0.9333, 1] has 1.0 wrong: |1 - 0| = 1.
    calibration = counted([0.45, 0.45, 0.9, 0.9, 0.9, 1.0], [True, False, True, True, True, False])
    assert calibration.error == pytest.approx((2 * 0.05 + 3 * 0.1 + 1 * 1) / 6, abs=1e-6)
    filled = {index: one for index, one in enumerate(calibration.bins) if one.pixels}
    assert {index: one.pixels for index, one in filled.items()} == {6: 2, 13: 3, 14: 1}
    assert {index: one.accuracy for index, one in filled.items()} == {6: 0.5, 13: 1.0, 14: 0.0}
    assert {index: one.confidence for index, one in filled.items()} == pytest.approx({6: 0.45, 13: 0.9, 14: 1.0})
    assert [one.high for one in calibration.bins][-1] == 1.0
    assert np.isnan(calibration.bins[0].accuracy)


def test_pixels_of_one_bin_may_outweigh_each_other():
    # 0.7 and 0.72 share a bin; too sure of one, not sure enough of the other: |0.71 - 0.5|.
    assert counted([0.70, 0.72], [False, True]).error == pytest.approx(0.21, abs=1e-6)


def test_bins_are_closed_above():
    edges = [np.float32(index / BINS) for index in range(1, BINS + 1)]
    inside = [index for index, edge in enumerate(edges) if np.float32(edge) * np.float32(BINS) == index + 1]
    assert len(inside) > 10  # the others are not representable
    for index in inside:
        assert counted([float(edges[index])], [True]).bins[index].pixels == 1


@pytest.mark.parametrize("pieces", [1, 7])
def test_error_is_torchmetrics(pieces):
    logits, mask = random_pixels(20_000)
    ours = calibrated(logits, mask, pieces=pieces)
    theirs = MulticlassCalibrationError(num_classes=5, n_bins=15, norm="l1", ignore_index=IGNORED)
    theirs.update(logits.softmax(dim=1), mask)
    assert ours.error == pytest.approx(theirs.compute().item(), abs=1e-5)
    assert 0.02 < ours.error < 0.5


def test_ignored_pixels_do_not_count():
    calibration = counted([0.9, 0.6, 0.8], [True, False, False], [0.1, 0.2, 0.3], ignored=[1])
    assert sum(one.pixels for one in calibration.bins) == 2
    assert calibration.accuracy_at_coverage(1.0) == 0.5
    assert calibration.accuracy_at_coverage(1.0, by="uncertainty") == 0.5
    assert calibration.error == pytest.approx((0.1 + 0.8) / 2, abs=1e-6)


def test_accuracy_of_the_surest_worked_by_hand():
    confidences = [0.99, 0.95, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4]
    right = [True, True, True, False, True, True, False, False, True, False]
    uncertainty = list(range(10, 0, -1))  # the other way round
    calibration = counted(confidences, right, uncertainty)
    by_hand = {0.1: 1.0, 0.3: 1.0, 0.4: 3 / 4, 0.5: 4 / 5, 0.7: 5 / 7, 1.0: 6 / 10}
    assert {share: calibration.accuracy_at_coverage(share) for share in by_hand} == pytest.approx(by_hand)
    by_hand = {0.1: 0.0, 0.2: 1 / 2, 0.4: 1 / 4, 1.0: 6 / 10}
    found = {share: calibration.accuracy_at_coverage(share, by="uncertainty") for share in by_hand}
    assert found == pytest.approx(by_hand)
    # A share that ends within a pixel takes that part of it: 3.5 of 10.
    assert calibration.accuracy_at_coverage(0.35) == pytest.approx(3 / 3.5)


def test_of_equally_sure_pixels_the_mean_is_taken():
    assert counted([1.0] * 8, [True] * 6 + [False] * 2).accuracy_at_coverage(0.25) == pytest.approx(0.75)


def test_accuracy_of_the_surest_is_that_of_sorting_every_pixel():
    logits, mask = random_pixels(50_000)
    # As tiny and as far apart as variances are.
    uncertainty = torch.exp(-20 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)))
    calibration = calibrated(logits, mask, uncertainty, pieces=3)
    kept = (mask != IGNORED).flatten()
    right = (logits.argmax(dim=1) == mask).flatten()[kept].double()
    for by, doubt in (("confidence", 1 - confidence(logits)), ("uncertainty", uncertainty)):
        ordered = right[doubt.flatten()[kept].argsort()]
        for share in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
            exact = ordered[: round(share * len(ordered))].mean().item()
            assert calibration.accuracy_at_coverage(share, by=by) == pytest.approx(exact, abs=2e-3)


def test_confidences_that_differ_in_the_sixth_digit_are_told_apart():
    calibration = counted([1 - 1e-6] * 50 + [1 - 2e-6] * 50, [True] * 50 + [False] * 50)
    assert calibration.accuracy_at_coverage(0.5) == 1.0


def test_memory_is_that_of_the_histograms_however_many_pixels_come():
    calibration = Calibration(IGNORED)
    before = {name: value.numel() for name, value in vars(calibration).items() if isinstance(value, torch.Tensor)}
    for seed in range(3):
        logits, mask = random_pixels(100_000, seed=seed)
        calibration.update(logits.argmax(dim=1), confidence(logits), mask, confidence(logits))
    after = {name: value.numel() for name, value in vars(calibration).items() if isinstance(value, torch.Tensor)}
    assert after == before
    assert sum(after.values()) < 200_000


def test_the_report_holds_the_curve_and_nulls_where_nothing_was_counted():
    report = counted([0.9, 0.9], [True, False]).report()
    assert report["expected_calibration_error"] == pytest.approx(0.4, abs=1e-6)
    assert report["accuracy_at_coverage"] == {
        "by_confidence": dict.fromkeys(("0.1", "0.25", "0.5", "0.75", "0.9", "1"), 0.5)
    }
    assert [one["pixels"] for one in report["bins"]] == [0] * 13 + [2, 0]
    assert report["bins"][0]["accuracy"] is None
    assert (report["bins"][13]["confidence_from"], report["bins"][13]["confidence_to"]) == (13 / 15, 14 / 15)
    empty = Calibration(IGNORED).report()
    assert empty["expected_calibration_error"] is None
    assert empty["accuracy_at_coverage"] == {}


def test_the_sentence_says_the_error_and_the_surest():
    said = counted([0.9] * 10, [True] * 10, [0.1] * 10).error_message()
    assert said.startswith("calibration error 10.0%; accuracy of the surest pixels by uncertainty: 10 %: 100.0%, 25 %:")


def test_labels_come_with_their_probabilities():
    logits = torch.randn(2, 5, 6, 7) * 50
    expected = logits.double().softmax(dim=1).amax(dim=1)
    prediction, sure = labels_and_confidence(ClassScores(logits, False))
    torch.testing.assert_close(sure.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(prediction, labels(logits, (6, 7)))
    probabilities = logits.softmax(dim=1)
    assert torch.equal(labels_and_confidence(ClassScores(probabilities, True))[1], probabilities.amax(dim=1))
    equal = torch.tensor([1.0, 3.0, 3.0]).view(1, 3, 1, 1)
    assert labels_and_confidence(ClassScores(equal, False))[0].item() == 1  # the first, as argmax takes it
