"""Paths along switches, checked against unpooling and against paths computed by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segdeconv.analysis.switch_paths import path, recorded, sources, votes, winners
from segdeconv.models import FPN, SegNet, UNet
from segdeconv.switches.ops import max_pool, unpool
from segdeconv.switches.packing import pack


def pooled_by(seed, size, channels, levels, *, packed=False):
    """Return poolings of unrelated random maps, one per level."""
    generator = torch.Generator().manual_seed(seed)
    pooled = []
    for _ in range(levels):
        pooled.append(max_pool(torch.randn(2, channels, *size, generator=generator), packed=packed))
        size = tuple(pooled[-1].features.shape[-2:])
    return pooled


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (33, 65), (5, 1), (1, 1)])
def test_with_one_channel_a_path_ends_where_unpooling_places_the_value(size):
    pooled = pooled_by(0, size, 1, 5)
    for image in range(2):
        ends = sources(pooled, image=image)
        deepest = pooled[-1].features.shape[-2:]
        # The index of every window of the deepest pool, from 1, is unpooled through all levels.
        numbers = torch.arange(1.0, deepest.numel() + 1).view(1, 1, *deepest).repeat(2, 1, 1, 1)
        for pooling in reversed(pooled):
            numbers = unpool(numbers, pooling.switches, pooling.size)
        for y in range(0, size[0], 3):
            for x in range(0, size[1], 7):
                steps = path(pooled, (y, x), image=image)
                assert [step.level for step in steps] == [5, 4, 3, 2, 1]
                assert [step.share for step in steps] == [1.0] * 5
                end = tuple(map(int, steps[-1].place))
                assert numbers[image, 0, *end] == 1 + (y >> 5) * deepest[1] + (x >> 5)
                assert tuple(ends[y, x].tolist()) == end
                for above, below in pairwise(steps):  # each cell is the next window
                    (top, left, bottom, right), (y1, x1, y2, x2) = above.box, below.box
                    assert top <= y1 < y2 <= bottom
                    assert left <= x1 < x2 <= right
                    assert below.window == (top >> (above.level - 1), left >> (above.level - 1))


def test_majority_and_strongest_equal_hand_computed_cells():
    # Four channels of one window, with the winning cells 3, 1, 2, 1; the third has the largest value.
    x = torch.zeros(1, 4, 2, 2)
    for channel, (cell, value) in enumerate([(3, 1.0), (1, 2.0), (2, 9.0), (1, 0.5)]):
        x[0, channel, cell // 2, cell % 2] = value
    pooled = [max_pool(x)]
    (majority,), (strongest,) = path(pooled, (0, 0)), path(pooled, (0, 0), rule="strongest")
    assert (majority.cell, majority.share, majority.place, majority.box) == (1, 0.5, (0.0, 1.0), (0, 1, 1, 2))
    assert (strongest.cell, strongest.share, strongest.place) == (2, 0.25, (1.0, 0.0))
    x[0, 0] = 0
    x[0, 0, 1, 0] = 1.0  # two channels for cell 1, two for cell 2: the first in reading order wins
    assert path([max_pool(x)], (1, 1))[0].cell == 1


@pytest.mark.parametrize("rule", ["majority", "strongest"])
def test_sources_equal_the_paths_of_single_pixels(rule):
    pooled = pooled_by(1, (21, 30), 7, 3)
    ends = sources(pooled, rule=rule, image=1)
    expected = [[path(pooled, (y, x), rule=rule, image=1)[-1].place for x in range(30)] for y in range(21)]
    assert np.array_equal(ends.numpy(), np.array(expected))


def test_packed_switches_lead_to_the_same_pixel():
    pooled, packed = pooled_by(2, (20, 20), 6, 2), pooled_by(2, (20, 20), 6, 2, packed=True)
    assert torch.equal(packed[0].switches, pack(pooled[0].switches))
    assert torch.equal(sources(pooled), sources(packed))


def test_votes_are_counted_over_channels():
    pooling = pooled_by(3, (12, 15), 9, 1)[0]
    pooling.features[1, :, 2, 3] = -1.0  # if no channel is above zero, all channels vote
    voting = pooling.features[1] > 0
    voting[:, 2, 3] = True
    counts = (F.one_hot(pooling.switches[1].long(), 4) * voting[..., None]).sum(dim=0)
    assert torch.equal(votes(pooling, image=1), counts.permute(2, 0, 1))
    assert (counts.gather(2, winners(pooling, image=1).long()[..., None])[..., 0] == counts.amax(dim=2)).all()


def test_channels_of_zeros_do_not_vote():
    x = torch.zeros(1, 5, 2, 2)
    x[0, 3, 1, 0] = 2.0  # the switches of the four channels of zeros are cell 0, as after a ReLU
    (step,) = path([max_pool(x)], (0, 1))
    assert (step.cell, step.share) == (2, 1.0)


def test_a_pixel_outside_the_image_is_refused():
    with pytest.raises(ValueError, match=r"pixel \(4, 0\) is not in an image of 4x4"):
        path(pooled_by(4, (4, 4), 1, 1), (4, 0))


def test_the_poolings_of_a_forward_pass_are_recorded():
    network, image = SegNet(2, stages=((4,), (8,))).eval(), torch.randn(1, 3, 13, 18)
    with torch.no_grad(), recorded(network) as pooled:
        network(image)
        network(image)
        expected = network.encoder(image).pooled
    assert len(pooled) == 2
    assert all(torch.equal(pooling.switches, other.switches) for pooling, other in zip(pooled, expected, strict=True))
    before = list(pooled)
    with torch.no_grad():
        network(-image)
    assert pooled == before  # nothing is recorded outside the block
    with torch.no_grad(), recorded(fpn := FPN(2, stages=((4,), (8,), (8,)), num_levels=2).eval()) as pooled:
        fpn(image)
    assert len(pooled) == 3
    with torch.no_grad(), recorded(unet := UNet(2, stages=((4,), (8,))).eval()) as pooled:
        unet(image)
    assert pooled == []
