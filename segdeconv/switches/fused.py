"""Fused end of an encoder stage on a GPU: batch norm, ReLU and max-pool with switches in one pass over memory.

The separate steps write the normalised map and read it again, which at full resolution takes longer than the
arithmetic. Here one kernel reads the output of the convolution and writes the pooled map; the batch statistics are
computed by torch. Under torch.compile the separate steps are used, because the compiler fuses them itself.

The results differ from the separate steps by rounding only: the float32 operations run in another order, as they do
between any two of torch's own batch norm kernels. A switch changes where the two largest values of its window differ
in the last bit only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from segdeconv.switches.modules import MaxPool
from segdeconv.switches.ops import Pooling, load_triton_kernels
from segdeconv.switches.packing import is_tracing


def fuses(stage: nn.Module, pool: nn.Module, x: Tensor) -> bool:
    """Return whether `norm_relu_pool` can replace the last block of a stage and its `MaxPool`.

    It can for plain batch norm in training mode, with float32 parameters and statistics, on a GPU with Triton, outside
    torch.compile, and if none of the modules that it would bypass has hooks.

    Args:
        stage: Sequence of ConvBlocks.
        pool: The pool that follows the stage.
        x: Input of the stage, (N, C, H, W).
    """
    if not _runs_on_its_device(x) or not isinstance(stage, nn.Sequential) or type(pool) is not MaxPool:
        return False
    block: Any = stage[-1]
    norm = block.norm
    if type(norm) is not nn.BatchNorm2d:  # absent, folded, or a subclass such as SyncBatchNorm
        return False
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return (
        norm.training
        and norm.track_running_stats
        and norm.momentum is not None
        and all(tensor is not None and tensor.dtype == torch.float32 for tensor in tensors)
        and x.numel() > x.shape[1]  # torch raises its own error for the statistics of a single pixel
        and not any(_has_hooks(module) for module in (stage, block, norm, block.activation, pool))
    )


def norm_relu_pool(x: Tensor, norm: nn.BatchNorm2d, *, relu_before: bool, packed: bool = False) -> Pooling:
    """Apply batch norm in training mode, ReLU and `max_pool`, and update the norm's running statistics.

    Call it only where `fuses` returns True.

    Args:
        x: Output of a convolution, (N, C, H, W), on a GPU.
        norm: The batch norm that follows the convolution.
        relu_before: Search for the maxima after the ReLU, so that a window of four zeros selects its first cell. The
            features are rectified, and the same, either way.
        packed: Return packed switches, see `max_pool`.
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
        from segdeconv.switches import fused_triton  # imported late, because Triton may not be installed

        channels = torch.stack([mean, weight * inverse_std, bias])
        features, switches, winners = fused_triton.norm_pool(x, channels, relu_before=relu_before, packed=packed)
        ctx.mark_non_differentiable(switches)
        ctx.save_for_backward(x, weight, mean, inverse_std, features, switches, winners)
        return features, switches

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias.

        With y = weight * n + bias, n = (x - mean) / std, and M values per channel,
        dx = weight / std * (dy - sum(dy) / M - n * sum(dy * n) / M), where dy is 0 except at the winning cells.
        """
        from segdeconv.switches import fused_triton

        x, weight, mean, inverse_std, features, switches, winners = ctx.saved_tensors
        total, with_deviation = fused_triton.norm_pool_sums(gradient, features, winners, mean[None])
        weight_gradient = with_deviation * inverse_std
        x_gradient = None
        if ctx.needs_input_grad[0]:
            scale, values = weight * inverse_std, x.numel() // x.shape[1]
            slope = scale * inverse_std * weight_gradient / values
            channels = torch.stack([mean, scale, scale * total / values, slope])
            x_gradient = fused_triton.norm_pool_gradient(x, gradient, features, switches, channels)
        return x_gradient, weight_gradient, total, None, None, None, None


def _has_hooks(module: nn.Module) -> bool:
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(own) or torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]


def _runs_on_its_device(x: Tensor) -> bool:
    traced = torch.compiler.is_compiling() or is_tracing()
    return x.is_cuda and not traced and load_triton_kernels(x.device) is not None
