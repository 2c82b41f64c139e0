"""ONNX graphs of traced networks, restricted to operators that other programs support."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from segdeconv.errors import UsageError

Module = TypeVar("Module", bound=nn.Module)
Runner = Callable[[np.ndarray], np.ndarray]  # maps an input to the output of the file

OPSET = 18  # published in 2022, so that other programs support it
MAX_BYTES = 2**31 - 1  # the limit of a protocol buffer and thus of an ONNX file

# TensorRT, OpenVINO and CoreML do not support these, or not with dynamic sizes; nor a MaxPool that returns indices.
FORBIDDEN = {
    "GatherElements", "GatherND", "If", "Loop", "MaxUnpool", "NonZero", "Scan", "Scatter", "ScatterElements",
    "ScatterND",
}  # fmt: skip


def require_libraries() -> dict[str, str]:
    """Return the versions of the libraries that write and run ONNX.

    Raises:
        UsageError: A library is not installed.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise UsageError(
            f"exporting to ONNX needs {error.name} - pip install onnx onnxscript onnxruntime, or write .pt2"
        ) from None
    return {module.__name__: module.__version__ for module in (onnx, onnxscript, onnxruntime)}


def runner(path: Path) -> Runner:
    """Return a function that runs an ONNX file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})[0]


def convert(program: ExportedProgram, *, axes: str, output: str, half: bool, path: Path) -> Any:
    """Convert a traced network to an ONNX protocol buffer with operators that other programs support.

    Args:
        program: The traced network.
        axes: The axes of the input, such as `NCHW`. The name of the input is `image`.
        output: The name of the output, `logits` or `labels`.
        half: Whether to store weights in 16 bits.
        path: The file that will be written, for error messages.

    Returns:
        An `onnx.ModelProto`.

    Raises:
        UsageError: The file would be larger than 2 GB, or the graph contains an unsupported operator.
    """
    size = sum(weight.nbytes for weight in program.state_dict.values())
    if size // (2 if half else 1) > MAX_BYTES:
        raise UsageError(f"{path} would be larger than 2 GB, the limit of ONNX files - write .pt2, or add --half")
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with _quiet():
        exported: Any = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=[output],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    ClearMetadataAndDocStringPass()(exported.model)  # they name source files of this machine
    graph = exported.model_proto
    (graph_input,), (graph_output,) = graph.graph.input, graph.graph.output
    for value, names in ((graph_input, axes), (graph_output, "NHW" if output == "labels" else "NCHW")):
        for dimension, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
            if name != "C":
                dimension.dim_param = name
    del graph.graph.value_info[:]  # intermediate shapes, named by the exporter
    if unsupported := sorted(foreign_operators(graph)):
        raise UsageError(
            f"{path} was not written: its graph contains {', '.join(unsupported)}, which other programs do not support "
            "- export to .pt2"
        )
    if half:
        _halve(graph)
    return graph


def foreign_operators(graph: Any) -> set[str]:
    """Return the operators of an ONNX graph that TensorRT, OpenVINO or CoreML do not support."""
    operators = FORBIDDEN & {node.op_type for node in graph.graph.node}
    operators |= {f"{node.domain}.{node.op_type}" for node in graph.graph.node if node.domain not in ("", "ai.onnx")}
    indices = any(node.op_type == "MaxPool" and len(node.output) > 1 and node.output[1] for node in graph.graph.node)
    return operators | ({"MaxPool with indices"} if indices else set())


def _halve(graph: Any) -> None:
    """Store weights of two or more dimensions as float16, each followed by a Cast to float32.

    The mean of 16-bit images can exceed the range of float16, so what becomes infinite stays float32; `round_to_half`
    has refused such weights of the network.
    """
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in graph.graph.initializer:
        if weight.data_type == TensorProto.FLOAT and len(weight.dims) > 1:
            name = weight.name
            with np.errstate(over="ignore"):
                half = numpy_helper.to_array(weight).astype(np.float16)
            if not np.isfinite(half).all():
                continue
            weight.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    others = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*casts, *others])


def round_to_half(network: Module, path: Path) -> Module:
    """Round the weights of a network in place to the float16 values that --half stores, and return the network.

    Args:
        network: The network, in float32.
        path: The file that will be written, for error messages.

    Raises:
        UsageError: A weight exceeds the range of float16.
    """
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
            if not bool(torch.isfinite(parameter).all()):
                raise UsageError(f"{path} was not written: {name} exceeds the range of float16 - leave out --half")
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings and logs of torch's exporter."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
