"""Base class of segmentation networks, and the `model` node of a config."""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segdeconv.classes import Classes
from segdeconv.config import (
    TARGET,
    check,
    checked_arguments,
    is_foreign,
    locate,
    parameters_of,
    public_name,
    without_defaults,
)
from segdeconv.errors import UsageError
from segdeconv.system.plain_data import PlainDataError, check_plain

# Arguments of a network that the data set determines, under the names that libraries give them.
CLASSES, CHANNELS = ("num_classes", "classes", "num_labels"), ("in_channels", "in_chans")
SUPPLIED = (*CLASSES, *CHANNELS)


class SegmentationModel(nn.Module, ABC):
    """Network that maps images to logits of the same height and width.

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images, 3 for RGB.

    Attributes:
        heads: Names of the modules whose first dimension is the classes, which are replaced for other classes.
        square_heads: Names of the modules whose first two dimensions are the classes.
        minimum_size: Smallest side in pixels that the network accepts; inference pads smaller images to it.
        size_multiple: The network extends images to multiples of it, so tiles have to start at multiples of it.
    """

    _arguments: dict[str, Any] | None = None  # of the constructor, if they are plain data
    card: dict[str, Any] | None = None  # config and metadata of the checkpoint that the network was read from
    heads: tuple[str, ...] = ("classifier",)
    square_heads: tuple[str, ...] = ()
    minimum_size: int = 32
    size_multiple: int = 1

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "__init__" in vars(cls):
            constructor = cls.__init__ if is_foreign(cls) else checked_arguments(cls.__init__)
            cls.__init__ = _recorded(constructor)  # type: ignore[method-assign]

    @checked_arguments
    def __init__(self, num_classes: PositiveInt, *, in_channels: PositiveInt = 3) -> None:
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

    @classmethod
    def from_pretrained(cls, name: str | Path, *, trust: Collection[str] = ()) -> Self:
        """Load a trained network, in evaluation mode.

        Its input are normalised images; `segdeconv.load` loads the preprocessing too and predicts images as they are.

        Args:
            name: A shipped network such as `camvid-small`, a run folder, a file, a folder that `save_pretrained` wrote,
                or hf://OWNER/NAME[@REVISION] on the Hugging Face Hub, which is downloaded
                (`pip install "segdeconv[hub]"`).
            trust: Names of classes of your own that the checkpoint may use.

        Raises:
            CheckpointError: The file is damaged, of another program, or names classes that are not trusted.
            UsageError: There is no such network, or it is of another class.
        """
        from segdeconv.checkpoints.pretrained import load_network

        network = load_network(name, trust)
        if not isinstance(network, cls):
            own = type(network).__name__
            raise UsageError(f"{name} is a {own}, not a {cls.__name__} - use {own}.from_pretrained")
        return network

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        classes: Sequence[str] | Mapping[Any, Any] | Classes | None = None,
        half: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write model.safetensors and its card, model.json, from which `from_pretrained` and every command load it.

        Args:
            folder: The folder, which is created.
            classes: The names of the classes, or a mapping between names and class indices, for a network that was
                neither loaded nor trained by segdeconv. It is then taken to be fed images that are normalised as
                `train` does, with ImageNet's mean and deviation.
            half: Store filters in 16 bits, for half the size.
            about: Further entries of the card, such as scores and licence; plain data.

        Returns:
            The .safetensors file.

        Raises:
            UsageError: The classes are unknown.
        """
        from segdeconv.checkpoints.pretrained import save_network

        return save_network(self, Path(folder), classes=classes, half=half, about=about)

    def push_to_hub(
        self,
        name: str,
        *,
        classes: Sequence[str] | Mapping[Any, Any] | Classes | None = None,
        half: bool = False,
        about: Mapping[str, Any] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        message: str = "Upload network with segdeconv",
        token: str | bool | None = None,
    ) -> str:
        """Upload the files of `save_pretrained` to a repository of the Hugging Face Hub, as one commit.

        Args:
            name: OWNER/NAME; the repository is created if it does not exist.
            classes: See `save_pretrained`.
            half: See `save_pretrained`.
            about: See `save_pretrained`.
            private: Whether a new repository is private; None for the default of the owner.
            revision: The branch; None for main.
            message: The message of the commit.
            token: An access token; None for that of `hf auth login`.

        Returns:
            The address of the commit, hf://OWNER/NAME@COMMIT.

        Raises:
            UsageError: The classes are unknown, or the Hub refuses the upload.
        """
        from segdeconv.checkpoints.pretrained import push_network

        return push_network(
            self,
            name,
            classes=classes,
            half=half,
            about=about,
            private=private,
            revision=revision,
            message=message,
            token=token,
        )

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
    target = locate(node, "model")
    if inspect.isclass(target) and not issubclass(target, nn.Module):
        raise UsageError(
            f"model._target_={node[TARGET]} is not a network - name a torch.nn.Module, or a file of configs/"
        )
    parameters, _, takes_any = parameters_of([target], "model")
    if not takes_any and not set(CLASSES) & set(parameters):
        raise UsageError(f"model ({node[TARGET]}) takes no num_classes, so it cannot be built for the data set")
    checked = check(node, "model", [target], supplied=SUPPLIED)
    return checked if is_own(target) else without_defaults(checked, node, target)


def is_own(target: Any) -> bool:
    """Return whether a callable returns a `SegmentationModel`, as far as one can tell without calling it."""
    return not is_foreign(target) or (inspect.isclass(target) and issubclass(target, SegmentationModel))


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
