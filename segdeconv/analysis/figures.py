"""Figures about one image or one layer for `scripts/visualize.py`, as (H, W, 3) uint8 arrays."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from segdeconv.analysis.contributions import Contributions, MapContribution
from segdeconv.analysis.decoder_stages import DecoderTrace
from segdeconv.analysis.explanation import Explanation, shown
from segdeconv.analysis.switch_paths import over_windows, path, sources, votes
from segdeconv.analysis.switch_stability import Instability
from segdeconv.analysis.switch_statistics import shares
from segdeconv.analysis.unit_projection import METHODS, Method
from segdeconv.classes import Classes
from segdeconv.drawing import draw
from segdeconv.drawing.panels import (
    Colour,
    Panel,
    arrows,
    bars,
    diverging_scale,
    figure,
    fitted,
    grid,
    hues,
    scale,
    signed_bars,
    swatches,
    wheel,
)
from segdeconv.switches.ops import Pooling

# Colours of the cells 0..3, distinguishable with any colour vision (P. Tol's bright scheme).
CELLS: tuple[Colour, ...] = ((68, 119, 170), (204, 187, 68), (34, 136, 51), (238, 102, 119))
CELL_NAMES = ("0: upper left", "1: upper right", "2: lower left", "3: lower right")
NUM_ACTIVATIONS = 9  # per unit
MAX_PANEL_WIDTH = 320  # pixels
MIN_PANEL_HEIGHT = 180  # pixels
MAP_SIDE = 216  # pixels, of the maps of pools in explanations

METHOD_NAMES: dict[Method, str] = {
    "deconvnet": "projected through the switches (Zeiler & Fergus)",
    "guided": "guided backpropagation",
    "gradient": "gradient times activation",
}


def fit(picture: np.ndarray) -> np.ndarray:
    """Shrink a picture that is wider than a panel; enlarge a small one by an integer factor."""
    height, width = picture.shape[:2]
    if width > MAX_PANEL_WIDTH:
        size = (MAX_PANEL_WIDTH, max(1, round(height * MAX_PANEL_WIDTH / width)))
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return draw.enlarged(picture, MIN_PANEL_HEIGHT)


def over_image(map_: Tensor, level: int, size: tuple[int, int]) -> np.ndarray:
    """Expand (h, w) values of the windows of a level to (H, W) pixels."""
    values: np.ndarray = over_windows(map_.cpu(), size, level).numpy()
    return values


def switches_figure(name: str, image: np.ndarray, pooled: Sequence[Pooling], ties: Sequence[float]) -> np.ndarray:
    """Draw the winning cells of every level over the image: by majority of the channels, in one channel, and counts.

    Args:
        name: The name of the image.
        image: (H, W, 3) uint8, at the input size.
        pooled: The poolings of the image, the finest first.
        ties: The tie rate of each level; see `tie_rate`.
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
        [Panel(fit(draw.to_rgb(image)), "image at the input size"), Panel(legend, "cell of the 2x2 window")],
        majority,
        single,
        charts,
    ]
    note = (
        "Majority: the cell that wins in most of the channels that are above zero in a window. The colour shows the "
        "agreement of these channels, from white (no cell has more than a quarter of them) to full colour (one cell "
        "has three quarters). Unpooling itself uses the switches of each channel, as in the row below."
    )
    return figure(f"Switches of {name}", rows, note=note)


def switch_paths_figure(name: str, image: np.ndarray, pooled: Sequence[Pooling]) -> np.ndarray:
    """Draw the pixels to which unpooling moves the values of a pool, as displacements and as paths.

    Args:
        name: The name of the image.
        image: (H, W, 3) uint8, at the input size.
        pooled: The poolings of the image, the finest first.
    """
    size = (image.shape[0], image.shape[1])
    pixels = np.mgrid[: size[0], : size[1]].transpose(1, 2, 0)
    from_pixels, from_centres = [], []
    for depth in range(1, len(pooled) + 1):
        ends = sources(pooled[:depth]).cpu().numpy()
        max_length = 2**depth / 2
        windows = f"all pixels of a {2**depth}x{2**depth} window lead to one pixel"
        text = f"from level {depth} down: {windows}; full colour: {max_length:g} px"
        from_pixels.append(Panel(fit(arrows(ends - pixels, max_length)), text))
        centres = pixels // 2**depth * 2**depth + (2**depth - 1) / 2
        text = f"from level {depth} down, from the centre of the window"
        from_centres.append(Panel(fit(arrows(ends - centres, max_length)), text))
    factor = max(1, 480 // size[1])
    grey = np.repeat(draw.to_rgb(image).mean(axis=2, keepdims=True), 3, axis=2) * 0.5 + 110
    canvas = Image.fromarray(draw.enlarged(grey.clip(0, 255).astype(np.uint8), factor * size[0]))
    pen = ImageDraw.Draw(canvas)
    side = 2 ** len(pooled)
    rows, columns = (range(0, length, side) for length in size)
    for index, (y, x) in enumerate((y, x) for y in rows for x in columns):
        steps = path(pooled, (y, x))
        centre = (min(y + side, size[0]) + y - 1) / 2, (min(x + side, size[1]) + x - 1) / 2
        places = [centre, *(step.place for step in steps)]
        points = [((px + 0.5) * factor, (py + 0.5) * factor) for py, px in places]
        colour = hues(7)[index % 7]
        pen.line(points, fill=colour, width=2)
        px, py = points[-1]
        pen.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colour, outline=(0, 0, 0))
    text = f"the path of every window of level {len(pooled)}, from its centre to the pixel at which it ends (dot)"
    first = [Panel(np.asarray(canvas), text), Panel(wheel(96, 1.0), "direction and length")]
    note = (
        "From each window, the path follows the cell that wins in most of the channels that are above zero, level by "
        "level, down to one pixel, where unpooling places the value of the window. Hue shows the direction of that "
        "pixel and saturation its distance, from every pixel of the window (above) and from its centre (below)."
    )
    return figure(f"Switch paths of {name}", [first, from_pixels, from_centres], note=note)


def decoder_stages_figure(
    name: str, image: np.ndarray, trace: DecoderTrace, classes: Classes, label: int, filters: str
) -> np.ndarray:
    """Draw the unpooled and filtered maps of one class in every stage of the decoder.

    Args:
        name: The name of the image.
        image: (H, W, 3) uint8, at the input size.
        trace: The maps; see `trace_decoder`.
        classes: The classes.
        label: The index of the class.
        filters: The name of the layers that follow unpooling, for the captions.
    """
    size = (image.shape[0], image.shape[1])
    prediction = trace.prediction.cpu().numpy().astype(np.uint8)
    overlay = draw.overlay(image, prediction, classes)

    def activation_picture(map_: Tensor) -> np.ndarray:
        values = map_.float().cpu().clamp(min=0).numpy()
        top = float(np.quantile(values[values > 0], 0.99)) if (values > 0).any() else 1.0
        picture = draw.heat(values, top)
        return cv2.resize(np.ascontiguousarray(picture), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)

    def shrink_sparse(map_: Tensor) -> Tensor:
        """Shrink a sparse map to the panel by max pooling, so that every value remains visible."""
        factor = max(1, -(-map_.shape[-1] // MAX_PANEL_WIDTH))
        values = map_.float().clamp(min=0)[None, None]
        return torch.nn.functional.max_pool2d(values, factor, ceil_mode=True)[0, 0]

    start = f"the deepest map, {trace.start.shape[0]}x{trace.start.shape[1]}, unit {trace.stages[0].unit}"
    probability = draw.heat(trace.probability.cpu().numpy(), 1.0)
    first = [
        Panel(fit(draw.to_rgb(image)), "image"),
        Panel(fit(activation_picture(trace.start)), start),
        Panel(fit(probability), f"probability of {classes.names[label]}"),
        Panel(fit(overlay), "prediction"),
    ]
    sparse, dense = [], []
    for index, stage in enumerate(trace.stages):
        height, width = stage.unpooled.shape
        level = len(trace.stages) - index
        text = f"unpooled by the switches of level {level}: {height}x{width}, unit {stage.unit}"
        sparse.append(Panel(fit(activation_picture(shrink_sparse(stage.unpooled))), text))
        dense.append(Panel(fit(activation_picture(stage.dense)), f"after {filters}, unit {stage.dense_unit}"))
    present = [int(index) for index in np.unique(prediction) if index < len(classes)]
    legend = Panel(draw.legend(classes, present, sum(panel.picture.shape[1] for panel in sparse)))
    note = (
        "Each stage shows the unit that contributes most to the class where it is predicted: the largest sum of "
        "activation times gradient. Each map is scaled separately, from black at or below 0 to pale at its 99th "
        "percentile."
    )
    title = f"Decoder stages of {classes.names[label]} in {name}"
    return figure(title, [first, sparse, dense, [legend]], note=note)


def stability_figure(
    name: str,
    image: np.ndarray,
    prediction: np.ndarray,
    entropy: np.ndarray,
    measures: Instability,
    classes: Classes,
    *,
    mask: np.ndarray | None = None,
    variance: np.ndarray | None = None,
) -> np.ndarray:
    """Draw the instability of switches in perturbed views of the image, beside other measures of uncertainty.

    Args:
        name: The name of the image.
        image: (H, W, 3) uint8, at the input size.
        prediction: (H, W) uint8, class indices.
        entropy: (H, W), the entropy of the class probabilities, in nats.
        measures: The instability of the image.
        classes: The classes.
        mask: (H, W) uint8, the ground truth if it is available.
        variance: (H, W), the variance over passes with dropout, if there are any.
    """
    first = [
        Panel(fit(draw.to_rgb(image)), "image"),
        Panel(fit(draw.overlay(image, prediction, classes)), "prediction"),
    ]
    if mask is not None:
        wrong = draw.error(mask, prediction, classes.ignore_index)
        first.append(Panel(fit(wrong), "green: correct, red: wrong, dark: ignored"))
    first.append(_uncertainty_panel(entropy, "nats", "entropy of the probabilities"))
    if variance is not None:
        first.append(_uncertainty_panel(variance, "", "variance over passes with dropout"))
    levels = range(1, len(measures.changed) + 1)
    caption = "changed: share of maxima not preserved, all levels"
    overall = _uncertainty_panel(_first(measures.changed.mean(dim=0)), "", caption)
    panels = [
        _uncertainty_panel(_first(measures.changed[level - 1]), "", f"changed, level {level}") for level in levels
    ]
    changed = [overall, *panels]
    unit = "times the mean"
    overall = _uncertainty_panel(
        _first(measures.moved.mean(dim=0)), unit, "moved: activation not preserved, all levels"
    )
    panels = [_uncertainty_panel(_first(measures.moved[level - 1]), unit, f"moved, level {level}") for level in levels]
    moved = [overall, *panels]
    note = (
        "The image is compared with its mirror image, four shifts by one pixel, and two copies with noise of 2 grey "
        "levels. Changed: the share of a window's maxima, over all channels, that are then at another position. Moved: "
        "the activation of these maxima, in units of the mean activation of a window of the level."
    )
    return figure(f"Stability of the switches of {name}", [first, changed, moved], note=note)


def _first(maps: Tensor) -> np.ndarray:
    values: np.ndarray = maps[0].cpu().numpy()
    return values


def _uncertainty_panel(values: np.ndarray, unit: str, caption: str) -> Panel:
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
    """Draw the strongest activations of the units of a layer: nine crops each, and their projections by each method.

    Args:
        layer: The name of the layer.
        network: The name of the network.
        units: By unit, the strongest first: the activation, a (h, w, 3) uint8 crop, and a projection of its size by
            method.
        images: The number of images that were searched.
        field: (height, width) of the receptive field, in pixels.
    """
    rows, side = [], 64 if max(field) <= 64 else 100
    for number, strongest in units.items():
        values = ", ".join(f"{value:.3g}" for value, _, _ in strongest[:1])
        crops = grid([crop for _, crop, _ in strongest], 3, side)
        row = [Panel(crops, f"unit {number}: crops, strongest {values}")]
        row += [
            Panel(grid([projections[method] for _, _, projections in strongest], 3, side), METHOD_NAMES[method])
            for method in METHODS
        ]
        rows.append(row)
    note = (
        f"The {NUM_ACTIVATIONS} strongest activations of each unit in {images} image(s), with the receptive field of "
        f"{field[0]}x{field[1]} pixels around each; light grey is outside the image. In projections, middle grey is "
        "zero, and each is scaled separately."
    )
    return figure(f"Units of {layer} ({network})", rows, note=note)


def explanation_figure(name: str, image: np.ndarray, explanation: Explanation, classes: Classes) -> np.ndarray:
    """Draw where a prediction comes from: contributions by pixel, through each pool and unpooling, and by level.

    Args:
        name: The name of the image.
        image: (H, W, C), as stored.
        explanation: The explanation.
        classes: The classes.
    """
    question, class_, other = explanation.question, *(classes.names[i] for i in (explanation.class_, explanation.other))
    stored = draw.to_rgb(image)
    height, width = explanation.network_size
    grey = cv2.resize(np.ascontiguousarray(stored), (width, height), interpolation=cv2.INTER_AREA)
    inside = cv2.resize(
        explanation.inside.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT
    ).astype(bool)
    place = (
        min(height - 1, int((question.y + 0.5) * height / explanation.size[0])),
        min(width - 1, int((question.x + 0.5) * width / explanation.size[1])),
    )
    # A window around the explained pixels, for a closer view.
    rows, columns = np.nonzero(inside) if question.region else (np.array([place[0]]), np.array([place[1]]))
    margin = max(16, height // 8)
    top, bottom = max(0, rows.min() - margin), min(height, rows.max() + margin + 1)
    left, right = max(0, columns.min() - margin), min(width, columns.max() + margin + 1)
    wider = (
        slice(max(0, rows.min() - 2 * margin), rows.max() + 2 * margin + 1),
        slice(max(0, columns.min() - 2 * margin), columns.max() + 2 * margin + 1),
    )

    def marked(picture: np.ndarray, *, closer: bool = False) -> np.ndarray:
        canvas = fit(picture)
        factor = canvas.shape[1] / picture.shape[1]
        centre = (place[0] - (top if closer else 0) + 0.5, place[1] - (left if closer else 0) + 0.5)
        drawn = Image.fromarray(canvas)
        pen = ImageDraw.Draw(drawn)
        y, x = centre[0] * factor, centre[1] * factor
        for radius, colour in ((7, (0, 0, 0)), (6, (255, 255, 255))):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour)
        return np.asarray(drawn)

    def outlined(picture: np.ndarray) -> np.ndarray:
        if not question.region:
            return picture
        line = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) & ~inside
        return np.where(line[:, :, None], np.array((255, 0, 200), np.uint8), picture)

    shrunk = cv2.resize(explanation.prediction, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    predicted = outlined(draw.overlay(grey, shrunk, classes))
    present = [int(index) for index in np.unique(explanation.prediction)]
    asked = f"the region of {int(explanation.inside.sum())} pixels" if question.region else "the pixel"
    what = f"predicted {classes.names[explanation.predicted]}"
    first = [
        Panel(marked(outlined(grey)), f"{asked} at y {question.y}, x {question.x}: {what}"),
        Panel(marked(predicted), "prediction"),
        Panel(draw.legend(classes, present, MAX_PANEL_WIDTH)),
    ]
    sigma = max(1.0, width / 240)
    by_pixel, through, levels = [], [], []
    for title, contributions in explanation.named.items():
        values, largest = shown(contributions.pixels, sigma=sigma)
        picture = outlined(draw.diverging(values, grey))
        text = f"{title}: contributions of the pixels, together {contributions.from_pixels:+.3g}"
        panel = fit(marked(picture))
        by_pixel.append(Panel(np.concatenate([panel, diverging_scale(largest, panel.shape[1])]), text))
        part = np.ascontiguousarray(picture[top:bottom, left:right])
        by_pixel.append(Panel(marked(part, closer=True), f"{title}: the same, closer"))
        for start, layer in (("pool", "pool"), ("unpool", "unpooling")):
            maps = [map_ for map_ in contributions.maps if map_.name.startswith(f"{start} ")]
            through.append([_passing_panel(title, layer, map_, grey, wider) for map_ in maps])
        labelled = {
            level if level == "pixels" else f"biases, {level}": value
            for level, value in contributions.by_level().items()
        }
        chart = signed_bars(labelled, 2 * MAX_PANEL_WIDTH)
        levels.append(Panel(chart, f"{title}: {_sum_of(contributions)}"))
    method = (
        f"Red speaks for {class_}, blue against it; in the difference, blue speaks for {other}. A contribution is "
        "gradient times value, with switches and signs of ReLUs as they are in this image. With the contributions of "
        "the biases, which the bars show by stage and by scale of the map, they add up to the logit. Values of pixels "
        f"are relative to the mean colour, and shown with a blur of {sigma:.2g} px. Maps of pools show what passes "
        "through their switches, in the cells that these select, around what is explained."
    )
    limits = f"{explanation.limits[:1].upper()}{explanation.limits[1:]}. " if explanation.limits else ""
    rows_of_panels = [first, by_pixel, *through, levels]
    return figure(f"Why {class_} and not {other} in {name}", rows_of_panels, note=limits + method)


def _sum_of(contributions: Contributions) -> str:
    relation = "=" if contributions.exact else "is not"
    return f"sum {contributions.total:.6g} {relation} logit {contributions.value:.6g}"


def _passing_panel(
    title: str, layer: str, map_: MapContribution, image: np.ndarray, window: tuple[slice, slice]
) -> Panel:
    """Draw the contributions that pass through one map, in a window of the image."""
    values, _ = shown(map_.values, sigma=0.5)
    resized = cv2.resize(values, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    picture = np.ascontiguousarray(draw.diverging(resized, image)[window])
    height, width = map_.values.shape
    level = map_.name.rpartition(" ")[2]
    rest = f", later biases {map_.later:+.3g}" if map_.whole else "; the rest passes beside it"
    text = f"{title}: {map_.total:+.3g} through {layer} {level} ({height}x{width}){rest}"
    return Panel(fitted(picture, MAP_SIDE), text)
