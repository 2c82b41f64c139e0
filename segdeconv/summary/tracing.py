"""Tracing of a network: every layer and operation of a forward pass on an image without data.

The image and the weights are on torch's meta device, so that nothing is computed and no memory is used. The names of
the rows come from the modules, and their content from the operations that torch dispatches, so that functions, skips
and user-defined modules are traced as well as layers.
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
    """Layer or operation of a network: one row of the table.

    Attributes:
        name: Name of the module.
        kind: Kind of operation; empty for an operation that does not get a row of its own.
        input: (channels, height, width) of one image.
        output: (channels, height, width) of one image.
        kernel: (height, width).
        filter_depth: Input channels of each filter.
        stride: (height, width).
        dilation: (height, width).
        field: Receptive field of one position of the output, (height, width); None for a side that is the whole image,
            and None instead of both if it is unknown.
        parameters: Number of parameters.
        multiply_adds: Number of multiply-adds.
        memory: Bytes of the output in float32.
        kept: Bytes of switches that are kept for the decoder.
        then: Operations applied to the output in place or pointwise, whose parameters are counted here.
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
    """Dispatch mode that records every operation of one forward pass of a network.

    Args:
        model: On the meta device and in evaluation mode.

    Attributes:
        layers: Rows of the table.
        spans: Receptive fields of their outputs, None if unknown.
        peak: Largest number of bytes of maps that existed at the same time.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.layers: list[Layer] = []
        self.spans: list[tuple[Span, Span] | None] = []
        self.peak = 0
        # For tensors that depend on the image: the field (None: unknown), and the row that made them (None: the image).
        self.fields: Any = WeakTensorKeyDictionary()
        self.makers: Any = WeakTensorKeyDictionary()
        self.alive: Any = WeakTensorKeyDictionary()
        self.pools: Any = WeakTensorKeyDictionary()  # the number of the pool's row for a tensor of switches
        self.partly_written: set[int] = set()  # storages that were written in parts
        self.running: list[str] = []  # names of the running modules, the innermost last
        self.leaf: list[Layer] | None = None  # operations of the running leaf module
        self.counted: set[int] = set()  # ids of parameters
        self.recording = True

    def run(self, size: tuple[int, int]) -> Tensor:
        """Run the network on one image of size (H, W) and return the logits."""
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

    # Modules: a leaf module is one row, or belongs to the row before it.

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.running.append(self.names[module])
        if module is not self.model and not any(module.children()):
            self.leaf = []
        self.recording = not isinstance(module, MaxPool | Unpool)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self.running.pop()
        operations, self.leaf, self.recording = self.leaf, None, True
        if isinstance(module, MaxPool):
            return self._record_pool(name, output, *args, **kwargs)
        if isinstance(module, Unpool):
            return self._record_unpool(name, output, *args, **kwargs)
        inputs = [tensor for tensor in _tensors([*args, *kwargs.values()]) if tensor in self.fields]
        if operations is None or not inputs or not isinstance(output, Tensor) or isinstance(module, nn.Identity):
            return
        kind = type(module).__name__.lower().removesuffix("2d")
        parameters = self._count(module.parameters(recurse=False))
        multiply_adds = sum(operation.multiply_adds for operation in operations)
        makers = {self.makers[tensor] for tensor in inputs}
        (maker, *others), before, now = makers, self.fields[inputs[0]], self.fields[output]
        unchanged = before is not None and now is not None and before.equals(now) and output.shape == inputs[0].shape
        if unchanged and not multiply_adds and not others and maker is not None:
            self.layers[maker].then.append(kind)
            self.layers[maker].parameters += parameters
            self.makers[output] = maker
            return
        main = next((operation for operation in operations if operation.kind), Layer(kind=kind))
        row = self._add_row(main, name, inputs[0], output)
        row.parameters, row.multiply_adds = parameters, multiply_adds

    def _count(self, parameters: Iterable[nn.Parameter]) -> int:
        """Count the elements of those parameters that were not counted before."""
        new = {id(parameter): parameter.numel() for parameter in parameters if id(parameter) not in self.counted}
        self.counted |= set(new)
        return sum(new.values())

    def _add_row(self, row: Layer, name: str, x: Tensor, output: Tensor) -> Layer:
        """Complete a row with its name, shapes and memory, and add it."""
        row.name, row.input, row.output = name, tuple(x.shape[1:]), tuple(output.shape[1:])
        row.memory = output.numel() * 4
        field = self.fields[output]
        self.layers.append(row)
        self.spans.append(field.spans if field is not None else None)
        self.makers[output] = len(self.layers) - 1
        return row

    # Operations: outside of leaf modules, all that are not pointwise get a row of their own.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        outputs = _tensors([output])
        for tensor in outputs:
            self.alive[tensor] = True
        self.peak = max(self.peak, self._alive())
        if self.recording:
            inputs = [tensor for tensor in _tensors(args) if self._depends_on_image(tensor)]
            if inputs:
                self._record(func, args, inputs, outputs)
        return output

    def _alive(self) -> int:
        """Return the number of bytes of the existing maps, without the weights."""
        own = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for tensor in self.alive
            if id(tensor) not in own
        }
        return sum(storages.values())

    def _depends_on_image(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on the image, and mark the field of a partly written one as unknown."""
        if tensor.untyped_storage()._cdata in self.partly_written:
            self.fields[tensor] = None
            self.makers.setdefault(tensor, None)
        return tensor in self.fields

    def _record(self, func: Any, args: Sequence[Any], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name, operation = func.overloadpacket.__name__.strip("_"), _operation(func, args, outputs)
        part = bool(outputs) and outputs[0].numel() * outputs[0].element_size() < outputs[0].untyped_storage().nbytes()
        if part and func._schema.is_mutable and any(tensor is not outputs[0] for tensor in inputs):
            self.partly_written.add(outputs[0].untyped_storage()._cdata)
        fields = [self.fields[tensor] for tensor in inputs]
        makers = {self.makers[tensor] for tensor in inputs}
        maker = max(makers, key=lambda row: -1 if row is None else row)
        for tensor in outputs:
            self.makers[tensor] = maker
            try:
                self.fields[tensor] = None if None in fields else receptive_field.propagate(func, args, fields, tensor)
            except Unknown:
                self.fields[tensor] = None
                if tensor is outputs[0]:
                    operation.kind = operation.kind or name
        pointwise = torch.Tag.pointwise in func.tags
        if self.leaf is not None:
            self.leaf.append(operation)
        elif operation.kind or (pointwise and len(makers) > 1):
            operation.kind = operation.kind or name
            row = self._add_row(operation, self.running[-1], inputs[0], outputs[0])
            row.parameters = self._count(tensor for tensor in _tensors(args) if isinstance(tensor, nn.Parameter))
        elif maker is not None and pointwise and outputs[0].is_floating_point():
            self.layers[maker].then.append(name)
        elif maker is not None and name in ("slice", "constant_pad_nd"):
            before, now = inputs[0].shape[2:], outputs[0].shape[2:]
            label, then = f"{'cut' if now < before else 'padded'} to ", self.layers[maker].then
            if then and then[-1].startswith(label):  # slices cut rows first, then columns
                then.pop()
            if now != before:
                then.append(label + "x".join(map(str, now)))

    # Pools and unpools with switches: one row each, however they are implemented.

    def _record_pool(self, name: str, pooling: Pooling, x: Tensor) -> None:
        features, codes, _ = pooling
        aten = torch.ops.aten.max_pool2d_with_indices.default
        field = self.fields.get(x)
        for tensor in (features, codes):
            self.fields[tensor] = field and receptive_field.propagate(aten, (x, [2, 2]), [field], tensor)
        row = self._add_row(Layer(kind="max_pool", kernel=(2, 2), stride=(2, 2)), name, x, features)
        row.kept = codes.nbytes
        self.makers[codes] = self.makers[features]
        self.pools[codes] = len(self.layers)

    def _record_unpool(self, name: str, output: Tensor, x: Tensor, switches: Tensor, size: tuple[int, int]) -> None:
        of_values, of_switches = self.fields.get(x), self.fields.get(switches)
        if of_values is None or of_switches is None:
            self.fields[output] = of_values or of_switches
        else:
            field = (of_values | of_switches).along(2, lambda span: span.at(np.arange(size[0]) // 2))
            self.fields[output] = field.along(3, lambda span: span.at(np.arange(size[1]) // 2))
        row = self._add_row(Layer(kind="unpool", kernel=(2, 2), stride=(2, 2)), name, x, output)
        row.then.append(f"switches of {self.pools[switches]}" if switches in self.pools else "switches")


def traced(model: nn.Module, size: tuple[int, int]) -> Trace:
    """Trace a copy of a network on one image of size (H, W); the network itself is not changed."""
    trace = Trace(copy.deepcopy(model).to("meta").eval())
    trace.run(size)
    return trace


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    flat = [item for argument in arguments for item in (argument if isinstance(argument, list | tuple) else [argument])]
    return [item for item in flat if isinstance(item, Tensor)]


_KINDS = {
    "max_pool2d_with_indices": "max_pool", "avg_pool2d": "avg_pool", "_adaptive_avg_pool2d": "avg_pool",
    "adaptive_max_pool2d": "max_pool", "upsample_nearest2d": "nearest", "upsample_bilinear2d": "bilinear", "cat": "cat",
    "mean": "mean", "sum": "sum", "amax": "max", "addmm": "linear", "mm": "linear", "pixel_shuffle": "pixel_shuffle",
}  # fmt: skip


def _operation(func: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> Layer:
    """Return the row of an ATen operation, without name and shapes."""
    name = func.overloadpacket.__name__
    row = Layer(kind=_KINDS.get(name, ""))
    if name == "convolution":
        x, weight, transposed, groups = args[0], args[1], args[6], args[8]
        row.kind = "deconv" if transposed else "conv"
        row.kernel, row.stride, row.dilation = tuple(weight.shape[2:]), tuple(args[3]), tuple(args[5])
        row.filter_depth = weight.shape[0] // groups if transposed else weight.shape[1]
        # Every filter is applied once per position, of the output or, if transposed, of the input.
        positions = (x if transposed else outputs[0])[0, 0].numel() * x.shape[0]
        row.multiply_adds = positions * weight.numel()
    elif name in ("addmm", "mm"):
        first, second = args[-2:]
        row.filter_depth, row.multiply_adds = first.shape[1], first.shape[0] * second.numel()
    elif name in ("bmm", "baddbmm"):
        first, second = args[-2:]
        row.multiply_adds = first.shape[1] * second.numel()
    elif "pool" in name and len(args) > 2 and "adaptive" not in name:
        row.kernel, row.stride = tuple(args[1]), tuple(args[2] or args[1])
    return row
