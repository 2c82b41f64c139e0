"""Activation checkpointing: stages save only their inputs and are recomputed in the backward pass.

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
    """Marker base class of stages that `checkpoint_activations` recomputes as a whole."""


def checkpoint_activations(network: nn.Module) -> None:
    """Make every `Checkpointable` of a network save only its inputs and run again in the backward pass, in place.

    This takes less memory and more time. The results are bit-identical: dropout draws the same elements again, and the
    running statistics of batch norm are updated once per batch. The names in the state dict do not change, and a deep
    copy of the network recomputes its own stages.
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
        forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _preserve_statistics(norms))
    )


@contextmanager
def _preserve_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    """Let batch norm update copies of its running statistics.

    Without the update autograd would save fewer tensors than in the forward pass, which torch reports as an error.
    """
    training = [norm for norm in norms if norm.training]
    before = [(norm, name, buffer) for norm in training for name, buffer in norm.named_buffers(recurse=False)]
    try:
        for norm, name, buffer in before:
            setattr(norm, name, buffer.clone())
        yield
    finally:
        for norm, name, buffer in before:
            setattr(norm, name, buffer)
