"""Whether an image seen in tiles comes out as the image seen whole."""

from dataclasses import dataclass
from pathlib import Path

from segdeconv.inference.predictors import TiledPredictor
from segdeconv.inference.scorers import ClassScores
from segdeconv.inference.segmenter import Segmenter
from segdeconv.inference.tiling import parts
from segdeconv.inference.views import ImageView, Tiler


@dataclass(frozen=True)
class Comparison:
    """How near the scores of an image by tiles are to those of the whole, and that as a sentence."""

    labels: float
    scores: float
    worst: float
    sentence: str

    @property
    def same(self) -> bool:
        """Of the labels 99.9 % are equal, and of the pixels' probabilities 99.9 % differ by 1e-4 at most.

        Not all: rounding can flip a switch between two cells that are all but equal, which moves a value by a pixel.
        """
        return self.labels >= 0.999 and self.scores >= 0.999


def compare_tiling(segmenter: Segmenter, path: Path) -> Comparison:
    """See an image whole and in tiles, at the size that the network sees it at; both in float32, each held whole.

    Without a tile that is smaller than the image the smallest that is used is taken, twice what lies around a part.
    """
    image, _ = segmenter.open(path)
    network, settings = segmenter.network, segmenter.settings
    tiler = TiledPredictor(network, segmenter.preprocessing, memory=settings.memory, tile=settings.tile).tiler
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
        said = f"{path}: {size[0]}x{size[1]} is one tile of {tile[0]}x{tile[1]}, and so the same"
        return Comparison(1.0, 1.0, 0.0, said)
    found = []
    for limit in (size, tile):
        limited = Tiler(tiler.model, memory=tiler.memory, tile=limit)
        view = ImageView(image, size, network, segmenter.preprocessing, limited, str(path))
        found.append(ClassScores(view.scores().float(), network.flip).probabilities())
    whole, tiled = found
    count = len(list(parts(size, geometry.steps(tile, size))))
    equal = float((whole.argmax(dim=1) == tiled.argmax(dim=1)).double().mean())
    differences = (whole - tiled).abs().amax(dim=1)
    near, worst = float((differences <= 1e-4).double().mean()), float(differences.max())
    said = (
        f"{path}: {count} tiles of {tile[0]}x{tile[1]} or smaller against the whole of {size[0]}x{size[1]}, float32: "
        f"{100 * equal:.4f} % of the labels are equal, {100 * near:.4f} % of the pixels' probabilities within 1e-4, "
        f"the largest difference is {worst:.1e}"
    )
    return Comparison(equal, near, worst, said)
