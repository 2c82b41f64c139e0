"""What the machine can do at most: multiply matrices, and copy memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

SIDES = (1024, 2048, 4096)
LAYOUTS = ("row by row", "row by column")
TRIALS = 0.4  # seconds that one repetition multiplies


def products(device: torch.device, dtype: torch.dtype, side: int, layout: str) -> Callable[[], None]:
    """A repetition: products of two square matrices, in so many as take about TRIALS seconds on two CPU cores."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    right = right.t() if layout == LAYOUTS[1] else right
    count = rounds(device, side)

    def step() -> None:
        for _ in range(count):
            left @ right

    return step


def rounds(device: torch.device, side: int) -> int:
    """How many products of this side one repetition is."""
    speed = 2e11 if device.type == "cpu" else 4e14
    return max(1, round(TRIALS * speed / (2 * side**3)))


def contestants(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Callable[[], None]]]:
    """By name, for `harness.race`; `operations` says what a repetition of each has done."""
    return {
        f"{str(dtype).removeprefix('torch.')} {side} {layout}": partial(products, device, dtype, side, layout)
        for side in SIDES
        for layout in LAYOUTS
    }


def operations(device: torch.device, side: int) -> int:
    """Multiplications and additions of one repetition."""
    return 2 * side**3 * rounds(device, side)
