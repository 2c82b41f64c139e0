"""Construction of networks: by name, or from a `model` node, segdeconv's own or those of other libraries."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from segdeconv.config import TARGET, build, check, choice, list_groups, locate
from segdeconv.errors import UsageError
from segdeconv.models.adapter import adapted
from segdeconv.models.base import CHANNELS, CLASSES, SegmentationModel, check_model, is_own
from segdeconv.system import CONFIGS

# Arguments of other libraries that ask for pretrained weights, which are downloaded; without a value there are none.
PRETRAINED = ("weights", "weights_backbone", "encoder_weights")


def list_models() -> list[str]:
    """Return the names of the networks, those of the files in configs/model.

    Examples:
        >>> list_models()[:3]
        ['bayesian_segnet', 'bayesian_segnet_basic', 'bilinear_interpolation']
    """
    return list_groups(CONFIGS)["model"]


def create_model(name: str, num_classes: int, *, in_channels: int = 3, **arguments: Any) -> SegmentationModel:
    """Create a network by its name, as `model=NAME` does on the command line.

    Examples:
        >>> create_model("unet", num_classes=5, width=0.25).num_classes
        5

    Args:
        name: One of `list_models`.
        num_classes: Number of output channels.
        in_channels: Number of channels of the images, 3 for RGB.
        **arguments: Further arguments of the network's constructor.

    Returns:
        The network with new weights, unless `pretrained` asks for others.

    Raises:
        UsageError: The name or an argument is unknown, or an argument is invalid.
    """
    sizes = check({"num_classes": num_classes, "in_channels": in_channels}, "", [SegmentationModel])
    return build_model(check_model({**choice("model", name), **arguments}), **sizes)


def build_model(
    node: Mapping[str, Any], num_classes: int, in_channels: int, *, fresh: bool = False
) -> SegmentationModel:
    """Build the network of a checked `model` node.

    Args:
        node: Checked by `check_model`.
        num_classes: Number of classes of the data set.
        in_channels: Number of channels of the images.
        fresh: Skip the pretrained weights that the node asks for, because others are loaded afterwards.

    Returns:
        The network; one of another library in an `adapter.Adapter`.

    Raises:
        UsageError: The network does not support the number of channels, refuses its arguments, or is none.
    """
    target = locate(node, "model")
    parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = dict(node)
    if fresh and "pretrained" in node:
        arguments["pretrained"] = False if isinstance(node["pretrained"], bool) else "none"
    if not is_own(target):
        arguments |= {name: None for name in PRETRAINED if name in parameters and (fresh or name not in node)}
    supplied = {next((name for name in CLASSES if name in parameters), CLASSES[0]): num_classes}
    channels = next((name for name in CHANNELS if name in parameters), None)
    if channels is None and takes_any and str(node[TARGET]).startswith("timm."):
        channels = "in_chans"
    if channels is not None:
        supplied[channels] = in_channels
    elif in_channels != 3:
        raise UsageError(
            f"{node[TARGET]} takes images with 3 channels, but the images have {in_channels} - add an argument "
            "in_channels to its constructor, or choose another model"
        )
    network = build(arguments, "model", **supplied)
    if not isinstance(network, nn.Module) or not any(True for _ in network.parameters()):
        what = "has no parameters to train" if isinstance(network, nn.Module) else f"is a {type(network).__name__}"
        raise UsageError(f"model ({node[TARGET]}) {what} - name a network, a torch.nn.Module")
    return adapted(network, num_classes, in_channels)
