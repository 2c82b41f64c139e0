"""Requirements of the evaluation servers of benchmarks."""

from __future__ import annotations

from typing import NamedTuple

from segdeconv.classes import Classes


class Submission(NamedTuple):
    """The rules of an evaluation server for an archive of predicted masks, which are single-channel 8-bit PNGs.

    Attributes:
        title: Name of the benchmark.
        source: Where the rules are published.
        classes: The classes with the labels that the server expects; None for those of the checkpoint's own data set.
        image_name: Regular expression of the names of the test images, without suffix; the mask of NAME is NAME.png.
        example: Such a name.
        num_images: Number of test images.
        size: Size (H, W) of every test image, if they all have one.
        folder: Folder of the masks in the archive, with / between its parts; empty for none.
        archive_suffix: `.zip` or `.tgz`.
        palette: Whether the masks have the palette of the class colours.
    """

    title: str
    source: str
    classes: Classes | None
    image_name: str
    example: str
    num_images: int
    size: tuple[int, int] | None = None
    folder: str = ""
    archive_suffix: str = ".zip"
    palette: bool = False


# Not a data set of ours; its masks hold the indices of the labels in config_v1.2.json or config_v2.0.json.
MAPILLARY_VISTAS = Submission(
    title="Mapillary Vistas",
    source="https://github.com/mapillary/mapillary_vistas",
    classes=None,
    image_name=r"[\w-]+",
    example="0035fkbjWljhaftpVM37-g",
    num_images=5000,
)
