"""What the arguments of predict mean: pictures and videos, and the names of what is written for each."""

import glob
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from segdeconv.data.files.reading import SUFFIXES, read_list
from segdeconv.errors import UsageError

VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".mpeg", ".webm"})
LONGEST = 255  # bytes of a file's name
STDIN = "-"


def find_images(arguments: Sequence[str], out: Path, endings: Sequence[str]) -> dict[str, Path]:
    """The pictures and videos that arguments mean, by the name (without suffix) of their output in `out`.

    arguments: files, folders (their pictures, with sub-folders), patterns, lists (.txt, one path a line, as seen from
        the working folder; `-` for one on stdin).
    endings: how the names of the files that are written for each of them end.
    """
    images: dict[str, Path] = {}
    owners: dict[str, Path] = {}
    for argument in arguments:
        for path, name in _meant(argument, out):
            for ending in endings:
                owner = owners.setdefault(name + ending, path)
                if owner != path:
                    raise UsageError(f"{path} and {owner} would both become {out / name}{ending} - use two folders")
            images[name] = path
    if not images:
        raise UsageError("no image was given - name pictures, folders, or a pattern in quotes after the checkpoint")
    return images


def _meant(argument: str, out: Path) -> Iterator[tuple[Path, str]]:
    """(path, name of its output) of everything that one argument means."""
    if argument == STDIN and not Path(argument).exists():
        yield from _listed(
            [(number, line.strip()) for number, line in enumerate(sys.stdin, 1) if line.strip()], "stdin"
        )
        return
    found = [Path(argument)] if Path(argument).exists() else [Path(path) for path in sorted(glob.glob(argument))]
    if not found and Path(argument).is_symlink():
        found = [Path(argument)]
    if not found:
        raise UsageError(f"there is no {argument} - give pictures, folders, or a pattern in quotes")
    inner = Path(os.path.realpath(out))
    for path in found:
        if inner in (Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))):
            raise UsageError(f"--out {out} is the folder of the images, which would mix both - choose another")
        if path.suffix.lower() == ".txt" and path.is_file():
            yield from _listed(read_list(path), str(path))
        elif not path.is_dir():
            yield path, path.stem
        else:
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES]
            if not inside:
                raise UsageError(f"{path} holds no picture - the suffixes are {', '.join(sorted(SUFFIXES))}")
            for file in inside:
                if inner not in Path(os.path.realpath(file)).parents:
                    yield file, file.relative_to(path).with_suffix("").as_posix()


def _listed(lines: list[tuple[int, str]], where: str) -> Iterator[tuple[Path, str]]:
    for number, line in lines:
        path = Path(line)
        if not path.exists():
            raise UsageError(f"{where}, line {number}: there is no {line} - paths are as seen from this folder")
        inside = not path.is_absolute() and ".." not in path.parts
        yield path, (path.with_suffix("") if inside else Path(path.stem)).as_posix()


def output(out: Path, name: str, ending: str) -> Path:
    """out/NAMEending; a name that is then too long for a file is cut, and ends in its hash."""
    path = out / f"{name}{ending}"
    if len(os.fsencode(path.name)) > LONGEST:
        stem = os.fsencode(Path(name).name)
        digest = hashlib.sha256(stem).hexdigest()[:8]
        kept = stem[: LONGEST - len(os.fsencode(ending)) - len(digest) - 1].decode(errors="ignore")
        path = path.with_name(f"{kept}~{digest}{ending}")
    return path
