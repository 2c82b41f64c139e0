"""Exact contributions of pixels and biases to a number that a network computes from an image.

While the signs of its ReLUs and the switches of its pools stay as they are in one image, a network of convolutions,
batch norms in evaluation mode, ReLUs, max pools, unpooling, linear resizing, concatenation and addition is an affine
map. Any sum of its logits is then a sum of contributions, with nothing left over:

    value = sum over pixels of gradient * pixel + sum over biases of gradient * bias

Srinivas & Fleuret 2019, proposition 1, https://arxiv.org/abs/1905.00780, who call it the full gradient. One backward
pass gives all gradients. The same holds at every map through which all paths from the image lead: the value is the sum
of gradient * activation over that map, plus the contributions of the biases after it. Biases are those of convolutions
and linear layers, the shift of a batch norm, `bias - mean * weight / std`, and constants that are added to a map.

Other operations, such as softmax, sigmoid, GELU, group norm and layer norm, are not affine; the sum then misses the
value. `Contributions.exact` compares the two, and `non_affine_operations` names the operations.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segdeconv.inference.scorers import with_padding
from segdeconv.switches import MaxPool, Pooling, Unpool
from segdeconv.switches.ops import unpool

# Of |sum - value|, as a fraction of the sum of the absolute contributions, which rounding errors grow with.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}

WITH_BIAS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
}  # fmt: skip
ADDITIONS = {
    "add", "add_", "__add__", "__radd__", "__iadd__",
    "sub", "sub_", "subtract", "subtract_", "rsub", "__sub__", "__rsub__", "__isub__",
}  # fmt: skip
MAX_DEVIATION = 1e-4  # of an operation from doubling its output, relative to the largest value


class BiasContribution(NamedTuple):
    """The contribution of the biases of one operation.

    Attributes:
        operation: The name of the module and, if it is not the module itself, the function.
        stage: `encoder`, up to the deepest map, or `decoder`.
        scale: The image's height divided by that of the map that the biases are added to, rounded to a power of two.
        total: The sum of gradient times bias.
        magnitude: The sum of the absolute values, over channels.
    """

    operation: str
    stage: str
    scale: int
    total: float
    magnitude: float

    @property
    def level(self) -> str:
        """Stage and scale, such as `encoder 1/4`."""
        return f"{self.stage} 1/{self.scale}"


@dataclass(frozen=True)
class MapContribution:
    """The contribution that passes through one pool or unpooling.

    Attributes:
        name: Such as `pool 3` or `unpool 3`; level 1 pools the finest map.
        values: (h, w), the sum over channels of gradient times activation. The values of a pool with switches lie in
            the cells that the switches select, those of another pool in its output.
        magnitude: The sum of the absolute values, over channels and positions.
        later: The contributions of the biases that are added after it.
        later_magnitude: The sum of their absolute values.
        whole: True if every path from the image leads through it; `total` plus `later` is then the value. False
            beside skip connections.
    """

    name: str
    values: Tensor
    magnitude: float
    later: float
    later_magnitude: float
    whole: bool

    @cached_property
    def total(self) -> float:
        """The sum of `values`."""
        return float(self.values.double().sum())


@dataclass(frozen=True)
class Contributions:
    """The contributions to one number, the value.

    Attributes:
        value: The value as the network computes it.
        pixels: (C, H, W), the contribution of every channel of every pixel of the normalised image, or of the map that
            `AffineGraph` starts from.
        biases: The contributions of the biases in the order of their operations.
        maps: Those that pass through pools and unpoolings, in the order of the network.
        tolerance: See `TOLERANCES`.
    """

    value: float
    pixels: Tensor
    biases: tuple[BiasContribution, ...]
    maps: tuple[MapContribution, ...]
    tolerance: float

    @cached_property
    def from_pixels(self) -> float:
        """The sum of the contributions of the pixels."""
        return float(self.pixels.double().sum())

    @cached_property
    def from_biases(self) -> float:
        """The sum of the contributions of the biases."""
        return math.fsum(bias.total for bias in self.biases)

    @property
    def total(self) -> float:
        """The sum of all contributions, which equals `value` if the network is affine."""
        return self.from_pixels + self.from_biases

    @cached_property
    def magnitude(self) -> float:
        """The sum of the absolute contributions."""
        return float(self.pixels.double().abs().sum()) + math.fsum(bias.magnitude for bias in self.biases)

    @property
    def allowed(self) -> float:
        """Largest difference of `total` and `value` that rounding explains."""
        return self.tolerance * self.magnitude

    @property
    def exact(self) -> bool:
        """True if the contributions add up to the value, at the image and at every map that all paths lead through."""
        return abs(self.total - self.value) <= self.allowed and all(
            abs(map_.total + map_.later - self.value) <= self.tolerance * (map_.magnitude + map_.later_magnitude)
            for map_ in self.maps
            if map_.whole
        )

    def by_level(self) -> dict[str, float]:
        """Return the contributions of the pixels, and of the biases of each level, in the order of the network."""
        sums = {"pixels": self.from_pixels}
        for bias in self.biases:
            sums[bias.level] = sums.get(bias.level, 0.0) + bias.total
        return sums


@dataclass(eq=False)
class _Bias:
    """The biases of one operation.

    Attributes:
        value: The biases, broadcastable to the output of the operation; for a batch norm, its shift.
        node: The node of the operation in the graph.
        operation: Its name.
        height: The height of its output.
        gradient: The gradient of the biases in the last backward pass, None if the value did not depend on them.
    """

    value: Tensor
    node: Any
    operation: str
    height: int
    gradient: Tensor | None = None

    def keep(self, gradient: Tensor) -> None:
        """Sum the gradient of the output, as a hook of the backward pass.

        The gradient that a convolution itself computes for its bias is a sum of inferior accuracy.
        """
        self.gradient = gradient.sum_to_size(self.value.shape)

    def contributions(self) -> Tensor:
        """Return gradient times bias of every channel, on the CPU, since some devices have no float64."""
        value = self.value.cpu().double()
        return torch.zeros_like(value) if self.gradient is None else self.gradient.cpu().double() * value


class _Map(NamedTuple):
    """A map of the graph, and how the contributions of its positions are laid out in the plane."""

    tensor: Tensor
    name: str
    place: Callable[[Tensor], Tensor]


class AffineGraph:
    """The graph of one forward pass, which keeps the biases of all operations.

    Args:
        network: The network, in evaluation mode.
        image: (1, C, H, W), normalised, on the network's device, float32 or float64.
        minimum_size: Smallest side that the network accepts; smaller images are padded.
        start: The name of a module whose output takes the place of the image; "" for the image.

    Attributes:
        logits: (1, K, H, W), from which values for `contributions` are computed by linear operations.
    """

    def __init__(self, network: nn.Module, image: Tensor, *, minimum_size: int = 1, start: str = "") -> None:
        self.source = image.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        self.recorder = _Recorder(network)
        self.height = image.shape[-2]

        def restart(module: nn.Module, args: Any, output: Any) -> Tensor:
            self.source = output.detach().requires_grad_()
            return self.source

        with ExitStack() as stack:
            stack.enter_context(_frozen(network))
            if start:
                stack.enter_context(network.get_submodule(start).register_forward_hook(restart))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.recorder.recording())
            self.logits = with_padding(network, minimum_size)(self.source)

    def contributions(self, value: Tensor) -> Contributions:
        """Return the contributions to a sum of logits, by one backward pass.

        Args:
            value: Scalar, a linear function of `logits`.
        """
        biases, maps = self.recorder.biases, self.recorder.maps
        tensors = [self.source, *(map_.tensor for map_ in maps)]
        for bias in biases:
            bias.gradient = None
        gradients = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        pixels, *passing = (
            torch.zeros_like(own) if gradient is None else gradient * own.detach()
            for own, gradient in zip(tensors, gradients, strict=True)
        )
        stages = self.recorder.stages(self.height)
        shares = []
        for bias, stage in zip(biases, stages, strict=True):
            own = bias.contributions()
            shares.append(BiasContribution(bias.operation, *stage, float(own.sum()), float(own.abs().sum())))
        through = []
        for map_, part in zip(maps, passing, strict=True):
            beside = _nodes_beside(value, map_.tensor)
            later = [share for bias, share in zip(biases, shares, strict=True) if bias.node in beside]
            through.append(
                MapContribution(
                    map_.name,
                    map_.place(part)[0].sum(dim=0).cpu(),
                    float(part.abs().sum()),
                    math.fsum(share.total for share in later),
                    math.fsum(share.magnitude for share in later),
                    not any(getattr(node, "variable", None) is self.source for node in beside),
                )
            )
        return Contributions(
            float(value.detach()), pixels[0].cpu(), tuple(shares), tuple(through), TOLERANCES[self.source.dtype]
        )


def non_affine_operations(network: nn.Module, image: Tensor, *, minimum_size: int = 1) -> list[str]:
    """Return the operations that are not affine while switches and signs stay the same, in the order of the network.

    Such an operation does not double its output when its input and its biases are doubled, which is tested for every
    call of a torch function on the values of this image. Autograd functions of other libraries are not tested.

    Args:
        network: The network, in evaluation mode.
        image: See `AffineGraph`.
        minimum_size: See `AffineGraph`.

    Returns:
        The name of the module with its class, or the function with its module, each once.
    """
    recorder = _Recorder(network, testing=True)
    with _frozen(network), torch.enable_grad(), recorder.recording():
        with_padding(network, minimum_size)(image.detach().clone().requires_grad_())
    return list(recorder.non_affine)


class _Recorder(TorchFunctionMode):
    """Mode that keeps the biases of every operation on maps, and the maps of pools.

    The parameters of the network must not require gradients: a tensor that does depends on the image.

    Args:
        network: The network.
        testing: Also test whether each operation is affine.
    """

    def __init__(self, network: nn.Module, *, testing: bool = False) -> None:
        super().__init__()
        self.names = {module: name for name, module in network.named_modules()}
        self.testing = testing
        self.running: list[nn.Module] = []
        self.biases: list[_Bias] = []
        self.maps: list[_Map] = []
        self.heights: list[tuple[int, bool]] = []  # of the outputs of biases (True) and pools in order
        self.non_affine: dict[str, None] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward passes in this context."""
        with ExitStack() as stack:
            for module in self.names:
                stack.enter_context(module.register_forward_pre_hook(lambda module, args: self.running.append(module)))
                stack.enter_context(module.register_forward_hook(self._leave))
            stack.enter_context(self)
            yield

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()
        if isinstance(module, MaxPool):
            pooling: Pooling = output

            def place(values: Tensor) -> Tensor:
                return unpool(values, pooling.switches, pooling.size)

            self._add_map(_Map(pooling.features, f"pool {module.level}", place))
        elif isinstance(module, Unpool):
            self._add_map(_Map(output, f"unpool {module.level}", lambda values: values))

    def _add_map(self, map_: _Map) -> None:
        self.maps.append(map_)
        self.heights.append((map_.tensor.shape[-2], False))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if not torch.is_grad_enabled() or not any(map(_tracked, _tensors([args, kwargs]))):
            return func(*args, **kwargs)
        constant = _constant(name, args, kwargs)
        normalises = func is F.batch_norm
        bias = _shift(*args, **kwargs) if normalises else _bias(func, name, args, kwargs, constant)
        known = bias is not None and (normalises or name in ADDITIONS)
        testing = self.testing and not known
        doubled = func(*_doubled(args, constant), **_doubled(kwargs, constant)) if testing else None
        output = func(*args, **kwargs)
        self._record(name, bias, output, doubled)
        return output

    def _record(self, name: str, bias: Tensor | None, output: Any, doubled: Any) -> None:
        outputs = list(_tensors([output]))
        if not any(map(_tracked, outputs)):
            return  # a size, a device, a dtype
        first = outputs[0]
        if bias is not None:
            height = first.shape[-2] if first.ndim > 2 else 1
            kept = _Bias(bias.detach(), first.grad_fn, self._operation(name), height)
            first.register_hook(kept.keep)  # type: ignore[no-untyped-call]
            self.biases.append(kept)
            self.heights.append((height, True))
        if "max_pool" in name and first.ndim == 4:
            number = 1 + sum(map_.name.startswith("pool") for map_ in self.maps)
            self._add_map(_Map(first, f"pool {number}", lambda values: values))
        for one, other in zip(outputs, _tensors([doubled]), strict=False):
            if _tracked(one) and _deviation(one.detach(), other.detach()) > MAX_DEVIATION:
                self.non_affine[self._operation(name)] = None

    def _operation(self, function: str) -> str:
        if not self.running:
            return function
        module = self.running[-1]
        name = self.names[module] or "the network"
        own = any(True for _ in module.children()) or not type(module).__module__.startswith("torch.")
        return f"{name} ({function})" if own else f"{name} ({type(module).__name__})"

    def stages(self, height: int) -> list[tuple[str, int]]:
        """Return the stage and the scale of each bias, for an image of this height."""
        scales = [2 ** max(0, round(math.log2(height / max(1, own)))) for own, _ in self.heights]
        deepest = max((index for index, scale in enumerate(scales) if scale == max(scales)), default=0)
        return [
            ("encoder" if index <= deepest else "decoder", scale)
            for index, (scale, (_, is_bias)) in enumerate(zip(scales, self.heights, strict=True))
            if is_bias
        ]


def _shift(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Return what a batch norm adds, broadcastable to its output; None if it computes statistics."""
    if training or running_mean is None or running_var is None:
        return None
    mean, variance = running_mean.cpu().double(), running_var.cpu().double()  # some devices have no float64
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight.cpu().double())
    shift = -mean * scale if bias is None else bias.cpu().double() - mean * scale
    return shift.view(-1, *[1] * (x.ndim - 2))


def _constant(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the argument of a call that is a bias: that of a convolution, or a constant operand of an addition."""
    if name in WITH_BIAS:
        return args[2] if len(args) > 2 else kwargs.get("bias")
    operands = [*args[:2], *([kwargs["other"]] if "other" in kwargs else [])]
    constants = [operand for operand in operands if not _tracked(operand)]
    return constants[0] if name in ADDITIONS and len(operands) == 2 and len(constants) == 1 else None


def _bias(
    func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any], constant: Any
) -> Tensor | None:
    """Return what an operation adds to a linear map of its other arguments, broadcastable to its output."""
    if constant is None:
        return None
    if name in ADDITIONS:  # the constant with its sign and factor
        with torch.no_grad():
            zeroed = [torch.zeros_like(part) if _tracked(part) else part for part in args]
            output: Tensor = func(*zeroed, **kwargs).clone()  # an operation in place returns the constant itself
        return output
    dimensions = 0 if name == "linear" else int(name[-2])
    return constant.view(-1, *[1] * dimensions)


def _tracked(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _doubled(value: Any, constant: Any) -> Any:
    """Return arguments with the tensors that depend on the image doubled, and the bias of a convolution too.

    They are copies, which an operation may write to.
    """
    if _tracked(value) or (value is constant and isinstance(value, Tensor)):
        return value.detach() * 2
    if isinstance(value, dict):
        return {name: _doubled(part, constant) for name, part in value.items()}
    return type(value)(_doubled(part, constant) for part in value) if type(value) in (list, tuple) else value


def _deviation(output: Tensor, doubled: Tensor) -> float:
    """Return how much an operation deviates from doubling its output, relative to the largest value."""
    largest = output.abs().max()
    return float((doubled - 2 * output).abs().max() / largest) if largest > 0 else float(doubled.abs().max())


def _nodes_beside(value: Tensor, map_: Tensor) -> set[Any]:
    """Return the nodes that the value depends on along paths that do not lead through a map."""
    waiting, seen = [value.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node is not map_.grad_fn and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
