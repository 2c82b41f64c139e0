"""VGG as a table of stages, and its trained weights.

Simonyan & Zisserman 2015, table 1, https://arxiv.org/abs/1409.1556.
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from segdeconv.errors import CheckpointError, UsageError
from segdeconv.models.encoders import Encoder, Stages, SwitchSource
from segdeconv.models.layers import ConvBlock

# Output channels of every convolution, stage by stage; a 2x2 max-pool ends each stage.
VGG_STAGES: dict[int, Stages] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    19: ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512)),
}


def vgg_encoder(
    depth: Literal[11, 13, 16, 19],
    *,
    in_channels: int = 3,
    norm: bool = True,
    width: float = 1.0,
    pretrained: str = "none",
    stages: Stages | None = None,
    dilations: tuple[int, ...] | None = None,
    switch_source: SwitchSource = "pre_relu",
    packed_switches: bool = False,
) -> Encoder:
    """The convolutional part of VGG.

    depth: weight layers of the classification network: 13 of VGG16's 16 are convolutions and stay.
    width: factor on every channel count; below 1 a slim network that has no ImageNet weights.
    pretrained: `none`; `imagenet` (torchvision's weights of the same form, downloaded and checked by hash);
        `imagenet_plain` (the weights of the VGG without batch norm, also into an encoder with it: new norm layers
        after trained convolutions, as SegNet and DeconvNet started); or the path of a torchvision VGG file.
    stages: a table of your own in place of VGG's, the output channels of every convolution, stage by stage; depth,
        width and pretrained then say nothing.
    dilations, switch_source, packed_switches: see `Encoder`.
    """
    if stages:
        table, pretrained = tuple(map(tuple, stages)), "none"
    else:
        table = tuple(tuple(max(1, round(channels * width)) for channels in stage) for stage in VGG_STAGES[depth])
    encoder = Encoder(
        table, in_channels=in_channels, norm=norm, dilations=dilations, switch_source=switch_source,
        packed_switches=packed_switches,
    )  # fmt: skip
    state = vgg_weights(pretrained, depth=depth, norm=norm, width=width)
    if state is not None:
        load_vgg(encoder, state, source=pretrained)
    return encoder


def vgg_weights(
    pretrained: str, *, depth: Literal[11, 13, 16, 19], norm: bool, width: float = 1.0
) -> Mapping[str, Tensor] | None:
    """torchvision's state dict that `pretrained` asks for, classifier and all; None for `none`. See `vgg_encoder`."""
    if pretrained == "none":
        return None
    if width != 1.0:
        raise UsageError(
            f"model.pretrained={pretrained} with model.width={width}: trained VGG weights have full width "
            "- use model.width=1.0 or model.pretrained=none"
        )
    if pretrained in ("imagenet", "imagenet_plain"):
        return _download(f"VGG{depth}_BN_Weights" if norm and pretrained == "imagenet" else f"VGG{depth}_Weights")
    return _read(Path(pretrained))


def load_vgg(encoder: Encoder, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy torchvision VGG weights into an encoder, by order of the layers.

    state: torchvision's state dict; of its `features.*` entries, 4-D weights are convolutions and entries with
        running statistics batch norms. Weights without batch norm load into an encoder with it (its norms stay new),
        weights of RGB images into one for any number of channels (`adapt_channels`).
    Raises CheckpointError if the layers do not match one to one.
    """
    layers: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "features":
            index, _, name = rest.partition(".")
            layers.setdefault(index, {})[name] = value
    convs = [layer for layer in layers.values() if layer.get("weight", torch.empty(0)).ndim == 4]
    norms = [layer for layer in layers.values() if "running_mean" in layer]
    blocks = [block for block in encoder.modules() if isinstance(block, ConvBlock)]
    if convs:
        convs[0]["weight"] = adapt_channels(convs[0]["weight"], blocks[0].conv.in_channels)
    shapes = [tuple(layer["weight"].shape) for layer in convs]
    expected = [tuple(block.conv.weight.shape) for block in blocks]
    if shapes != expected:
        raise CheckpointError(
            f"{source} holds {len(shapes)} convolutions and the encoder has {len(expected)}, or their shapes differ: "
            "it is not a torchvision VGG of this depth - choose the file or model.depth to match"
        )
    has_norm = isinstance(blocks[0].norm, nn.BatchNorm2d)
    if norms and not has_norm:
        raise CheckpointError(
            f"{source} was trained with batch norm and the encoder has none - use model.norm=true or plain VGG weights"
        )
    for position, block in enumerate(blocks):
        block.conv.load_state_dict(convs[position])
        if norms:
            block.norm.load_state_dict(norms[position])


def load_fully_connected(fc6: nn.Conv2d, fc7: nn.Conv2d, state: Mapping[str, Tensor]) -> None:
    """Copy VGG's fully connected layers into the convolutions that they are, each if the number of weights is the same.

    torchvision flattens C, H, W in this order.
    """
    for convolution, name in ((fc6, "classifier.0"), (fc7, "classifier.3")):
        weight = state.get(f"{name}.weight")
        if weight is not None and tuple(weight.shape) == tuple(convolution.weight.flatten(1).shape):
            convolution.load_state_dict({"weight": weight.view_as(convolution.weight), "bias": state[f"{name}.bias"]})


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """The weight of a first convolution, remade for images of another number of channels.

    weight: (out, C, kernel, kernel), C = 3 for RGB. Returns (out, channels, kernel, kernel).
    New and old channels are dealt out in turn, the new k mod `channels` standing in for the old k mod C, and an old
    channel with several stand-ins is shared out evenly. So the sum over channels stays: a grey image copied into
    every new channel gives what it gave copied into every old one. RGB becomes, for 1 channel, R+G+B; for 2, R+B and
    G; for 4, R/2, G, B and R/2; for 6, R/2, G/2, B/2 twice.

    >>> adapt_channels(torch.tensor([6., 2., 4.]).view(1, 3, 1, 1), 4).flatten().tolist()
    [3.0, 2.0, 4.0, 3.0]
    """
    before = weight.shape[1]
    if channels == before:
        return weight
    share = weight.new_zeros(channels, before)
    for turn in range(max(channels, before)):
        share[turn % channels, turn % before] = 1
    return torch.einsum("nc,ocij->onij", share / share.sum(dim=0), weight)


def _download(name: str) -> Mapping[str, Tensor]:
    from torchvision.models import get_weight  # late: torchvision takes 1.7 s to import

    weights = get_weight(f"{name}.IMAGENET1K_V1")
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a hash that differs
        raise UsageError(
            f"could not download {weights.url}: {error} - fetch that file elsewhere and give its path as "
            "model.pretrained=PATH, or train from scratch with model.pretrained=none"
        ) from error


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UsageError(
            f"model.pretrained={path} is not a file; it takes none, imagenet, imagenet_plain or the path of a "
            "torchvision VGG file"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or foreign file
        raise CheckpointError(
            f"{path} is not a weights file that can be read safely ({type(error).__name__}) - give a torchvision VGG "
            "state dict"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors - give a torchvision VGG state dict")
    return state
