"""The hashes of all images and masks of a run, data.csv, by which a change of its data is found and named."""

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.inspection import DIGEST, Inspection, count_image, hash_pixels, map_with_progress
from segdeconv.errors import UsageError
from segdeconv.system.files import encode, replace_text
from segdeconv.system.plain_data import Limits, PlainDataError, read_bytes

NAME = "data.csv"
HEADER = ("split", "name", "image", "mask")
LIMITS = Limits(size=1 << 30)  # a line of 100 bytes for each of ten million images


class SampleDigest(NamedTuple):
    """The hashes of one sample.

    Attributes:
        name: The name of the sample, as UTF-8 text.
        image: Hash of the pixels of the image.
        mask: Hash of the values of the mask; empty for shards of earlier versions.
    """

    name: str
    image: str
    mask: str


def digests_of(inspection: Inspection, dataset: SegmentationDataset) -> list[SampleDigest]:
    """Return the hashes of a split, which its inspection has computed."""
    whole = dataset.whole
    triples = zip(whole.names, inspection.digests, inspection.mask_digests, strict=True)
    return [SampleDigest(_as_text(name), _current(image), _current(mask)) for name, image, mask in triples]


def image_hashes(dataset: SegmentationDataset) -> list[str]:
    """Return the hash of the pixels of every image of a split, as in `SampleDigest`; images are read as needed."""

    def hashed(index: int) -> str:
        contents = dataset.contents(index)
        return hash_pixels(dataset[index].image) if contents is None else contents.digest

    return map_with_progress(len(dataset), hashed, f"hashing {dataset.split}")


def _as_text(name: str) -> str:
    """Return a name as it is read from the file, which is UTF-8."""
    return encode(name).decode()


def _current(digest: str) -> str:
    """Return a hash, or nothing for the shorter one of a shard of an earlier version."""
    return digest if len(digest) == 2 * DIGEST else ""


def combined(digests: Sequence[SampleDigest]) -> str:
    """Return one sha256 of the names and hashes of a split, in hex."""
    total = hashlib.sha256()
    for digest in digests:
        total.update(f"{digest.name!a} {digest.image} {digest.mask}\n".encode())
    return total.hexdigest()


def write(digests: Mapping[str, Sequence[SampleDigest]], path: Path) -> None:
    """Write the hashes of all splits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for split, samples in digests.items():
        writer.writerows((split, *sample) for sample in samples)
    replace_text(path, text.getvalue())


def read(path: Path) -> dict[str, list[SampleDigest]]:
    """Read the hashes of all splits.

    Raises:
        PlainDataError: The file has another form.
        OSError: It cannot be read.
    """
    try:
        header, *rows = csv.reader(read_bytes(path, LIMITS).decode().splitlines())
        digests: dict[str, list[SampleDigest]] = {}
        for split, name, image, mask in rows:
            digests.setdefault(split, []).append(SampleDigest(name, image, mask))
    except (csv.Error, ValueError) as error:
        raise PlainDataError("is not a table of hashes of images and masks") from error
    if tuple(header) != HEADER:
        raise PlainDataError(f"has other columns than {', '.join(HEADER)}")
    return digests


def changes(dataset: SegmentationDataset, recorded: Sequence[SampleDigest]) -> Iterator[str]:
    """Read every image and mask of a split, and yield what differs from its recorded hashes, one phrase each.

    Args:
        dataset: The split.
        recorded: Its recorded hashes.
    """
    whole = dataset.whole
    names = [_as_text(name) for name in whole.names]
    if names != [digest.name for digest in recorded]:
        missing = sorted({digest.name for digest in recorded} - set(names))
        added = sorted(set(names) - {digest.name for digest in recorded})
        for kind, others in (("is missing", missing), ("is new", added)):
            yield from (f"{whole.split} image {name} {kind}" for name in others)
        if not missing and not added:
            yield f"the {whole.split} images are in another order"
        return

    def change(index: int) -> str:
        try:
            contents = count_image(whole, index, whole[index])
        except UsageError as error:
            return f"{recorded[index].name} ({whole.split}), which cannot be read: {error}"
        digest = recorded[index]
        parts = [
            part
            for part, before, now in (
                ("image", digest.image, contents.digest),
                ("mask", digest.mask, contents.mask_digest),
            )
            if before and before != now
        ]
        return f"the {' and the '.join(parts)} of {digest.name} ({whole.split})" if parts else ""

    yield from filter(None, map_with_progress(len(whole), change, f"hashing {whole.split}"))
