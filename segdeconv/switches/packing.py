"""Switches in two bits: four channels to a byte."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(switches: Tensor) -> Tensor:
    """Four to a byte: (N, C, h, w) uint8 in 0..3 -> (N, ceil(C/4), h, w) uint8, in the same memory format.

    Channel c is in byte c // 4, at bits 2 (c % 4) and 2 (c % 4) + 1; bits of channels that are not there are 0.

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
    """What `pack` was given, of so many channels.

    >>> unpack(torch.tensor([27, 3], dtype=torch.uint8).view(1, 2, 1, 1), 5).flatten().tolist()
    [3, 2, 1, 0, 3]
    """
    codes = [(packed >> 2 * position) & 3 for position in range(4)]
    if torch.compiler.is_compiling():
        return torch.stack(codes, dim=2).flatten(1, 2)[:, :channels]
    # In place, since stacking would lose the memory format.
    shape = (packed.shape[0], channels, *packed.shape[2:])
    switches = torch.empty(shape, dtype=torch.uint8, device=packed.device, memory_format=layout(packed))
    for position, code in enumerate(codes):
        part = switches[:, position::4]
        part.copy_(code[:, : part.shape[1]])
    return switches


def one_to_a_byte(switches: Tensor, channels: int) -> Tensor:
    """Switches of so many channels, packed or not, as `unpack` gives them."""
    return switches if switches.shape[1] == channels else unpack(switches, channels)


def layout(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
