"""Ablation of switches, checked against a decoder written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from segdeconv.analysis.ablation import UPSAMPLINGS, require_unpooling, shuffled, unpooling_by
from segdeconv.errors import UsageError
from segdeconv.models import SegNet, UNet
from segdeconv.switches.ops import max_pool, unpool

SIZE = (21, 30)


def network(*, packed=False):
    torch.manual_seed(0)
    return SegNet(3, stages=((4,), (6,), (8,)), packed_switches=packed).eval()


def by_hand(model, image, upsample):
    """Run a SegNet with `upsample(x, switches, size, level)` in place of unpooling."""
    with torch.no_grad():
        x, pooled, _ = model.encoder(image)
        for level, stage in zip((3, 2, 1), model.decoder.stages, strict=True):
            pooling = pooled[level - 1]
            *blocks, _ = stage
            x = torch.nn.Sequential(*blocks)(upsample(x, pooling.switches, pooling.size, level))
        return model.decoder.classifier(x)


@pytest.mark.parametrize("level", ["all", 1, 2, 3])
def test_one_level_or_all_levels_are_replaced(level):
    model, image = network(), torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))

    def corner(x, switches, size, at_level):
        if level not in ("all", at_level):
            return unpool(x, switches, size)
        out = torch.zeros(*x.shape[:2], *size)
        out[..., ::2, ::2] = x
        return out

    def bilinear(x, switches, size, at_level):
        if level not in ("all", at_level):
            return unpool(x, switches, size)
        return F.interpolate(x, scale_factor=2, mode="bilinear")[..., : size[0], : size[1]] / 4

    for kind, upsample in (("corner", corner), ("bilinear", bilinear)):
        with torch.no_grad(), unpooling_by(model, kind, level):
            first, second = model(image), model(image)
        assert torch.equal(first, second)  # a forward pass leaves no state
        torch.testing.assert_close(first, by_hand(model, image, upsample))
    with torch.no_grad():
        assert torch.equal(model(image), by_hand(model, image, lambda x, codes, size, _: unpool(x, codes, size)))


def test_an_aborted_forward_pass_leaves_no_state():
    model, image = network(), torch.randn(1, 3, *SIZE)
    with torch.no_grad(), unpooling_by(model, "corner", 2):
        expected = model(image)

    def run_out(module, given):
        raise MemoryError

    with torch.no_grad(), unpooling_by(model, "corner", 2):
        hook = model.encoder.stages[2].register_forward_pre_hook(run_out)
        with pytest.raises(MemoryError):
            model(image)
        hook.remove()
        assert torch.equal(model(image), expected)


def test_shuffled_switches_are_a_permutation():
    codes = max_pool(torch.randn(3, 5, 20, 16)).switches
    moved = shuffled(codes, (20, 16), 0)
    for image in range(3):
        for channel in range(5):
            assert torch.equal(moved[image, channel].flatten().bincount(), codes[image, channel].flatten().bincount())
    assert (moved != codes).float().mean() > 0.6  # three of four are expected
    assert torch.equal(moved[1:], shuffled(codes[1:], (20, 16), 0))  # independent of the batch
    assert not torch.equal(moved, shuffled(codes, (20, 16), 1))
    places = torch.arange(80, dtype=torch.uint8).view(1, 1, 10, 8).repeat(1, 2, 1, 1)
    first, second = shuffled(places, (20, 16), 0)[0]
    assert sorted(first.flatten().tolist()) == list(range(80))
    assert not torch.equal(first, second)  # each map has its own permutation


def test_no_value_is_lost_in_incomplete_windows():
    codes = max_pool(torch.randn(1, 6, 21, 15)).switches
    moved = shuffled(codes, (21, 15), 3)
    assert unpool(torch.ones(1, 6, 11, 8), moved, (21, 15)).sum() == 6 * 11 * 8


def test_packed_switches_are_replaced_in_the_same_way():
    image = torch.randn(1, 3, *SIZE)
    for kind in UPSAMPLINGS:
        plain, packed = network(), network(packed=True)
        with torch.no_grad(), unpooling_by(plain, kind, "all"), unpooling_by(packed, kind, "all"):
            torch.testing.assert_close(plain(image), packed(image))


def test_levels_are_counted_and_a_network_without_any_is_refused():
    assert require_unpooling(network()) == 3
    with pytest.raises(UsageError, match="UNet does not unpool, so it has no switches to replace"):
        require_unpooling(UNet(3, stages=((4,), (8,))))
