"""The segmenter, which predicts the masks of images of any size with a trained network."""

import io
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, get_args, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from segdeconv.checkpoints import checkpoint
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.data.files.decoding import header_pixels
from segdeconv.data.files.geo import Georeference, read_georeference
from segdeconv.data.files.reading import MAX_PIXELS, read_upright, turn_back, turn_upright
from segdeconv.data.pixels import as_image
from segdeconv.data.resizing import ResizedImages
from segdeconv.drawing import draw, notebook
from segdeconv.errors import UsageError, did_you_mean, first_line
from segdeconv.inference import rasters
from segdeconv.inference.network import Network
from segdeconv.inference.predictors import PredictionSettings, build_predictor
from segdeconv.inference.scorers import entropy_of, labels, labels_and_confidence
from segdeconv.inference.small_regions import merge_small_regions
from segdeconv.inference.tiling import Part
from segdeconv.models import SegmentationModel
from segdeconv.system.devices import named_device
from segdeconv.system.files import scratch_array
from segdeconv.system.memory import keep_freed, release_memory

LARGE_IMAGE = 1 << 24  # pixels; for larger images, freed memory is returned to the system at once
MEMORY_MAPPED = 1 << 26  # pixels; the maps of larger rasters are kept in files
ORIENTATIONS = range(1, 9)  # of EXIF
GEOTIFF = (".tif", ".tiff")

ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray | Tensor

# Called with a part of the image and its (C, h, w) float32 probabilities.
Sink = Callable[[Part, np.ndarray], None]


@dataclass(frozen=True)
class OpenedImage:
    """An image as read from its file.

    Attributes:
        image: (H, W, channels), upright.
        orientation: EXIF orientation of the file, 1 to 8.
        reference: Where it lies on the Earth, if it is georeferenced and rasterio is installed.
        nodata: (H, W) bool, upright, True for pixels without data; None if there are none.
        scratch: Folder of the files that hold the image, if it is larger than what is kept in memory.
    """

    image: np.ndarray
    orientation: int
    reference: Georeference | None = None
    nodata: np.ndarray | None = None
    scratch: Path | None = None


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one image; image and maps are upright.

    Attributes:
        image: (H, W, channels) as read.
        mask: (H, W) uint8 class indices, after small regions were merged (`PredictionSettings.min_area`);
            `classes.ignore_index` where a georeferenced image has no data.
        uncertainty: (H, W) float16 if requested: with samples, the variance averaged over the classes; otherwise the
            entropy of the probabilities divided by its maximum, in 0..1.
        confidence: (H, W) float16 if requested: the probability of the most probable class.
        orientation: EXIF orientation of the image's file.
        repeat: Repeats the prediction and passes the probabilities to a sink.
        reference: Where the image lies on the Earth, if it is georeferenced and rasterio is installed.
    """

    image: np.ndarray
    mask: np.ndarray
    classes: Classes
    uncertainty: np.ndarray | None
    confidence: np.ndarray | None
    orientation: int
    repeat: Callable[[Sink], None]
    reference: Georeference | None = None

    def __repr__(self) -> str:
        total, counts = self.mask.size, sorted(self.pixels().items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in counts if count)
        return f"Prediction({self.mask.shape[0]}x{self.mask.shape[1]} (HxW): {shares})"

    def _repr_html_(self) -> str:
        """Return the overlay and the classes, as a notebook shows them."""
        return notebook.html(self.image, self.mask, self.classes)

    def _repr_png_(self) -> bytes:
        """Return the overlay with its legend, for a notebook that shows no HTML."""
        return notebook.png(self.image, self.mask, self.classes)

    def probabilities(self) -> np.ndarray:
        """Compute the probabilities, (C, H, W) float32, with another forward pass."""
        probabilities = np.empty((len(self.classes), *self.mask.shape), dtype=np.float32)

        def write_part(part: Part, values: np.ndarray) -> None:
            probabilities[:, slice(*part[0]), slice(*part[1])] = values

        self.repeat(write_part)
        return probabilities

    def pixels(self) -> dict[str, int]:
        """Return the number of pixels of each class."""
        return dict(zip(self.classes.names, draw.pixel_counts(self.mask), strict=False))

    def overlay(self, *, outlines: bool = False, window: tuple[float, float] | None = None) -> np.ndarray:
        """Draw the mask over the image, with a legend below: (H', W', 3) uint8. Small images are enlarged.

        Args:
            outlines: Draw only the outlines of the regions.
            window: The values of the image that are shown as black and as white; by default, those of a 16-bit image
                are stretched as in `draw.to_rgb`.
        """
        image = draw.windowed(self.image, draw.Window(*window) if window else None)
        return draw.overlay_with_legend(image, self.mask, self.classes, outlines=outlines)

    def save(self, path: str | Path, *, labels: draw.Labels = "index") -> None:
        """Write the mask as a PNG, or as a GeoTIFF, in the orientation of the image's file.

        Args:
            path: The file, which ends in .png; that of a georeferenced image is a GeoTIFF if it ends in .tif or .tiff.
            labels: See `draw.save_mask`.

        Raises:
            UsageError: The file's name has another ending, or `labels` is unknown.
        """
        suffix, kinds = Path(path).suffix.lower(), get_args(draw.Labels)
        if labels not in kinds:
            raise UsageError(f"labels={labels!r} is unknown - give {' or '.join(map(repr, kinds))}")
        if suffix != ".png" and (self.reference is None or suffix not in GEOTIFF):
            raise UsageError(
                f"{str(path) or repr('')}: masks are PNGs, or GeoTIFFs of georeferenced images, since many formats "
                "would change labels - give a name that ends in .png, such as mask.png"
            )
        mask = turn_back(self.mask, self.orientation)
        if self.reference is not None and suffix in GEOTIFF:
            rasters.save_mask(mask, self.classes, Path(path), self.reference, labels=labels)
        else:
            draw.save_mask(mask, self.classes, Path(path), labels=labels)


class Segmenter:
    """A checkpoint's network that predicts the masks of images. Threads can share it; they predict one at a time.

    Args:
        checkpoint: The checkpoint, from `checkpoint.read`.
        settings: Prediction settings; by default one forward pass, in tiles if an image exceeds the available memory.
        device: The device; None for the best one available.
        report: Called with a message when prediction deviates from the settings, for example with smaller tiles.
        at_once: See `ResizedImages`.

    Attributes:
        resized: A count of the images whose scale the network's input size changes a lot.

    Raises:
        UsageError: The checkpoint does not support the settings.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: PredictionSettings | None = None,
        *,
        device: torch.device | None = None,
        report: Callable[[str], None] = print,
        at_once: bool = False,
    ) -> None:
        self.checkpoint, self.settings = checkpoint, settings or PredictionSettings()
        self.classes, self.preprocessing = checkpoint.classes, checkpoint.preprocessing
        self.max_pixels = checkpoint.config["dataset"].get("max_pixels") or MAX_PIXELS
        self.network = Network.of(
            checkpoint,
            device=device,
            precision=self.settings.precision,
            ranges=self.settings.ranges,
            flip=self.settings.flip,
            samples=self.settings.samples,
        )
        self.predictor = build_predictor(checkpoint, self.network, self.settings, report=report)
        # Regions are meant to be resized.
        self.resized = ResizedImages(None if self.settings.regions else self.preprocessing.size, at_once=at_once)
        self._report = report
        self._lock = threading.RLock()  # a sink may predict too

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild the segmenter in another process, or as a copy: it holds a lock and a prepared network."""
        rebuild = partial(Segmenter, device=self.network.device, report=self._report, at_once=self.resized.at_once)
        return rebuild, (self.checkpoint, self.settings)

    def __repr__(self) -> str:
        network = type(self.network.source).__name__
        return (
            f"Segmenter({str(self.checkpoint.path)!r}: {network}, {len(self.classes)} classes, {self.network.device})"
        )

    @cached_property
    def float32_model(self) -> SegmentationModel:
        """The network in float32, prepared for inference, for gradients and single activations."""
        if self.network.precision == "32-true":
            return self.network.model
        return Network.of(self.checkpoint, device=self.network.device, precision="32-true").model

    def precision_note(self) -> str | None:
        """Return a line that says which precision `auto` chose, unless it is float32."""
        if self.network.precision == "32-true" or self.settings.precision != "auto":
            return None
        return (
            f"precision: {self.network.precision}, as in training and fast here; exported files compute in "
            "float32, as --precision 32-true does"
        )

    def open(self, path: Path, *, scratch: Path | None = None) -> OpenedImage:
        """Read an image file.

        Args:
            path: The image file.
            scratch: Folder for the pixels of a raster too large for the memory, which rasterio reads part by part.

        Returns:
            The upright image with the channels that the network expects.

        Raises:
            UsageError: The image cannot be read, or is of another kind than the network expects.
        """
        pixels = header_pixels(path)
        if pixels >= LARGE_IMAGE:
            release_memory()
        channels = self.preprocessing.channels if self.preprocessing.as_stored else None
        image, orientation, used = None, 1, None
        if scratch is not None and not 0 < pixels < MEMORY_MAPPED:  # 0: a kind of TIFF that Pillow cannot open
            image, used = rasters.read_large(path, channels, MEMORY_MAPPED, self.max_pixels, scratch), scratch
        if image is None:
            image, orientation = read_upright(path, channels=channels, max_pixels=self.max_pixels)
            used = None
        self.preprocessing.checked(image, path)
        reference = read_georeference(path)
        nodata = None
        if reference is not None:
            stored = image.shape[:2] if orientation < 5 else image.shape[1::-1]
            nodata = rasters.find_nodata(path, (stored[0], stored[1]), all_bands=channels is not None, scratch=used)
        if nodata is not None:
            nodata = turn_upright(nodata, orientation)
        return OpenedImage(image, orientation, reference, nodata, used)

    def open_bytes(self, content: bytes, name: str = "the image") -> OpenedImage:
        """Read the bytes of an image file, like `open`; messages call it `name`."""
        # In a file, since some formats are read by libraries that take nothing else.
        with tempfile.TemporaryDirectory(prefix="segdeconv-") as folder:
            path = Path(folder) / "image"
            path.write_bytes(content)
            try:
                return self.open(path)
            except UsageError as error:
                raise UsageError(str(error).replace(str(path), name)) from None

    @overload
    def predict(
        self,
        image: ImageLike | OpenedImage,
        *,
        name: str = ...,
        orientation: int = ...,
        uncertainty: bool = ...,
        confidence: bool = ...,
        sink: Sink | None = ...,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        image: list[Any] | tuple[Any, ...],
        *,
        name: str = ...,
        orientation: int = ...,
        uncertainty: bool = ...,
        confidence: bool = ...,
        sink: Sink | None = ...,
    ) -> list[Prediction]: ...

    def predict(
        self,
        image: ImageLike | OpenedImage | list[Any] | tuple[Any, ...],
        *,
        name: str = "the image",
        orientation: int = 1,
        uncertainty: bool = False,
        confidence: bool = False,
        sink: Sink | None = None,
    ) -> Prediction | list[Prediction]:
        """Predict the mask of one image, or of each image of a list.

        Args:
            image: The path of a file; a binary file, which is read from its start, or its bytes; what `open` returned;
                a PIL image, whose EXIF orientation is ignored; an array, (H, W, 3), (H, W, 1), (H, W), (3, H, W) or
                (1, H, W), the first that fits; or a tensor of such a shape, where the last two come first. Values are
                uint8, or floats in 0..1; RGB, not normalised. A grey image is predicted as the RGB image with three
                equal channels. A network that was trained on other channels or 16 bits takes those.
            name: Name of the image, for messages and for files that belong to it.
            orientation: EXIF orientation of the file of an array or tensor, 1 to 8, which `Prediction.save` restores.
            uncertainty: Compute the uncertainty of each pixel.
            confidence: Compute the confidence of each pixel.
            sink: Called with the probabilities part by part, so that they are never held in memory as a whole.

        Raises:
            UsageError: The image cannot be read, or is of another kind than the network expects, or there is no such
                orientation.
        """
        if orientation not in ORIENTATIONS:
            raise UsageError(f"orientation={orientation!r} is not an EXIF orientation - give 1 to 8; 1 is upright")
        if isinstance(image, list | tuple):
            return [
                self.predict(
                    item,
                    name=f"{name} {index}",
                    orientation=orientation,
                    uncertainty=uncertainty,
                    confidence=confidence,
                    sink=sink,
                )
                for index, item in enumerate(image)
            ]
        if isinstance(image, str | os.PathLike):
            name = os.fsdecode(image)
            image = self.open(_existing(name))
        elif isinstance(image, bytes | bytearray | memoryview) or hasattr(image, "read"):
            image = self.open_bytes(_content(image, name), name)
        if isinstance(image, OpenedImage):
            self.preprocessing.checked(image.image, name)
        else:
            expected = self.preprocessing
            pixels = as_image(
                image, name, channels=expected.channels, bits=expected.bits, grey_as_rgb=not expected.as_stored
            )
            shape = "" if isinstance(image, Image.Image) else f" of shape {tuple(image.shape)}"
            expected.checked(pixels, f"{name}{shape}")
            # A copy, since the prediction keeps the image, and a camera's buffer gets the next one.
            image = OpenedImage(pixels.copy(), orientation)
        array, nodata, scratch = image.image, image.nodata, image.scratch
        size = (array.shape[0], array.shape[1])
        self.resized.add(name, size)
        if size[0] * size[1] < LARGE_IMAGE:
            keep_freed(self.network.device)
        else:
            release_memory()
        new_map = np.empty if scratch is None else partial(scratch_array, folder=scratch)
        mask = new_map(size, dtype=np.uint8)
        confidences = new_map(size, dtype=np.float16) if confidence else None
        uncertainties = new_map(size, dtype=np.float16) if uncertainty or self.settings.samples else None
        with self._lock:
            for part, scores in self.predictor(array, name):
                area = slice(*part[0]), slice(*part[1])
                if confidences is None:
                    index = labels(scores.values, (scores.values.shape[-2], scores.values.shape[-1]))
                else:
                    index, top = labels_and_confidence(scores)
                    confidences[area] = top[0].cpu().numpy()
                mask[area] = index[0].cpu().numpy()
                if uncertainties is not None and scores.uncertainty is not None:
                    uncertainties[area] = scores.uncertainty[0].cpu().numpy()
                if sink is None and (uncertainties is None or scores.uncertainty is not None):
                    continue
                probabilities = scores.probabilities()
                if uncertainties is not None and scores.uncertainty is None:
                    entropy = entropy_of(probabilities) / np.log(max(2, len(self.classes)))
                    uncertainties[area] = entropy[0].cpu().numpy()
                if sink is not None:
                    sink(part, probabilities[0].cpu().numpy())
        if nodata is not None:
            mask[nodata] = self.classes.ignore_index
        mask = merge_small_regions(mask, self.settings.min_area)
        if nodata is not None:
            mask[nodata] = self.classes.ignore_index  # small gaps in the data were merged too
        repeat = partial(self._predict_to_sink, array, name)
        return Prediction(
            array, mask, self.classes, uncertainties, confidences, image.orientation, repeat, image.reference
        )

    def _predict_to_sink(self, image: np.ndarray, name: str, sink: Sink) -> None:
        self.predict(OpenedImage(image, 1), name=name, sink=sink)


def _existing(name: str) -> Path:
    """Return the path of a file that was given for an image.

    Raises:
        UsageError: It is not a file.
    """
    if "://" in name:
        raise UsageError(f"{name} is a URL - download it first: urllib.request.urlretrieve(URL, 'image.jpg')")
    if not os.path.isfile(name):
        kind = "a folder" if os.path.isdir(name) else "not a file"
        raise UsageError(
            f"{name!r} is {kind} - give the path of an image, or a list of paths, such as "
            "sorted(pathlib.Path('photos').glob('*.jpg'))"
        )
    return Path(name)


def _content(file: Any, name: str) -> bytes:
    """Return the bytes of a file given as bytes or as a file object.

    Raises:
        UsageError: The file object is closed, or gives text.
    """
    if isinstance(file, bytes | bytearray | memoryview):
        return bytes(file)
    try:
        with suppress(AttributeError, io.UnsupportedOperation):  # a response of a server, for one, has only one pass
            file.seek(0)
        content = file.read()
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: {type(file).__name__} cannot be read ({first_line(error)}) - give a path") from error
    if not isinstance(content, bytes | bytearray):
        raise UsageError(
            f"{name}: {type(file).__name__} gives no bytes - open the file with mode 'rb', or give its path"
        )
    return bytes(content)


def load(
    path: str | Path,
    *,
    trust: Collection[str] = (),
    overrides: Iterable[str] = (),
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> Segmenter:
    """Load a trained network for prediction; available as `segdeconv.load`.

    Args:
        path: A .ckpt, a run folder, `latest` for the newest run below ./runs, a .safetensors with its card, the name
            of a shipped network, or hf://OWNER/NAME[@REVISION] on the Hugging Face Hub, which is downloaded.
        trust: See `checkpoint.read`.
        overrides: See `checkpoint.read`; `["dataset.size=null"]` keeps every image at its own size.
        model: A network to load the weights into, for a checkpoint of a network that was given to `train` as an object.
        device: The device, such as `cpu` or `cuda:1`; None for the best one available.
        **settings: See `PredictionSettings`, for example `precision="32-true"`, `flip=True` or `tile=(512, 512)`;
            `second` may be the path of a checkpoint.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        UsageError: A setting is invalid, or the device is not available.
        TypeError: There is no such setting.
    """
    chosen = None if device is None else named_device(device)
    names = [field.name for field in fields(PredictionSettings)]
    for name in settings:
        if name not in names:
            raise TypeError(f"load() has no setting {name} - {did_you_mean(name, names)}")
    loaded = checkpoint.read(path, trust=trust, overrides=overrides, model=model)
    if isinstance(settings.get("second"), str | Path):
        settings["second"] = checkpoint.read(settings["second"], trust=trust)
    return Segmenter(loaded, PredictionSettings(**settings), device=chosen, at_once=True)
