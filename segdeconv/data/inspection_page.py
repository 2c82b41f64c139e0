"""inspect.html: a page with the contents of a data set."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from segdeconv.classes import BLACK, Classes, distinct_colours
from segdeconv.data import checks
from segdeconv.data.checks import Finding
from segdeconv.data.dataset import FileDataset, Pair, SegmentationDataset
from segdeconv.data.files.finding import describe_skipped, find_files
from segdeconv.data.files.reading import read_image, read_stored_mask
from segdeconv.data.inspection import MAX_SHOWN, Inspection, stored_values
from segdeconv.data.loading import TrainingBatches
from segdeconv.drawing import draw, html, thumbnails
from segdeconv.errors import UsageError
from segdeconv.system.seeding import key

NUM_SAMPLES = 8
NUM_RAREST = 4  # number of rarest classes
IMAGES_PER_CLASS = 2  # images of each of them
MAX_VALUES = 60  # labels or colours of mask files in the table
MAX_PICTURED = 24  # of them with a picture
MAX_SUSPECTS = 4  # files that an error names
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
    findings: Sequence[Finding],
    weights: Sequence[float],
    training: TrainingBatches | None,
    *,
    seed: int,
    command: str,
    config: Mapping[str, Any],
    window: draw.Window | None = None,
) -> str:
    """Build the page of a data set.

    Args:
        splits: The splits, train first.
        inspections: The inspection of each split.
        problems: The problems of all splits.
        findings: What is probably not meant.
        weights: Weight of each class.
        training: The training samples; None if files of train cannot be used.
        seed: Seed of the selection of samples.
        command: The command that writes the page.
        config: The config to show.
        window: The window in which images are shown; None for `draw.to_rgb`.

    Returns:
        The page as HTML.

    Raises:
        UsageError: See `draw.require_window`.
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
        verdict=verdict(problems, findings),
        findings=findings,
        inventory=train.inventory,
        values=_values(splits, inspections, window),
        duplicates=[checks.duplicates(inspection) for inspection in inspections],
        suspects=[_problem_entry(problem, splits) for problem in problems[:MAX_SHOWN]],
        rarest=list(_rarest(train, inspections[0], training, window)) if training else [],
        samples=list(_samples(training, classes, seed, window)) if training else [],
        command=command,
        configuration=yaml.safe_dump(dict(config), sort_keys=False, width=1000),
    )


def build_failure_page(error: str, root: str | None, *, command: str, config: Mapping[str, Any]) -> str:
    """Build the page of a data set that cannot be read at all: the error, the files it names, and the files there are.

    Args:
        error: The error.
        root: The folder of the data set, if it has one.
        command: The command that writes the page.
        config: The config to show.

    Returns:
        The page as HTML.
    """
    folder = Path(root).expanduser() if root else None
    listing = None
    if folder is not None and folder.is_dir():
        with suppress(UsageError):  # it says which folder cannot be read, as the error of the page probably does
            listing = find_files(folder)
    files = [] if listing is None else listing.files
    counts = Counter(path.relative_to(folder).parent.as_posix() for path in files) if folder else Counter[str]()
    return html.render(
        "inspect_failed.html",
        error=error,
        folder=folder,
        counts=sorted(counts.items()),
        skipped=describe_skipped(listing, folder) if listing is not None and folder is not None else [],
        suspects=[Entry(path.name, "", [*_decoded_file(path)]) for path in sorted(files) if _names_file(error, path)][
            :MAX_SUSPECTS
        ],
        command=command,
        configuration=yaml.safe_dump(dict(config), sort_keys=False, width=1000),
    )


def verdict(problems: Sequence[str], findings: Sequence[Finding]) -> tuple[bool, str]:
    """Return whether a data set is fit to train, and a sentence that says so."""
    refused = sum(finding.refused for finding in findings)
    warnings = len(findings) - refused
    reasons = []
    if problems:
        one = len(problems) == 1
        reasons.append(
            f"{len(problems)} {'file' if one else 'files'} cannot be used as {'it is' if one else 'they are'}"
        )
    if refused:
        reasons.append(f"{refused} {'finding prevents' if refused == 1 else 'findings prevent'} training")
    noted = f"{warnings} {'warning' if warnings == 1 else 'warnings'}"
    if reasons:
        return False, f"Not fit to train: {' and '.join(reasons)}{f'; {noted}' if warnings else ''}."
    return True, f"Fit to train, with {noted}." if warnings else "Fit to train: nothing conspicuous was found."


class Value(NamedTuple):
    """A row of the table of the labels or colours in mask files.

    Attributes:
        value: The label or colour.
        colour: Its colour if it is one.
        meaning: The name of its class, or `ignored`.
        pixels, share, images: Pixels, their share of all and images, over all splits.
        pictures: The image with the most pixels of it, with these pixels marked.
    """

    value: int | str
    colour: str | None
    meaning: str
    pixels: int
    share: float
    images: int
    pictures: Pictures


def _values(
    splits: Sequence[SegmentationDataset], inspections: Sequence[Inspection], window: draw.Window | None
) -> list[Value]:
    counts: dict[int | str, tuple[int, int, int, SegmentationDataset]] = {}
    for split, inspection in zip(splits, inspections, strict=True):
        for entry in inspection.values:
            pixels, images, place, owner = counts.get(entry.value, (0, 0, entry.largest, split))
            counts[entry.value] = (pixels + entry.pixels, images + entry.images, place, owner)
    total = max(1, sum(pixels for pixels, *_ in counts.values()))
    rows: list[Value] = []
    for value, (pixels, images, place, owner) in sorted(counts.items(), key=lambda item: -item[1][0])[:MAX_VALUES]:
        meaning = checks.meaning(owner.stored_classes, value)
        pictures = list(_marked(owner, place, value, window)) if len(rows) < MAX_PICTURED else []
        colour = value if isinstance(value, str) else None
        rows.append(Value(value, colour, meaning, pixels, pixels / total, images, pictures))
    return rows


def _marked(
    dataset: SegmentationDataset, place: int, value: int | str, window: draw.Window | None
) -> Iterator[tuple[str, html.Picture]]:
    """Yield the mask with the most pixels of a label or colour, these in white on the dimmed image."""
    files = dataset.unwrapped
    if not isinstance(files, FileDataset):
        return
    values, _ = stored_values(files.stored_mask(place), files.classes)
    marked = values == (value if isinstance(value, int) else int(value[1:], 16))
    image, shown = thumbnails.smaller(draw.windowed(files[place].image, window), marked.astype(np.uint8))
    yield (
        f"{value} in {files.names[place]}",
        html.picture(np.where(shown[:, :, None] > 0, 255, image // 3).astype(np.uint8)),
    )


def _samples(training: TrainingBatches, classes: Classes, seed: int, window: draw.Window | None) -> Iterator[Entry]:
    random = np.random.Generator(np.random.Philox(key=key(seed, "shown samples")))
    for index in sorted(random.permutation(len(training))[:NUM_SAMPLES].tolist()):
        yield Entry(training.dataset.names[index], "", _before_and_after(training, index, classes, window))


def _rarest(
    train: SegmentationDataset, inspection: Inspection, training: TrainingBatches, window: draw.Window | None
) -> Iterator[Entry]:
    """Yield the images with the most pixels of the rarest classes; none for crops, since whole images are inspected."""
    if train.whole is not train:
        return
    present = [index for index, pixels in enumerate(inspection.pixels[:-1]) if pixels]
    for label in sorted(present, key=lambda index: inspection.pixels[index])[:NUM_RAREST]:
        occurrence = f"in {inspection.images[label]} of {inspection.num_images} images"
        for index in inspection.largest[label][:IMAGES_PER_CLASS]:
            note = f"many pixels of {train.classes.names[label]}, which occurs {occurrence}"
            yield Entry(train.names[index], note, _before_and_after(training, index, train.classes, window))


def _before_and_after(training: TrainingBatches, index: int, classes: Classes, window: draw.Window | None) -> Pictures:
    image, mask, _ = training.dataset[index]
    pictures = _image_and_mask(draw.windowed(image, window), mask, classes, "")
    for number, epoch in enumerate(EPOCHS, start=1):
        sample = training[(epoch, index)]
        image = draw.windowed(sample["image"], window)
        pictures += _image_and_mask(image, sample["mask"], classes, f", augmented {number}")
    return pictures


def _image_and_mask(image: np.ndarray, mask: np.ndarray, classes: Classes, suffix: str) -> Pictures:
    picture, labels = thumbnails.smaller(image, mask)
    colours = html.picture(draw.colourise(labels, classes), few_colours=True)
    return [(f"image{suffix}", html.picture(picture)), (f"mask{suffix}", colours)]


# Files that cannot be used


def _problem_entry(problem: str, splits: Sequence[SegmentationDataset]) -> Entry:
    """Return a problem with the files it names, as far as they can be decoded."""
    for pair in _pairs(splits):
        if _names_file(problem, pair.image) or _names_file(problem, pair.mask):
            return Entry(pair.name, problem, [*_decoded(pair)])
    return Entry("", problem, [])


def _pairs(splits: Sequence[SegmentationDataset]) -> Iterator[Pair]:
    for split in splits:
        dataset = split.unwrapped
        if isinstance(dataset, FileDataset):
            yield from dataset.pairs


def _names_file(message: str, path: Path) -> bool:
    return f"{path} " in f"{message} " or f"{path}:" in message or f"{path}," in message


def _decoded(pair: Pair) -> Iterator[tuple[str, html.Picture]]:
    """Yield the image and the mask as far as they can be decoded; the problem reports why they cannot."""
    with suppress(UsageError):
        yield "image", _shrunk(read_image(pair.image, exif="ignore"), few_colours=False)
    with suppress(UsageError):
        yield "mask", _shrunk(_mask_colours(pair.mask), few_colours=True)


def _decoded_file(path: Path) -> Iterator[tuple[str, html.Picture]]:
    """Yield a file as far as it can be decoded; the error of the page reports why it cannot."""
    with suppress(UsageError):
        yield "as stored", _shrunk(_mask_colours(path), few_colours=True)


def _mask_colours(path: Path) -> np.ndarray:
    """Return a mask with a colour for each label, or its own colours, (H, W, 3) uint8."""
    try:
        mask = read_stored_mask(path)
    except UsageError:
        return read_image(path, exif="ignore")
    if mask.values.ndim == 3:
        return mask.values
    colours = mask.palette if mask.palette is not None else np.array((BLACK, *distinct_colours(255)), dtype=np.uint8)
    return colours[(mask.values & 255).astype(np.uint8)]


def _shrunk(picture: np.ndarray, *, few_colours: bool) -> html.Picture:
    image, _ = thumbnails.smaller(picture, picture[:, :, 0])
    return html.picture(image, few_colours=few_colours)
