"""Files held against a list of their hashes, so that one that was damaged or exchanged is not learnt from."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.files.reading import read_list
from segdeconv.errors import UsageError
from segdeconv.system.files import hash_file


def verify(dataset: SegmentationDataset, *, checksums: str | None = None) -> None:
    """Read every file of a split and hold it against a list; a decoder accepts most JPEGs with a flipped bit.

    checksums: a file as `sha256sum` writes it, lines of `HASH  PATH` with paths from the folder that it lies in. It has
        to name every file of the split, and may name others.
    """
    if checksums is None:
        return
    listing = Path(checksums).expanduser()
    expected = _read(listing)
    if not dataset.files:
        raise UsageError(f"dataset.checksums: {dataset.kind} lies in no files - leave it out")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        wrong = [problem for problem in pool.map(lambda file: _problem(file, expected), dataset.files) if problem]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        raise UsageError(f"{wrong[0]} {listing}{more} - restore the file, or make the list anew")


def _read(listing: Path) -> dict[str, str]:
    if not listing.is_file():
        raise UsageError(f"dataset.checksums={listing} is no file - make one: sha256sum images/* masks/* > FILE")
    expected = {}
    for number, line in read_list(listing):
        found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if found is None:
            raise UsageError(
                f"{listing}, line {number}: '{line[:80]}' is not 'HASH  PATH' - sha256sum writes such lines"
            )
        expected[os.path.realpath(listing.parent / found[2])] = found[1].lower()
    return expected


def _problem(file: Path, expected: dict[str, str]) -> str | None:
    digest = expected.get(os.path.realpath(file))
    if digest is None:
        return f"{file} is not in"
    try:
        return None if hash_file(file) == digest else f"{file} has another hash than in"
    except OSError as error:
        return f"{file} cannot be read ({error.strerror}) and is in"
