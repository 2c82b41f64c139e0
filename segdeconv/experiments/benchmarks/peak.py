"""Peak speed of the machine, measured with matrix products."""

import time

import torch

SIDES = (1024, 2048, 4096)


def matrix_peak(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> float:
    """Return the floating-point operations per second of the fastest product of two square matrices.

    Args:
        device: Device of the matrices.
        dtype: Their dtype.
        seconds: Time for which the product is repeated, at least once, for each of `SIDES` and for both layouts
            (row-major and column-major) of the second matrix.
    """
    best = 0.0
    for side in SIDES:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        for second in (right, right.t()):
            _synchronised(left @ second)
            started, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - started < seconds:
                _synchronised(left @ second)
                count += 1
            best = max(best, 2 * side**3 * count / (time.perf_counter() - started))
    return best


def _synchronised(result: torch.Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize()
