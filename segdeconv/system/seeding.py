"""Seeds of random numbers that depend on the position in the training run, never on what ran before.

A run that is killed and resumed, or that uses another number of workers, draws the same numbers, because every draw is
keyed by (seed, purpose, position) and no generator state is carried along.
"""

import hashlib


def key(seed: int, *position: int | str) -> int:
    """Return a 64-bit seed for one purpose at one position, the same on every machine.

    Args:
        seed: The seed of the run.
        position: The purpose, and the indices (epoch, image, ...) that identify the draw.

    Examples:
        >>> key(0, "order", 1) == key(0, "order", 1) != key(0, "order", 2)
        True
    """
    text = "\x1f".join(map(str, (seed, *position)))
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
