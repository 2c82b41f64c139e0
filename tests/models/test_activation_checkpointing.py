"""Activation checkpointing: bit-identical results with less memory."""

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
    "SegNet with soft switches": lambda: SegNet(3, stages=((4, 4), (6, 6)), switch_source="soft"),
    "SegNet with concatenation": lambda: SegNet(3, stages=((4, 4), (6, 6)), encoder_concatenation=True),
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
    """Return a network after two batches, and the bytes that the second forward pass saved."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    if recompute:
        checkpoint_activations(network)
    for module in network.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()
    side = 225 if name.startswith("DeconvNet") else 36
    for _ in range(2):
        image = torch.randn(2, 3, side, side + 4)
        saved = {}
        network.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.update({id(t): t}) or t, lambda t: t
        ):
            logits = network(image)
        saved = {tensor.data_ptr(): tensor.nbytes for tensor in saved.values()}
        logits.square().mean().backward()
    return network, sum(saved.values())


@pytest.mark.parametrize(("name", "frozen"), [*((name, False) for name in sorted(NETWORKS)), ("SegNetBasic", True)])
def test_gradients_and_running_statistics_are_bit_identical_and_less_is_saved(name, frozen):
    plain, plain_bytes = trained(name, recompute=False, frozen=frozen)
    recomputed, recomputed_bytes = trained(name, recompute=True, frozen=frozen)
    for (key, parameter), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), key
    for (key, buffer), other in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(buffer, other), key
        if key.endswith("num_batches_tracked"):
            assert buffer == (0 if frozen else 2)
    assert recomputed_bytes < plain_bytes


def test_each_stage_saves_only_its_inputs():
    """For two stages of 4 channels at 32x32 float32, counted by hand."""
    network = SegNet(3, stages=((4, 4), (4, 4)))
    saved = {}
    checkpoint_activations(network)
    image = torch.randn(1, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        network(image)
    own = {parameter.data_ptr() for parameter in network.parameters()}
    # torch 2.11 also saves an empty tensor of its own.
    maps = sorted(tensor.nbytes for pointer, tensor in saved.items() if pointer not in own and tensor.nbytes)
    full, half, quarter = 4 * 4 * 32 * 32, 4 * 4 * 16 * 16, 4 * 4 * 8 * 8
    switches = [half // 4, quarter // 4]
    # The image, both pooled maps, the outputs of the two stages of the decoder, and the switches.
    assert maps == sorted([image.nbytes, half, quarter, half, full, *switches])


def test_nothing_is_recomputed_without_gradients():
    network, _ = trained("SegNetBasic", recompute=True)
    calls = []
    network.encoder.stages[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        network(torch.randn(1, 3, 20, 20))
    assert len(calls) == 1


def test_a_run_with_activation_checkpointing_ends_with_the_same_weights(tmp_path, capsys):
    train(config(trainer__max_epochs=1), tmp_path / "plain")
    assert "activation checkpointing" not in capsys.readouterr().out
    train(config(trainer__max_epochs=1, trainer__activation_checkpointing=True), tmp_path / "again")
    assert "not compiled, activation checkpointing" in capsys.readouterr().out
    plain, recomputed = state(tmp_path / "plain"), state(tmp_path / "again")
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_activation_checkpointing_and_compiling_exclude_each_other(tmp_path):
    with pytest.raises(
        UsageError, match=r"trainer\.compile=true and trainer\.activation_checkpointing=true: .* set only one"
    ):
        train(config(trainer__compile=True, trainer__activation_checkpointing=True), tmp_path)
