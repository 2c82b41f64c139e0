"""Calibration, checked against values computed by hand, sorting of all pixels, and torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from segdeconv.evaluation.calibration import BINS, Calibration
from segdeconv.inference.scorers import ClassScores, labels, labels_and_confidence

IGNORED = 255


def calibration_of(confidences, correct, uncertainty=None, *, ignored=()):
    """Return a Calibration of the pixels of one image, for all of which class 1 is predicted."""
    mask = torch.tensor([[int(value) for value in correct]], dtype=torch.uint8)
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
    """Return (logits, mask) of a slightly overconfident network."""
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
    for piece, mask_piece, spread in zip(logits.chunk(pieces, dim=3), mask.chunk(pieces, dim=2), extra, strict=True):
        calibration.update(piece.argmax(dim=1), confidence(piece), mask_piece, spread)
    return calibration


def test_error_equals_a_hand_computed_value():
    # Bins of 1/15: (0.4, 0.4667] has 0.45 correct and 0.45 wrong: |0.45 - 0.5| = 0.05, two pixels.
    # (0.8667, 0.9333] has 0.9 correct three times: |0.9 - 1| = 0.1. (0.9333, 1] has 1.0 wrong: |1 - 0| = 1.
    calibration = calibration_of([0.45, 0.45, 0.9, 0.9, 0.9, 1.0], [True, False, True, True, True, False])
    assert calibration.error == pytest.approx((2 * 0.05 + 3 * 0.1 + 1 * 1) / 6, abs=1e-6)
    filled = {index: bin_ for index, bin_ in enumerate(calibration.bins) if bin_.pixels}
    assert {index: bin_.pixels for index, bin_ in filled.items()} == {6: 2, 13: 3, 14: 1}
    assert {index: bin_.accuracy for index, bin_ in filled.items()} == {6: 0.5, 13: 1.0, 14: 0.0}
    assert {index: bin_.confidence for index, bin_ in filled.items()} == pytest.approx({6: 0.45, 13: 0.9, 14: 1.0})
    assert calibration.bins[-1].high == 1.0
    assert np.isnan(calibration.bins[0].accuracy)


def test_errors_within_one_bin_can_cancel():
    # 0.7 and 0.72 share a bin; the first is overconfident, the second underconfident: |0.71 - 0.5|.
    assert calibration_of([0.70, 0.72], [False, True]).error == pytest.approx(0.21, abs=1e-6)


def test_bins_include_their_upper_limit():
    edges = [np.float32(index / BINS) for index in range(1, BINS + 1)]
    inside = [index for index, edge in enumerate(edges) if np.float32(edge) * np.float32(BINS) == index + 1]
    assert len(inside) > 10  # the others are not representable
    for index in inside:
        assert calibration_of([float(edges[index])], [True]).bins[index].pixels == 1


@pytest.mark.parametrize("pieces", [1, 7])
def test_error_equals_torchmetrics(pieces):
    logits, mask = random_pixels(20_000)
    calibration = calibrated(logits, mask, pieces=pieces)
    reference = MulticlassCalibrationError(num_classes=5, n_bins=15, norm="l1", ignore_index=IGNORED)
    reference.update(logits.softmax(dim=1), mask)
    assert calibration.error == pytest.approx(reference.compute().item(), abs=1e-5)
    assert 0.02 < calibration.error < 0.5


def test_ignored_pixels_do_not_count():
    calibration = calibration_of([0.9, 0.6, 0.8], [True, False, False], [0.1, 0.2, 0.3], ignored=[1])
    assert sum(bin_.pixels for bin_ in calibration.bins) == 2
    assert calibration.accuracy_at_coverage(1.0) == 0.5
    assert calibration.accuracy_at_coverage(1.0, by="uncertainty") == 0.5
    assert calibration.error == pytest.approx((0.1 + 0.8) / 2, abs=1e-6)


def test_accuracy_at_coverage_equals_hand_computed_values():
    confidences = [0.99, 0.95, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4]
    correct = [True, True, True, False, True, True, False, False, True, False]
    uncertainty = list(range(10, 0, -1))  # the reverse order
    calibration = calibration_of(confidences, correct, uncertainty)
    by_hand = {0.1: 1.0, 0.3: 1.0, 0.4: 3 / 4, 0.5: 4 / 5, 0.7: 5 / 7, 1.0: 6 / 10}
    assert {share: calibration.accuracy_at_coverage(share) for share in by_hand} == pytest.approx(by_hand)
    by_hand = {0.1: 0.0, 0.2: 1 / 2, 0.4: 1 / 4, 1.0: 6 / 10}
    by_uncertainty = {share: calibration.accuracy_at_coverage(share, by="uncertainty") for share in by_hand}
    assert by_uncertainty == pytest.approx(by_hand)
    # A share that ends within a pixel counts a part of it: 3.5 of 10.
    assert calibration.accuracy_at_coverage(0.35) == pytest.approx(3 / 3.5)


def test_equally_confident_pixels_count_with_their_mean_accuracy():
    assert calibration_of([1.0] * 8, [True] * 6 + [False] * 2).accuracy_at_coverage(0.25) == pytest.approx(0.75)


def test_accuracy_at_coverage_equals_sorting_every_pixel():
    logits, mask = random_pixels(50_000)
    # Spread over many magnitudes, as variances are.
    uncertainty = torch.exp(-20 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)))
    calibration = calibrated(logits, mask, uncertainty, pieces=3)
    valid = (mask != IGNORED).flatten()
    correct = (logits.argmax(dim=1) == mask).flatten()[valid].double()
    for by, values in (("confidence", 1 - confidence(logits)), ("uncertainty", uncertainty)):
        ordered = correct[values.flatten()[valid].argsort()]
        for share in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
            exact = ordered[: round(share * len(ordered))].mean().item()
            assert calibration.accuracy_at_coverage(share, by=by) == pytest.approx(exact, abs=2e-3)


def test_confidences_that_differ_in_the_sixth_digit_are_distinguished():
    calibration = calibration_of([1 - 1e-6] * 50 + [1 - 2e-6] * 50, [True] * 50 + [False] * 50)
    assert calibration.accuracy_at_coverage(0.5) == 1.0


def test_memory_does_not_grow_with_the_number_of_pixels():
    calibration = Calibration(IGNORED)
    before = {name: value.numel() for name, value in vars(calibration).items() if isinstance(value, torch.Tensor)}
    for seed in range(3):
        logits, mask = random_pixels(100_000, seed=seed)
        calibration.update(logits.argmax(dim=1), confidence(logits), mask, confidence(logits))
    after = {name: value.numel() for name, value in vars(calibration).items() if isinstance(value, torch.Tensor)}
    assert after == before
    assert sum(after.values()) < 200_000


def test_the_report_contains_the_curve_and_null_for_empty_bins():
    report = calibration_of([0.9, 0.9], [True, False]).report()
    assert report["expected_calibration_error"] == pytest.approx(0.4, abs=1e-6)
    assert report["accuracy_at_coverage"] == {
        "by_confidence": dict.fromkeys(("0.1", "0.25", "0.5", "0.75", "0.9", "1"), 0.5)
    }
    assert [bin_["pixels"] for bin_ in report["bins"]] == [0] * 13 + [2, 0]
    assert report["bins"][0]["accuracy"] is None
    assert (report["bins"][13]["confidence_from"], report["bins"][13]["confidence_to"]) == (13 / 15, 14 / 15)
    empty = Calibration(IGNORED).report()
    assert empty["expected_calibration_error"] is None
    assert empty["accuracy_at_coverage"] == {}


def test_the_summary_contains_the_error_and_the_accuracies():
    summary = calibration_of([0.9] * 10, [True] * 10, [0.1] * 10).summary()
    assert summary.startswith("calibration error 10.0%; accuracy of the most certain pixels by uncertainty: 10 %: ")


def test_labels_are_returned_with_their_probabilities():
    logits = torch.randn(2, 5, 6, 7) * 50
    expected = logits.double().softmax(dim=1).amax(dim=1)
    prediction, confidences = labels_and_confidence(ClassScores(logits, False))
    torch.testing.assert_close(confidences.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(prediction, labels(logits, (6, 7)))
    probabilities = logits.softmax(dim=1)
    assert torch.equal(labels_and_confidence(ClassScores(probabilities, True))[1], probabilities.amax(dim=1))
    equal = torch.tensor([1.0, 3.0, 3.0]).view(1, 3, 1, 1)
    assert labels_and_confidence(ClassScores(equal, False))[0].item() == 1  # the first of equal scores, as argmax
