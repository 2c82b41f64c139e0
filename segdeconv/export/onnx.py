"""ONNX: the graph of a traced network, held to what other programs run."""

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
Runner = Callable[[np.ndarray], np.ndarray]  # what a file gives for an input

OPSET = 18  # of 2022, so that other programs know it
LARGEST = 2**31 - 1  # bytes of an ONNX file: of a protocol buffer

# TensorRT, OpenVINO and CoreML know none of these, or not with free sizes; nor a MaxPool that gives its indices.
FORBIDDEN = {
    "GatherElements", "GatherND", "If", "Loop", "MaxUnpool", "NonZero", "Scan", "Scatter", "ScatterElements",
    "ScatterND",
}  # fmt: skip


def require_libraries() -> dict[str, str]:
    """The versions of what writes and runs ONNX, or one sentence."""
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
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})[0]


def convert(program: ExportedProgram, *, axes: str, output: str, half: bool, path: Path) -> Any:
    """A traced network as a protocol buffer of ONNX, of which no operator is foreign to other programs.

    axes: of the input, such as NCHW, whose name is `image`. output: its name. half: keep weights in 16 bits.
    path: for the sentence if it cannot be.
    """
    size = sum(weight.nbytes for weight in program.state_dict.values())
    if size // (2 if half else 1) > LARGEST:
        raise UsageError(f"{path} would be larger than 2 GB, which ONNX files cannot be - write .pt2, or take --half")
    with _quiet():
        graph: Any = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=[output],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        ).model_proto  # type: ignore[union-attr]  # of dynamo=True it is a program
    (given,), (gives,) = graph.graph.input, graph.graph.output
    for value, names in ((given, axes), (gives, "NHW" if output == "labels" else "NCHW")):
        for dimension, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
            if name != "C":
                dimension.dim_param = name
    del graph.graph.value_info[:]  # shapes in between, in the exporter's own names
    for node in graph.graph.node:  # where in which file of this machine each came from
        del node.metadata_props[:]
        node.ClearField("doc_string")
    if wrong := sorted(foreign_operators(graph)):
        raise UsageError(f"{path} was not written: its graph has {', '.join(wrong)}, which other programs do not run")
    if half:
        _halve(graph)
    return graph


def foreign_operators(graph: Any) -> set[str]:
    """What stands in an ONNX graph that TensorRT, OpenVINO or CoreML would not take."""
    found = FORBIDDEN & {node.op_type for node in graph.graph.node}
    found |= {f"{node.domain}.{node.op_type}" for node in graph.graph.node if node.domain not in ("", "ai.onnx")}
    indices = any(node.op_type == "MaxPool" and len(node.output) > 1 and node.output[1] for node in graph.graph.node)
    return found | ({"MaxPool with indices"} if indices else set())


def _halve(graph: Any) -> None:
    """Weights of two dimensions or more as float16, each with a Cast to float32 behind it."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in graph.graph.initializer:
        if weight.data_type == TensorProto.FLOAT and len(weight.dims) > 1:
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    others = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*casts, *others])


def rounded(network: Module, path: Path) -> Module:
    """The network with the weights that --half keeps, in float32."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
            if not bool(torch.isfinite(parameter).all()):
                raise UsageError(f"{path} was not written: {name} is beyond what float16 holds - leave out --half")
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter has to say to its developers."""
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
