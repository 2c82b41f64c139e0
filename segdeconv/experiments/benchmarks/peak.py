"""What the machine can do at most: multiply matrices."""

import time

import torch

SIDES = (1024, 2048, 4096)


def matrix_peak(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> float:
    """Operations a second of the fastest product of two square matrices, the second one stored either way.

    seconds: that each of the SIDES in each of both layouts is repeated for, at least once.
    """
    best = 0.0
    for side in SIDES:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        for second in (right, right.t()):
            _waited(left @ second)
            started, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - started < seconds:
                _waited(left @ second)
                count += 1
            best = max(best, 2 * side**3 * count / (time.perf_counter() - started))
    return best


def _waited(result: torch.Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize()
