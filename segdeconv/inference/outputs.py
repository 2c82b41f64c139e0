"""The files that a batch prediction writes for each image or video."""

import io
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.annotations.polygons import regions
from segdeconv.data.files.reading import turn_back, turned_view
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.inputs import FileNames, is_video, output_path
from segdeconv.inference.segmenter import Prediction
from segdeconv.inference.tiling import Part
from segdeconv.inference.video_writer import video_suffix
from segdeconv.system.files import allocate, hash_text, replacing, replacing_path
from segdeconv.system.own_files import FRAME

MAX_CLASS_LENGTH = 100  # bytes of a class in a file name


@dataclass(frozen=True)
class Outputs:
    """The files written for each image NAME, in addition to its mask NAME.png.

    Attributes:
        out: Output folder.
        overlay: Write NAME_overlay.png; for a video, NAME_overlay.webm, or NAME_overlay.mp4 without ffmpeg.
        outlines: Overlays show only the outlines of the regions.
        window: The window in which overlays show the images; None for `draw.to_rgb`.
        probabilities: Write NAME.npy, (classes, H, W) float16.
        uncertainty: Write NAME_uncertainty.png.
        class_masks: Write NAME_CLASS.png for each class: 255 where the class is, 0 elsewhere.
        polygons: Write NAME_regions.json.
        frames: Write the mask of each frame of a video, NAME/000001.png and so on.
        labels: Values of the masks: class indices, or the labels or colours of the data set's own masks.
    """

    out: Path
    classes: Classes
    overlay: bool = True
    outlines: bool = False
    window: draw.Window | None = None
    probabilities: bool = False
    uncertainty: bool = False
    class_masks: bool = False
    polygons: bool = False
    frames: bool = False
    labels: draw.Labels = "index"

    def endings(self) -> list[str]:
        """Return the file name endings of all outputs of an image or a video.

        Raises:
            UsageError: Two outputs of an image would be one file.
        """
        owners = {".png": "the mask"}
        if self.overlay:
            owners |= dict.fromkeys(("_overlay.png", "_overlay.webm", "_overlay.mp4"), "the overlay")
        if self.probabilities:
            owners[".npy"] = "the probabilities"
        if self.uncertainty:
            owners["_uncertainty.png"] = "the uncertainty"
        if self.polygons:
            owners["_regions.json"] = "the polygons"
        names = FileNames("--class-masks: ", "leave out --class-masks and take the classes from the masks")
        for ending, owner in owners.items():
            names.add(f"NAME{ending}", owner)
        for name in self.classes.names if self.class_masks else ():
            ending = f"_{_file_name(name)}.png"
            names.add(f"NAME{ending}", f"class '{name}'")
            owners[ending] = name
        names.warn()
        return list(owners)

    def planned(self, images: Mapping[str, Path]) -> tuple[list[Path], list[Path]]:
        """Return all files that a batch prediction writes, and the folders of the frames of videos.

        Args:
            images: Path of each image or video by the name of its outputs.

        Raises:
            UsageError: A file would be a folder of another output, or a frame of a video.
        """
        endings = self.endings()
        files = [self.out / name for name in ("statistics.csv", *(["regions.json"] if self.polygons else []))]
        frame_folders = []
        for name, path in images.items():
            video = is_video(path)
            if not video:
                files += [self.path(name, ending) for ending in endings if not ending.endswith((".webm", ".mp4"))]
            elif self.overlay:
                files.append(self.path(name, self.video_ending))
            if video and self.frames:
                frame_folders.append(self.out / name)
        way_out = "use two --out folders"
        folders = {folder for path in files for folder in path.parents} | set(frame_folders)
        frames = set(frame_folders)
        for path in files:
            if path in folders:
                raise UsageError(f"{path} would be an output file and a folder of other outputs - {way_out}")
            if path.parent in frames and FRAME.fullmatch(path.name):
                raise UsageError(f"{path} would be the output of an image and a frame of a video - {way_out}")
        return files, frame_folders

    @property
    def video_ending(self) -> str:
        """The file name ending of the overlay of a video."""
        return f"_overlay{video_suffix()}"

    def path(self, name: str, ending: str) -> Path:
        """Return the path of one output file."""
        return output_path(self.out, name, ending)

    def write(self, name: str, prediction: Prediction, bounded: bool) -> list[Path]:
        """Write the mask, figures and polygons of an image, and return the files written.

        Args:
            bounded: The uncertainty is in 0..1; otherwise its figure is scaled to its maximum.
        """
        mask = turn_back(prediction.mask, prediction.orientation)  # as the image is stored in its file
        files = [self.path(name, ".png")]
        draw.save_mask(mask, self.classes, files[0], labels=self.labels)
        if self.overlay:
            files.append(self.path(name, "_overlay.png"))
            image = draw.windowed(prediction.image, self.window)
            draw.save_overlay(image, prediction.mask, self.classes, files[-1], outlines=self.outlines)
        if prediction.uncertainty is not None:
            files.append(self.path(name, "_uncertainty.png"))
            top = 1.0 if bounded else float(prediction.uncertainty.max())
            draw.save_image(draw.heat(prediction.uncertainty, top), files[-1])
        if self.class_masks:
            for index, class_name in enumerate(self.classes.names):
                files.append(self.path(name, f"_{_file_name(class_name)}.png"))
                draw.save_image(np.where(mask == index, np.uint8(255), np.uint8(0)), files[-1])
        if self.polygons:
            files.append(self.path(name, "_regions.json"))
            confidence = prediction.confidence
            if confidence is not None:
                confidence = turn_back(confidence, prediction.orientation)
            numbered_regions = enumerate(regions(mask, confidence=confidence), start=1)
            content = {
                "image": {"file_name": name, "height": mask.shape[0], "width": mask.shape[1]},
                "annotations": [region.annotation(number, 1) for number, region in numbered_regions],
            }
            with replacing(files[-1]) as file:
                file.write(json.dumps(content).encode())
        return files

    @contextmanager
    def sink(self, name: str, size: tuple[int, int], orientation: int) -> Iterator[Callable[[Part, np.ndarray], None]]:
        """Open NAME.npy and yield a function that writes the probabilities of one part of the image to it.

        The array is memory-mapped, so the probabilities of the whole image are never held in memory.
        """
        path = self.path(name, ".npy")
        stored_size = size if orientation < 5 else size[::-1]  # EXIF orientations 5 to 8 swap rows and columns
        with replacing_path(path) as partial:
            shape = (len(self.classes), *stored_size)
            header = io.BytesIO()
            description = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(header, {**description, "shape": shape})
            allocate(partial, header.tell() + math.prod(shape) * np.dtype(np.float16).itemsize)
            with partial.open("r+b") as file:
                file.write(header.getvalue())
            array = np.lib.format.open_memmap(partial, mode="r+")

            def write_part(part: Part, values: np.ndarray) -> None:
                for channel, class_values in zip(array, values, strict=True):
                    turned_view(channel, orientation)[slice(*part[0]), slice(*part[1])] = class_values

            yield write_part
            array.flush()


def _file_name(class_name: str) -> str:
    """Replace the characters of a class name that may be unsafe in a file name, and truncate a long one."""
    # \w has no combining marks, without which words of many scripts become the same.
    kept = [letter if unicodedata.category(letter)[0] in "LMN" or letter in "_.-" else " " for letter in class_name]
    name = re.sub(" +", "_", "".join(kept))
    encoding = sys.getfilesystemencoding()
    name = name.encode(encoding, errors="replace").decode(encoding).replace("?", "_")
    if len(os.fsencode(name)) <= MAX_CLASS_LENGTH:
        return name
    return f"{os.fsencode(name)[:MAX_CLASS_LENGTH].decode(encoding, errors='ignore')}~{hash_text(class_name)[:8]}"
