"""Stability of switches, checked against positions listed one by one, and AUROC, against all pairs of pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segdeconv.analysis.switch_stability import STEPS, instability, views, winning_cells
from segdeconv.analysis.uncertainty import ErrorRanking, noise_of
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.switches.ops import max_pool

NOISE = torch.tensor([0.5, 0.1])


def pools(image):
    """Return two poolings with a nonlinear function between them."""
    first = max_pool(image)
    second = max_pool(torch.sin(3 * first.features))
    return [first, second._replace(features=second.features.relu())]


def winner_positions(pooling, channel, side):
    """Return {window: (y, x) of the centre of the winning cell, in pixels} of the first image."""
    positions = {}
    for y, row in enumerate(pooling.switches[0, channel].tolist()):
        for x, code in enumerate(row):
            cell = 2 * y + code // 2, 2 * x + code % 2
            positions[y, x] = tuple(index * side + (side - 1) / 2 for index in cell)
    return positions


@pytest.mark.parametrize("size", [(12, 16), (11, 13), (9, 6)])
def test_instability_equals_a_comparison_of_single_positions(size):
    image = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0))
    measures = instability(pools, image, noise=NOISE)
    height, width = size
    for level in (1, 2):
        side, pooling = 2 ** (level - 1), pools(image)[level - 1]
        lost, counted, moved = (np.zeros(pooling.features.shape[-2:]) for _ in range(3))
        num_views = 0
        for view in views(image, NOISE):
            num_views += 1
            view_pooling = pools(view.image)[level - 1]
            for channel in range(2):
                positions = list(winner_positions(view_pooling, channel, side).values())
                # Mapped back to the unperturbed image.
                positions = [
                    (y - view.step[0], (width - 1 - x if view.mirrored else x) - view.step[1]) for y, x in positions
                ]
                down = [(i * side + (side - 1) / 2 - view.step[0]) for i in range(-(-height // side))]
                across = [(j * side + (side - 1) / 2) for j in range(-(-width // side))]
                across = [(width - 1 - x if view.mirrored else x) - view.step[1] for x in across]
                for window, (y, x) in winner_positions(pooling, channel, side).items():
                    inside = min(abs(y - m) for m in down) <= side / 2 and min(abs(x - m) for m in across) <= side / 2
                    if not inside:
                        continue
                    counted[window] += 1
                    if not any(abs(y - v) <= side / 2 and abs(x - u) <= side / 2 for v, u in positions):
                        lost[window] += 1
                        moved[window] += pooling.features[0, channel, *window].item()
        rows, columns = np.arange(height) >> level, np.arange(width) >> level
        assert lost.sum() > 0
        share = lost / np.maximum(counted, 1)
        np.testing.assert_allclose(measures.changed[level - 1, 0], share[rows[:, None], columns], atol=1e-6)
        mean_activation = pooling.features[0].sum(dim=0).mean().item()
        np.testing.assert_allclose(
            measures.moved[level - 1, 0], (moved / num_views / mean_activation)[rows[:, None], columns], atol=1e-5
        )


def test_views_have_the_same_content():
    image = torch.randn(2, 2, 7, 9)
    mirrored, *shifted, noisy, other = views(image, NOISE)
    assert torch.equal(mirrored.image.flip(-1), image)
    for view, (dy, dx) in zip(shifted, STEPS, strict=True):
        assert view.step == (dy, dx)
        assert torch.equal(torch.roll(image, (dy, dx), (2, 3))[..., 1:-1, 1:-1], view.image[..., 1:-1, 1:-1])
    spread = torch.cat([noisy.image - image, other.image - image]).std(dim=(0, 2, 3))
    torch.testing.assert_close(spread, NOISE, rtol=0.25, atol=0)
    torch.testing.assert_close(noisy.image[0] - image[0], noisy.image[1] - image[1], rtol=0, atol=1e-5)


def test_mirroring_a_symmetric_image_changes_nothing(monkeypatch):
    monkeypatch.setattr("segdeconv.analysis.switch_stability.STEPS", ())
    monkeypatch.setattr("segdeconv.analysis.switch_stability.NUM_NOISY", 0)
    half = torch.randn(1, 3, 8, 8)
    image = torch.cat([half, half.flip(-1)], dim=-1)  # the width is even, so that the windows of both views coincide
    assert instability(pools, image, noise=torch.zeros(3)).changed.max() == 0
    assert instability(pools, torch.randn(1, 3, 8, 16), noise=torch.zeros(3)).changed.max() == 0


def test_winning_cells_are_where_unpooling_places_values():
    x = torch.randn(2, 3, 9, 14)
    _, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
    expected = torch.zeros(2, 3, 9 * 14, dtype=torch.bool).scatter(2, indices.flatten(2), True).view(x.shape)
    assert torch.equal(winning_cells(max_pool(x)), expected)
    assert torch.equal(winning_cells(max_pool(x, packed=True)), expected)


def test_auroc_equals_a_comparison_of_all_pairs():
    generator = np.random.default_rng(0)
    signal = np.round(generator.exponential(size=400) * 20) / 20  # with many equal values
    wrong = generator.random(400) < 0.1 + 0.2 * signal
    valid = generator.random(400) < 0.8
    ranking = ErrorRanking()
    for part in np.array_split(np.arange(400), 3):
        ranking.update(*(torch.from_numpy(array[part]) for array in (signal, wrong, valid)))
    of_correct, of_wrong = signal[valid & ~wrong], signal[valid & wrong]
    pairs = [1.0 if high > low else 0.5 if high == low else 0.0 for high in of_wrong for low in of_correct]
    assert ranking.auroc == pytest.approx(np.mean(pairs), abs=1e-12)


def test_auroc_of_small_and_of_equal_signals():
    def auroc(signal, wrong):
        ranking = ErrorRanking()
        ranking.update(torch.tensor(signal), torch.tensor(wrong), torch.ones(len(signal), dtype=torch.bool))
        return ranking.auroc

    assert auroc([1e-9, 2e-9, 0.0, 1.0], [False, True, False, True]) == 1
    assert auroc([3.0, 3.0, 3.0], [False, True, False]) == 0.5
    assert auroc([0.2, 0.1], [False, True]) == 0
    assert np.isnan(auroc([0.2, 0.1], [False, False]))


def test_noise_is_two_grey_levels_in_the_units_of_the_network():
    eight = Preprocessing(None, (0.0,) * 3, (1.0, 2.0, 4.0))
    assert noise_of(eight).tolist() == pytest.approx([2.0, 1.0, 0.5])
    bgr = Preprocessing(None, (0.0,) * 3, (1.0, 2.0, 4.0), order="bgr")
    assert noise_of(bgr).tolist() == pytest.approx([0.5, 1.0, 2.0])
    sixteen = Preprocessing(None, (0.0,), (257.0,), bits=16, as_stored=True)
    assert noise_of(sixteen).tolist() == pytest.approx([2.0])
