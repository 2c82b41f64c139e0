"""The index of a data set in shards: what each tar file holds, where, and how it is verified.

`index.json` names the classes and, for each split, two files with their hashes: `SPLIT.json` has the hashes of the
shards, and the offset, size and hash of every image and mask in them; `SPLIT-contents.json` has what is counted in each
image, which only an inspection needs. An index may come from a stranger: it is JSON that is checked field by field, and
no name in it can lead outside a folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from segdeconv.classes import Classes
from segdeconv.data.dataset import ImageContents
from segdeconv.data.files.reading import Exif
from segdeconv.errors import UsageError
from segdeconv.system.plain_data import Limits, PlainDataError, read_json

INDEX = "index.json"
FORMAT: Literal["segdeconv shards"] = "segdeconv shards"
VERSION: Literal[1] = 1
HEAD_LIMITS = Limits()
WAY_OUT = "restore it, or convert the data set again"
MAX_LIST = 1 << 32  # bytes of a list

Count = Annotated[int, Field(ge=0, lt=1 << 60)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]{0,200}$")]  # a plain name: no folder, no `..`
SplitName = Annotated[str, Field(pattern=r"^\w[\w-]{0,50}$")]
Suffix = Annotated[str, Field(pattern=r"^(\.\w{1,16})?$")]
SampleName = Annotated[str, Field(min_length=1, max_length=4096)]
Byte = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a shard.

    Attributes:
        suffix: The suffix of its path, which is SPLIT/images/, SPLIT/masks/ or SPLIT/instances/, and the name.
        offset: Position of its first byte in the tar file.
        size: Number of its bytes.
        sha256: Hash of its bytes.
    """

    suffix: Suffix
    offset: Count
    size: Count
    sha256: Hash


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One sample of a shard.

    Attributes:
        name: Its name, unique within the split.
        image: The image file, as it was in the data set.
        mask: The mask, a palette PNG of class indices.
        instances: The file that numbers the objects, if the data set has one.
    """

    name: SampleName
    image: Member
    mask: Member
    instances: Member | None


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file.

    Attributes:
        file: Its name.
        size: Number of its bytes.
        sha256: Hash of its bytes.
        samples: What it holds, in order.
    """

    file: FileName
    size: Count
    sha256: Hash
    samples: list[ShardSample]


@dataclass(frozen=True, slots=True)
class ListFile:
    """A file beside the shards.

    Attributes:
        file: Its name.
        size: Number of its bytes.
        sha256: Hash of its bytes.
    """

    file: FileName
    size: Annotated[int, Field(ge=0, le=MAX_LIST)]
    sha256: Hash


@dataclass(frozen=True, slots=True)
class SplitFiles:
    """The lists of a split.

    Attributes:
        num_images: Number of samples.
        shards: The list of shards.
        contents: The list of the contents of images, in the order of the shards.
    """

    num_images: Annotated[int, Field(ge=1)]
    shards: ListFile
    contents: ListFile


@dataclass(frozen=True)
class Head:
    """The content of `index.json`.

    Attributes:
        format: Always `FORMAT`.
        version: `VERSION`.
        source: Name of the data set that was converted.
        classes: The classes, see `Classes.to_dict`.
        own_classes: See `SegmentationDataset`.
        channels: Number of channels of every image.
        as_stored: See `SegmentationDataset`.
        band_names: See `SegmentationDataset`.
        exif: How the rotation of images is treated, see `read_image`; the masks fit it.
        splits: The lists of each split.
    """

    format: Literal["segdeconv shards"]
    version: Literal[1]
    source: str
    classes: dict[str, Any]
    own_classes: bool
    channels: Annotated[int, Field(ge=1, le=65535)]
    as_stored: bool
    band_names: list[str]
    exif: Exif
    splits: dict[SplitName, SplitFiles]


@dataclass(frozen=True)
class _ClassesDict:
    """The types of `Classes.to_dict`."""

    names: list[str]
    colours: list[tuple[Byte, Byte, Byte]]
    ignore_index: Byte
    labels: list[Annotated[int, Field(ge=0, le=65535)]]
    ignore_colour: tuple[Byte, Byte, Byte] | None
    ignored_labels: list[int]
    by_colour: bool | None


_HEAD, _CLASSES = TypeAdapter(Head), TypeAdapter(_ClassesDict)
_SHARDS, _CONTENTS = TypeAdapter(list[Shard]), TypeAdapter(list[ImageContents])


def is_index(path: Path) -> bool:
    """Return whether a file is the index of shards, whole or damaged, rather than some other index.json."""
    try:
        with path.open("rb") as file:
            return b'"' + FORMAT.encode() + b'"' in file.read(1 << 10)
    except OSError:
        return False


def read_head(path: Path, shown: str) -> tuple[Head, Classes]:
    """Read `index.json`.

    Args:
        path: The file.
        shown: What messages call it.

    Raises:
        UsageError: It is not such an index.
    """
    try:
        data = read_json(path, HEAD_LIMITS)
    except PlainDataError as error:
        raise UsageError(f"{shown} {error} - {WAY_OUT}") from None
    except FileNotFoundError:
        raise UsageError(f"{shown} is missing - give the folder that convert --shards wrote") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UsageError(f"{shown} is not the index of shards - give the folder that convert --shards wrote")
    if data.get("version") != VERSION:
        raise UsageError(
            f"{shown} has version {str(data.get('version'))[:20]}, but this segdeconv reads version {VERSION} - "
            "convert the data set again"
        )
    with _explained(shown):
        head = _HEAD.validate_python(data)
        classes = _CLASSES.validate_python(head.classes)
    try:
        return head, Classes.from_dict(asdict(classes))
    except UsageError as error:
        raise _damaged(shown, str(error).partition(" - ")[0]) from None


def read_shards(path: Path, shown: str, num_images: int) -> list[Shard]:
    """Read the list of shards of a split.

    Args:
        path: The file.
        shown: What messages call it.
        num_images: The number of samples.

    Raises:
        UsageError: It is not such a list.
    """
    with _explained(shown):
        shards = _SHARDS.validate_json(_bytes(path, shown))
    names: set[str] = set()
    for shard in shards:
        if not shard.samples:
            raise _damaged(shown, f"{shard.file} has no samples")
        for sample in shard.samples:
            if not is_inside(sample.name):
                raise _damaged(shown, f"{sample.name!r} is not a path inside a folder")
            for member in (sample.image, sample.mask, sample.instances):
                if member is not None and member.offset + member.size > shard.size:
                    raise _damaged(shown, f"a file of {sample.name!r} ends after its shard {shard.file}")
            names.add(sample.name)
    count = sum(len(shard.samples) for shard in shards)
    if not count == len(names) == num_images:
        raise _damaged(shown, f"it has {count} samples of {len(names)} names, but the index states {num_images}")
    return shards


def read_contents(path: Path, shown: str, head: Head, num_images: int) -> list[ImageContents]:
    """Read the contents of the images of a split.

    Args:
        path: The file.
        shown: What messages call it.
        head: The content of `index.json`.
        num_images: The number of samples.

    Raises:
        UsageError: It is not such a list.
    """
    with _explained(shown):
        contents = _CONTENTS.validate_json(_bytes(path, shown))
    if len(contents) != num_images:
        raise _damaged(shown, f"it has {len(contents)} images, but the index states {num_images}")
    num_classes = len(head.classes["names"])
    for number, image in enumerate(contents):
        fits = len(image.counts) == num_classes + 1 and {len(row) for row in image.sums} == {head.channels}
        if not fits or min(image.counts) < 0 or sum(image.counts) != image.size[0] * image.size[1]:
            raise _damaged(shown, f"the counts of image {number} do not fit its size, the classes or the channels")
    return contents


def _bytes(path: Path, shown: str) -> bytes:
    try:
        return path.read_bytes()  # of the size in the index, which is limited
    except OSError as error:
        raise UsageError(f"{shown} cannot be read: {(error.strerror or str(error)).lower()} - {WAY_OUT}") from None


@contextmanager
def _explained(shown: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        raise _damaged(shown, f"{'.'.join(map(str, details['loc']))}: {details['msg']}"[:200]) from None


def _damaged(shown: str, reason: str) -> UsageError:
    return UsageError(f"{shown} is damaged ({reason}) - {WAY_OUT}")


def is_inside(name: str) -> bool:
    """Return whether a name from a stranger is a path with `/` that stays inside the folder it is joined to.

    Examples:
        >>> is_inside("a/b.png"), is_inside("../b.png"), is_inside("/b.png"), is_inside("a//b.png")
        (True, False, False, False)
    """
    parts = name.split("/")
    return not re.search(r"[\\\x00-\x1f\x7f]", name) and not {"", ".", ".."} & set(parts) and not os.path.isabs(name)


def as_json(content: Head | Sequence[Shard] | Sequence[ImageContents]) -> bytes:
    """Return the JSON of a file of the index; names that are not UTF-8 are escaped."""
    plain = asdict(content) if isinstance(content, Head) else [_plain(entry) for entry in content]
    return (json.dumps(plain, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _plain(entry: Shard | ImageContents) -> object:
    return asdict(entry) if isinstance(entry, Shard) else entry
