"""VGG encoders and their pretrained weights.

Simonyan & Zisserman 2015, table 1, https://arxiv.org/abs/1409.1556.
"""

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from segdeconv.errors import CheckpointError, UsageError
from segdeconv.models.encoders import Encoder, Stages, SwitchSource
from segdeconv.models.layers import ConvBlock

# Output channels of every convolution, stage by stage; each stage ends with a 2x2 max-pool.
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
    """Build the convolutional part of VGG.

    Args:
        depth: Number of layers with weights of the classification network. The three fully connected ones are left
            out, so VGG16 has 13 convolutions.
        in_channels: Number of channels of the images.
        norm: Use batch norm.
        width: Factor on every number of channels; other widths than 1 have no pretrained weights.
        pretrained: `none`; `imagenet` (torchvision's weights with or without batch norm, as in this encoder, downloaded
            and checked by hash); `imagenet_plain` (the weights of the VGG without batch norm, which an encoder with
            batch norm accepts too: new norm layers after trained convolutions, as SegNet and DeconvNet started); or the
            path of a torchvision VGG file.
        stages: Output channels of every convolution, stage by stage, instead of VGG's; depth, width and pretrained are
            then ignored.
        dilations: See `Encoder`.
        switch_source: See `Encoder`.
        packed_switches: See `Encoder`.

    Raises:
        UsageError: The pretrained weights do not exist for this width, or cannot be found or downloaded.
        CheckpointError: The pretrained weights cannot be read or do not fit the encoder.
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
    """Return torchvision's state dict for `pretrained`, including the classifier, or None for `none`.

    Arguments and errors are those of `vgg_encoder`.
    """
    if pretrained == "none":
        return None
    if width != 1.0:
        raise UsageError(
            f"model.pretrained={pretrained} with model.width={width}: pretrained VGG weights exist only for full width "
            "- use model.width=1.0 or model.pretrained=none"
        )
    if pretrained in ("imagenet", "imagenet_plain"):
        return _download(f"VGG{depth}_BN_Weights" if norm and pretrained == "imagenet" else f"VGG{depth}_Weights")
    return _read(Path(os.path.expanduser(pretrained)))


def vgg_depth(state: Mapping[str, Tensor], *, source: str) -> Literal[11, 13, 16, 19]:
    """Return the depth of the VGG that a state dict of torchvision belongs to, by its number of convolutions.

    Args:
        state: torchvision's state dict.
        source: Name of the weights, for messages.

    Raises:
        CheckpointError: It is of no VGG.
    """
    count = sum(key.startswith("features.") and value.ndim == 4 for key, value in state.items())
    for depth in (11, 13, 16, 19):
        if count == sum(map(len, VGG_STAGES[depth])):
            return depth
    raise CheckpointError(f"{source} is not a torchvision VGG: it has {count} convolutions named features.*")


def load_vgg(encoder: Encoder, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy torchvision VGG weights into an encoder, layer by layer in order.

    Weights without batch norm can be loaded into an encoder with batch norm (its norms keep their initial values), and
    weights for RGB images into an encoder for any number of channels (`adapt_channels`).

    Args:
        encoder: Changed in place.
        state: torchvision's state dict. Among its `features.*` entries, 4-D weights are convolutions and entries with
            running statistics are batch norms.
        source: Name of the weights, for messages.

    Raises:
        CheckpointError: The layers do not match one to one.
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
            f"{source} is not a torchvision VGG of this depth: it has {len(shapes)} convolutions and the encoder has "
            f"{len(expected)}, or their shapes differ - choose the file or model.depth to match"
        )
    has_norm = isinstance(blocks[0].norm, nn.BatchNorm2d)
    if norms and not has_norm:
        raise CheckpointError(
            f"{source} was trained with batch norm, but the encoder has none - use model.norm=true or VGG weights "
            "without batch norm"
        )
    for position, block in enumerate(blocks):
        block.conv.load_state_dict(convs[position])
        if norms:
            block.norm.load_state_dict(norms[position])


def load_fully_connected(fc6: nn.Conv2d, fc7: nn.Conv2d, state: Mapping[str, Tensor]) -> None:
    """Copy VGG's fully connected layers into equivalent convolutions, each if the number of weights is the same.

    torchvision flattens C, H, W in this order.

    Args:
        fc6: Convolution that takes the weights of the first fully connected layer.
        fc7: Convolution that takes the weights of the second fully connected layer.
        state: torchvision's state dict.
    """
    for convolution, name in ((fc6, "classifier.0"), (fc7, "classifier.3")):
        weight = state.get(f"{name}.weight")
        if weight is not None and tuple(weight.shape) == tuple(convolution.weight.flatten(1).shape):
            convolution.load_state_dict({"weight": weight.view_as(convolution.weight), "bias": state[f"{name}.bias"]})


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt the weight of a first convolution to images with another number of channels.

    New and old channels are matched in turn: the new channel k mod `channels` takes the weight of the old channel
    k mod C, and an old channel with several new ones is divided evenly among them. This preserves the sum over
    channels: a grey image copied into every new channel gives the same output as copied into every old one. RGB
    becomes, for 1 channel, R+G+B; for 2, R+B and G; for 4, R/2, G, B and R/2; for 6, R/2, G/2, B/2 twice.

    Args:
        weight: (out, C, kernel, kernel), C = 3 for RGB.
        channels: Number of channels of the images.

    Returns:
        (out, channels, kernel, kernel).

    Examples:
        >>> adapt_channels(torch.tensor([6., 2., 4.]).view(1, 3, 1, 1), 4).flatten().tolist()
        [3.0, 2.0, 4.0, 3.0]
    """
    before = weight.shape[1]
    if channels == before:
        return weight
    fractions = weight.new_zeros(channels, before)
    for turn in range(max(channels, before)):
        fractions[turn % channels, turn % before] = 1
    return torch.einsum("nc,ocij->onij", fractions / fractions.sum(dim=0), weight)


def _download(name: str) -> Mapping[str, Tensor]:
    from torchvision.models import get_weight  # imported late, because torchvision takes 1.7 s to import

    weights = get_weight(f"{name}.IMAGENET1K_V1")
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or another hash
        raise UsageError(
            f"could not download {weights.url}: {error} - download that file elsewhere and give its path as "
            "model.pretrained=PATH, or train from scratch with model.pretrained=none"
        ) from error


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UsageError(
            f"model.pretrained={path} is not a file - use none, imagenet, imagenet_plain or the path of a "
            "torchvision VGG file"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or foreign file
        raise CheckpointError(
            f"{path} is not a weights file that can be read safely ({type(error).__name__}) - use a torchvision VGG "
            "state dict"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a state dict of tensors - use a torchvision VGG state dict")
    return state
