"""Memory for time: stages of a network that keep their inputs alone and are computed again in the backward pass.

Chen et al. 2016, section 3, https://arxiv.org/abs/1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Staged(nn.Module):
    """A network, or a part of one, that goes through its stages one by one.

    recompute: whether the backward pass computes each stage again, from its inputs, instead of keeping what is in it.
        The same bits either way: dropout repeats itself, and batch norm's running statistics hear of a batch once.
    """

    recompute: bool = False

    def run(self, stage: Callable[..., Any], *inputs: Any) -> Any:
        """stage(*inputs), where `stage` uses modules of this part only."""
        if not (self.recompute and torch.is_grad_enabled()):
            return stage(*inputs)
        return checkpoint(stage, *inputs, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(self)


@contextmanager
def _statistics_kept(part: nn.Module) -> Iterator[None]:
    """Batch norm updates copies of its running statistics. (Without any, autograd would keep fewer tensors than before,
    which torch takes for another computation.)"""
    norms = [module for module in part.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    try:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
