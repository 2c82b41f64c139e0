"""The parts of a prediction or an evaluation that independent jobs compute, such as those of a SLURM array.

Job K of N takes every N-th image, beginning with the K-th. Its progress log and its counts lie in the output folder, in
`.segdeconv-parts/K-of-N`, with part.json once it is complete; `merge` puts the parts together.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from segdeconv.errors import UsageError
from segdeconv.system.files import replace_text
from segdeconv.system.plain_data import Limits, read_json, require_mapping

PARTS = ".segdeconv-parts"
MERGED = f"{PARTS}-merged"  # the same folder, while it is being removed
SUMMARY = "part.json"
SUMMARY_LIMITS = Limits(size=1 << 28, nodes=4_000_000)
MAX_PARTS = 10_000
FOLDER = re.compile(r"([1-9]\d{0,4})-of-([1-9]\d{0,4})")

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Part:
    """One of several disjoint parts of the images.

    Attributes:
        index: Its number, from 1.
        count: The number of parts.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Parse the value of --shard.

        Raises:
            UsageError: The text is not K/N with 1 <= K <= N.

        Examples:
            >>> Part.parse("3/16")
            Part(index=3, count=16)
        """
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        part = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= part.index <= part.count <= MAX_PARTS:
            raise UsageError(
                f"--shard={text} is not a part - write K/N with K from 1 to N, and N at most {MAX_PARTS}, such as 3/16"
            )
        return part

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def select(self, items: Sequence[T]) -> list[T]:
        """Return the items of this part.

        Examples:
            >>> Part(2, 3).select("abcdefg")
            ['b', 'e']
        """
        return list(items[self.index - 1 :: self.count])

    def folder(self, out: Path) -> Path:
        """Return the folder of the part's record in an output folder."""
        return out / PARTS / f"{self.index}-of-{self.count}"

    def begin(self, out: Path) -> None:
        """Remove the summary of an earlier run of this part.

        Raises:
            UsageError: The output folder has parts of another number of parts.
        """
        others = sorted({other.count for other in _find(out)} - {self.count})
        if others:
            raise UsageError(
                f"{out} has parts of --shard K/{others[0]}, not K/{self.count} - give all jobs the same number, or "
                f"choose another --out"
            )
        (self.folder(out) / SUMMARY).unlink(missing_ok=True)

    def finish(self, out: Path, summary: Mapping[str, Any]) -> None:
        """Write the summary of the part, plain data, once all its results are there."""
        replace_text(self.folder(out) / SUMMARY, json.dumps(dict(summary), indent=1) + "\n")


def has_parts(out: Path) -> bool:
    """Return whether an output folder has parts that are not merged."""
    return bool(_find(out))


def _find(out: Path) -> list[Part]:
    names = os.listdir(out / PARTS) if (out / PARTS).is_dir() else []
    return sorted(Part(int(match[1]), int(match[2])) for name in names if (match := FOLDER.fullmatch(name)))


def complete_parts(out: Path) -> dict[Part, dict[str, Any]]:
    """Return the summaries of all parts of an output folder.

    Raises:
        UsageError: Parts are missing, unfinished or damaged.
    """
    parts = _find(out)
    if not parts:
        raise UsageError(
            f"{out} has no parts to merge - give the folder that predict or evaluate --shard K/N wrote to with --out"
        )
    count = parts[0].count
    if any(part.count != count for part in parts):
        raise UsageError(
            f"{out / PARTS} has parts of {count} and of {parts[-1].count} - remove those of the wrong number"
        )
    if missing := sorted({Part(index, count) for index in range(1, count + 1)} - set(parts)):
        raise UsageError(f"{out} lacks {_listed(missing)} - run the command with --shard for each of them")
    if unfinished := [part for part in parts if not (part.folder(out) / SUMMARY).is_file()]:
        raise UsageError(f"{out}: {_listed(unfinished)} not finished - run the same command again for each of them")
    summaries = {}
    for part in parts:
        try:
            summaries[part] = dict(require_mapping(read_json(part.folder(out) / SUMMARY, SUMMARY_LIMITS)))
        except ValueError as error:
            raise UsageError(f"{part.folder(out) / SUMMARY} {error} - run part {part} again") from error
    return summaries


def remove_parts(out: Path) -> None:
    """Remove the parts, whose results are merged, by a rename, so that a killed merge leaves all or none."""
    remove_merged(out)
    (out / PARTS).rename(out / MERGED)
    remove_merged(out)


def remove_merged(out: Path) -> None:
    """Remove what a `remove_parts` that was killed left."""
    shutil.rmtree(out / MERGED, ignore_errors=True)


def fingerprint(names: Iterable[str]) -> dict[str, Any]:
    """Return number and hash of names, which tell whether the jobs were given the same images."""
    lines = [f"{name!a}\n".encode() for name in names]
    return {"images": len(lines), "sha256": hashlib.sha256(b"".join(lines)).hexdigest()}


def _listed(parts: Sequence[Part]) -> str:
    names = ", ".join(str(part) for part in parts[:20]) + (f" and {len(parts) - 20} more" if parts[20:] else "")
    return f"part{'s' if parts[1:] else ''} {names}"
