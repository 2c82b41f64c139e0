"""The end of an encoder's stage in one pass over memory on a GPU: batch norm, ReLU and max-pool with switches.

The separate steps write the normalised map and read it again, which at full resolution takes longer than what is
computed there. Here one kernel reads what the convolution wrote and writes the pooled map; the statistics before it are
torch's own. torch.compile fuses the separate steps by itself and keeps them.

The results differ by rounding alone: float32 arithmetic in another order, as between any two of torch's own batch
norms. It moves a switch where two of its four values are equal but for the last bit.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as everyones

from segdeconv.switches.ops import Pooling, load_triton_kernels


def fuses(stage: nn.Module, pool: nn.Module, x: Tensor) -> bool:
    """Whether `norm_relu_pool` does what the last block of a stage and its `MaxPool` do.

    stage: ConvBlocks in a row. x: what goes into the stage, (N, C, H, W).
    It does for plain batch norm in training, all of it float32, on a GPU with Triton, outside of torch.compile, and if
    nobody has put hooks on the modules that it would pass by.
    """
    if not _runs_on_its_device(x) or not isinstance(stage, nn.Sequential):
        return False
    block: Any = stage[-1]
    norm = block.norm
    if type(norm) is not nn.BatchNorm2d:  # none, folded, or one of a subclass, such as SyncBatchNorm
        return False
    numbers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return (
        norm.training
        and norm.track_running_stats
        and norm.momentum is not None
        and all(tensor is not None and tensor.dtype == torch.float32 for tensor in numbers)
        and x.numel() > x.shape[1]  # of a single pixel torch refuses to take statistics, and says so
        and not any(_hooked(module) for module in (stage, block, norm, block.activation, pool))
    )


def norm_relu_pool(x: Tensor, norm: nn.BatchNorm2d, *, relu_before: bool, packed: bool = False) -> Pooling:
    """Batch norm in training mode, ReLU and `max_pool`, and norm's running statistics brought up to date.

    x: (N, C, H, W) on a GPU, what a convolution gave. Only where `fuses` says so.
    relu_before: the maxima are looked for after the ReLU, so that a window of four zeros names its first cell. The
        features are rectified either way, and the same.
    packed: see `max_pool`.
    """
    assert norm.momentum is not None
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        mean, variance = torch.batch_norm_update_stats(x, norm.running_mean, norm.running_var, norm.momentum)
        inverse_std = (variance + norm.eps).rsqrt()
    features, switches = _NormReluPool.apply(x, norm.weight, norm.bias, mean, inverse_std, relu_before, packed)
    return Pooling(features, switches, (x.shape[-2], x.shape[-1]))


class _NormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, relu_before: bool,
        packed: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from segdeconv.switches import fused_triton  # late: Triton is not everywhere

        channels = torch.stack([mean, weight * inverse_std, bias])
        features, switches, winners = fused_triton.norm_pool(x, channels, relu_before=relu_before, packed=packed)
        ctx.mark_non_differentiable(switches)
        ctx.save_for_backward(x, weight, mean, inverse_std, features, switches, winners)
        return features, switches

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """With y = weight * n + bias, n = (x - mean) / std, and M values of each channel:

        dx = weight / std * (dy - sum(dy) / M - n * sum(dy * n) / M), where dy is 0 but for the winners.
        """
        from segdeconv.switches import fused_triton

        x, weight, mean, inverse_std, features, switches, winners = ctx.saved_tensors
        total, with_deviation = fused_triton.norm_pool_sums(gradient, features, winners, mean[None])
        of_weight = with_deviation * inverse_std
        of_x = None
        if ctx.needs_input_grad[0]:
            scale, values = weight * inverse_std, x.numel() // x.shape[1]
            slope = scale * inverse_std * of_weight / values
            channels = torch.stack([mean, scale, scale * total / values, slope])
            of_x = fused_triton.norm_pool_gradient(x, gradient, features, switches, channels)
        return of_x, of_weight, total, None, None, None, None


def _hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its `forward`."""
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(own) or everyones._has_any_global_hook()  # type: ignore[no-untyped-call]


def _runs_on_its_device(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling() and load_triton_kernels(x.device) is not None
