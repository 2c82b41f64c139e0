"""Windows: every pixel once, aligned, holding all that is heard; and scores by parts are those of the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segdeconv.errors import UsageError
from segdeconv.inference.tiling import Axis, geometry_of, parts
from segdeconv.models import FCN, FPN, DeconvNet, DeepLabLargeFOV, FCNBasic, SegNet, SegNetBasic, UNet

SMALL = {"width": 0.0625}
NETWORKS = {
    "segnet": lambda: SegNet(3, **SMALL),
    "segnet of two stages": lambda: SegNet(3, stages=((4,), (8,))),
    "segnet basic": lambda: SegNetBasic(3, width=4),
    "fcn-8s": lambda: FCN(3, fc_width=8, **SMALL),
    "unet": lambda: UNet(3, **SMALL),
    "deeplab": lambda: DeepLabLargeFOV(3, fc_width=8, **SMALL),
    "fcn basic": lambda: FCNBasic(3, width=4),
    "deconvnet": lambda: DeconvNet(3, fc_width=8, **SMALL),
}
SLOW = ("deconvnet", "fcn-8s", "deeplab", "unet")


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    step=st.tuples(st.integers(1, 400), st.integers(1, 400)),
)
@settings(max_examples=50, deadline=None)
def test_parts_cover_every_pixel_once(size, step):
    count = np.zeros(size, dtype=int)
    for (top, bottom), (left, right) in parts(size, step):
        assert 0 < bottom - top <= step[0]
        assert 0 < right - left <= step[1]
        count[top:bottom, left:right] += 1
    assert (count == 1).all()


@given(
    stride=st.sampled_from([1, 2, 3, 8, 32]),
    heard=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    sawtooth=st.booleans(),
    least=st.integers(1, 80),
    length=st.integers(1, 700),
    tile=st.integers(1, 400),
)
@settings(max_examples=150, deadline=None)
def test_windows_hold_all_that_is_heard_begin_at_a_stride_and_are_as_long_as_the_network_needs(
    stride, heard, sawtooth, least, length, tile
):
    teeth = np.arange(stride) if sawtooth else np.zeros(stride, dtype=int)
    axis = Axis(stride, heard[0] + teeth, heard[1] + teeth[::-1], least)
    step = axis.step(tile)
    if step == 0:
        return
    for part, _ in parts((length, 1), (step, 1)):
        first, last = axis.window(part, length)
        assert first % stride == 0
        assert last == length or last % stride == 0
        assert last - first <= max(tile, axis.overlap + stride, least + stride)
        assert last - first >= min(length, least)
        places = np.arange(*part)
        assert first <= max(0, (places - axis.before[places % stride]).min())
        assert last > min(length - 1, (places + axis.after[places % stride]).max())


def skeleton(make):
    with torch.device("meta"):
        return make().eval()


def test_what_networks_hear_is_what_the_table_of_layers_says():
    vgg = geometry_of(skeleton(lambda: SegNet(11, width=0.25)), 32)
    # 404 pixels (docs/describe.md), of which 192 at most, and no fewer than 160, lie before a multiple of 32.
    assert (vgg.rows.stride, vgg.rows.overlap, vgg.exact) == (32, 384, True)
    assert max(vgg.rows.before + vgg.rows.after) + 1 == 404
    assert 160 < vgg.rows.before[0] <= 192
    assert vgg.smallest == (416, 416)
    assert vgg.rows.window((320, 352), 1000) == (128, 544)
    assert vgg.rows.window((0, 32), 1000) == (0, 224)
    assert vgg.rows.window((992, 1000), 1000) == (800, 1000)
    basic = geometry_of(skeleton(lambda: SegNetBasic(11, width=8)), 32)
    assert (basic.rows.stride, basic.rows.overlap) == (16, 192)


def in_use(network):
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight)
    return network.eval().double()  # in which rounding moves no switch


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NETWORKS]
)
def test_scores_by_parts_are_those_of_the_whole(name):
    network = in_use(NETWORKS[name]())
    geometry = geometry_of(skeleton(NETWORKS[name]), network.minimum_size)
    assert geometry.exact
    rows, columns = geometry.smallest
    size = (rows + 71, columns + 103)  # odd, and no multiple of any stride
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    step = geometry.steps((size[0] - 1, size[1] - 1), size)
    assert len(list(parts(size, step))) >= 4
    with torch.no_grad():
        whole = network(image)
        for part in parts(size, step):
            (top, bottom), (left, right) = geometry.window(part, size)
            seen = network(image[..., top:bottom, left:right])
            (first, last), (start, stop) = part
            one = seen[..., first - top : last - top, start - left : stop - left]
            torch.testing.assert_close(one, whole[..., first:last, start:stop], rtol=1e-10, atol=1e-10)


def test_windows_one_stride_too_small_would_not_do():
    """Or the test above would prove nothing."""
    network = in_use(SegNetBasic(3, width=4))
    geometry = geometry_of(skeleton(lambda: SegNetBasic(3, width=4)), 32)
    image = torch.randn(1, 3, 64, 400, dtype=torch.float64)
    (_, _), (left, right) = geometry.window(((0, 64), (192, 208)), (64, 400))
    with torch.no_grad():
        whole = network(image)[..., 192:208]
        near = network(image[..., left + 16 : right])[..., 192 - left - 16 : 208 - left - 16]
        shifted = network(image[..., left + 1 : right])[..., 192 - left - 1 : 208 - left - 1]
    assert (whole - near).abs().max() > 1e-6
    assert (whole - shifted).abs().max() > 1e-3


def test_a_tile_without_room_for_what_is_heard_is_refused():
    geometry = geometry_of(skeleton(lambda: SegNetBasic(3, width=4)), 32)
    with pytest.raises(
        UsageError,
        match=r"tiles of 200x500 are too small: SegNetBasic hears 96 pixels and more on every side - give tiles of "
        "208x208 or larger",
    ):
        geometry.steps((200, 500), (1000, 1000))
    assert geometry.steps((100, 500), (90, 1000)) == (90, 304)  # an image that is no taller than the tile


def test_a_tile_fits_into_the_memory_that_is_given():
    geometry = geometry_of(skeleton(lambda: SegNetBasic(3, width=4)), 32)
    for size in ((3000, 4000), (100, 100_000), (100_000, 100), (12_000, 9_000)):
        for memory in (30 << 20, 200 << 20):
            tile = geometry.tile(size, memory)
            if tile is None:
                assert geometry.needed(size) <= memory
                continue
            assert geometry.needed(tile) <= memory * 1.01
            step = geometry.steps(tile, size)
            assert all(one % 16 == 0 or one == side for one, side in zip(step, size, strict=True))


class Everywhere(nn.Module):
    def forward(self, image):
        return image[:, :2] + image.mean(dim=(2, 3), keepdim=True)[:, :2]


def test_a_network_that_hears_all_of_the_image_everywhere_takes_no_tiles():
    with pytest.raises(
        UsageError, match="every score of Everywhere hears all of the image, so it cannot be cut into tiles"
    ):
        geometry_of(Everywhere(), 1)


class Stretched(nn.Module):
    def forward(self, image):
        small = nn.functional.interpolate(image, size=(image.shape[-2] * 3 // 7, image.shape[-1] * 3 // 7))
        return nn.functional.interpolate(small, size=image.shape[-2:], mode="bilinear")


def test_a_network_that_normalises_by_what_it_sees_is_known_not_to_be_exact():
    """Its group norm takes the mean over the whole map, which no window has."""
    assert not geometry_of(skeleton(lambda: FPN(3, **SMALL)), 32).exact


def test_a_network_whose_ratios_depend_on_the_image_is_known_not_to_be_exact():
    assert not geometry_of(Stretched(), 1).exact
