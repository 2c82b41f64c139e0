"""Gaussian filtering in many dimensions on the permutohedral lattice.

Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (Eurographics 2010): every
point of d dimensions lies in a simplex with d + 1 corners; values are distributed to the corners (splat), smoothed with
(1/2, 1, 1/2) along the d + 1 directions of the lattice (blur), and interpolated at the points (slice). Each step is the
product of a sparse matrix and the values, which `embedding_bag` computes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.errors import UsageError


class SparseRows(NamedTuple):
    """A sparse matrix by rows: row i has the weights and columns starts[i] to starts[i + 1]."""

    columns: Tensor
    weights: Tensor
    starts: Tensor

    def __matmul__(self, values: Tensor) -> Tensor:
        """Multiply the matrix by (columns, C) values; the result is (rows, C)."""
        return F.embedding_bag(self.columns, values, self.starts, mode="sum", per_sample_weights=self.weights)


class Lattice:
    """A Gaussian filter of points, which maps (P, C) float32 values to (P, C) weighted sums over all points.

    The weights are approximately proportional to exp(-distance**2 / 2). Corners that belong to no point's simplex are
    left out, as in the authors' program, so no values propagate through them.

    Args:
        features: (P, d) float32, the coordinates of the points in units of the standard deviation.

    Raises:
        UsageError: The features span too many lattice cells for 64-bit indices.
    """

    def __init__(self, features: Tensor) -> None:
        points, dimensions = features.shape
        corners = dimensions + 1
        origin, order, barycentric = _simplices(features)

        # One integer identifies a corner, with its coordinates as digits; the last coordinate follows from the others,
        # since all sum to 0. The digits leave room for neighbours, so a step in a direction adds a constant.
        low = origin[:, :-1].amin(dim=0) - 2 * corners
        spans = (origin[:, :-1].amax(dim=0) + 2 * corners + 1 - low).tolist()
        if math.prod(spans) >= 2**63:
            raise UsageError(
                f"the CRF's standard deviations are too small for an image of {dimensions - 2} channels - increase them"
            )
        digits = [math.prod(spans[axis + 1 :]) for axis in range(dimensions)] + [0]
        steps = torch.tensor([sum(digits) - corners * digit for digit in digits], device=features.device)
        first = ((origin[:, :-1] - low) * torch.tensor(digits[:-1], device=features.device)).sum(dim=1, keepdim=True)
        ids = torch.cat([first, first + steps[order.flip(1)[:, :-1]].cumsum(dim=1)], dim=1)

        ordered, place = ids.flatten().sort(stable=True)
        is_first = torch.ones_like(ordered, dtype=torch.bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        corner = torch.empty_like(place, dtype=torch.int32)
        corner[place] = is_first.cumsum(dim=0, dtype=torch.int32) - 1

        barycentric = barycentric.flatten()
        self.splat = SparseRows((place // corners).int(), barycentric[place], is_first.nonzero().flatten().int())
        self.slice = SparseRows(corner, barycentric, torch.arange(0, points * corners, corners).to(corner))
        self.blurs = _blurs(ordered[is_first], steps)

    def __call__(self, values: Tensor) -> Tensor:
        values = self.splat @ values
        for blur in self.blurs:
            values = blur @ values
        return self.slice @ values


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the simplex of each of (P, d) points.

    The other corners are reached from the first by steps in the directions of `order`, from the last to the first: +1
    in all coordinates, and -(d + 1) in the coordinate of that direction.

    Returns:
        Three (P, d + 1) tensors: the first corner of each simplex, an integer point; the order of the steps; and the
        point's barycentric coordinates, in the order of the corners.
    """
    dimensions = features.shape[1]
    corners = dimensions + 1
    # Embed the points in the plane of d + 1 coordinates that sum to 0, scaled so that splat, blur and slice together
    # smooth with a standard deviation of 1. Where two simplices meet (as for the first column of an image), rounding
    # selects the corners: the sums follow the order of the authors' program, and the factors are the same on every
    # device.
    factors = [corners * math.sqrt(2 / 3 / (axis * (axis + 1))) for axis in range(1, corners)]
    scaled = features * torch.tensor(factors, device=features.device)
    sums = [torch.zeros_like(scaled[:, 0])]
    for column in reversed(scaled.unbind(dim=1)):
        sums.append(sums[-1] + column)
    elevated = torch.stack(sums[::-1], dim=1)
    elevated[:, 1:] -= scaled * torch.arange(1, corners, device=features.device)

    # The nearest point whose coordinates are multiples of d + 1 need not lie in the plane: the coordinates with the
    # largest rounding errors are corrected.
    origin = (elevated / corners).round()
    excess = origin.sum(dim=1, keepdim=True)
    origin *= corners
    rank = (elevated - origin).argsort(dim=1, descending=True, stable=True).argsort(dim=1) + excess
    origin += corners * ((rank < 0).float() - (rank >= corners).float())
    rest, order = (elevated - origin).sort(dim=1, descending=True, stable=True)
    rest /= corners
    barycentric = torch.cat([1 + rest[:, -1:] - rest[:, :1], (rest[:, :-1] - rest[:, 1:]).flip(1)], dim=1)
    return origin.long(), order, barycentric


def _blurs(ids: Tensor, steps: Tensor) -> list[SparseRows]:
    """Build the matrices that smooth along all directions, two directions each to halve the passes over the values.

    Args:
        ids: The sorted ids of the corners.
        steps: The difference between a corner's id and its neighbour's, for each direction.
    """
    count = len(ids)
    own = torch.arange(count, device=ids.device, dtype=torch.int32)
    weight = torch.tensor([1.0, 0.5, 0.5], device=ids.device)
    tables = []
    for step in steps:
        # Columns: the corner itself, the next and the previous corner; `count` marks a missing neighbour.
        table = torch.full((count + 1, 3), count, device=ids.device, dtype=torch.int32)
        table[:-1, 0] = own
        neighbour = torch.searchsorted(ids, ids + step, out_int32=True).clamp(max=count - 1)
        exists = ids[neighbour] == ids + step
        table[:-1, 1][exists] = neighbour[exists]
        table[neighbour[exists], 2] = own[exists]
        tables.append(table)

    blurs = []
    for axis in range(0, len(tables), 2):
        *before, last = tables[axis : axis + 2]
        columns, weights = last[:-1], weight
        for table in before:
            columns, weights = table[columns].flatten(1), torch.outer(weights, weight).flatten()
        exists = columns < count
        lengths = exists.sum(dim=1)
        starts = (lengths.cumsum(dim=0) - lengths).int()
        blurs.append(SparseRows(columns[exists], weights.expand(count, -1)[exists], starts))
    return blurs
