"""Views of an image at one size, whole or in tiles, and the network's scores of any part of them.

Between an image and its mask nothing is held of which there is one number per class and pixel, but for a part at a
time: `ImageView.scores` computes what a part of the mask needs.
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

# Bytes of maps for each pixel, beyond what any network here holds: an image that fits so is not asked further.
MOST_PER_PIXEL = 1 << 13


class Tiler:
    """How much of an image a network sees at once.

    Args:
        model: The network on torch's meta device; its minimum size is the smallest tile.
        memory: Bytes that its maps may take.
        tile: The largest window, (H, W), in place of what `memory` allows.
        report: Called with a message when memory runs out and tiles become smaller.
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
        self.said = False

    @functools.cached_property
    def geometry(self) -> Geometry:
        """Of the network; taken when the first image needs it."""
        return geometry_of(self.model, self.model.minimum_size)

    def step(self, size: Size) -> Size | None:
        """The size of the parts that an image of this size is seen in; None if it is seen whole."""
        if self.tile is not None:
            if size[0] <= self.tile[0] and size[1] <= self.tile[1]:
                return None
            return self.geometry.steps(self.tile, size)
        if size[0] * size[1] * MOST_PER_PIXEL <= self.memory or self.whole_only:
            return None
        try:
            tile = self.geometry.tile(size, self.memory)
        except UsageError as error:
            self.report(f"images are seen whole, whatever memory they take: {error}")
            self.whole_only = True
            return None
        if tile is None:
            return None
        if not (self.geometry.exact or self.said):
            self.said = True
            self.report(
                f"{self.geometry.network} sees a tile a little otherwise than the whole: scores are near, not equal"
            )
        return self.geometry.steps(tile, size)

    def shrink(self, size: Size) -> None:
        """After memory ran out on images of this size: half as many pixels at once from now on."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        now = self.tile or (size if self.step(size) is None else self.geometry.tile(size, self.memory)) or size
        now = (min(now[0], size[0]), min(now[1], size[1]))
        smallest = self.geometry.smallest
        if now[0] <= smallest[0] and now[1] <= smallest[1]:
            raise UsageError(
                f"memory ran out on {now[0]}x{now[1]} pixels, and {self.geometry.network} takes no smaller tiles - "
                "free some memory, or take a machine with more"
            )
        tall = now[0] - smallest[0] >= now[1] - smallest[1]
        cut = (now[0] // 2, now[1]) if tall else (now[0], now[1] // 2)
        self.tile = (max(cut[0], smallest[0]), max(cut[1], smallest[1]))
        smaller = f"{self.tile[0]}x{self.tile[1]}"
        self.report(f"memory ran out at {now[0]}x{now[1]} pixels: continuing with tiles of {smaller}")


class ImageView:
    """An image resized to one size, and the network's scores of any part of it.

    Args:
        image: (H, W, C) as stored.
        size: (H, W) that it is resized to.
        network: Whose logits are computed; with `network.flip`, mean probabilities of the view and its mirror image.
        name: Of the image, in messages.
    """

    def __init__(
        self, image: np.ndarray, size: Size, network: Network, preprocessing: Preprocessing, tiler: Tiler, name: str
    ) -> None:
        self.image = preprocessing.checked(resize_image(image, size), name)
        self.size, self.network, self.preprocessing, self.tiler, self.name = size, network, preprocessing, tiler, name

    def scores(self, part: Part | None = None) -> Tensor:
        """(1, C, h, w) scores of a part of the view, or of all of it."""
        part = part or whole(self.size)
        while True:
            try:
                return self._scores(part)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
            # Out here, since the error holds what was computed until then.
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
            one = self._flip_averaged(((top + rows[0], top + rows[1]), (left + columns[0], left + columns[1])))
            if canvas is None:
                canvas = one.new_empty((1, one.shape[1], *size))
            canvas[..., slice(*rows), slice(*columns)] = one
        assert canvas is not None
        return canvas

    def _flip_averaged(self, part: Part) -> Tensor:
        if not self.network.flip:
            return self._logits(self.image, part)
        width = self.size[1]
        rows, (left, right) = part
        straight = self._logits(self.image, part).float().softmax(dim=1)
        turned = self._logits(self.image[:, ::-1], (rows, (width - right, width - left)))
        return (straight + turned.float().softmax(dim=1).flip(-1)) / 2

    def _logits(self, image: np.ndarray, part: Part) -> Tensor:
        window = whole(self.size)
        if part != window:
            window = self.tiler.geometry.window(part, self.size)
        seen = np.ascontiguousarray(image[slice(*window[0]), slice(*window[1])])
        scores = self.network.logits(self.preprocessing.normalise(seen, self.name)[None])
        (top, bottom), (left, right) = part
        above, before = window[0][0], window[1][0]
        return scores[..., top - above : bottom - above, left - before : right - before]


def resized_part(scores: Callable[[Part], Tensor], seen: Size, size: Size, part: Part) -> Tensor:
    """A part of what `inference.resized` makes of the scores of a view: (1, C, h, w) float32.

    scores: gives a part of them. seen, size: of the view and of the result, of which `part` is wanted.
    """
    if seen == size:
        return scores(part).float()
    low, high, share = zip(*(_between(*axis) for axis in zip(seen, size, part, strict=True)), strict=True)
    spans = [(int(near.min()), int(far.max()) + 1) for near, far in zip(low, high, strict=True)]
    result = scores((spans[0], spans[1])).float()
    for axis, dim in ((0, -2), (1, -1)):
        near, far = (torch.from_numpy(end[axis] - spans[axis][0]).to(result.device) for end in (low, high))
        weight = torch.from_numpy(share[axis]).to(result.device, torch.float32)
        weight = weight[:, None] if dim == -2 else weight
        result = result.index_select(dim, near).lerp(result.index_select(dim, far), weight)
    return result


def _between(length: int, out: int, extent: Extent) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For places of an axis that was stretched: the places before and after, and the share of the latter."""
    source = ((np.arange(*extent) + 0.5) * (length / out) - 0.5).clip(0)
    low = np.floor(source).astype(np.int64).clip(0, length - 1)
    return low, (low + 1).clip(0, length - 1), source - low
