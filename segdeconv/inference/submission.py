"""Archives of predicted masks for the evaluation servers of benchmarks, checked against the rules of the server."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from segdeconv.classes import Classes, match_classes, voc_colours
from segdeconv.data.datasets import ade20k, cityscapes, voc
from segdeconv.data.files.decoding import open_image
from segdeconv.data.files.reading import MAX_PIXELS, read_labels
from segdeconv.data.submission import MAPILLARY_VISTAS, Submission
from segdeconv.drawing.png import Png
from segdeconv.errors import UsageError, did_you_mean
from segdeconv.inference.inputs import is_video
from segdeconv.system.files import replacing

SERVERS: dict[str, Submission] = {
    "ade20k": ade20k.SUBMISSION,
    "cityscapes": cityscapes.SUBMISSION,
    "kitti": cityscapes.KITTI_SUBMISSION,
    "mapillary": MAPILLARY_VISTAS,
    "voc": voc.SUBMISSION,
}
NAMED = 3  # files that a message names
WAY_OUT = "correct them, or leave out --submission"


class SubmissionWriter:
    """A writer of one archive for an evaluation server.

    Args:
        server: A key of SERVERS.
        classes: The classes of the network.
        out: The folder of predictions, in which the archive is written.

    Raises:
        UsageError: The server is unknown, or expects other classes.
    """

    def __init__(self, server: str, classes: Classes, out: Path) -> None:
        if server not in SERVERS:
            raise UsageError(f"--submission {server} is not an evaluation server - {did_you_mean(server, SERVERS)}")
        self.server, self.submission = server, SERVERS[server]
        self.path = out / f"{server}{self.submission.archive_suffix}"
        self.labels = label_table(server, classes)

    def check_inputs(self, images: Mapping[str, Path]) -> None:
        """Check the names, the number and, if all have one, the sizes of the test images, before any is predicted.

        Args:
            images: Path of each image by the name of its outputs.

        Raises:
            UsageError: They are not those of the benchmark.
        """
        rules = self.submission
        names = Counter(path.stem for path in images.values())
        problems = [
            _count([path for path in images.values() if is_video(path)], "video"),
            _count(
                [path for path in images.values() if not re.fullmatch(rules.image_name, path.stem)],
                "image",
                f" with a name unlike {rules.example}",
            ),
            _count([path for path in images.values() if names[path.stem] > 1], "image", " whose name is not its own"),
        ]
        if len(images) != rules.num_images:
            problems.append(f"{len(images)} image{'s' if len(images) != 1 else ''} instead of {rules.num_images}")
        if rules.size is not None:
            wrong = [path for path in images.values() if _header_size(path) not in (rules.size, None)]
            problems.append(_count(wrong, "image", f" of another size than {rules.size[0]}x{rules.size[1]} (HxW)"))
        self._require_none(problems)

    def write(self, masks: Mapping[Path, tuple[Path, tuple[int, int]]]) -> None:
        """Check the masks and write the archive, whose bytes depend on nothing but the masks.

        Args:
            masks: For each image, its mask file of class indices and its size (H, W).

        Raises:
            UsageError: A mask has another size than its image, or a value that is not a class; nothing is written.
        """
        sizes, values = [], []
        with replacing(self.path) as file, _archive(file, self.submission.archive_suffix) as add:
            for image in sorted(masks, key=lambda path: path.stem):
                mask, size = masks[image]
                indices = read_labels(mask)
                if indices.shape != size:
                    sizes.append(mask)
                    continue
                labels = self.labels[indices]
                if (labels < 0).any():
                    values.append(mask)
                elif not sizes and not values:
                    add("/".join(filter(None, (self.submission.folder, f"{image.stem}.png"))), self._png(labels))
            self._require_none(
                [
                    _count(sizes, "mask", " of another size than its image"),
                    _count(values, "mask", " with a value that is not a class"),
                ]
            )

    def _png(self, labels: np.ndarray) -> bytes:
        file = io.BytesIO()
        palette = np.array(voc_colours(256), dtype=np.uint8) if self.submission.palette else None
        png = Png(file, (labels.shape[0], labels.shape[1]), palette=palette)
        png.write(labels.astype(np.uint8))
        png.close()
        return file.getvalue()

    def _require_none(self, problems: Sequence[str]) -> None:
        if found := "; ".join(filter(None, problems)):
            raise UsageError(
                f"--submission {self.server}: {found}; {self.submission.title} has rules for names, number, sizes and "
                f"values of masks - {WAY_OUT}"
            )


def label_table(server: str, classes: Classes) -> np.ndarray:
    """Return the server's label of each class index, (65536,) int32; -1 for values that are not classes.

    Raises:
        UsageError: The server expects other classes, or the checkpoint's have no labels for it.
    """
    rules = SERVERS[server]
    if rules.classes is None:
        labels: Sequence[int] = classes.labels
        if classes.by_colour or not all(0 <= label <= 255 for label in labels):
            raise UsageError(
                f"--submission {server}: the network was trained on masks without labels of 0 to 255 - train it on the "
                f"label masks of {rules.title}, and name their classes in classes.yaml"
            )
    else:
        order = match_classes(
            classes,
            rules.classes,
            owners=("the checkpoint", f"the server of {rules.title}"),
            way_out=f"submit a network that was trained on the classes of {rules.title}, or leave out --submission",
        )
        labels = [rules.classes.labels[place] for place in order]
    table = np.full(65536, -1, dtype=np.int32)
    table[: len(classes)] = labels
    return table


def _count(paths: Sequence[Path], noun: str, fault: str = "") -> str:
    """Return the number of files and the names of the first, or an empty text for none."""
    if not paths:
        return ""
    more = ", ..." if paths[NAMED:] else ""
    names = ", ".join(map(str, paths[:NAMED]))
    return f"{len(paths)} {noun}{'s' if paths[1:] else ''}{fault} ({names}{more})"


def _header_size(path: Path) -> tuple[int, int] | None:
    """Return the size (H, W) in the header of an image; None if it cannot be read, which prediction reports."""
    try:
        image, _ = open_image(path, MAX_PIXELS, decode=False)
    except UsageError:
        return None
    return image.height, image.width


@contextmanager
def _archive(file: BinaryIO, suffix: str) -> Iterator[Callable[[str, bytes], None]]:
    """Yield a function that adds a file to an archive, always with the same date and owner."""
    if suffix == ".zip":
        with zipfile.ZipFile(file, "w") as archive:
            yield lambda name, content: archive.writestr(zipfile.ZipInfo(name), content)
        return
    # PNGs are compressed already.
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

        yield add
