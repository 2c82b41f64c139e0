"""The files that a batch prediction writes for each image or video."""

import io
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.annotations.polygons import regions
from segdeconv.data.files.geo import is_raster, write_raster
from segdeconv.data.files.reading import turn_back
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference import rasters
from segdeconv.inference.inputs import FileNames, is_video, output_path
from segdeconv.inference.output_folder import OutputFolder
from segdeconv.inference.segmenter import OpenedImage, Prediction, Sink
from segdeconv.inference.vectors import write_geojson, write_geopackage
from segdeconv.inference.video_writer import video_suffix
from segdeconv.system.files import allocate, hash_text, replacing, replacing_path
from segdeconv.system.own_files import FRAME

REGION_SUFFIXES = {"coco": "json", "geojson": "geojson", "gpkg": "gpkg"}
STATISTICS, PARQUET, REGIONS = "statistics.csv", "statistics.parquet", "regions.json"
MAX_CLASS_LENGTH = 100  # bytes of a class in a file name


@dataclass(frozen=True)
class Outputs:
    """The files written for each image NAME, in addition to its mask NAME.png.

    Where rasterio is installed, the files of a georeferenced image are GeoTIFFs, except for the overlay: NAME.tif with
    the class names in NAME.tif.aux.xml, NAME_probabilities.tif, NAME_uncertainty.tif and NAME_CLASS.tif.

    Attributes:
        folder: Output folder.
        overlay: Write NAME_overlay.png; for a video, NAME_overlay.webm, or NAME_overlay.mp4 without ffmpeg.
        outlines: Overlays show only the outlines of the regions.
        window: The window in which overlays show the images; None for `draw.to_rgb`.
        probabilities: Write NAME.npy, (classes, H, W) float16.
        uncertainty: Write NAME_uncertainty.png.
        class_masks: Write NAME_CLASS.png for each class: 255 where the class is, 0 elsewhere.
        polygons: The formats of the regions: `coco` is NAME_regions.json, `geojson` NAME_regions.geojson and `gpkg`
            NAME_regions.gpkg; `auto` is coco, and for georeferenced images geojson too.
        keep_background: Write the regions of the background (`Classes.background`) too.
        parquet: Write statistics.parquet, the table statistics.csv with its types.
        frames: Write the mask of each frame of a video, NAME/000001.png and so on.
        labels: Values of the masks: class indices, or the labels or colours of the data set's own masks.
    """

    folder: OutputFolder
    classes: Classes
    overlay: bool = True
    outlines: bool = False
    window: draw.Window | None = None
    probabilities: bool = False
    uncertainty: bool = False
    class_masks: bool = False
    polygons: tuple[str, ...] = ()
    keep_background: bool = False
    parquet: bool = False
    frames: bool = False
    labels: draw.Labels = "index"

    @property
    def out(self) -> Path:
        """The folder on a disk that files are written to, see `OutputFolder.path`."""
        return self.folder.path

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
        owners |= {f"_regions.{REGION_SUFFIXES[name]}": "the polygons" for name in self.region_formats(True)}
        names = FileNames("--class-masks: ", "leave out --class-masks and take the classes from the masks")
        for ending, owner in owners.items():
            names.add(f"NAME{ending}", owner)
        if self.probabilities:
            names.add("NAME_probabilities.png", owners[".npy"])  # a .tif, as a class mask of a georeferenced image is
        for name in self.classes.names if self.class_masks else ():
            ending = f"_{_file_name(name)}.png"
            names.add(f"NAME{ending}", f"class '{name}'")
            owners[ending] = name
        names.warn()
        return list(owners)

    def planned(self, images: Mapping[str, Path], *, tables: bool = True) -> tuple[list[Path], list[Path]]:
        """Return all files that a batch prediction writes, and the folders of the frames of videos.

        Args:
            images: Path of each image or video by the name of its outputs.
            tables: Whether the tables of all images are among them.

        Raises:
            UsageError: A file would be a folder of another output, or a frame of a video.
        """
        endings = self.endings()
        files = [self.out / name for name in self.tables()] if tables else []
        frame_folders = []
        for name, path in images.items():
            video = is_video(path)
            if not video:
                own = [ending for ending in endings if not ending.endswith((".webm", ".mp4"))]
                if is_raster(path):
                    own = [each for ending in own for each in _raster_endings(ending)]
                files += [self.path(name, ending) for ending in own]
            elif self.overlay:
                files.append(self.path(name, self.video_ending))
            if video and self.frames:
                frame_folders.append(self.out / name)
        way_out = "use two --out folders"
        folders = {folder for path in files for folder in path.parents} | set(frame_folders)
        frames = set(frame_folders)
        for path in files:
            if path in folders:
                raise UsageError(
                    f"{self.folder.shown(path)} would be an output file and a folder of other outputs - {way_out}"
                )
            if path.parent in frames and FRAME.fullmatch(path.name):
                raise UsageError(
                    f"{self.folder.shown(path)} would be the output of an image and a frame of a video - {way_out}"
                )
        return files, frame_folders

    @property
    def video_ending(self) -> str:
        """The file name ending of the overlay of a video."""
        return f"_overlay{video_suffix()}"

    def tables(self) -> list[str]:
        """Return the names of the tables of all images."""
        regions = [REGIONS] if "coco" in self.region_formats(False) else []
        return [STATISTICS, *([PARQUET] if self.parquet else []), *regions]

    def path(self, name: str, ending: str) -> Path:
        """Return the path of one output file."""
        return output_path(self.out, name, ending)

    def region_formats(self, georeferenced: bool) -> tuple[str, ...]:
        """Return the formats in which the regions of an image are written."""
        if "auto" in self.polygons:
            return ("coco", "geojson") if georeferenced else ("coco",)
        return self.polygons

    def mask_path(self, name: str, source: Path) -> Path:
        """Return the path of the mask of an image."""
        return self.path(name, ".tif" if is_raster(source) else ".png")

    def write(self, name: str, source: Path, prediction: Prediction, bounded: bool) -> list[Path]:
        """Write the mask, figures and polygons of an image, and return the files written.

        Args:
            name: Name of the outputs.
            source: Path of the image.
            prediction: Its prediction.
            bounded: The uncertainty is in 0..1; otherwise its figure is scaled to its maximum.
        """
        mask = turn_back(prediction.mask, prediction.orientation)  # as the image is stored in its file
        reference = prediction.reference
        files = [self.path(name, ".png" if reference is None else ".tif")]
        if reference is None:
            draw.save_mask(mask, self.classes, files[0], labels=self.labels)
        else:
            files = rasters.save_mask(mask, self.classes, files[0], reference, labels=self.labels)
        if self.overlay:
            files.append(self.path(name, "_overlay.png"))
            image = draw.windowed(prediction.image, self.window)
            draw.save_overlay(image, prediction.mask, self.classes, files[-1], outlines=self.outlines)
        if prediction.uncertainty is not None:
            files.append(self.path(name, "_uncertainty.png" if reference is None else "_uncertainty.tif"))
            if reference is None:
                top = 1.0 if bounded else float(prediction.uncertainty.max())
                draw.save_image(draw.heat(prediction.uncertainty, top), files[-1])
            else:
                uncertainty = turn_back(prediction.uncertainty, prediction.orientation)
                rasters.save_map(uncertainty, mask == self.classes.ignore_index, files[-1], reference)
        if self.class_masks:
            for index, class_name in enumerate(self.classes.names):
                files.append(self.path(name, f"_{_file_name(class_name)}{'.png' if reference is None else '.tif'}"))
                shown = np.where(np.arange(256) == index, np.uint8(255), np.uint8(0))
                if reference is None:
                    draw.save_image(shown[mask], files[-1])
                else:
                    write_raster(files[-1], mask, reference, lookup=shown)
        if self.polygons:
            files += self._write_regions(name, source, mask, prediction)
        return files

    def _write_regions(self, name: str, source: Path, mask: np.ndarray, prediction: Prediction) -> list[Path]:
        confidence, background = prediction.confidence, self.classes.background
        if confidence is not None:
            confidence = turn_back(confidence, prediction.orientation)
        left_out = {self.classes.ignore_index}
        if background is not None and not self.keep_background:
            left_out.add(background)
        found = list(regions(mask, confidence=confidence, without=left_out))
        files = []
        reference, file_name = prediction.reference, source.as_posix()
        for kind in self.region_formats(reference is not None):
            files.append(self.path(name, f"_regions.{REGION_SUFFIXES[kind]}"))
            if kind == "geojson":
                write_geojson(files[-1], found, self.classes, file_name, reference)
            elif kind == "gpkg":
                write_geopackage(files[-1], found, self.classes, file_name, reference)
            else:
                pixel_area = None if reference is None else reference.pixel_area
                content = {
                    "image": {"file_name": file_name, "height": mask.shape[0], "width": mask.shape[1]},
                    "annotations": [
                        region.annotation(number, 1, pixel_area) for number, region in enumerate(found, start=1)
                    ],
                }
                with replacing(files[-1]) as file:
                    file.write(json.dumps(content).encode())
        return files

    @contextmanager
    def sink(self, name: str, opened: OpenedImage) -> Iterator[tuple[Path, Sink]]:
        """Open the file of the probabilities and yield it with a function that writes those of one part of the image.

        The probabilities of the whole image are never held in memory.
        """
        height, width = opened.image.shape[:2]
        stored_size = (height, width) if opened.orientation < 5 else (width, height)  # 5 to 8 swap rows and columns
        shape = (len(self.classes), *stored_size)
        if opened.reference is not None:
            path = self.path(name, "_probabilities.tif")
            with rasters.probabilities(
                path,
                shape,
                opened.reference,
                names=self.classes.names,
                nodata=opened.nodata,
                orientation=opened.orientation,
            ) as write_part:
                yield path, write_part
            return
        path = self.path(name, ".npy")
        with replacing_path(path) as partial:
            header = io.BytesIO()
            description = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(header, {**description, "shape": shape})
            allocate(partial, header.tell() + math.prod(shape) * np.dtype(np.float16).itemsize)
            with partial.open("r+b") as file:
                file.write(header.getvalue())
            array = np.lib.format.open_memmap(partial, mode="r+")
            yield path, rasters.part_writer(array, opened.orientation)
            array.flush()


def _raster_endings(ending: str) -> list[str]:
    """Return the endings of the files of a georeferenced image in place of that of another image."""
    if ending == ".npy":
        return ["_probabilities.tif"]
    if ending == ".png":
        return [".tif", f".tif{rasters.NAMES}"]
    if ending.endswith(".png") and ending != "_overlay.png":
        return [f"{ending[:-4]}.tif"]
    return [ending]


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
