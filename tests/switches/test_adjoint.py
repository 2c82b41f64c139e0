"""Transposed convolution and unpooling as gradients and transposes of convolution and max-pooling."""

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from segdeconv.models.layers import ConvBlock, DeconvBlock
from segdeconv.switches.ops import max_pool, unpool

PAGE = Path(__file__).parents[2] / "docs" / "transposed-convolution.md"
SETTINGS = [
    (kernel, stride, padding, dilation)
    for kernel, stride, padding, dilation in itertools.product((1, 2, 3, 4, 7), (1, 2, 3), (0, 1, 3), (1, 2))
    if padding <= dilation * (kernel - 1)
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*size, **options):
    return torch.randn(*size, dtype=torch.float64, **options)


def remainder(side, kernel, stride, padding, dilation):
    """Return the number of rows that a convolution of this stride leaves over, which output_padding restores."""
    return (side + 2 * padding - dilation * (kernel - 1) - 1) % stride


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), SETTINGS)
def test_a_transposed_convolution_is_the_gradient_and_the_adjoint_of_the_convolution(kernel, stride, padding, dilation):
    for height, width in ((14, 17), (15, 16)):
        x, weight = randn(2, 3, height, width, requires_grad=True), randn(5, 3, kernel, kernel)
        convolved = F.conv2d(x, weight, stride=stride, padding=padding, dilation=dilation)
        y = randn(*convolved.shape)
        left_over = tuple(remainder(side, kernel, stride, padding, dilation) for side in (height, width))
        spread = F.conv_transpose2d(
            y, weight, stride=stride, padding=padding, dilation=dilation, output_padding=left_over
        )
        (gradient,) = torch.autograd.grad(convolved, x, y)
        assert spread.shape == x.shape
        torch.testing.assert_close(spread, gradient)
        torch.testing.assert_close((convolved * y).sum(), (x * spread).sum())


def test_the_blocks_of_encoder_and_decoder_are_adjoint():
    gather, spread = ConvBlock(3, 5, norm=False, activation=False).double(), DeconvBlock(5, 3, norm=False).double()
    with torch.no_grad():
        spread.deconv.weight.copy_(gather.conv.weight)
        gather.conv.bias.zero_()
        spread.deconv.bias.zero_()
    x, y = randn(2, 3, 8, 9), randn(2, 5, 8, 9)
    torch.testing.assert_close((gather(x) * y).sum(), (x * spread.deconv(y)).sum())


def by_definition(x, weight, bias, stride, padding, dilation):
    """Add the kernel of every value to the output, over all incoming maps."""
    channels, height, width = x.shape
    outputs, kernel = weight.shape[1:3]
    size = [stride * (side - 1) + dilation * (kernel - 1) + 1 for side in (height, width)]
    out = bias[:, None, None].repeat(1, *size)
    for d, c, i, j, row, column in itertools.product(*map(range, (outputs, channels, height, width, kernel, kernel))):
        out[d, stride * i + dilation * row, stride * j + dilation * column] += x[c, i, j] * weight[c, d, row, column]
    return out[:, padding : size[0] - padding, padding : size[1] - padding]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (4, 2, 1, 1), (3, 2, 2, 2)])
def test_a_transposed_convolution_adds_its_incoming_maps(kernel, stride, padding, dilation):
    x, weight, bias = randn(3, 4, 3), randn(3, 2, kernel, kernel), randn(2)
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    whole = F.conv_transpose2d(x[None], weight, bias, **settings)[0]
    torch.testing.assert_close(whole, by_definition(x, weight, bias, stride, padding, dilation))
    alone = [F.conv_transpose2d(x[None, c : c + 1], weight[c : c + 1], **settings)[0] for c in range(3)]
    torch.testing.assert_close(whole, sum(alone) + bias[:, None, None])


# Unpooling. The values are a permutation, so that every window has one maximum.


def distinct(*size):
    count = torch.Size(size).numel()
    return torch.randperm(count).to(torch.float64).view(size) - count // 2


@pytest.mark.parametrize("size", [(6, 8), (7, 8), (6, 9), (7, 9), (1, 1)])
def test_unpooling_and_pooling_are_each_others_gradients_through_the_same_switches(size):
    x = distinct(2, 3, *size).requires_grad_()
    features, switches, where = max_pool(x)
    g, h = randn(*features.shape), randn(*x.shape)
    (pooling_gradient,) = torch.autograd.grad(features, x, g)
    assert torch.equal(pooling_gradient, unpool(g, switches, where))
    y = randn(*features.shape, requires_grad=True)
    (unpooling_gradient,) = torch.autograd.grad(unpool(y, switches, where), y, h)
    for n, c, i, j in itertools.product(*map(range, features.shape)):
        row, column = divmod(int(switches[n, c, i, j]), 2)
        assert unpooling_gradient[n, c, i, j] == h[n, c, 2 * i + row, 2 * j + column]
    # For fixed switches the two are each other's transposes, and pooling undoes unpooling.
    torch.testing.assert_close((unpool(y, switches, where) * h).sum(), (y * unpooling_gradient).sum())
    assert torch.equal(unpool(features, switches, where)[pooling_gradient != 0], x[pooling_gradient != 0])


@pytest.mark.parametrize("size", [(6, 8), (7, 9)])
def test_unpooling_puts_zeros_where_no_maximum_was(size):
    x = distinct(2, 3, *size)
    features, switches, where = max_pool(x)
    restored = unpool(features + 1000, switches, where)
    for n, c in itertools.product(range(2), range(3)):
        for i, j in itertools.product(range(0, size[0], 2), range(0, size[1], 2)):
            window = x[n, c, i : i + 2, j : j + 2]
            expected = torch.where(window == window.max(), window + 1000, 0.0)
            assert torch.equal(restored[n, c, i : i + 2, j : j + 2], expected)


# The page that explains this.


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_every_block_of_the_page_runs():
    assert len(blocks()) == PAGE.read_text().count("```") // 2 >= 8
    exec(compile("\n".join(blocks()), str(PAGE), "exec"), {})


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("output_padding=(1, 0))  # the same", "output_padding=(1, 0)) * 2  # the same"),
        ("+= x[c, i, j]", "= x[c, i, j]"),
        ("[[[[0, 7, 0]", "[[[[1, 7, 0]"),
        ("torch.equal(gradient, unpool(g,", "torch.equal(gradient, unpool(2 * g,"),
    ],
)
def test_the_code_blocks_check_the_claims_of_the_page(original, changed):
    text = "\n".join(blocks())
    assert text.count(original) == 1
    with pytest.raises(AssertionError):
        exec(compile(text.replace(original, changed), str(PAGE), "exec"), {})
