"""Packed switches: two bits each, four channels per byte."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(switches: Tensor) -> Tensor:
    """Pack the switches of four channels into one byte.

    Channel c is in byte c // 4, at bits 2 (c % 4) and 2 (c % 4) + 1; bits beyond the last channel are 0.

    Args:
        switches: (N, C, h, w) uint8 in 0..3.

    Returns:
        (N, ceil(C/4), h, w) uint8, in the same memory format.

    Examples:
        >>> pack(torch.tensor([3, 2, 1, 0, 3], dtype=torch.uint8).view(1, 5, 1, 1)).flatten().tolist()  # 0b00011011
        [27, 3]
    """
    missing = -switches.shape[1] % 4
    if missing:
        switches = F.pad(switches, (0, 0, 0, 0, 0, missing))
    packed = switches[:, 0::4]
    for position in range(1, 4):
        packed = packed | (switches[:, position::4] << 2 * position)
    return packed


def unpack(packed: Tensor, channels: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: (N, ceil(C/4), h, w) uint8.
        channels: Number of channels C before packing.

    Returns:
        (N, C, h, w) uint8 in 0..3.

    Examples:
        >>> unpack(torch.tensor([27, 3], dtype=torch.uint8).view(1, 2, 1, 1), 5).flatten().tolist()
        [3, 2, 1, 0, 3]
    """
    codes = [(packed >> 2 * position) & 3 for position in range(4)]
    if torch.compiler.is_compiling() or is_tracing():
        return torch.stack(codes, dim=2).flatten(1, 2)[:, :channels]
    # Copied into place, because stacking would lose the memory format.
    shape = (packed.shape[0], channels, *packed.shape[2:])
    switches = torch.empty(shape, dtype=torch.uint8, device=packed.device, memory_format=layout(packed))
    for position, code in enumerate(codes):
        part = switches[:, position::4]
        part.copy_(code[:, : part.shape[1]])
    return switches


def is_tracing() -> bool:
    """Return whether torch.jit.trace records the operations."""
    return not torch.compiler.is_compiling() and bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call, attr-defined]


def unpack_if_packed(switches: Tensor, channels: int) -> Tensor:
    """Return switches of `channels` channels, packed or not, in unpacked form."""
    return switches if switches.shape[1] == channels else unpack(switches, channels)


def layout(x: Tensor) -> torch.memory_format:
    """Return the memory format of a tensor: channels_last or contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
