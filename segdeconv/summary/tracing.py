"""Watching a network run: every layer and operation on the way of an image without data through it.

The image and the weights lie on torch's meta device, so that nothing is computed and nothing takes memory. What a row
is called comes from the modules, what it does from the operations that torch was asked for, so that functions, skips
and a user's own modules are seen as well as layers.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from segdeconv.summary import receptive_field
from segdeconv.summary.receptive_field import Field, Span, Unknown
from segdeconv.switches import MaxPool, Pooling, Unpool


@dataclass
class Layer:
    """One row. Shapes are (channels, height, width) of one image; memory is in bytes of float32.

    kind: what it does; empty for an operation that is not worth a row by itself. kernel: (height, width).
    filter_depth: input channels that each filter sees.
    field: (height, width) of the image that one place of the output can depend on, None for a side that is all of it;
        None for both if it is not known.
    memory: of the output. kept: bytes of switches that stay for the decoder. then: what is done to the output in place
        or place by place, whose parameters are counted here.
    """

    name: str = ""
    kind: str = ""
    input: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    kernel: tuple[int, ...] | None = None
    filter_depth: int | None = None
    stride: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None
    field: tuple[int | None, int | None] | None = None
    parameters: int = 0
    multiply_adds: int = 0
    memory: int = 0
    kept: int = 0
    then: list[str] = dataclasses.field(default_factory=list)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of one run of a network.

    layers: the rows so far; spans: of each, what its output sees of the image, None if unknown.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.layers: list[Layer] = []
        self.spans: list[tuple[Span, Span] | None] = []
        self.peak = 0
        # Of tensors that depend on the image: the field (None: unknown), and the row that made them (None: the image).
        self.fields: Any = WeakTensorKeyDictionary()
        self.makers: Any = WeakTensorKeyDictionary()
        self.alive: Any = WeakTensorKeyDictionary()
        self.pools: Any = WeakTensorKeyDictionary()  # the row that made a tensor of switches
        self.torn: set[int] = set()  # storages that were written in parts
        self.within: list[str] = []  # the modules that are running, the innermost last
        self.leaf: list[Layer] | None = None  # operations of the leaf module that is running
        self.counted: set[int] = set()
        self.looking = True

    def run(self, size: tuple[int, int]) -> Tensor:
        """One image of size (H, W) through the network; the logits."""
        channels = getattr(self.model, "in_channels", 3)
        image = torch.empty(1, channels, *size, device="meta")
        self.fields[image] = Field((Span.of_image(size[0]), Span.of_image(size[1])), (2, 3))
        self.makers[image] = None
        self.alive[image] = True
        with ExitStack() as stack:
            for module in self.model.modules():
                stack.enter_context(module.register_forward_pre_hook(self._enter))
                stack.enter_context(module.register_forward_hook(self._leave, with_kwargs=True))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self)
            logits = self.model(image)
        return logits

    # Modules: a leaf is one row, or goes with the row before it.

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.within.append(self.names[module])
        if module is not self.model and not any(module.children()):
            self.leaf = []
        self.looking = not isinstance(module, MaxPool | Unpool)

    def _leave(self, module: nn.Module, given: Any, named: Any, output: Any) -> None:
        name = self.within.pop()
        operations, self.leaf, self.looking = self.leaf, None, True
        if isinstance(module, MaxPool):
            return self._pooled(name, output, *given, **named)
        if isinstance(module, Unpool):
            return self._unpooled(name, output, *given, **named)
        inputs = [tensor for tensor in _tensors([*given, *named.values()]) if tensor in self.fields]
        if operations is None or not inputs or not isinstance(output, Tensor) or isinstance(module, nn.Identity):
            return
        kind = type(module).__name__.lower().removesuffix("2d")
        parameters, work = self._count(module.parameters(recurse=False)), sum(one.multiply_adds for one in operations)
        makers = {self.makers[tensor] for tensor in inputs}
        (maker, *others), before, now = makers, self.fields[inputs[0]], self.fields[output]
        kept = before is not None and now is not None and before.equals(now) and output.shape == inputs[0].shape
        if kept and not work and not others and maker is not None:
            self.layers[maker].then.append(kind)
            self.layers[maker].parameters += parameters
            self.makers[output] = maker
            return
        said = next((operation for operation in operations if operation.kind), Layer(kind=kind))
        row = self._row(said, name, inputs[0], output)
        row.parameters, row.multiply_adds = parameters, work

    def _count(self, parameters: Iterable[nn.Parameter]) -> int:
        """How many numbers, those that were counted before left out."""
        fresh = {id(parameter): parameter.numel() for parameter in parameters if id(parameter) not in self.counted}
        self.counted |= set(fresh)
        return sum(fresh.values())

    def _row(self, row: Layer, name: str, given: Tensor, output: Tensor) -> Layer:
        """Make a row of what an operation is."""
        row.name, row.input, row.output = name, tuple(given.shape[1:]), tuple(output.shape[1:])
        row.memory = output.numel() * 4
        found = self.fields[output]
        self.layers.append(row)
        self.spans.append(found.spans if found is not None else None)
        self.makers[output] = len(self.layers) - 1
        return row

    # Operations: outside of a leaf, those that do more than go place by place are rows of their own.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        made = _tensors([output])
        for tensor in made:
            self.alive[tensor] = True
        self.peak = max(self.peak, self._alive())
        if self.looking:
            given = [tensor for tensor in _tensors(args) if self._known(tensor)]
            if given:
                self._see(func, args, given, made)
        return output

    def _alive(self) -> int:
        """Bytes of the maps that exist now, the weights left out."""
        own = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        places = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for tensor in self.alive
            if id(tensor) not in own
        }
        return sum(places.values())

    def _known(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the image; one whose storage was written in parts does, nobody knows how."""
        if tensor.untyped_storage()._cdata in self.torn:
            self.fields[tensor] = None
            self.makers.setdefault(tensor, None)
        return tensor in self.fields

    def _see(self, func: Any, args: Sequence[Any], given: list[Tensor], made: list[Tensor]) -> None:
        name, operation = func.overloadpacket.__name__.strip("_"), _operation(func, args, made)
        part = bool(made) and made[0].numel() * made[0].element_size() < made[0].untyped_storage().nbytes()
        if part and func._schema.is_mutable and any(tensor is not made[0] for tensor in given):
            self.torn.add(made[0].untyped_storage()._cdata)
        known = [self.fields[tensor] for tensor in given]
        makers = {self.makers[tensor] for tensor in given}
        maker = max(makers, key=lambda row: -1 if row is None else row)
        for tensor in made:
            self.makers[tensor] = maker
            try:
                self.fields[tensor] = None if None in known else receptive_field.after(func, args, known, tensor)
            except Unknown:
                self.fields[tensor] = None
                if tensor is made[0]:
                    operation.kind = operation.kind or name
        placewise = torch.Tag.pointwise in func.tags
        if self.leaf is not None:
            self.leaf.append(operation)
        elif operation.kind or (placewise and len(makers) > 1):
            operation.kind = operation.kind or name
            row = self._row(operation, self.within[-1], given[0], made[0])
            row.parameters = self._count(tensor for tensor in _tensors(args) if isinstance(tensor, nn.Parameter))
        elif maker is not None and placewise and made[0].is_floating_point():
            self.layers[maker].then.append(name)
        elif maker is not None and name in ("slice", "constant_pad_nd"):
            before, now = given[0].shape[2:], made[0].shape[2:]
            said, then = f"{'cut' if now < before else 'padded'} to ", self.layers[maker].then
            if then and then[-1].startswith(said):  # slices cut rows first, then columns
                then.pop()
            if now != before:
                then.append(said + "x".join(map(str, now)))

    # Switches: one row for each pool and unpool, whatever they are made of.

    def _pooled(self, name: str, pooling: Pooling, x: Tensor) -> None:
        features, codes, _ = pooling
        aten = torch.ops.aten.max_pool2d_with_indices.default
        found = self.fields.get(x)
        for tensor in (features, codes):
            self.fields[tensor] = found and receptive_field.after(aten, (x, [2, 2]), [found], tensor)
        row = self._row(Layer(kind="max_pool", kernel=(2, 2), stride=(2, 2)), name, x, features)
        row.kept = codes.nbytes
        self.makers[codes] = self.makers[features]
        self.pools[codes] = len(self.layers)

    def _unpooled(self, name: str, output: Tensor, x: Tensor, switches: Tensor, size: tuple[int, int]) -> None:
        one, other = self.fields.get(x), self.fields.get(switches)
        if one is None or other is None:
            self.fields[output] = one or other
        else:
            tall = (one | other).along(2, lambda span: span.at(np.arange(size[0]) // 2))
            self.fields[output] = tall.along(3, lambda span: span.at(np.arange(size[1]) // 2))
        row = self._row(Layer(kind="unpool", kernel=(2, 2), stride=(2, 2)), name, x, output)
        row.then.append(f"switches of {self.pools[switches]}" if switches in self.pools else "switches")


def traced(model: nn.Module, size: tuple[int, int]) -> Trace:
    """What a network does with one image of size (H, W); the network itself, wherever it lies, is left alone."""
    seen = Trace(copy.deepcopy(model).to("meta").eval())
    seen.run(size)
    return seen


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    flat = [item for one in arguments for item in (one if isinstance(one, list | tuple) else [one])]
    return [item for item in flat if isinstance(item, Tensor)]


_SAID = {
    "max_pool2d_with_indices": "max_pool", "avg_pool2d": "avg_pool", "_adaptive_avg_pool2d": "avg_pool",
    "adaptive_max_pool2d": "max_pool", "upsample_nearest2d": "nearest", "upsample_bilinear2d": "bilinear", "cat": "cat",
    "mean": "mean", "sum": "sum", "amax": "max", "addmm": "linear", "mm": "linear", "pixel_shuffle": "pixel_shuffle",
}  # fmt: skip


def _operation(func: Any, args: Sequence[Any], made: Sequence[Tensor]) -> Layer:
    """What an ATen operation is in a table."""
    name = func.overloadpacket.__name__
    found = Layer(kind=_SAID.get(name, ""))
    if name == "convolution":
        x, weight, transposed, groups = args[0], args[1], args[6], args[8]
        found.kind = "deconv" if transposed else "conv"
        found.kernel, found.stride, found.dilation = tuple(weight.shape[2:]), tuple(args[3]), tuple(args[5])
        found.filter_depth = weight.shape[0] // groups if transposed else weight.shape[1]
        # Each place of the map that is gathered into, or spread from, goes once through every filter.
        places = (x if transposed else made[0])[0, 0].numel() * x.shape[0]
        found.multiply_adds = places * weight.numel()
    elif name in ("addmm", "mm"):
        first, second = args[-2:]
        found.filter_depth, found.multiply_adds = first.shape[1], first.shape[0] * second.numel()
    elif name in ("bmm", "baddbmm"):
        first, second = args[-2:]
        found.multiply_adds = first.shape[1] * second.numel()
    elif "pool" in name and len(args) > 2 and "adaptive" not in name:
        found.kernel, found.stride = tuple(args[1]), tuple(args[2] or args[1])
    return found
