"""inspect.html: what a data set holds, for a person with a browser."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import yaml

from segdeconv.classes import Classes, voc_colours
from segdeconv.data.dataset import DatasetView, FileDataset, Pair, SegmentationDataset
from segdeconv.data.files.reading import read_image, read_labels
from segdeconv.data.inspection import MOST_SHOWN, Inspection
from segdeconv.data.loading import TrainingBatches
from segdeconv.drawing import draw, html, thumbnails
from segdeconv.errors import UsageError
from segdeconv.system.seeding import key

NUM_SAMPLES = 8
NUM_RAREST = 4  # classes
EACH = 2  # images of each of them
EPOCHS = (0, 1)  # whose augmentation is shown

Pictures = list[tuple[str, html.Picture]]


class Shown(NamedTuple):
    """An image, or a file that cannot be used, in the page."""

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
    """The page of a data set.

    splits: train first, each with its inspection. problems: of all of them. weights: of the classes.
    training: what training draws from train; None where files of it cannot be used.
    """
    train, classes = splits[0], splits[0].classes
    totals = [sum(one.pixels) for one in inspections]
    shares = [
        [pixels / total if total else None for pixels in one.pixels]
        for one, total in zip(inspections, totals, strict=True)
    ]
    return html.render(
        "inspect.html",
        data=train.kind,
        classes=classes,
        notes=train.notes,
        splits=inspections,
        shares=shares,
        absent=[
            [name for name, pixels in zip(classes.names, one.pixels[:-1], strict=True) if not pixels]
            for one in inspections
        ],
        ignored=sum(one.pixels[-1] for one in inspections) / sum(totals) if sum(totals) else None,
        weights=list(weights),
        problems=problems,
        suspects=[_suspect(problem, splits) for problem in problems[:MOST_SHOWN]],
        rarest=list(_rarest(train, inspections[0], training)) if training else [],
        samples=list(_samples(training, classes, seed)) if training else [],
        command=command,
        configuration=yaml.safe_dump(dict(config), sort_keys=False, width=1000),
    )


def _samples(training: TrainingBatches, classes: Classes, seed: int) -> Iterator[Shown]:
    random = np.random.Generator(np.random.Philox(key=key(seed, "shown samples")))
    for index in sorted(random.permutation(len(training))[:NUM_SAMPLES].tolist()):
        yield Shown(training.dataset.names[index], "", _before_and_after(training, index, classes))


def _rarest(train: SegmentationDataset, seen: Inspection, training: TrainingBatches) -> Iterator[Shown]:
    """The images with most pixels of the rarest classes; of whole images, which is what an inspection looks at."""
    if train.whole is not train:
        return
    there = [index for index, pixels in enumerate(seen.pixels[:-1]) if pixels]
    for label in sorted(there, key=lambda index: seen.pixels[index])[:NUM_RAREST]:
        for index in seen.largest[label][:EACH]:
            note = f"much {train.classes.names[label]}, which is in {seen.images[label]} of {seen.num_images} images"
            yield Shown(train.names[index], note, _before_and_after(training, index, train.classes))


def _before_and_after(training: TrainingBatches, index: int, classes: Classes) -> Pictures:
    image, mask, _ = training.dataset[index]
    pictures = _both(image, mask, classes, "")
    for number, epoch in enumerate(EPOCHS, start=1):
        drawn = training[(epoch, index)]
        pictures += _both(drawn["image"], drawn["mask"], classes, f", augmented {number}")
    return pictures


def _both(image: np.ndarray, mask: np.ndarray, classes: Classes, how: str) -> Pictures:
    picture, labels = thumbnails.smaller(image, mask)
    colours = html.picture(draw.colourise(labels, classes), few=True)
    return [(f"image{how}", html.picture(picture)), (f"mask{how}", colours)]


# Files that cannot be used.


def _suspect(problem: str, splits: Sequence[SegmentationDataset]) -> Shown:
    """A problem, with what can be decoded of the files that it names."""
    for pair in _pairs(splits):
        if str(pair.image) in problem or str(pair.mask) in problem:
            return Shown(pair.name, problem, [*_decoded(pair)])
    return Shown("", problem, [])


def _pairs(splits: Sequence[SegmentationDataset]) -> Iterator[Pair]:
    for split in splits:
        dataset = split.whole
        while isinstance(dataset, DatasetView):
            dataset = dataset.dataset
        if isinstance(dataset, FileDataset):
            yield from dataset.pairs


def _decoded(pair: Pair) -> Iterator[tuple[str, html.Picture]]:
    """The image, and the mask as a colour for each label, or as the picture that it is; what cannot be is left out."""
    palette = np.array(voc_colours(256), dtype=np.uint8)
    with suppress(UsageError):  # the problem says so
        yield "image", _shrunk(read_image(pair.image, exif="ignore"), few=False)
    with suppress(UsageError):
        try:
            picture = palette[read_labels(pair.mask) & 255]
        except UsageError:
            picture = read_image(pair.mask, exif="ignore")
        yield "mask", _shrunk(picture, few=True)


def _shrunk(picture: np.ndarray, *, few: bool) -> html.Picture:
    image, _ = thumbnails.smaller(picture, picture[:, :, 0])
    return html.picture(image, few=few)
