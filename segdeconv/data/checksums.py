"""Verification of a data set's files by their hashes, so that damaged or replaced files are not trained on."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.files.reading import read_list
from segdeconv.errors import UsageError
from segdeconv.system.files import hash_file


def verify(dataset: SegmentationDataset, *, checksums: str | None = None) -> None:
    """Check the hash of every file of a split; decoders accept most JPEGs with a flipped bit.

    Args:
        dataset: The split.
        checksums: A file in the format of `sha256sum`: lines of `HASH  PATH` with paths relative to its folder. It must
            list every file of the split, and may list others. None checks nothing.

    Raises:
        UsageError: The list cannot be read, or a file is unreadable, unlisted or has another hash.
    """
    if checksums is None:
        return
    listing = Path(os.path.expanduser(checksums))
    expected = _read(listing)
    if not dataset.files:
        raise UsageError(f"dataset.checksums: {dataset.kind} has no files - leave it out")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        problems = [problem for problem in pool.map(lambda file: _problem(file, expected), dataset.files) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise UsageError(f"{problems[0]} {listing}{more} - restore the file, or write the list again")


def _read(listing: Path) -> dict[str, str]:
    if not listing.is_file():
        raise UsageError(f"dataset.checksums={listing} is not a file - write it with sha256sum images/* masks/* > FILE")
    expected = {}
    for number, line in read_list(listing):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if match is None:
            raise UsageError(
                f"{listing}, line {number}: '{line[:80]}' is not 'HASH  PATH' - write the list with sha256sum"
            )
        expected[os.path.realpath(listing.parent / match[2])] = match[1].lower()
    return expected


def _problem(file: Path, expected: dict[str, str]) -> str | None:
    digest = expected.get(os.path.realpath(file))
    if digest is None:
        return f"{file} is not in"
    try:
        return None if hash_file(file) == digest else f"{file} does not have the hash in"
    except OSError as error:
        return f"{file} cannot be read ({error.strerror}), but is listed in"
