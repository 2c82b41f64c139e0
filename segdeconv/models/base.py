"""Base class of segmentation networks, and the `model` node of a config."""

import functools
import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segdeconv.config import TARGET, build, check, locate, public_name
from segdeconv.errors import UsageError
from segdeconv.system.plain_data import PlainDataError, check_plain


class SegmentationModel(nn.Module, ABC):
    """Network that maps images to logits of the same height and width.

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images, 3 for RGB.

    Attributes:
        heads: Names of the modules whose first dimension is the classes, which are replaced for other classes.
        square_heads: Names of the modules whose first two dimensions are the classes.
        minimum_size: Smallest side in pixels that the network accepts; inference pads smaller images to it.
    """

    _arguments: dict[str, Any] | None = None  # of the constructor, if they are plain data
    heads: tuple[str, ...] = ("classifier",)
    square_heads: tuple[str, ...] = ()
    minimum_size: int = 32

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "__init__" in vars(cls):
            cls.__init__ = _recorded(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, num_classes: int, *, in_channels: int = 3) -> None:
        super().__init__()
        self.num_classes, self.in_channels = num_classes, in_channels

    @property
    def node(self) -> dict[str, Any] | None:
        """The `model` node of a config that describes the network: its class and the arguments of its constructor.

        The numbers of classes and channels, which are those of the data, are left out. None if an argument is not plain
        data, or the class cannot be imported.
        """
        target = public_name(type(self))
        if target is None or self._arguments is None:
            return None
        own = {name: value for name, value in self._arguments.items() if name not in ("num_classes", "in_channels")}
        return check_model({TARGET: target, **own})

    def class_dimensions(self, name: str) -> int:
        """Return the number of leading dimensions of the named parameter that are classes, 0 outside the heads."""
        parts = set(name.split("."))
        return 2 if parts & set(self.square_heads) else int(bool(parts & set(self.heads)))

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Compute logits, (N, num_classes, H, W), of normalised images, (N, in_channels, H, W)."""

    def check_input(self, image: Tensor) -> None:
        """Raise UsageError if the network cannot take the images, (N, in_channels, H, W).

        A separate method, so that training can call it outside of compiled code, in which no message can be formatted.
        """

    def supervised(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the logits that training compares with the mask, those of `forward` first.

        A network with supervision at several levels returns several maps, each like that of `forward`; the loss is the
        mean over them. This is a separate method so that `forward` does the same in training and inference.
        """
        return (self(image),)


def _recorded(constructor: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that keeps its arguments; of the constructors of base classes, those of the first count."""

    @functools.wraps(constructor)
    def construct(self: Any, *arguments: Any, **named: Any) -> None:
        if "_arguments" not in vars(self):
            with suppress(TypeError, PlainDataError):  # a wrong call, of which the constructor tells
                bound = inspect.signature(constructor).bind(self, *arguments, **named).arguments
                plain = check_plain({name: value for name, value in bound.items() if value is not self})
                object.__setattr__(self, "_arguments", plain)
        constructor(self, *arguments, **named)

    return construct


def check_model(node: Mapping[str, Any]) -> dict[str, Any]:
    """Check the `model` node of a config against the network's constructor and return it with defaults filled in.

    Raises:
        UsageError: A key is unknown or a value is invalid.
    """
    return check(node, "model", [locate(node, "model")], supplied=["num_classes", "in_channels"])


def build_model(
    node: Mapping[str, Any], num_classes: int, in_channels: int, *, fresh: bool = False
) -> SegmentationModel:
    """Build the network of a checked `model` node.

    Args:
        node: Checked by `check_model`.
        num_classes: Number of classes of the data set.
        in_channels: Number of channels of the images.
        fresh: Skip the pretrained weights that the node asks for, because others are loaded afterwards.

    Raises:
        UsageError: The network does not support the number of channels, or refuses its arguments.
    """
    arguments = {**node, "pretrained": "none"} if fresh and "pretrained" in node else node
    supplied = {"num_classes": num_classes}
    if "in_channels" in inspect.signature(locate(node, "model")).parameters:
        supplied["in_channels"] = in_channels
    elif in_channels != 3:
        raise UsageError(
            f"{node[TARGET]} takes images with 3 channels, but the images have {in_channels} - add an argument "
            "in_channels to its constructor, or choose another model"
        )
    return typing.cast(SegmentationModel, build(arguments, "model", **supplied))


class WithoutMemory(TorchFunctionMode):
    """A context in which tensors are created without memory and their initialisation is skipped.

    A network that is built in it has only names and shapes. `torch.device("meta")` would do the same, but its first
    use takes a second.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if function in (torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor):
            options = {**(options or {}), "device": "meta"}
        elif name.endswith("_") and not name.endswith("__"):
            changed = arguments[0] if arguments else (options or {}).get("tensor")  # as torch.nn.init calls it
            if isinstance(changed, Tensor):
                return changed
        return function(*arguments, **(options or {}))
