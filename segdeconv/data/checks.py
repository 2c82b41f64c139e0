"""Checks of an inspected data set for what is probably not meant."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from segdeconv.classes import Classes, hex_colour
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.inspection import Inspection
from segdeconv.data.preprocessing import Size
from segdeconv.data.resizing import changes_scale, describe_resizing
from segdeconv.errors import UsageError, command

MANY_IGNORED = 0.25  # share of the pixels
FEW_SHARE = 1e-4  # of the pixels that are not ignored
FEW_PIXELS = 50
NAMED = 3
IGNORED = "ignored"


class Finding(NamedTuple):
    """Something about a data set that is probably not meant.

    Attributes:
        message: What, with counts, and the way out.
        refused: Whether training is refused.
    """

    message: str
    refused: bool = False


def review(
    splits: Sequence[SegmentationDataset], inspections: Sequence[Inspection], size: Sequence[int] | None = None
) -> list[Finding]:
    """Return the findings about the splits of a data set, those that prevent training first.

    Args:
        splits: The splits, train first.
        inspections: The inspection of each.
        size: (H, W) that images are resized to; None if they keep their size.
    """
    findings = [Finding(line) for line in dict.fromkeys(line for split in splits for line in split.warnings)]
    if not any(inspection.problems for inspection in inspections):  # otherwise pixels are missing for another reason
        for split, inspection in zip(splits, inspections, strict=True):
            findings += _ignored(split, inspection)
            findings += _nodata(split, inspection)
        findings += _classes(splits[0], inspections)
    findings += _images(splits, inspections)
    if size is not None and splits[0].whole is splits[0]:  # crops of objects are meant to be resized
        findings += _scale(splits, inspections, (size[0], size[1]))
    findings += _bands(splits, inspections)
    findings += _copies(splits, inspections)
    return sorted(findings, key=lambda finding: not finding.refused)


def refuse(findings: Iterable[Finding]) -> None:
    """Raise the first finding that prevents training.

    Raises:
        UsageError: There is one.
    """
    refused = [finding.message for finding in findings if finding.refused]
    if refused:
        more = f" (and {len(refused) - 1} more: {command('inspect_data')} lists them)" if refused[1:] else ""
        raise UsageError(refused[0] + more)


def _classes(dataset: SegmentationDataset, inspections: Sequence[Inspection]) -> list[Finding]:
    """Return findings about classes without pixels, or with few."""
    names = dataset.classes.names
    pixels = [sum(inspection.pixels[index] for inspection in inspections) for index in range(len(names))]
    absent = [name for name, count in zip(names, pixels, strict=True) if not count]
    findings = []
    if absent:
        one = len(absent) == 1
        subject = f"class{'' if one else 'es'} {_listed(absent)} {'has' if one else 'have'} no pixel"
        ignored = _ignored_values(dataset.stored_classes, inspections)
        if dataset.own_classes and ignored:
            value, count = ignored[0]
            total = sum(count for _, count in ignored)
            findings.append(
                Finding(
                    f"{subject}, while {count} pixels ({_share(count, inspections)}) are {value}"
                    f"{f' and {total - count} others are ignored too' if total > count else ''}, which is ignored - if "
                    f"{value} is meant, write '{absent[0]}: {value}' in classes.yaml; otherwise remove the class, or "
                    "set dataset.absent_classes=allow",
                    refused=True,
                )
            )
        else:
            findings.append(
                Finding(
                    f"{subject} in {_names(inspections)}, and cannot be learned or scored - check the masks, or change "
                    "the classes with dataset.label_map"
                )
            )
    for inspection in inspections:
        missing = [
            name for name, count, total in zip(names, inspection.pixels, pixels, strict=False) if total and not count
        ]
        if missing and sum(inspection.pixels[:-1]):
            findings.append(
                Finding(
                    f"{inspection.split}: no pixel of {_listed(missing)}, which other splits have - choose other splits"
                )
            )
    labelled = sum(pixels)
    bound = max(FEW_PIXELS, FEW_SHARE * labelled)
    few = [(name, count) for name, count in zip(names, pixels, strict=True) if 0 < count < bound]
    if few:
        counts = _listed([f"{name} ({count} pixel{'s'[: count > 1]})" for name, count in few])
        findings.append(
            Finding(
                f"classes with fewer than {bound:.0f} pixels in all: {counts} - check that they are meant; "
                "dataset.label_map can merge or ignore them"
            )
        )
    return findings


def _ignored_values(classes: Classes, inspections: Sequence[Inspection]) -> list[tuple[int | str, int]]:
    """Return the labels or colours of the mask files that are ignored, with their pixels, the most frequent first."""
    counts: dict[int | str, int] = {}
    for inspection in inspections:
        for entry in inspection.values:
            if meaning(classes, entry.value) == IGNORED:
                counts[entry.value] = counts.get(entry.value, 0) + entry.pixels
    return sorted(counts.items(), key=lambda item: -item[1])


def describe_classes(inspections: Sequence[Inspection], splits: Sequence[SegmentationDataset]) -> dict[str, str]:
    """Return a remark for each class of the mask files: its pixels, and an image with many of them."""
    classes = splits[0].stored_classes
    remarks = {}
    for name in classes.names:
        entries = [
            (entry, split)
            for inspection, split in zip(inspections, splits, strict=True)
            for entry in inspection.values
            if meaning(classes, entry.value) == name
        ]
        if entries:
            pixels, images = (sum(values) for values in zip(*((e.pixels, e.images) for e, _ in entries), strict=True))
            entry, split = max(entries, key=lambda item: item[0].pixels)
            remarks[name] = f"{pixels} pixels in {images} images, such as {split.whole.names[entry.largest]}"
    return remarks


def meaning(classes: Classes, value: int | str) -> str:
    """Return the name of the class of a label or colour ('#rrggbb') in a mask file, or IGNORED."""
    if isinstance(value, int):
        return classes.names[classes.labels.index(value)] if value in classes.labels else IGNORED
    colours = [hex_colour(colour) for colour in classes.colours]
    return classes.names[colours.index(value)] if value in colours else IGNORED


def _ignored(dataset: SegmentationDataset, inspection: Inspection) -> list[Finding]:
    """Return findings about ignored pixels."""
    total, split = sum(inspection.pixels), inspection.split
    if not total:
        return []
    if not sum(inspection.pixels[:-1]):
        return [
            Finding(
                f"{split}: every pixel of its {inspection.num_images} masks is ignored, so there is nothing to "
                f"{'learn' if split == 'train' else 'score'} - correct the masks or the classes",
                refused=True,
            )
        ]
    findings = []
    share = inspection.pixels[-1] / total
    if share > MANY_IGNORED:
        findings.append(
            Finding(f"{split}: {inspection.pixels[-1]} pixels ({share:.1%}) are ignored - check that this is meant")
        )
    if inspection.empty:
        findings.append(
            Finding(
                f"{split}: every pixel is ignored in {_images_named(dataset, inspection.empty)} - label or remove them"
            )
        )
    return findings


def _nodata(dataset: SegmentationDataset, inspection: Inspection) -> list[Finding]:
    """Return findings about the nodata values of GeoTIFFs."""
    classes, findings = dataset.stored_classes, []
    pixels = {entry.value: entry.pixels for entry in inspection.values}
    for value, masks in inspection.mask_nodata:
        if not pixels.get(value):
            continue
        start = f"{inspection.split}: label {value} ({pixels[value]} pixels) is the nodata value of {masks} masks"
        if meaning(classes, value) != IGNORED:
            findings.append(
                Finding(
                    f"{start} and class '{meaning(classes, value)}', as which it is learned - if it marks pixels "
                    f"without data, write 'ignore: {value}' in classes.yaml in place of the class"
                )
            )
        elif not dataset.unwrapped.inferred_classes:
            findings.append(Finding(f"{start} and is ignored - if it is a class, name it in classes.yaml"))
    count, images = inspection.nodata
    if count:
        findings.append(
            Finding(
                f"{inspection.split}: {count} pixels of {images} images have the nodata value of their file and are "
                "ignored - if they have data, remove it (gdal_edit.py -unsetnodata)"
            )
        )
    return findings


def _bands(splits: Sequence[SegmentationDataset], inspections: Sequence[Inspection]) -> list[Finding]:
    """Return a finding about images whose channels have other names than those of most."""
    entries = [
        (tuple(names), count, split.whole.names[first])
        for split, inspection in zip(splits, inspections, strict=True)
        for names, count, first in inspection.bands
    ]
    if not entries:
        return []
    most = max(entries, key=lambda entry: entry[1])[0]
    others = [entry for entry in entries if entry[0] != most]
    if not others:
        return []
    return [
        Finding(
            f"the bands of {sum(count for _, count, _ in others)} images are not called {', '.join(most)}, such as "
            f"those of {others[0][2]}: {', '.join(others[0][0])}; bands are matched by their place - give all images "
            "the same bands in the same order"
        )
    ]


def _images(splits: Sequence[SegmentationDataset], inspections: Sequence[Inspection]) -> list[Finding]:
    """Return findings about the image files, over all splits."""
    lines = []
    deep = _formats(inspections, lambda bits, channels, alpha: bits > 8)
    as_stored = f"dataset.channels={_most_channels(inspections)} reads them as they are stored"
    flat = [(split, inspection.flat) for split, inspection in zip(splits, inspections, strict=True) if inspection.flat]
    if flat:
        named = " and ".join(f"{split.split}: {_images_named(split, places)}" for split, places in flat)
        lines.append(f"hardly any contrast in {named} - {as_stored if deep else 'check them'}")
    if deep:
        lines.append(f"images of more than 8 bit, of which the upper 8 are read: {deep} - {as_stored}")
    several = {channels for inspection in inspections for _, channels, alpha, _ in inspection.formats if not alpha}
    for number in sorted(several - {1, 2, 3}):
        counts = _formats(inspections, partial(_has_channels, number))
        way_out = f"dataset.channels={number} reads all"
        lines.append(f"images of {number} channels, of which 3 are read: {counts} - {way_out}")
    if transparent := _formats(inspections, lambda bits, channels, alpha: alpha):
        lines.append(
            f"images with an alpha channel, whose transparent pixels are blended with black: {transparent} - save them "
            "without it"
        )
    return [Finding(line) for line in lines]


def _scale(splits: Sequence[SegmentationDataset], inspections: Sequence[Inspection], target: Size) -> list[Finding]:
    """Return a finding about the images whose scale or proportions the input size changes a lot."""
    changed = [
        (count, split.names[first], (height, width))
        for split, inspection in zip(splits, inspections, strict=True)
        for (height, width, count), first in zip(inspection.sizes, inspection.first_of_size, strict=True)
        if changes_scale((height, width), target)
    ]
    if not changed:
        return []
    total = sum(inspection.num_images for inspection in inspections)
    count = sum(count for count, _, _ in changed)
    _, name, size = max(changed, key=lambda entry: entry[0])
    images = f"{count} of {total} images {'is' if count == 1 else 'are'}"
    return [Finding(describe_resizing(images, name, size, target, training=True))]


def _has_channels(number: int, bits: int, channels: int, alpha: bool) -> bool:
    return channels == number and not alpha


def _formats(inspections: Sequence[Inspection], matches: Callable[[int, int, bool], bool]) -> str:
    """Return the number of images of each split in the formats that match, "" if there are none."""
    counts = {}
    for inspection in inspections:
        matching = [count for bits, channels, alpha, count in inspection.formats if matches(bits, channels, alpha)]
        counts[inspection.split] = sum(matching)
    return ", ".join(f"{count} of {split}" for split, count in counts.items() if count)


def _most_channels(inspections: Sequence[Inspection]) -> int:
    formats = [stored for inspection in inspections for stored in inspection.formats]
    return max((channels for bits, channels, _, _ in formats if bits > 8), default=1)


def _copies(splits: Sequence[SegmentationDataset], inspections: Sequence[Inspection]) -> list[Finding]:
    """Return a finding for each two splits that have identical images in different files."""
    findings = []
    for index, (split, inspection) in enumerate(zip(splits, inspections, strict=True)):
        for earlier, other in zip(splits[:index], inspections[:index], strict=True):
            known = set(other.digests) - {""}
            same = [place for place, digest in enumerate(inspection.digests) if digest in known]
            if same:
                findings.append(
                    Finding(
                        f"{split.split}: {len(same)} of {inspection.num_images} images are pixel for pixel in "
                        f"{earlier.split} too ({_listed([split.whole.names[place] for place in same])}), so that its "
                        "scores are too good - remove the copies"
                    )
                )
    return findings


def duplicates(inspection: Inspection) -> int:
    """Return the number of images of a split that are pixel for pixel an earlier image of it."""
    digests = [digest for digest in inspection.digests if digest]
    return len(digests) - len(set(digests))


def _images_named(dataset: SegmentationDataset, places: Sequence[int]) -> str:
    names = dataset.whole.names
    return f"{len(places)} of {len(names)} images ({_listed([names[place] for place in places])})"


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"'{name}'" if name.strip() != name else name for name in names[:NAMED]) + more


def _names(inspections: Sequence[Inspection]) -> str:
    return " and ".join(inspection.split for inspection in inspections)


def _share(count: int, inspections: Sequence[Inspection]) -> str:
    return f"{count / max(1, sum(sum(inspection.pixels) for inspection in inspections)):.1%}"
