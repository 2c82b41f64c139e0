"""The check that prediction in tiles equals prediction of the whole image."""

from dataclasses import dataclass
from pathlib import Path

from segdeconv.inference.predictors import TiledPredictor
from segdeconv.inference.scorers import ClassScores
from segdeconv.inference.segmenter import Segmenter
from segdeconv.inference.tiling import parts
from segdeconv.inference.views import ImageView


@dataclass(frozen=True)
class Comparison:
    """The agreement of prediction in tiles with prediction of the whole image.

    Attributes:
        labels: Fraction of pixels with the same class.
        scores: Fraction of pixels whose probabilities differ by at most 1e-4.
        max_difference: Largest difference of two probabilities.
        summary: A message with these numbers.
    """

    labels: float
    scores: float
    max_difference: float
    summary: str

    @property
    def same(self) -> bool:
        """True if 99.9 % of the pixels have the same class, and 99.9 % have probabilities within 1e-4.

        A few pixels may differ: rounding can flip a switch between two almost equal values, which moves a value by a
        pixel.
        """
        return self.labels >= 0.999 and self.scores >= 0.999


def compare_tiling(segmenter: Segmenter, path: Path) -> Comparison:
    """Compare prediction in tiles with prediction of the whole image, at the network's input size.

    If the settings give no tile smaller than the image, a tile of twice the overlap plus one stride is used. The
    probabilities of both predictions are held in memory as a whole.

    Args:
        segmenter: Its predictor is a `TiledPredictor`, so without regions, a second network or a CRF.
        path: The image.
    """
    image = segmenter.open(path).image
    network = segmenter.network
    assert isinstance(segmenter.predictor, TiledPredictor)
    tiler = segmenter.predictor.tiler
    size = segmenter.preprocessing.size or (image.shape[0], image.shape[1])
    tile, geometry = tiler.tile, tiler.geometry
    if tiler.step(size) is None:
        tile = (
            2 * geometry.rows.overlap + geometry.rows.stride,
            2 * geometry.columns.overlap + geometry.columns.stride,
        )
    elif tile is None:
        tile = geometry.tile(size, tiler.memory)
    assert tile is not None
    if size[0] <= tile[0] and size[1] <= tile[1]:
        summary = f"{path}: {size[0]}x{size[1]} fits into one tile of {tile[0]}x{tile[1]}, so the predictions are equal"
        return Comparison(1.0, 1.0, 0.0, summary)
    probabilities, given = [], tiler.tile
    try:
        for limit in (size, tile):
            tiler.tile = limit
            view = ImageView(image, size, network, segmenter.preprocessing, tiler, str(path))
            probabilities.append(ClassScores(view.scores().float(), network.flip).probabilities())
    finally:
        tiler.tile = given
    whole, tiled = probabilities
    count = len(list(parts(size, geometry.steps(tile, size))))
    equal = float((whole.argmax(dim=1) == tiled.argmax(dim=1)).double().mean())
    differences = (whole - tiled).abs().amax(dim=1)
    close, maximum = float((differences <= 1e-4).double().mean()), float(differences.max())
    summary = (
        f"{path}: {count} tiles of at most {tile[0]}x{tile[1]} compared with the whole image of {size[0]}x{size[1]}, "
        f"float32: {100 * equal:.4f} % of the pixels have the same class, {100 * close:.4f} % have probabilities "
        f"within 1e-4, the largest difference is {maximum:.1e}"
    )
    return Comparison(equal, close, maximum, summary)
