"""Changes of a network's logits in the weights of the layers that compute them: a temperature, and class offsets.

The last layer of a segmentation network is linear, and what follows it (sums, means and interpolation of its maps) is
linear too, so that its weights and biases divided by T give the logits divided by T (temperature scaling, Guo et al.
2017, section 4.2, https://arxiv.org/abs/1706.04599), and a number added to its bias is added to the logits. The result
is an ordinary network: everything that runs or exports one keeps the change.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from segdeconv.errors import UsageError
from segdeconv.models.base import SegmentationModel


@torch.no_grad()
def divide_logits(model: SegmentationModel, temperature: float, *, size: tuple[int, int]) -> None:
    """Divide the logits of a network by a temperature, in place, up to the rounding of the changed weights.

    Args:
        model: The network, in evaluation mode.
        temperature: The temperature, above 0.
        size: (H, W) of an image that the network takes, with which it is checked.

    Raises:
        UsageError: The logits are not linear in the weights of any layers.
    """
    for parameter in logit_parameters(model, size=size):
        parameter.copy_(parameter.double() / temperature)


@torch.no_grad()
def shift_logits(model: SegmentationModel, offsets: Tensor, *, size: tuple[int, int]) -> None:
    """Add a number to the logits of each class, in place.

    Args:
        model: The network, in evaluation mode.
        offsets: (C,), one per class.
        size: (H, W) of an image that the network takes, with which it is checked.

    Raises:
        UsageError: No bias shifts all logits of a class by the same amount.
    """
    bias, factor = logit_bias(model, size=size)
    bias.copy_(bias.double() + offsets.to(bias.device).double() / factor)


@torch.no_grad()
def logit_bias(model: SegmentationModel, *, size: tuple[int, int]) -> tuple[nn.Parameter, float]:
    """Return the bias that shifts all logits of a class by the same amount, and that amount per unit of the bias.

    The last such bias is found by trial, on a random image in float64. The amount is not 1 where a head is used more
    than once.

    Args:
        model: The network, in evaluation mode.
        size: (H, W) of an image that the network takes.

    Raises:
        UsageError: There is none.
    """
    trial = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    device = next(trial.parameters()).device
    image = torch.randn(1, model.in_channels, *size, generator=generator, dtype=torch.double).to(device)
    steps = 1 + torch.rand(model.num_classes, generator=generator, dtype=torch.double).to(device)
    logits = trial(image)
    tried = dict(trial.named_parameters())
    for name, bias in reversed(list(model.named_parameters())):
        if not name.endswith("bias") or bias.shape != steps.shape:
            continue
        tried[name].add_(steps)
        shifts = (trial(image) - logits) / steps[:, None, None]
        tried[name].sub_(steps)
        factor = float(shifts.mean())
        if abs(factor) > 1e-3 and bool(((shifts - factor).abs() < 1e-6 * abs(factor)).all()):
            return bias, factor
    raise UsageError(
        f"no bias of {type(model).__name__} shifts all logits of a class by the same amount, so that it can hold no "
        "class offsets - give the network a last convolution with one map per class and a bias"
    )


@torch.no_grad()
def logit_parameters(model: SegmentationModel, *, size: tuple[int, int]) -> list[nn.Parameter]:
    """Return the parameters which, multiplied by any factor, multiply the logits of a network by that factor.

    Candidates are the network's heads, every layer that computes a map per class, the last one first, and all of these
    layers together. One is accepted if it halves the logits of a random image to the last bit when it is halved, which
    no rounding prevents.

    Args:
        model: The network, in evaluation mode.
        size: (H, W) of an image that the network takes.

    Raises:
        UsageError: No candidate does.
    """
    generator = torch.Generator().manual_seed(0)
    weight = next(model.parameters())
    image = torch.randn(1, model.in_channels, *size, generator=generator).to(weight)
    logits = model(image)
    for parameters in _candidates(model):
        try:
            _multiply(parameters, 0.5)
            if torch.equal(model(image), logits / 2):
                return parameters
        finally:
            _multiply(parameters, 2)
    raise UsageError(
        f"the logits of {type(model).__name__} are not computed by a linear last layer, into which a temperature could "
        "be folded - give the network a last convolution with one map per class"
    )


def _candidates(model: SegmentationModel) -> Iterator[list[nn.Parameter]]:
    heads = [parameter for name, parameter in model.named_parameters() if model.class_dimensions(name) == 1]
    layers = [
        list(layer.parameters(recurse=False))
        for layer in reversed(list(model.modules()))
        if _num_outputs(layer) == model.num_classes
    ]
    together = list({id(parameter): parameter for layer in layers for parameter in layer}.values())
    yield from filter(None, [heads, *layers, together])


def _num_outputs(layer: nn.Module) -> int | None:
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return layer.out_channels
    return layer.out_features if isinstance(layer, nn.Linear) else None


def _multiply(parameters: Sequence[nn.Parameter], factor: float) -> None:
    for parameter in parameters:
        parameter.mul_(factor)
