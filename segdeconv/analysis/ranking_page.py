"""The tables and pages of the command `rank`: images to label next, and suspect regions of masks."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from segdeconv.analysis.ranking import Ranked, pixel_uncertainty
from segdeconv.analysis.suspects import Suspect
from segdeconv.classes import hex_colour
from segdeconv.data.dataset import FileDataset, SegmentationDataset
from segdeconv.drawing import draw, html, thumbnails
from segdeconv.drawing.thumbnails import Gallery
from segdeconv.inference.segmenter import Segmenter

MARK = (255, 0, 200)  # the outline of a suspect region
MAX_REGIONS = 6  # regions of one image that the page lists


class RankedEntry(NamedTuple):
    """An image on the page of a ranking; the attributes are those of `Ranked`, and its pictures."""

    name: str
    ranked: Ranked
    pictures: Sequence[tuple[str, html.Picture]]


def ranking_table(ranked: Sequence[Ranked]) -> str:
    """Return the content of ranking.csv: a line per image, the first to label first."""
    lines = (
        [
            place,
            image.path,
            *(f"{value:.5g}" for value in (image.score, image.uncertainty, image.novelty)),
            image.nearest,
        ]
        for place, image in enumerate(ranked, start=1)
    )
    return _csv(["rank", "file", "score", "uncertainty", "novelty", "nearest_earlier"], lines)


def build_ranking(
    segmenter: Segmenter, first: Sequence[Ranked], *, total: int, labelled: int, diversity: float, typed: str
) -> str:
    """Return the HTML of the page of a ranking; its images are predicted again.

    Args:
        segmenter: The network that ranked.
        first: The images that the page shows.
        total: Number of ranked images.
        labelled: Number of labelled images they were compared with.
        diversity: The weight of novelty.
        typed: The command.
    """
    classes = segmenter.classes
    gallery = Gallery(classes, float(np.log(max(2, len(classes)))))
    shown = []
    for entry in first:
        image = segmenter.open(entry.path).image
        mask, uncertainty = pixel_uncertainty(segmenter, image, str(entry.path))
        gallery.update(mask, uncertainty)
        small, labels = thumbnails.smaller(image, mask)
        shown.append((html.picture(small), html.picture(draw.overlay(small, labels, classes))))
    top = max(float(gallery.uncertainty(place).max()) for place in range(len(first)))
    entries = []
    for place, entry in enumerate(first):
        heat = html.picture(np.ascontiguousarray(draw.heat(gallery.uncertainty(place), top)))
        picture, overlay = shown[place]
        pictures = [("image", picture), ("uncertainty", heat), ("prediction", overlay)]
        entries.append(RankedEntry(str(entry.path), entry, pictures))
    return html.render(
        "ranking.html",
        entries=entries,
        total=total,
        labelled=labelled,
        diversity=diversity,
        top=top,
        heat=[hex_colour(rgb) for rgb in draw.heat(np.linspace(0, 1, 9)[None], 1)[0]],
        sampled=segmenter.settings.samples,
        classes=classes,
        typed=typed,
    )


class SuspectImage(NamedTuple):
    """An image on the page of suspects, with its most suspect regions."""

    name: str
    suspects: Sequence[Suspect]
    more: int
    pictures: Sequence[tuple[str, html.Picture]]


def suspects_table(suspects: Sequence[Suspect], dataset: SegmentationDataset) -> str:
    """Return the content of suspects.csv: a line per region, the most suspect first."""
    names, files = dataset.classes.names, dataset.unwrapped
    lines = []
    for place, suspect in enumerate(suspects, start=1):
        region = suspect.region
        file = files.pairs[suspect.place].mask if isinstance(files, FileDataset) else dataset.names[suspect.place]
        classes = names[region.mask_class], names[region.network_class]
        shares = (f"{value:.4f}" for value in (suspect.confidence, suspect.mask_probability))
        lines.append([place, file, *region.box, *classes, suspect.pixels, *shares, f"{suspect.score:.5g}"])
    boxes, shares_of = ["top", "left", "bottom", "right"], ["confidence", "mask_class_probability"]
    return _csv(["rank", "file", *boxes, "mask_class", "network_class", "pixels", *shares_of, "score"], lines)


def suspects_summary(suspects: Sequence[Suspect], dataset: SegmentationDataset, *, lines: int) -> str:
    """Return the first suspects as a text table."""
    if not suspects:
        return f"no suspect regions in the {len(dataset)} masks of {dataset.split}"
    names, shown = dataset.classes.names, suspects[:lines]
    pairs = [f"{names[each.region.mask_class]} -> {names[each.region.network_class]}" for each in shown]
    wide, name_wide = max(map(len, pairs)), max(len(dataset.names[each.place]) for each in shown)
    rows = [f"{'':>4}  {'image':<{name_wide}}  {'mask -> network':<{max(wide, 15)}}  pixels  confidence"]
    for place, (each, pair) in enumerate(zip(shown, pairs, strict=True), start=1):
        name = f"{dataset.names[each.place]:<{name_wide}}"
        rows.append(f"{place:>4}  {name}  {pair:<{max(wide, 15)}}  {each.pixels:>6}  {100 * each.confidence:9.1f}%")
    return "\n".join(rows)


def build_suspects(
    segmenter: Segmenter, dataset: SegmentationDataset, suspects: Sequence[Suspect], *, first: int, typed: str
) -> str:
    """Return the HTML of the page of suspects, by image, the image with the most suspect region first.

    Args:
        segmenter: The network that found them; the images on the page are predicted again.
        dataset: The split.
        suspects: All suspects in order.
        first: Number of images on the page.
        typed: The command.
    """
    by_image: dict[int, list[Suspect]] = {}
    for suspect in suspects:
        by_image.setdefault(suspect.place, []).append(suspect)
    entries = [
        SuspectImage(
            dataset.names[place],
            found[:MAX_REGIONS],
            len(found) - MAX_REGIONS,
            _suspect_pictures(segmenter, dataset, place, found[:MAX_REGIONS]),
        )
        for place, found in list(by_image.items())[:first]
    ]
    return html.render(
        "suspects.html",
        entries=entries,
        num_images=len(by_image),
        num_regions=len(suspects),
        total=len(dataset),
        split=dataset.split,
        classes=dataset.classes,
        typed=typed,
    )


def _suspect_pictures(
    segmenter: Segmenter, dataset: SegmentationDataset, place: int, suspects: Sequence[Suspect]
) -> list[tuple[str, html.Picture]]:
    image, mask, name = dataset[place]
    prediction, _ = pixel_uncertainty(segmenter, image, name)
    small, truth = thumbnails.smaller(image, mask)
    predicted = thumbnails.smaller_labels(prediction) if prediction.shape == mask.shape else None
    inside = np.zeros(mask.shape, dtype=np.uint8)
    for suspect in suspects:
        top, left, bottom, right = suspect.region.box
        inside[top:bottom, left:right] |= suspect.region.inside
    outline = thumbnails.smaller_labels(cv2.dilate(inside, np.ones((5, 5), np.uint8)) - inside).astype(bool)

    def outlined(picture: np.ndarray) -> np.ndarray:
        return np.where(outline[:, :, None], np.array(MARK, dtype=np.uint8), picture)

    def of(labels: np.ndarray) -> html.Picture:
        return html.picture(outlined(draw.colourise(labels, dataset.classes)), few_colours=True)

    pictures = [("image", html.picture(outlined(small))), ("mask", of(truth))]
    return pictures if predicted is None else [*pictures, ("prediction", of(predicted))]


def _csv(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue()
