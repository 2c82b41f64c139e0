"""Speed of pooling and unpooling, forward and backward.

They are compared with the plain expression, torch's max_pool2d and max_unpool2d, and a copy of the feature map. Batch
norm followed by pooling is timed both fused and in separate steps.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.experiments.benchmarks.harness import median_time
from segdeconv.switches import ops, torch_kernels
from segdeconv.switches.fused import norm_relu_pool
from segdeconv.switches.ops import Pooling, max_pool, unpool

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CALLS = 10  # between two synchronisations with a GPU, so that launching a kernel hides behind the one before it
Case = tuple[str, Callable[[], Any], int]  # name, the call to time, bytes that it moves


def measure(
    *,
    shape: tuple[int, int, int, int] = (8, 64, 360, 480),
    layouts: tuple[str, ...] = ("channels_last", "contiguous"),
    dtypes: tuple[str, ...] = ("bf16", "fp32"),
    device: str | torch.device | None = None,
    seconds: float = 0.1,
) -> list[dict[str, Any]]:
    """Time all operations on one device.

    Args:
        shape: Shape (N, C, H, W) of the feature map that is pooled.
        layouts: Keys of `LAYOUTS`.
        dtypes: Keys of `DTYPES`.
        device: Default: the GPU if there is one, otherwise the CPU.
        seconds: Time for each row, after one warm-up call.

    Returns:
        Rows with `what`, `ms` (median time of a call, on a GPU of `CALLS` in a row), `gb_per_s` and `share_of_copy`
        (`gb_per_s` divided by that of copying the map). The bytes of an operation assume switches of one byte, or of
        two bits if they are packed, in all implementations, so that equal rates mean equal times; in fact, torch's
        int64 indices take 8 bytes each.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    calls = CALLS if device.type == "cuda" else 1
    rows = []
    for layout in layouts:
        for dtype in dtypes:
            x = torch.randn(shape, device=device).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
            copy_rate = 0.0
            for what, call, nbytes in _cases(x):
                median = median_time(functools.partial(_repeat, call, calls, device), seconds=seconds) / calls
                rate = nbytes / median / 1e9
                copy_rate = copy_rate or rate
                rows.append(
                    {
                        "what": f"{what}, {layout} {dtype} {'x'.join(map(str, shape))}",
                        "ms": 1000 * median,
                        "gb_per_s": rate,
                        "share_of_copy": rate / copy_rate,
                    }
                )
    return rows


def _cases(x: Tensor) -> Iterator[Case]:
    """Yield the operations, the copy first."""
    size = (x.shape[-2], x.shape[-1])
    out = torch.empty_like(x)
    yield "copy", lambda: out.copy_(x), 2 * x.nbytes

    codes, features = max_pool(x).switches, max_pool(x).features
    native, indices = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
    for name, packed in (("segdeconv", False), ("segdeconv, packed switches", True)):
        pooling = max_pool(x.requires_grad_(), packed=packed)
        small = features.clone().requires_grad_()
        restored = unpool(small, pooling.switches, size)
        moved = x.nbytes + features.nbytes + pooling.switches.nbytes
        with torch.no_grad():
            yield f"pool forward, {name}", lambda packed=packed: max_pool(x, packed=packed), moved  # type: ignore[misc]
        yield f"pool backward, {name}", _backward(pooling.features, x, features), moved
        with torch.no_grad():
            yield (
                f"unpool forward, {name}",
                lambda switches=pooling.switches: unpool(features, switches, size),  # type: ignore[misc]
                moved,
            )
        yield f"unpool backward, {name}", _backward(restored, small, out), moved

    moved = x.nbytes + features.nbytes + codes.nbytes
    x = x.detach()
    yield "pool forward, plain expression", lambda: torch_kernels.pool_plain(x), moved
    yield "pool backward, plain expression", lambda: torch_kernels.place_plain(features + 0.0, codes, *size), moved
    yield "unpool forward, plain expression", lambda: torch_kernels.place_plain(features, codes, *size), moved
    yield "unpool backward, plain expression", lambda: torch_kernels.pick_plain(out, codes), moved

    x.requires_grad_()
    small = native.detach().clone().requires_grad_()
    pooled = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)[0]
    restored = F.max_unpool2d(small, indices, (2, 2), (2, 2), output_size=size)
    with torch.no_grad():
        yield (
            "pool forward, torch's pair",
            lambda: F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True),
            moved,
        )
    yield "pool backward, torch's pair", _backward(pooled, x, features), moved
    with torch.no_grad():
        yield (
            "unpool forward, torch's pair",
            lambda: F.max_unpool2d(features, indices, (2, 2), (2, 2), output_size=size),
            moved,
        )
    yield "unpool backward, torch's pair", _backward(restored, small, out), moved

    # The forward pass reads the map twice, first for the statistics; the backward pass reads it once and writes its
    # gradient.
    moved += x.nbytes
    norm = nn.BatchNorm2d(x.shape[1]).to(x.device)
    for order, relu_before in (("norm, pool and ReLU", False), ("norm, ReLU and pool", True)):
        variants = {"separate steps": _separately}
        if ops._kernels(x) is not None:
            variants["one pass"] = norm_relu_pool
        for variant, function in variants.items():
            call = functools.partial(function, x, norm, relu_before=relu_before)
            with torch.no_grad():
                yield f"{order} forward, {variant}", call, moved
            yield f"{order} backward, {variant}", _backward(call().features, x, features), moved


def _separately(x: Tensor, norm: nn.BatchNorm2d, *, relu_before: bool) -> Pooling:
    if relu_before:
        return max_pool(torch.relu_(norm(x)))
    pooling = max_pool(norm(x))
    return pooling._replace(features=torch.relu(pooling.features))


def _backward(output: Tensor, inputs: Tensor, gradient: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)


def _repeat(call: Callable[[], Any], calls: int, device: torch.device) -> None:
    """Make several calls in a row and wait for the GPU."""
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
