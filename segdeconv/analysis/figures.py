"""Sheets about one image or one layer: what `scripts/visualize.py` writes, as pictures (H, W, 3) uint8."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from segdeconv.analysis.decoder_stages import DecoderTrace
from segdeconv.analysis.switch_paths import over_windows, path, sources, votes
from segdeconv.analysis.switch_stability import Instability
from segdeconv.analysis.switch_statistics import shares
from segdeconv.analysis.unit_projection import METHODS, Method
from segdeconv.classes import Classes
from segdeconv.drawing import draw
from segdeconv.drawing.panels import Colour, Panel, arrows, bars, figure, grid, hues, scale, swatches, wheel
from segdeconv.switches.ops import Pooling

# Of the cells 0..3; told apart with any colour vision (P. Tol's bright scheme).
CELLS: tuple[Colour, ...] = ((68, 119, 170), (204, 187, 68), (34, 136, 51), (238, 102, 119))
CELL_NAMES = ("0: upper left", "1: upper right", "2: lower left", "3: lower right")
NUM = 9  # activations of a unit
LARGEST = 320  # pixels of a panel's width
SMALLEST = 180  # of its height

METHOD_NAMES: dict[Method, str] = {
    "deconvnet": "projected through the switches (Zeiler & Fergus)",
    "guided": "guided backpropagation",
    "gradient": "gradient times activation",
}


def fit(picture: np.ndarray) -> np.ndarray:
    """A picture that is wider than a panel, made smaller; a small one enlarged by a whole factor."""
    height, width = picture.shape[:2]
    if width > LARGEST:
        size = (LARGEST, max(1, round(height * LARGEST / width)))
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return draw.enlarged(picture, SMALLEST)


def over_image(map_: Tensor, level: int, size: tuple[int, int]) -> np.ndarray:
    """(h, w) of windows of a level -> (H, W) of pixels."""
    found: np.ndarray = over_windows(map_.cpu(), size, level).numpy()
    return found


def switches_figure(name: str, image: np.ndarray, pooled: Sequence[Pooling], ties: Sequence[float]) -> np.ndarray:
    """Which cell won, in every level over the image: by majority of the channels, in one channel, and how often.

    image: (H, W, 3) uint8, as the network sees it; pooled: of it alone; ties: of each level, see `tie_rate`.
    """
    size = (image.shape[0], image.shape[1])
    colours = np.array(CELLS, dtype=np.float32)
    majority, single, charts = [], [], []
    top = max(max(shares(pooling)) for pooling in pooled)
    for level, (pooling, tied) in enumerate(zip(pooled, ties, strict=True), start=1):
        codes = pooling.codes[0]
        counts = votes(pooling)
        most, share = counts.argmax(dim=0), counts.amax(dim=0) / counts.sum(dim=0)
        strength = ((over_image(share, level, size) - 0.25) / 0.5).clip(0, 1)[..., None]
        blend = 255 + strength * (colours[over_image(most, level, size)] - 255)
        height, width = codes.shape[1:]
        windows = f"level {level}: {height}x{width} windows of {2**level}x{2**level} pixels"
        majority.append(Panel(fit(blend.round().astype(np.uint8)), f"{windows}, majority of {len(codes)} channels"))
        channel = int(pooling.features[0].float().mean(dim=(1, 2)).argmax())
        picture = colours.astype(np.uint8)[over_image(codes[channel], level, size)]
        single.append(Panel(fit(picture), f"level {level}, channel {channel}, the most active"))
        chart = bars(shares(pooling), CELLS, top=top, size=(90, fit(image).shape[1]))
        charts.append(Panel(chart, f"level {level}: share of each cell; ties in {100 * tied:.2g} % of the windows"))
    legend = swatches(list(zip(CELLS, CELL_NAMES, strict=True)))
    rows = [
        [Panel(fit(draw.to_rgb(image)), "image, as the network sees it"), Panel(legend, "cell of the 2x2 window")],
        majority,
        single,
        charts,
    ]
    note = (
        "Majority: the cell that wins in most of the channels that are above zero in a window; pale where these "
        "disagree, from white where no cell has more than a quarter of them to full colour where one has three "
        "quarters. Unpooling itself goes by each channel's own switches, as in the row below."
    )
    return figure(f"Switches of {name}", rows, note=note)


def switch_paths_figure(name: str, image: np.ndarray, pooled: Sequence[Pooling]) -> np.ndarray:
    """Where a value of a pool is put by all unpoolings below it: as displacements, and as paths."""
    size = (image.shape[0], image.shape[1])
    pixels = np.mgrid[: size[0], : size[1]].transpose(1, 2, 0)
    maps, middles = [], []
    for depth in range(1, len(pooled) + 1):
        ends = sources(pooled[:depth]).cpu().numpy()
        longest = 2**depth / 2
        windows = f"all pixels of a {2**depth}x{2**depth} window lead to one"
        text = f"from level {depth} down: {windows}; full colour: {longest:g} px"
        maps.append(Panel(fit(arrows(ends - pixels, longest)), text))
        middle = pixels // 2**depth * 2**depth + (2**depth - 1) / 2
        middles.append(Panel(fit(arrows(ends - middle, longest)), f"from level {depth} down, from the window's middle"))
    factor = max(1, 480 // size[1])
    grey = np.repeat(draw.to_rgb(image).mean(axis=2, keepdims=True), 3, axis=2) * 0.5 + 110
    canvas = Image.fromarray(draw.enlarged(grey.clip(0, 255).astype(np.uint8), factor * size[0]))
    pen = ImageDraw.Draw(canvas)
    side = 2 ** len(pooled)
    rows, columns = (range(0, length, side) for length in size)
    for index, (y, x) in enumerate((y, x) for y in rows for x in columns):
        steps = path(pooled, (y, x))
        middle = (min(y + side, size[0]) + y - 1) / 2, (min(x + side, size[1]) + x - 1) / 2
        places = [middle, *(step.place for step in steps)]
        points = [((px + 0.5) * factor, (py + 0.5) * factor) for py, px in places]
        colour = hues(7)[index % 7]
        pen.line(points, fill=colour, width=2)
        px, py = points[-1]
        pen.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colour, outline=(0, 0, 0))
    text = f"the path of every window of level {len(pooled)}, from its middle to the pixel where its value ends (dot)"
    first = [Panel(np.asarray(canvas), text), Panel(wheel(96, 1.0), "direction and length")]
    note = (
        "Of each window the cell that wins in most of the channels that are above zero is followed down, level by "
        "level, to one pixel: there unpooling puts what the decoder says for the window. Hue says in which direction "
        "that pixel lies, saturation how far away, for every pixel of the window (above) and for its middle (below)."
    )
    return figure(f"Where the switches of {name} lead", [first, maps, middles], note=note)


def decoder_stages_figure(
    name: str, image: np.ndarray, building: DecoderTrace, classes: Classes, label: int, filters: str
) -> np.ndarray:
    """How the decoder builds a class up: unpooled and filtered maps of every stage. filters: what follows unpooling."""
    size = (image.shape[0], image.shape[1])
    prediction = building.prediction.cpu().numpy().astype(np.uint8)
    shown = draw.overlay(image, prediction, classes)

    def active(map_: Tensor) -> np.ndarray:
        values = map_.float().cpu().clamp(min=0).numpy()
        top = float(np.quantile(values[values > 0], 0.99)) if (values > 0).any() else 1.0
        picture = draw.heat(values, top)
        return cv2.resize(np.ascontiguousarray(picture), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)

    def thick(map_: Tensor) -> Tensor:
        """A sparse map as large as the image or smaller, every value as large as a pixel of the sheet at least."""
        shrink = max(1, -(-map_.shape[-1] // LARGEST))
        values = map_.float().clamp(min=0)[None, None]
        return torch.nn.functional.max_pool2d(values, shrink, ceil_mode=True)[0, 0]

    start = f"the deepest map, {building.start.shape[0]}x{building.start.shape[1]}, unit {building.stages[0].unit}"
    probability = draw.heat(building.probability.cpu().numpy(), 1.0)
    first = [
        Panel(fit(draw.to_rgb(image)), "image"),
        Panel(fit(active(building.start)), start),
        Panel(fit(probability), f"probability of {classes.names[label]}"),
        Panel(fit(shown), "prediction"),
    ]
    sparse, dense = [], []
    for index, stage in enumerate(building.stages):
        height, width = stage.unpooled.shape
        level = len(building.stages) - index
        text = f"unpooled by the switches of level {level}: {height}x{width}, unit {stage.unit}"
        sparse.append(Panel(fit(active(thick(stage.unpooled))), text))
        dense.append(Panel(fit(active(stage.dense)), f"after {filters}, unit {stage.dense_unit}"))
    present = [int(index) for index in np.unique(prediction) if index < len(classes)]
    legend = Panel(draw.legend(classes, present, sum(p.picture.shape[1] for p in sparse)))
    note = (
        "Of every stage the unit that says most for the class where it is predicted: the largest sum of activation "
        "times gradient. Each map is scaled by itself, from black at 0 and below to pale at its 99th percentile."
    )
    title = f"How the decoder builds {classes.names[label]} in {name}"
    return figure(title, [first, sparse, dense, [legend]], note=note)


def stability_figure(
    name: str,
    image: np.ndarray,
    prediction: np.ndarray,
    entropy: np.ndarray,
    found: Instability,
    classes: Classes,
    *,
    mask: np.ndarray | None = None,
    variance: np.ndarray | None = None,
) -> np.ndarray:
    """Where switches change in other views of the image, beside what else says that the network is in doubt.

    All (H, W), of the size of the image; variance: over passes with dropout; mask: the truth, if it is known.
    """
    first = [
        Panel(fit(draw.to_rgb(image)), "image"),
        Panel(fit(draw.overlay(image, prediction, classes)), "prediction"),
    ]
    if mask is not None:
        wrong = draw.error(mask, prediction, classes.ignore_index)
        first.append(Panel(fit(wrong), "green: right, red: wrong, dark: not counted"))
    first.append(_doubt(entropy, "nats", "entropy of the probabilities"))
    if variance is not None:
        first.append(_doubt(variance, "", "variance over passes with dropout"))
    levels = range(1, len(found.changed) + 1)
    changed = [_doubt(_of(found.changed.mean(dim=0)), "", "changed: share of maxima not found again, all levels")]
    changed += [_doubt(_of(found.changed[level - 1]), "", f"changed, level {level}") for level in levels]
    moved = [_doubt(_of(found.moved.mean(dim=0)), "times the mean", "moved: activation not found again, all levels")]
    moved += [_doubt(_of(found.moved[level - 1]), "times the mean", f"moved, level {level}") for level in levels]
    note = (
        "The image is seen again mirrored, moved by one pixel to four sides, and twice with noise of 2 grey levels. "
        "Changed: how many of a window's maxima, over all channels, are then at another place. Moved: the activation "
        "that these carry, in units of what a window of the level holds on average."
    )
    return figure(f"How steady the switches of {name} are", [first, changed, moved], note=note)


def _of(map_: Tensor) -> np.ndarray:
    found: np.ndarray = map_[0].cpu().numpy()
    return found


def _doubt(values: np.ndarray, unit: str, caption: str) -> Panel:
    top = float(np.quantile(values, 0.995)) or 1.0
    picture = fit(draw.heat(values, top))
    return Panel(np.concatenate([picture, scale(top, picture.shape[1], unit)]), caption)


def units_figure(
    layer: str,
    network: str,
    units: Mapping[int, Sequence[tuple[float, np.ndarray, Mapping[Method, np.ndarray]]]],
    *,
    images: int,
    field: tuple[int, int],
) -> np.ndarray:
    """What the maps of a layer see: nine crops each, and what of them each method projects to pixels.

    units: of each map, the strongest first: activation, (h, w, 3) uint8 crop, and a projection of its size by method.
    images: how many were looked at. field: (height, width) of the receptive field, in pixels.
    """
    rows, side = [], 64 if max(field) <= 64 else 100
    for number, strongest in units.items():
        values = ", ".join(f"{value:.3g}" for value, _, _ in strongest[:1])
        crops = grid([crop for _, crop, _ in strongest], 3, side)
        row = [Panel(crops, f"unit {number}: crops, strongest {values}")]
        row += [
            Panel(grid([made[method] for _, _, made in strongest], 3, side), METHOD_NAMES[method]) for method in METHODS
        ]
        rows.append(row)
    note = (
        f"The {NUM} strongest activations of each unit in {images} image(s), and around each the receptive field of "
        f"{field[0]}x{field[1]} pixels; light grey is outside of the image. In projections, each of which is stretched "
        "by itself, middle grey is zero."
    )
    return figure(f"What units of {layer} see ({network})", rows, note=note)
