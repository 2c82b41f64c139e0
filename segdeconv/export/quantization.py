"""8-bit ONNX files by ONNX Runtime's static quantisation: pairs of QuantizeLinear and DequantizeLinear nodes.

A runtime that knows such pairs computes the convolutions in integers. The maps that are pooled are rounded to codes
first, so that switches are decided by the numbers that are pooled.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segdeconv.data.preprocessing import resize_image, stacked
from segdeconv.export.module import Exported
from segdeconv.export.onnx import Runner
from segdeconv.inference.codes import MAX_FILTER_CODE, filter_scales
from segdeconv.inference.scorers import labels


def quantize_file(path: Path, exported: Exported, images: Iterable[np.ndarray]) -> None:
    """Replace an ONNX file by its 8-bit form.

    Args:
        path: The file.
        exported: The network in it.
        images: Images as stored, (H, W, C), on which the ranges of the maps are measured.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    batches = iter([{"image": as_input(exported, image)} for image in images])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(batches, None)

    logger, before = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)  # it advises to run a preprocessing whose work torch's exporter has done
    try:
        quantize_static(
            path,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "CalibMovingAverage": True,
                "CalibMovingAverageConstant": 0.1,
                "TensorQuantOverrides": _filter_ranges(path),
            },
        )
    finally:
        logger.setLevel(before)


def _filter_ranges(path: Path) -> dict[str, list[dict[str, float]]]:
    """Return the range of every filter of the convolutions of an ONNX file, as `quantize_static` takes them."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    names = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    ranges = {}
    for tensor in graph.initializer:
        if tensor.name in names:
            limits = MAX_FILTER_CODE * filter_scales(torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float32)))
            ranges[tensor.name] = [{"axis": 0, "rmin": -limit, "rmax": limit} for limit in limits.tolist()]
    return ranges


def as_input(exported: Exported, image: np.ndarray) -> np.ndarray:
    """Return the input of an exported file for an image as stored, (H, W, C)."""
    if exported.pixels:
        batch = image[None]
        return np.ascontiguousarray(batch if exported.pixels == "nhwc" else batch.transpose(0, 3, 1, 2))
    size = exported.preprocessing.size
    resized = image if size is None else resize_image(image, size)
    return exported.preprocessing.normalised(stacked([resized])).contiguous().numpy()


def predictor(run_file: Runner, exported: Exported) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that predicts the (H, W) uint8 class indices of an image as stored, (H, W, C), with a file."""

    def predict(image: np.ndarray) -> np.ndarray:
        result = torch.from_numpy(run_file(as_input(exported, image)))
        return (result if exported.argmax else labels(result, (image.shape[0], image.shape[1])))[0].numpy()

    return predict
