"""Stages that are computed again in the backward pass: the same bits for less memory."""

import pytest
import torch
from tiny_runs import config, state
from torch import nn

from segdeconv.errors import UsageError
from segdeconv.models import FCN, FPN, DeconvNet, DeepLabLargeFOV, FCNBasic, SegNet, SegNetBasic, UNet
from segdeconv.models.activation_checkpointing import checkpoint_activations
from segdeconv.train import train

NETWORKS = {
    "SegNet, dropout everywhere": lambda: SegNet(3, stages=((4, 4), (6, 6)), dropout_at="voc"),
    "SegNet after the ReLU, packed": lambda: SegNet(
        3, stages=((4,), (6,)), switch_source="post_relu", packed_switches=True
    ),
    "SegNetBasic": lambda: SegNetBasic(3, width=4, encoder_addition=True, dropout_at="central"),
    "FCNBasic": lambda: FCNBasic(3, width=4),
    "DeconvNet": lambda: DeconvNet(3, width=0.0625, fc_width=8, depth=11),
    "DeconvNet, tied": lambda: DeconvNet(3, width=0.0625, fc_width=8, depth=11, tied=True),
    "UNet": lambda: UNet(3, stages=((4,), (4,), (6,))),
    "FPN": lambda: FPN(3, stages=((4,), (4,), (6,)), num_levels=2, channels=16),
    "FCN": lambda: FCN(3, width=0.0625, fc_width=8, depth=11, norm=True),
    "DeepLab-LargeFOV": lambda: DeepLabLargeFOV(3, width=0.0625, fc_width=8, depth=11, norm=True),
}


def trained(name, *, recompute, frozen=False):
    """A network after two batches' gradients, and the bytes that the forward pass of the second one kept."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    if recompute:
        checkpoint_activations(network)
    for part in network.modules():
        if frozen and isinstance(part, nn.BatchNorm2d):
            part.eval()
    side = 225 if name.startswith("DeconvNet") else 36
    for _ in range(2):
        image = torch.randn(2, 3, side, side + 4)
        kept = {}
        network.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.update({id(t): t}) or t, lambda t: t):
            logits = network(image)
        kept = {tensor.data_ptr(): tensor.nbytes for tensor in kept.values()}
        logits.square().mean().backward()
    return network, sum(kept.values())


@pytest.mark.parametrize(("name", "frozen"), [*((name, False) for name in sorted(NETWORKS)), ("SegNetBasic", True)])
def test_gradients_and_running_statistics_are_the_same_bits_and_less_is_kept(name, frozen):
    plain, much = trained(name, recompute=False, frozen=frozen)
    again, little = trained(name, recompute=True, frozen=frozen)
    for (key, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), key
    for (key, one), other in zip(plain.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(one, other), key
        if key.endswith("num_batches_tracked"):
            assert one == (0 if frozen else 2)
    assert little < much


def test_each_stage_keeps_its_input_alone():
    """By hand, of two stages of 4 channels at 32x32 float32: nothing but what crosses between the stages."""
    network = SegNet(3, stages=((4, 4), (4, 4)))
    kept = {}
    checkpoint_activations(network)
    image = torch.randn(1, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        network(image)
    own = {parameter.data_ptr() for parameter in network.parameters()}
    maps = sorted(tensor.nbytes for place, tensor in kept.items() if place not in own)
    full, half, quarter = 4 * 4 * 32 * 32, 4 * 4 * 16 * 16, 4 * 4 * 8 * 8
    switches = [half // 4, quarter // 4]
    # The image, both pooled maps, what the two stages of the decoder give, and the switches.
    assert maps == sorted([image.nbytes, half, quarter, half, full, *switches])


def test_nothing_is_computed_again_without_gradients():
    network, _ = trained("SegNetBasic", recompute=True)
    calls = []
    network.encoder.stages[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        network(torch.randn(1, 3, 20, 20))
    assert len(calls) == 1


def test_a_run_that_computes_again_ends_with_the_same_weights(tmp_path, capsys):
    train(config(trainer__max_epochs=1), tmp_path / "plain")
    assert "stages computed again" not in capsys.readouterr().out
    train(config(trainer__max_epochs=1, trainer__activation_checkpointing=True), tmp_path / "again")
    assert "not compiled, activation checkpointing" in capsys.readouterr().out
    one, other = state(tmp_path / "plain"), state(tmp_path / "again")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_computing_again_and_compiling_exclude_each_other(tmp_path):
    with pytest.raises(
        UsageError, match=r"trainer\.compile=true and trainer\.activation_checkpointing=true: .* leave one"
    ):
        train(config(trainer__compile=True, trainer__activation_checkpointing=True), tmp_path)
