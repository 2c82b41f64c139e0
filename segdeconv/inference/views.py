"""Views of an image at one size, and the network's scores of any part of them, computed whole or in tiles.

Class scores of all pixels are never in memory at once if an image is predicted in tiles: `ImageView.scores` computes
the scores of one part at a time.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from segdeconv.data.preprocessing import Preprocessing, resize_image
from segdeconv.errors import UsageError
from segdeconv.inference.network import Network
from segdeconv.inference.tiling import Extent, Geometry, Part, Size, geometry_of, parts, whole
from segdeconv.models import SegmentationModel
from segdeconv.system.memory import ran_out_of_memory

# Upper bound on the bytes of feature maps per pixel, for any network here. An image that fits into memory by this bound
# is predicted whole, without tracing the network.
MAX_BYTES_PER_PIXEL = 1 << 13


class Tiler:
    """The choice of tiles: the size of the parts of an image that a network processes at once.

    Args:
        model: The network on torch's meta device; its minimum size is the smallest tile.
        memory: Bytes that its feature maps may take.
        tile: The largest window, (H, W), instead of the one that `memory` allows.
        report: Called with a message when tiling is inexact or impossible, or memory runs out and tiles become smaller.
    """

    def __init__(
        self,
        model: SegmentationModel,
        *,
        memory: int,
        tile: Size | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.model, self.report = model, report
        self.memory, self.tile, self.whole_only = memory, tile, False
        self.inexact_reported = False

    @functools.cached_property
    def geometry(self) -> Geometry:
        """The network's tiling geometry, computed when first needed."""
        return geometry_of(self.model, self.model.minimum_size)

    def step(self, size: Size) -> Size | None:
        """Return the size of the parts in which an image of this size is processed; None if it is processed whole.

        Raises:
            UsageError: The tile is too small for the network's receptive field.
        """
        if self.tile is not None:
            if size[0] <= self.tile[0] and size[1] <= self.tile[1]:
                return None
            return self._steps(self.tile, size)
        if size[0] * size[1] * MAX_BYTES_PER_PIXEL <= self.memory or self.whole_only:
            return None
        try:
            tile = self.geometry.tile(size, self.memory)
        except UsageError as error:
            self.report(f"warning: images are predicted whole, which may run out of memory: {error}")
            self.whole_only = True
            return None
        if tile is None:
            return None
        return self._steps(tile, size)

    def _steps(self, tile: Size, size: Size) -> Size:
        steps = self.geometry.steps(tile, size)
        if not (self.geometry.exact or self.inexact_reported):
            self.inexact_reported = True
            self.report(
                f"warning: {self.geometry.network} cannot be tiled exactly: scores in tiles differ slightly from those "
                "of the whole image"
            )
        return steps

    def shrink(self, size: Size) -> None:
        """Halve the tiles after memory ran out on images of this size.

        Raises:
            UsageError: The tiles are already as small as possible.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        current = self.tile or (size if self.step(size) is None else self.geometry.tile(size, self.memory)) or size
        current = (min(current[0], size[0]), min(current[1], size[1]))
        smallest = self.geometry.smallest
        if current[0] <= smallest[0] and current[1] <= smallest[1]:
            raise UsageError(
                f"memory ran out on {current[0]}x{current[1]} pixels, the smallest tile of {self.geometry.network} - "
                "free some memory, or use a machine with more"
            )
        tall = current[0] - smallest[0] >= current[1] - smallest[1]
        halved = (current[0] // 2, current[1]) if tall else (current[0], current[1] // 2)
        self.tile = (max(halved[0], smallest[0]), max(halved[1], smallest[1]))
        self.report(
            f"memory ran out at {current[0]}x{current[1]} pixels: continuing with tiles of "
            f"{self.tile[0]}x{self.tile[1]}"
        )


class ImageView:
    """An image resized to one size, and the network's scores of any part of it.

    Args:
        image: (H, W, C) as stored.
        size: (H, W) to which the image is resized.
        network: The network; the scores are its logits, or with `network.flip` the mean probabilities of the view and
            its mirror image.
        tiler: Chooses the tiles.
        name: Name of the image, for messages.
    """

    def __init__(
        self, image: np.ndarray, size: Size, network: Network, preprocessing: Preprocessing, tiler: Tiler, name: str
    ) -> None:
        self.image = preprocessing.checked(resize_image(image, size), name)
        self.size, self.network, self.preprocessing, self.tiler, self.name = size, network, preprocessing, tiler, name

    def scores(self, part: Part | None = None) -> Tensor:
        """Compute the (1, C, h, w) scores of a part of the view; of the whole view if `part` is None."""
        part = part or whole(self.size)
        while True:
            try:
                return self._scores(part)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
            # Outside the except block, since the exception keeps the tensors of the failed pass alive.
            self.tiler.shrink(self.size)

    def _scores(self, part: Part) -> Tensor:
        (top, bottom), (left, right) = part
        size = (bottom - top, right - left)
        step = self.tiler.step(self.size) or size
        pieces = list(parts(size, step))
        if len(pieces) == 1:
            return self._flip_averaged(part)
        canvas: Tensor | None = None
        for rows, columns in pieces:
            scores = self._flip_averaged(((top + rows[0], top + rows[1]), (left + columns[0], left + columns[1])))
            if canvas is None:
                canvas = scores.new_empty((1, scores.shape[1], *size))
            canvas[..., slice(*rows), slice(*columns)] = scores
        assert canvas is not None
        return canvas

    def _flip_averaged(self, part: Part) -> Tensor:
        if not self.network.flip:
            return self._logits(self.image, part)
        width = self.size[1]
        rows, (left, right) = part
        straight = self._logits(self.image, part).float().softmax(dim=1)
        mirrored = self._logits(self.image[:, ::-1], (rows, (width - right, width - left)))
        return (straight + mirrored.float().softmax(dim=1).flip(-1)) / 2

    def _logits(self, image: np.ndarray, part: Part) -> Tensor:
        window = whole(self.size)
        if part != window:
            window = self.tiler.geometry.window(part, self.size)
        crop = np.ascontiguousarray(image[slice(*window[0]), slice(*window[1])])
        scores = self.network.logits(self.preprocessing.normalise(crop, self.name)[None])
        (top, bottom), (left, right) = part
        above, before = window[0][0], window[1][0]
        return scores[..., top - above : bottom - above, left - before : right - before]


def resized_part(scores: Callable[[Part], Tensor], view_size: Size, size: Size, part: Part) -> Tensor:
    """Compute a part of the resized scores of a view, equal to that part of `scorers.resized`.

    Args:
        scores: Computes the scores of a part of the view.
        view_size: Size of the view.
        size: Size of the resized scores.
        part: The part of the resized scores to compute.

    Returns:
        (1, C, h, w) float32.
    """
    if view_size == size:
        return scores(part).float()
    low, high, weights = zip(*(_interpolation(*axis) for axis in zip(view_size, size, part, strict=True)), strict=True)
    spans = [(int(near.min()), int(far.max()) + 1) for near, far in zip(low, high, strict=True)]
    result = scores((spans[0], spans[1])).float()
    for axis, dim in ((0, -2), (1, -1)):
        near, far = (torch.from_numpy(end[axis] - spans[axis][0]).to(result.device) for end in (low, high))
        weight = torch.from_numpy(weights[axis]).to(result.device, torch.float32)
        weight = weight[:, None] if dim == -2 else weight
        result = result.index_select(dim, near).lerp(result.index_select(dim, far), weight)
    return result


def _interpolation(length: int, out: int, extent: Extent) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lower and upper source index of each pixel of a resized axis, and the weight of the upper one."""
    source = ((np.arange(*extent) + 0.5) * (length / out) - 0.5).clip(0)
    low = np.floor(source).astype(np.int64).clip(0, length - 1)
    return low, (low + 1).clip(0, length - 1), source - low
