"""inspect.html: a page with the contents of a data set."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import yaml

from segdeconv.classes import Classes, voc_colours
from segdeconv.data.dataset import DatasetView, FileDataset, Pair, SegmentationDataset
from segdeconv.data.files.reading import read_image, read_labels
from segdeconv.data.inspection import MAX_SHOWN, Inspection
from segdeconv.data.loading import TrainingBatches
from segdeconv.drawing import draw, html, thumbnails
from segdeconv.errors import UsageError
from segdeconv.system.seeding import key

NUM_SAMPLES = 8
NUM_RAREST = 4  # number of rarest classes
IMAGES_PER_CLASS = 2  # images of each of them
EPOCHS = (0, 1)  # the epochs whose augmentation is shown

Pictures = list[tuple[str, html.Picture]]


class Entry(NamedTuple):
    """An image of the page, or a problem with the files it is about.

    Attributes:
        name: Name of the sample.
        note: Text beside it.
        pictures: Captions and pictures.
    """

    name: str
    note: str
    pictures: Pictures


def build_page(
    splits: Sequence[SegmentationDataset],
    inspections: Sequence[Inspection],
    problems: Sequence[str],
    weights: Sequence[float],
    training: TrainingBatches | None,
    *,
    seed: int,
    command: str,
    config: Mapping[str, Any],
) -> str:
    """Build the page of a data set.

    Args:
        splits: The splits, train first.
        inspections: The inspection of each split.
        problems: The problems of all splits.
        weights: Weight of each class.
        training: The training samples; None if files of train cannot be used.
        seed: Seed of the selection of samples.
        command: The command that writes the page.
        config: The config to show.

    Returns:
        The page as HTML.
    """
    train, classes = splits[0], splits[0].classes
    totals = [sum(inspection.pixels) for inspection in inspections]
    shares = [
        [pixels / total if total else None for pixels in inspection.pixels]
        for inspection, total in zip(inspections, totals, strict=True)
    ]
    return html.render(
        "inspect.html",
        data=train.kind,
        classes=classes,
        notes=train.notes,
        splits=inspections,
        shares=shares,
        absent=[
            [name for name, pixels in zip(classes.names, inspection.pixels[:-1], strict=True) if not pixels]
            for inspection in inspections
        ],
        ignored=sum(inspection.pixels[-1] for inspection in inspections) / sum(totals) if sum(totals) else None,
        weights=list(weights),
        problems=problems,
        suspects=[_problem_entry(problem, splits) for problem in problems[:MAX_SHOWN]],
        rarest=list(_rarest(train, inspections[0], training)) if training else [],
        samples=list(_samples(training, classes, seed)) if training else [],
        command=command,
        configuration=yaml.safe_dump(dict(config), sort_keys=False, width=1000),
    )


def _samples(training: TrainingBatches, classes: Classes, seed: int) -> Iterator[Entry]:
    random = np.random.Generator(np.random.Philox(key=key(seed, "shown samples")))
    for index in sorted(random.permutation(len(training))[:NUM_SAMPLES].tolist()):
        yield Entry(training.dataset.names[index], "", _before_and_after(training, index, classes))


def _rarest(train: SegmentationDataset, inspection: Inspection, training: TrainingBatches) -> Iterator[Entry]:
    """Yield the images with the most pixels of the rarest classes; none for crops, since whole images are inspected."""
    if train.whole is not train:
        return
    present = [index for index, pixels in enumerate(inspection.pixels[:-1]) if pixels]
    for label in sorted(present, key=lambda index: inspection.pixels[index])[:NUM_RAREST]:
        occurrence = f"in {inspection.images[label]} of {inspection.num_images} images"
        for index in inspection.largest[label][:IMAGES_PER_CLASS]:
            note = f"many pixels of {train.classes.names[label]}, which occurs {occurrence}"
            yield Entry(train.names[index], note, _before_and_after(training, index, train.classes))


def _before_and_after(training: TrainingBatches, index: int, classes: Classes) -> Pictures:
    image, mask, _ = training.dataset[index]
    pictures = _image_and_mask(image, mask, classes, "")
    for number, epoch in enumerate(EPOCHS, start=1):
        sample = training[(epoch, index)]
        pictures += _image_and_mask(sample["image"], sample["mask"], classes, f", augmented {number}")
    return pictures


def _image_and_mask(image: np.ndarray, mask: np.ndarray, classes: Classes, suffix: str) -> Pictures:
    picture, labels = thumbnails.smaller(image, mask)
    colours = html.picture(draw.colourise(labels, classes), few_colours=True)
    return [(f"image{suffix}", html.picture(picture)), (f"mask{suffix}", colours)]


# Files that cannot be used


def _problem_entry(problem: str, splits: Sequence[SegmentationDataset]) -> Entry:
    """Return a problem with the files it names, as far as they can be decoded."""
    for pair in _pairs(splits):
        if str(pair.image) in problem or str(pair.mask) in problem:
            return Entry(pair.name, problem, [*_decoded(pair)])
    return Entry("", problem, [])


def _pairs(splits: Sequence[SegmentationDataset]) -> Iterator[Pair]:
    for split in splits:
        dataset = split.whole
        while isinstance(dataset, DatasetView):
            dataset = dataset.dataset
        if isinstance(dataset, FileDataset):
            yield from dataset.pairs


def _decoded(pair: Pair) -> Iterator[tuple[str, html.Picture]]:
    """Yield the image and the mask, in a colour per label or as stored; undecodable files are left out."""
    palette = np.array(voc_colours(256), dtype=np.uint8)
    with suppress(UsageError):  # reported by the problem
        yield "image", _shrunk(read_image(pair.image, exif="ignore"), few_colours=False)
    with suppress(UsageError):
        try:
            picture = palette[read_labels(pair.mask) & 255]
        except UsageError:
            picture = read_image(pair.mask, exif="ignore")
        yield "mask", _shrunk(picture, few_colours=True)


def _shrunk(picture: np.ndarray, *, few_colours: bool) -> html.Picture:
    image, _ = thumbnails.smaller(picture, picture[:, :, 0])
    return html.picture(image, few_colours=few_colours)
