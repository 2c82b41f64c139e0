"""Label a picture with an exported network: numpy, Pillow and onnxruntime, without torch and without segdeconv.

    python onnx_consumer.py NETWORK.onnx PICTURE MASK.png

For networks of 8-bit RGB pictures. What to do comes from NETWORK.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def shares(before, after, average):  # (after, before): how much of each old cell is in each new one
    scale, old, new = before / after, np.arange(before), np.arange(after)[:, None]
    if average:
        return np.clip(np.minimum(old + 1, (new + 1) * scale) - np.maximum(old, new * scale), 0, None) / scale
    return np.clip(1 - abs(np.clip((new + 0.5) * scale - 0.5, 0, before - 1) - old), 0, None)


def resized(maps, size, average=False):  # (C, h, w) -> (C, *size) float32: area average, or bilinear
    rows, columns = (shares(*sides, average) for sides in zip(maps.shape[1:], size, strict=True))
    return np.float32(rows @ maps @ columns.T)


def label(network, picture):
    card = json.loads(network.with_suffix(".json").read_text())
    given, prepare = card["input"], card["preprocessing"]
    image = ImageOps.exif_transpose(Image.open(picture)).convert("RGB")
    pixels = np.asarray(image).transpose(2, 0, 1)
    whole = pixels.shape[1:]
    if prepare["done_by"] == "you":
        if size := prepare["size"]:
            pixels = np.floor(resized(pixels, size, size[0] < whole[0] and size[1] < whole[1]) + 0.5)
        mean, std = (np.float32(prepare[name])[:, None, None] for name in ("mean", "std"))
        pixels = (pixels - mean) / std
        pixels = pixels[::-1] if given["channels"] == "bgr" else pixels
    height, width = pixels.shape[1:]
    least = [max(given["minimum_size"], side) for side in (height, width)]
    padded = np.empty((3, *least), pixels.dtype)
    padded[:] = np.reshape(given["fill"], (-1, 1, 1))
    padded[:, :height, :width] = pixels
    batch = padded[None] if given["axes"] == "NCHW" else padded.transpose(1, 2, 0)[None]
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {given["name"]: np.ascontiguousarray(batch)})
    result = result[0][..., :height, :width]
    if card["output"]["name"] == "logits":
        result = resized(result, whole).argmax(axis=0).astype(np.uint8)
    mask = Image.fromarray(result)
    mask.putpalette([channel for one in card["classes"] for channel in one["colour"]])
    return mask


if __name__ == "__main__":
    label(Path(sys.argv[1]), Path(sys.argv[2])).save(sys.argv[3])
