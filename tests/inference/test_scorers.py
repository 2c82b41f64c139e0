"""Scorers that wrap other scorers, compared with direct computation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segdeconv.errors import UsageError
from segdeconv.inference.network import prepare_for_inference
from segdeconv.inference.scorers import labels, with_flip, with_oom_fallback, with_padding
from segdeconv.models import DeconvNet, SegNet, SegNetBasic
from segdeconv.models.layers import ConvBlock, DeconvBlock, fold_norms
from segdeconv.system.devices import autocast, best_device, resolve_precision


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def recording_scorer(sizes):
    """A scorer that records the sizes it is called with; its scores are the image's channels."""

    def score(image):
        sizes.append(tuple(image.shape[-2:]))
        return image

    return score


@pytest.mark.parametrize(
    ("size", "called_with"),
    [((1, 1), (32, 32)), ((20, 50), (32, 50)), ((50, 20), (50, 32)), ((32, 32), (32, 32)), ((37, 41), (37, 41))],
)
def test_padding_is_added_below_and_right_up_to_the_minimum_and_cropped_again(size, called_with):
    sizes = []
    image = torch.randn(2, 3, *size)
    assert torch.equal(with_padding(recording_scorer(sizes), 32)(image), image)
    assert sizes == [called_with]


def test_a_padded_image_is_surrounded_by_zeros():
    model = SegNet(3, width=0.0625).eval()
    image = torch.randn(1, 3, 9, 40)
    by_hand = torch.zeros(1, 3, 32, 40)
    by_hand[:, :, :9] = image
    with torch.no_grad():
        assert torch.equal(with_padding(model, model.minimum_size)(image), model(by_hand)[:, :, :9])


def test_with_flip_is_the_mean_softmax_of_both_views():
    model = SegNet(3, width=0.0625).eval()
    image = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        result = with_flip(model)(image)
        mirror = torch.stack([image[..., 46 - column] for column in range(47)], dim=-1)
        mirrored = model(mirror).softmax(1)
        back = torch.stack([mirrored[..., 46 - column] for column in range(47)], dim=-1)
        expected = (model(image).softmax(1) + back) / 2
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(result.sum(dim=1), torch.ones(2, 33, 47))


def test_with_flip_gives_the_same_result_for_the_mirror_image():
    model = SegNet(3, width=0.0625).eval()
    image = torch.randn(1, 3, 32, 34)
    with torch.no_grad():
        torch.testing.assert_close(with_flip(model)(image.flip(-1)).flip(-1), with_flip(model)(image))


def test_labels_are_the_largest_channel():
    scores = torch.tensor([[0.1, 3.0, -1.0], [2.0, 1.0, -2.0]]).T.reshape(1, 3, 1, 2)
    result = labels(scores, (1, 2))
    assert result.tolist() == [[[1, 0]]]
    assert result.dtype == torch.uint8


def test_labels_resizes_scores_and_not_class_indices():
    scores = torch.randn(1, 4, 6, 8)
    direct = F.interpolate(scores, size=(13, 17), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(labels(scores, (13, 17)).long(), direct)
    # Halfway between class 0 (4, 0, 3) and class 1 (0, 4, 3) the third class is largest.
    between = torch.tensor([[[[4.0, 0.0]], [[0.0, 4.0]], [[3.0, 3.0]]]])
    assert 2 in labels(between, (1, 6))
    assert 2 not in labels(between, (1, 2))


def test_labels_resize_bfloat16_scores_in_float32():
    scores = torch.randn(1, 4, 6, 8).bfloat16()
    direct = F.interpolate(scores.float(), size=(13, 17), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(labels(scores, (13, 17)).long(), direct)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)]
)
def test_autocast_runs_convolutions_in_the_precision(precision, dtype):
    with autocast(precision, torch.device("cpu")):
        assert torch.nn.Conv2d(3, 4, 3)(torch.randn(1, 3, 8, 8)).dtype == dtype


def test_a_requested_precision_is_used(monkeypatch):
    monkeypatch.setattr("segdeconv.system.devices.fast_precision", lambda _: "bf16-mixed")
    assert resolve_precision("16-mixed", trained="bf16-mixed") == "16-mixed"
    assert resolve_precision("auto") == "bf16-mixed"
    assert resolve_precision("auto", trained="bf16-mixed") == "bf16-mixed"
    assert resolve_precision("auto", trained="32-true") == "32-true"


def test_a_precision_that_is_slow_here_is_not_chosen(monkeypatch):
    monkeypatch.setattr("segdeconv.system.devices.fast_precision", lambda _: "32-true")
    assert resolve_precision("auto", trained="bf16-mixed") == "32-true"


@pytest.mark.skipif(best_device().type != "cpu", reason="there is a GPU")
@pytest.mark.parametrize(("fast", "warnings"), [("32-true", 1), ("bf16-mixed", 0)])
def test_a_warning_says_that_bfloat16_is_emulated(fast, warnings, monkeypatch, capsys):
    monkeypatch.setattr("segdeconv.system.devices.fast_precision", lambda _: fast)
    monkeypatch.setattr("segdeconv.errors._warned", set())
    assert resolve_precision("bf16-mixed") == "bf16-mixed"
    assert capsys.readouterr().err.count("no instructions for bfloat16") == warnings


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision=fp16 is unknown - use auto, 32-true, bf16-mixed, 16-mixed"):
        resolve_precision("fp16")


# Folding.


def trained_norms(network):
    """Give every batch norm statistics and parameters that differ from the initial ones."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.3, 3)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
    return network.eval()


@pytest.mark.parametrize(
    "block",
    [
        lambda: ConvBlock(3, 5, kernel=7),
        lambda: ConvBlock(4, 6, bias=False, activation=False),
        lambda: ConvBlock(4, 4, groups=4),
        lambda: DeconvBlock(3, 5),
        lambda: DeconvBlock(6, 4, kernel=7, padding=0),
    ],
)
def test_a_folded_block_is_a_single_layer_and_the_same_function(block):
    block = trained_norms(block())
    layer = block.conv if isinstance(block, ConvBlock) else block.deconv
    x = torch.randn(2, layer.in_channels, 9, 8)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    folded = fold_norms(block)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), block(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize(
    "network",
    [
        lambda: SegNet(3, width=0.0625),
        lambda: SegNet(3, width=0.0625, norm=False),
        lambda: SegNetBasic(3, width=4),
        lambda: DeconvNet(3, width=0.0625, fc_width=8),
        lambda: DeconvNet(3, width=0.0625, fc_width=8, tied=True),
    ],
)
def test_a_folded_network_is_the_same_function(network):
    # In float64, where rounding changes no switch.
    network = trained_norms(network().double())
    image = torch.randn(1, 3, network.minimum_size, network.minimum_size + 9, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fold_norms(network)(image), network(image), rtol=1e-8, atol=1e-8)


def test_out_of_memory_halves_the_batch():
    sizes = []

    def scorer(image):
        sizes.append(len(image))
        if len(image) > 2:
            torch.empty(2**50)  # fails as on a machine without enough memory
        return image * 2

    images = torch.arange(5.0).reshape(5, 1, 1, 1)
    assert torch.equal(with_oom_fallback(scorer)(images), images * 2)
    assert sizes[:2] == [5, 3]
    assert max(sizes[2:]) <= 3


def test_a_single_image_that_is_too_large_is_an_error_message():
    def scorer(image):
        raise torch.OutOfMemoryError("CUDA out of memory")

    image = torch.full((1, 1, 300, 200), 3.0)
    with pytest.raises(UsageError, match=r"memory ran out on one image of 300x200 - set a smaller dataset.size"):
        with_oom_fallback(scorer)(image)
    with pytest.raises(RuntimeError, match="another fault"):
        with_oom_fallback(_fails)(image)


def _fails(image):
    raise RuntimeError("another fault")


def norms_in_use(network):
    """Give every batch norm running statistics as after training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_network_prepared_for_inference_is_a_faster_copy_with_the_same_scores(precision):
    network, device = norms_in_use(SegNetBasic(5, width=8)), torch.device("cpu")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    copy = prepare_for_inference(network, device, precision)
    assert not [module for module in copy.modules() if isinstance(module, nn.BatchNorm2d)]
    computed = {module.weight.dtype for module in copy.modules() if isinstance(module, nn.Conv2d)}
    assert computed == {torch.float32 if precision == "32-true" else torch.bfloat16}
    image = torch.randn(2, 3, 45, 60)
    with torch.no_grad(), autocast(precision, device):
        folded_scores, unfolded = copy(image).float(), network(image).float()
    with torch.no_grad():
        exact = network.double()(image.double())
    network.float()
    # As close to the exact scores as the original network.
    assert (folded_scores - exact).abs().mean() < 1.2 * (unfolded - exact).abs().mean() + 1e-6
    assert (folded_scores - exact).abs().mean() < (1e-5 if precision == "32-true" else 0.1) * exact.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
