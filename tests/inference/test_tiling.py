"""Windows cover every pixel once, are aligned and hold receptive fields; scores in tiles equal those of the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segdeconv.errors import UsageError
from segdeconv.inference.tiling import Axis, geometry_of, parts
from segdeconv.inference.views import Tiler
from segdeconv.models import FCN, FPN, DeconvNet, DeepLabLargeFOV, FCNBasic, SegNet, SegNetBasic, UNet
from segdeconv.models.adapter import Adapter
from segdeconv.models.instance_batch_norm import set_instance_statistics

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
    extent=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    sawtooth=st.booleans(),
    min_window=st.integers(1, 80),
    length=st.integers(1, 700),
    tile=st.integers(1, 400),
)
@settings(max_examples=150, deadline=None)
def test_windows_hold_the_receptive_field_are_aligned_and_as_long_as_the_network_needs(
    stride, extent, sawtooth, min_window, length, tile
):
    teeth = np.arange(stride) if sawtooth else np.zeros(stride, dtype=int)
    axis = Axis(stride, extent[0] + teeth, extent[1] + teeth[::-1], min_window)
    step = axis.step(tile)
    if step == 0:
        return
    for part, _ in parts((length, 1), (step, 1)):
        first, last = axis.window(part, length)
        assert first % stride == 0
        assert last == length or last % stride == 0
        assert last - first <= max(tile, axis.overlap + stride, min_window + stride)
        assert last - first >= min(length, min_window)
        pixels = np.arange(*part)
        assert first <= max(0, (pixels - axis.before[pixels % stride]).min())
        assert last > min(length - 1, (pixels + axis.after[pixels % stride]).max())


def skeleton(make):
    with torch.device("meta"):
        return make().eval()


def test_the_geometry_agrees_with_the_summarys_receptive_fields():
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
    return network.eval().double()  # in float64, rounding changes no switch


def another_librarys():
    layers = [
        nn.Conv2d(3, 4, 7, padding=3),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 7, padding=3),
        nn.Upsample(scale_factor=2),
    ]
    return Adapter(nn.Sequential(*layers, nn.Conv2d(4, 3, 7, padding=3)), 3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NETWORKS]
)
def test_scores_in_tiles_equal_those_of_the_whole_image(name):
    check_tiles(NETWORKS[name], (71, 103))  # odd, and no multiple of any stride


@pytest.mark.parametrize("more", [(36, 36), (33, 66), (96, 64), (71, 103)])
def test_tiles_of_a_network_that_extends_images_start_where_its_extension_would(more):
    check_tiles(another_librarys, more, tile=lambda smallest, size: smallest)


def check_tiles(build, more, tile=lambda smallest, size: (size[0] - 1, size[1] - 1)):
    """Compare tiles with the whole of an image that is this much larger than the smallest tile."""
    network = in_use(build())
    geometry = geometry_of(skeleton(build), network.minimum_size)
    assert geometry.exact
    rows, columns = geometry.smallest
    size = (rows + more[0], columns + more[1])
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    step = geometry.steps(tile(geometry.smallest, size), size)
    assert len(list(parts(size, step))) >= 4
    with torch.no_grad():
        whole = network(image)
        for part in parts(size, step):
            (top, bottom), (left, right) = geometry.window(part, size)
            scores = network(image[..., top:bottom, left:right])
            (first, last), (start, stop) = part
            scores = scores[..., first - top : last - top, start - left : stop - left]
            torch.testing.assert_close(scores, whole[..., first:last, start:stop], rtol=1e-10, atol=1e-10)


def test_windows_one_stride_too_small_change_the_scores():
    """Otherwise the test above would prove nothing."""
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


def test_a_tile_too_small_for_the_receptive_field_is_refused():
    geometry = geometry_of(skeleton(lambda: SegNetBasic(3, width=4)), 32)
    with pytest.raises(
        UsageError,
        match=r"tiles of 200x500 are too small: the receptive field of SegNetBasic extends at least 96 pixels to every "
        "side - give tiles of 208x208 or larger",
    ):
        geometry.steps((200, 500), (1000, 1000))
    assert geometry.steps((100, 500), (90, 1000)) == (90, 304)  # an image that is no taller than the tile


def test_a_tile_fits_into_the_given_memory():
    geometry = geometry_of(skeleton(lambda: SegNetBasic(3, width=4)), 32)
    for size in ((3000, 4000), (100, 100_000), (100_000, 100), (12_000, 9_000)):
        for memory in (30 << 20, 200 << 20):
            tile = geometry.tile(size, memory)
            if tile is None:
                assert geometry.needed(size) <= memory
                continue
            assert geometry.needed(tile) <= memory * 1.01
            step = geometry.steps(tile, size)
            assert all(length % 16 == 0 or length == side for length, side in zip(step, size, strict=True))


class Global(nn.Module):
    def forward(self, image):
        return image[:, :2] + image.mean(dim=(2, 3), keepdim=True)[:, :2]


def test_a_network_that_depends_on_the_whole_image_cannot_be_tiled():
    with pytest.raises(
        UsageError, match="every score of Global depends on the whole image, so images cannot be divided into tiles"
    ):
        geometry_of(Global(), 1)


class Resized(nn.Module):
    def forward(self, image):
        small = nn.functional.interpolate(image, size=(image.shape[-2] * 3 // 7, image.shape[-1] * 3 // 7))
        return nn.functional.interpolate(small, size=image.shape[-2:], mode="bilinear")


def test_a_network_that_normalises_by_statistics_of_its_input_is_not_exact():
    """Its group norm computes the mean over the whole feature map, which no window holds."""
    assert not geometry_of(skeleton(lambda: FPN(3, **SMALL)), 32).exact


def test_a_network_that_resizes_by_a_ratio_of_the_image_size_is_not_exact():
    assert not geometry_of(Resized(), 1).exact


@pytest.mark.parametrize("limit", [{"memory": 1}, {"memory": 1, "tile": (64, 64)}], ids=["memory", "tile"])
def test_one_warning_says_that_tiles_are_not_exact(limit):
    network, said = skeleton(NETWORKS["segnet of two stages"]), []
    set_instance_statistics(network, {"encoder": 0.2})
    tiler = Tiler(network, **limit, report=said.append)
    assert all(tiler.step(size) is not None for size in [(100, 90), (200, 70)])
    assert len(said) == 1
    assert "SegNet cannot be tiled exactly" in said[0]
