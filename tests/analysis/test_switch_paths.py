"""The path of a pixel against unpooling itself, and against a walk by hand."""

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
    """Pools of maps that have nothing to do with each other, as convolutions between them would leave them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(levels):
        found.append(max_pool(torch.randn(2, channels, *size, generator=generator), packed=packed))
        size = tuple(found[-1].features.shape[-2:])
    return found


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (33, 65), (5, 1), (1, 1)])
def test_with_one_channel_a_path_ends_where_unpooling_puts_the_value(size):
    pooled = pooled_by(0, size, 1, 5)
    for image in range(2):
        ends = sources(pooled, image=image)
        deepest = pooled[-1].features.shape[-2:]
        # Every window of the deepest pool sends its number, from 1, down through all the unpoolings.
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


def test_the_majority_and_the_strongest_worked_by_hand():
    # Four channels of one window: cells 3, 1, 1, 2 win; the third holds the largest value of all.
    x = torch.zeros(1, 4, 2, 2)
    for channel, (cell, value) in enumerate([(3, 1.0), (1, 2.0), (2, 9.0), (1, 0.5)]):
        x[0, channel, cell // 2, cell % 2] = value
    pooled = [max_pool(x)]
    (most,), (strongest,) = path(pooled, (0, 0)), path(pooled, (0, 0), rule="strongest")
    assert (most.cell, most.share, most.place, most.box) == (1, 0.5, (0.0, 1.0), (0, 1, 1, 2))
    assert (strongest.cell, strongest.share, strongest.place) == (2, 0.25, (1.0, 0.0))
    x[0, 0] = 0
    x[0, 0, 1, 0] = 1.0  # two for cell 1, two for cell 2: the first in reading order
    assert path([max_pool(x)], (1, 1))[0].cell == 1


@pytest.mark.parametrize("rule", ["majority", "strongest"])
def test_all_pixels_at_once_are_each_pixel_alone(rule):
    pooled = pooled_by(1, (21, 30), 7, 3)
    ends = sources(pooled, rule=rule, image=1)
    alone = [[path(pooled, (y, x), rule=rule, image=1)[-1].place for x in range(30)] for y in range(21)]
    assert np.array_equal(ends.numpy(), np.array(alone))


def test_packed_switches_lead_to_the_same_place():
    pooled, packed = pooled_by(2, (20, 20), 6, 2), pooled_by(2, (20, 20), 6, 2, packed=True)
    assert torch.equal(packed[0].switches, pack(pooled[0].switches))
    assert torch.equal(sources(pooled), sources(packed))


def test_winners_are_counted_over_channels():
    pooling = pooled_by(3, (12, 15), 9, 1)[0]
    pooling.features[1, :, 2, 3] = -1.0  # where no channel is above zero all count
    says = pooling.features[1] > 0
    says[:, 2, 3] = True
    counts = (F.one_hot(pooling.switches[1].long(), 4) * says[..., None]).sum(dim=0)
    assert torch.equal(votes(pooling, image=1), counts.permute(2, 0, 1))
    assert (counts.gather(2, winners(pooling, image=1).long()[..., None])[..., 0] == counts.amax(dim=2)).all()


def test_channels_that_are_zero_do_not_pull_to_the_first_cell():
    x = torch.zeros(1, 5, 2, 2)
    x[0, 3, 1, 0] = 2.0  # four channels of zeros name cell 0, as after a ReLU
    (step,) = path([max_pool(x)], (0, 1))
    assert (step.cell, step.share) == (2, 1.0)


def test_a_pixel_outside_is_refused():
    with pytest.raises(ValueError, match=r"pixel \(4, 0\) is not in an image of 4x4"):
        path(pooled_by(4, (4, 4), 1, 1), (4, 0))


def test_a_pass_of_a_network_leaves_its_poolings():
    network, image = SegNet(2, stages=((4,), (8,))).eval(), torch.randn(1, 3, 13, 18)
    with torch.no_grad(), recorded(network) as pooled:
        network(image)
        network(image)
        truth = network.encoder(image).pooled
    assert len(pooled) == 2
    assert all(torch.equal(one.switches, other.switches) for one, other in zip(pooled, truth, strict=True))
    kept = list(pooled)
    with torch.no_grad():
        network(-image)
    assert pooled == kept  # closed, it hears nothing more
    with torch.no_grad(), recorded(fpn := FPN(2, stages=((4,), (8,), (8,)), num_levels=2).eval()) as pooled:
        fpn(image)
    assert len(pooled) == 3
    with torch.no_grad(), recorded(unet := UNet(2, stages=((4,), (8,))).eval()) as pooled:
        unet(image)
    assert pooled == []
