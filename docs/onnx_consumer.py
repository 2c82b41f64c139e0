"""Predict an image with an exported network, using numpy, Pillow and onnxruntime, without torch or segdeconv.

    python onnx_consumer.py NETWORK.onnx IMAGE MASK.png

For networks trained on 8-bit RGB images. NETWORK.json describes the preprocessing.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def resize_matrix(before, after, average):  # (after, before): weight of each old cell in each new one
    scale, old, new = before / after, np.arange(before), np.arange(after)[:, None]
    if average:
        return np.clip(np.minimum(old + 1, (new + 1) * scale) - np.maximum(old, new * scale), 0, None) / scale
    return np.clip(1 - abs(np.clip((new + 0.5) * scale - 0.5, 0, before - 1) - old), 0, None)


def resized(maps, size, average=False):  # (C, h, w) -> (C, *size) float32: area average, or bilinear
    rows, columns = (resize_matrix(*sides, average) for sides in zip(maps.shape[1:], size, strict=True))
    return np.float32(rows @ maps @ columns.T)


def predict(network, path):
    card = json.loads(network.with_suffix(".json").read_text())
    spec, preprocessing = card["input"], card["preprocessing"]
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    pixels = np.asarray(image).transpose(2, 0, 1)
    whole = pixels.shape[1:]
    if preprocessing["done_by"] == "you":
        if size := preprocessing["size"]:
            pixels = np.floor(resized(pixels, size, size[0] < whole[0] and size[1] < whole[1]) + 0.5)
        mean, std = (np.float32(preprocessing[name])[:, None, None] for name in ("mean", "std"))
        pixels = (pixels - mean) / std
        pixels = pixels[::-1] if spec["channels"] == "bgr" else pixels
    height, width = pixels.shape[1:]
    padded_size = [max(spec["minimum_size"], side) for side in (height, width)]
    padded = np.empty((3, *padded_size), pixels.dtype)
    padded[:] = np.reshape(spec["fill"], (-1, 1, 1))
    padded[:, :height, :width] = pixels
    batch = padded[None] if spec["axes"] == "NCHW" else padded.transpose(1, 2, 0)[None]
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {spec["name"]: np.ascontiguousarray(batch)})
    result = result[0][..., :height, :width]
    if card["output"]["name"] == "logits":
        result = resized(result, whole).argmax(axis=0).astype(np.uint8)
    mask = Image.fromarray(result)
    mask.putpalette([channel for entry in card["classes"] for channel in entry["colour"]])
    return mask


if __name__ == "__main__":
    predict(Path(sys.argv[1]), Path(sys.argv[2])).save(sys.argv[3])
