"""Activation checkpointing: stages that keep only their inputs and are computed again in the backward pass.

Chen et al. 2016, section 3, https://arxiv.org/abs/1604.06174.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Checkpointable(nn.Module):
    """A step of a network that `checkpoint_activations` computes again as a whole; a base class without behaviour."""


def checkpoint_activations(network: nn.Module) -> None:
    """Make every `Checkpointable` of a network keep only its inputs and run again in the backward pass.

    It takes less memory and more time. The bits are the same: dropout repeats itself, and batch norm's running
    statistics are updated once for a batch.
    Names in the state dict stay, and a deep copy of the network recomputes its own stages.
    """
    for stage in network.modules():
        if isinstance(stage, Checkpointable):
            stage.forward = partial(_recomputed, stage)


def _recomputed(stage: nn.Module, *inputs: Any) -> Any:
    forward = partial(type(stage).forward, stage)
    if not torch.is_grad_enabled():
        return forward(*inputs)
    parts = [stage, *(module for module in inputs if isinstance(module, nn.Module))]
    norms = [norm for part in parts for norm in part.modules() if isinstance(norm, _BatchNorm)]
    return checkpoint(
        forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(norms))
    )


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norm updates copies of its running statistics. (Without any, autograd would keep fewer tensors than before,
    which torch takes for another computation.)"""
    training = [norm for norm in norms if norm.training]
    before = [(norm, name, buffer) for norm in training for name, buffer in norm.named_buffers(recurse=False)]
    try:
        for norm, name, buffer in before:
            setattr(norm, name, buffer.clone())
        yield
    finally:
        for norm, name, buffer in before:
            setattr(norm, name, buffer)
