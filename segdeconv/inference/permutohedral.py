"""Gaussian filtering in many dimensions on the permutohedral lattice.

Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (Eurographics 2010): every
point of d dimensions lies in a simplex with d + 1 corners; values are spread over the corners (splat), smoothed with
(1/2, 1, 1/2) along the d + 1 directions of the lattice (blur), and read back (slice). Each of these is a sparse matrix
times the values, which is what `embedding_bag` computes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.errors import UsageError


class SparseRows(NamedTuple):
    """A sparse matrix: row i has `weights` in the columns `columns`, both from starts[i] to starts[i + 1]."""

    columns: Tensor
    weights: Tensor
    starts: Tensor

    def __matmul__(self, values: Tensor) -> Tensor:
        """(columns, C) -> (rows, C)."""
        return F.embedding_bag(self.columns, values, self.starts, mode="sum", per_sample_weights=self.weights)


class Lattice:
    """(P, C) float32 -> (P, C): each point's values become a sum over all points, weighted by their nearness.

    features: (P, d) float32, a point's coordinates in units of the standard deviation. The weights are about
    proportional to exp(-distance**2 / 2). Corners that no point touches are left out, as the authors do: nothing is
    passed on by way of them.
    """

    def __init__(self, features: Tensor) -> None:
        points, dimensions = features.shape
        corners = dimensions + 1
        origin, order, shares = _simplices(features)

        # A corner is named by one integer, in which its coordinates are the digits; the last coordinate is minus the
        # sum of the others. The digits leave room for the neighbours, so to step in a direction is to add a number.
        low = origin[:, :-1].amin(dim=0) - 2 * corners
        spans = (origin[:, :-1].amax(dim=0) + 2 * corners + 1 - low).tolist()
        if math.prod(spans) >= 2**63:
            raise UsageError(
                f"the CRF's standard deviations are too small for an image of {dimensions - 2} channels - enlarge them"
            )
        digits = [math.prod(spans[axis + 1 :]) for axis in range(dimensions)] + [0]
        steps = torch.tensor([sum(digits) - corners * digit for digit in digits], device=features.device)
        first = ((origin[:, :-1] - low) * torch.tensor(digits[:-1], device=features.device)).sum(dim=1, keepdim=True)
        names = torch.cat([first, first + steps[order.flip(1)[:, :-1]].cumsum(dim=1)], dim=1)

        ordered, place = names.flatten().sort(stable=True)
        fresh = torch.ones_like(ordered, dtype=torch.bool)
        fresh[1:] = ordered[1:] != ordered[:-1]
        corner = torch.empty_like(place, dtype=torch.int32)
        corner[place] = fresh.cumsum(dim=0, dtype=torch.int32) - 1

        shares = shares.flatten()
        self.splat = SparseRows((place // corners).int(), shares[place], fresh.nonzero().flatten().int())
        self.slice = SparseRows(corner, shares, torch.arange(0, points * corners, corners).to(corner))
        self.blurs = _blurs(ordered[fresh], steps)

    def __call__(self, values: Tensor) -> Tensor:
        values = self.splat @ values
        for blur in self.blurs:
            values = blur @ values
        return self.slice @ values


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P, d) points -> (P, d + 1) each: a corner of each point's simplex, the order of the way round, and its shares.

    The corners are met by starting at the first, an integer point, and stepping in the directions of `order` from the
    last to the first: +1 in all coordinates, and -(d + 1) in the one of that direction. `shares` are the point's
    barycentric coordinates in the order of the corners.
    """
    dimensions = features.shape[1]
    corners = dimensions + 1
    # Into the plane of d + 1 coordinates that sum to 0, scaled so that the three steps smooth with a deviation of 1.
    # Where two simplices meet (the first column of an image lies there), rounding decides which corners there are: sums
    # are taken in the order of the authors' program, and factors are the same on every device.
    factors = [corners * math.sqrt(2 / 3 / (axis * (axis + 1))) for axis in range(1, corners)]
    scaled = features * torch.tensor(factors, device=features.device)
    sums = [torch.zeros_like(scaled[:, 0])]
    for column in reversed(scaled.unbind(dim=1)):
        sums.append(sums[-1] + column)
    elevated = torch.stack(sums[::-1], dim=1)
    elevated[:, 1:] -= scaled * torch.arange(1, corners, device=features.device)

    # The nearest point whose coordinates are multiples of d + 1 need not lie in the plane: those that were rounded
    # furthest go back.
    origin = (elevated / corners).round()
    excess = origin.sum(dim=1, keepdim=True)
    origin *= corners
    rank = (elevated - origin).argsort(dim=1, descending=True, stable=True).argsort(dim=1) + excess
    origin += corners * ((rank < 0).float() - (rank >= corners).float())
    rest, order = (elevated - origin).sort(dim=1, descending=True, stable=True)
    rest /= corners
    shares = torch.cat([1 + rest[:, -1:] - rest[:, :1], (rest[:, :-1] - rest[:, 1:]).flip(1)], dim=1)
    return origin.long(), order, shares


def _blurs(names: Tensor, steps: Tensor) -> list[SparseRows]:
    """The smoothing along all directions, two directions to a matrix: half as many passes over the values.

    names: the sorted numbers of the corners; steps: what to add to one for its neighbour in each direction.
    """
    count = len(names)
    own = torch.arange(count, device=names.device, dtype=torch.int32)
    weight = torch.tensor([1.0, 0.5, 0.5], device=names.device)
    tables = []
    for step in steps:
        # Each corner, the next and the previous one; `count` stands for none.
        table = torch.full((count + 1, 3), count, device=names.device, dtype=torch.int32)
        table[:-1, 0] = own
        found = torch.searchsorted(names, names + step, out_int32=True).clamp(max=count - 1)
        met = names[found] == names + step
        table[:-1, 1][met] = found[met]
        table[found[met], 2] = own[met]
        tables.append(table)

    blurs = []
    for axis in range(0, len(tables), 2):
        *before, last = tables[axis : axis + 2]
        columns, weights = last[:-1], weight
        for table in before:
            columns, weights = table[columns].flatten(1), torch.outer(weights, weight).flatten()
        there = columns < count
        lengths = there.sum(dim=1)
        starts = (lengths.cumsum(dim=0) - lengths).int()
        blurs.append(SparseRows(columns[there], weights.expand(count, -1)[there], starts))
    return blurs
