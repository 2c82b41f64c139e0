"""Order of training samples as a function of (seed, epoch), so that a resumed run continues exactly."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from segdeconv.data.dataset import Locality
from segdeconv.system.seeding import key


class StatelessBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), shuffled in every epoch; the last, incomplete batch of an epoch is dropped.

    Args:
        num_samples: Number of samples.
        batch_size: Batch size per process.
        seed: Seed of the order.
        position: Returns (epoch, number of its batches already done); called when an epoch starts or resumes.
        rank: Index of this process.
        world_size: Number of processes. The global order does not depend on it, unless `locality` has more groups than
            its window.
        locality: Groups of samples that are stored together. If there are more than its window, groups are read in
            random order, and samples are shuffled within a sliding window of groups, see `shuffle`. Processes then
            have consecutive parts of this order, which hold disjoint samples of nearly disjoint groups, and share the
            window.

    Examples:
        >>> batches = StatelessBatches(5, 2, seed=0, position=lambda: (0, 1))
        >>> len(batches), len(list(batches))  # an epoch has two batches, one of them is done
        (2, 1)
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        position: Callable[[], tuple[int, int]],
        rank: int = 0,
        world_size: int = 1,
        locality: Locality | None = None,
    ) -> None:
        self.num_samples, self.batch_size, self.seed, self.position = num_samples, batch_size, seed, position
        self.rank, self.world_size, self.locality = rank, world_size, locality

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, done = self.position()
        random = np.random.Generator(np.random.Philox(key=key(self.seed, "order", epoch)))
        if self.locality is None or self.locality.window > self.locality.groups.max():
            order = random.permutation(self.num_samples)
            first, step = self.rank * self.batch_size, self.world_size * self.batch_size
        else:
            window = max(1, self.locality.window // self.world_size)
            order = shuffle(self.locality.groups, window, random)
            first, step = self.rank * len(self) * self.batch_size, self.batch_size
        for batch in range(done, len(self)):
            start = first + batch * step
            yield [(epoch, int(index)) for index in order[start : start + self.batch_size]]


def shuffle(groups: np.ndarray, window: int, random: np.random.Generator) -> np.ndarray:
    """Return an order of samples in which those of a group are near each other.

    The groups get random places 0, 1, 2, ..., and a sample of the group at place p comes at a random time between p and
    p + window. At any time samples of about `window` groups are mixed.

    Args:
        groups: (N,) number of the group of each sample.
        window: Number of groups.
        random: The generator.

    Returns:
        (N,) int64, a permutation.
    """
    places = random.permutation(int(groups.max()) + 1)
    return np.argsort(places[groups] + window * random.random(len(groups)), kind="stable")
