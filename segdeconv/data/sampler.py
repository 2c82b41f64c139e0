"""Order of training samples as a function of (seed, epoch), so that a resumed run continues exactly."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from segdeconv.system.seeding import key


class StatelessBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), shuffled in every epoch; the last, incomplete batch of an epoch is dropped.

    Args:
        num_samples: Number of samples.
        batch_size: Batch size per process.
        seed: Seed of the order.
        position: Returns (epoch, number of its batches already done); called when an epoch starts or resumes.
        rank: Index of this process.
        world_size: Number of processes. The global order does not depend on it.

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
    ) -> None:
        self.num_samples, self.batch_size, self.seed, self.position = num_samples, batch_size, seed, position
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, done = self.position()
        random = np.random.Generator(np.random.Philox(key=key(self.seed, "order", epoch)))
        order = random.permutation(self.num_samples)
        for batch in range(done, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(epoch, int(index)) for index in order[first : first + self.batch_size]]
