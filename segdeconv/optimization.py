"""Optimizers over a network's parameters, and how the learning rate runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0)]


def sgd(
    model: nn.Module,
    *,
    lr: Rate = 0.1,
    momentum: Share = 0.9,
    weight_decay: Decay = 5e-4,
    nesterov: bool = False,
    bias_lr: Rate = 1.0,
) -> Optimizer:
    """Stochastic gradient descent with momentum.

    bias_lr: factor on the learning rate of biases; the originals' training files have 2.
    """
    return torch.optim.SGD(
        parameter_groups(model, lr, weight_decay, bias_lr), lr=lr, momentum=momentum, nesterov=nesterov
    )


def adamw(
    model: nn.Module,
    *,
    lr: Rate = 1e-3,
    weight_decay: Decay = 0.01,
    betas: tuple[Share, Share] = (0.9, 0.999),
) -> Optimizer:
    """Adam with decoupled weight decay. Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101."""
    return torch.optim.AdamW(parameter_groups(model, lr, weight_decay), lr=lr, betas=(betas[0], betas[1]))


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, bias_lr: float = 1.0) -> list[dict[str, Any]]:
    """Weights decay; biases and norms (one-dimensional parameters) do not. `base_lr` is what a schedule scales."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay, "base_lr": lr},
        {"params": others, "weight_decay": 0.0, "base_lr": lr * bias_lr},
    ]


class Schedule(ABC):
    """A factor on the learning rate at each optimizer step, a function of the step alone.

    warmup_steps: over these first steps the factor rises from nearly 0 along a straight line.
    """

    def __init__(self, *, warmup_steps: Count = 0) -> None:
        self.warmup_steps = warmup_steps

    def __call__(self, step: int, total_steps: int) -> float:
        """step: 0 .. total_steps - 1."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        rest = max(1, total_steps - self.warmup_steps)
        return self.factor(min(1.0, (step - self.warmup_steps) / rest), step)

    @abstractmethod
    def factor(self, progress: float, step: int) -> float:
        """progress: share of the steps after the warm-up that are done, 0..1."""


class Constant(Schedule):
    """The learning rate stays, as in SegNet's training files.

    >>> Constant()(500, 1000)
    1.0
    """

    def factor(self, progress: float, step: int) -> float:
        return 1.0


class Poly(Schedule):
    """(1 - progress) ** power. Chen et al. 2016 (DeepLab), section 4.1, https://arxiv.org/abs/1606.00915.

    >>> Poly(power=2)(500, 1000)
    0.25
    """

    def __init__(self, *, power: Rate = 0.9, warmup_steps: Count = 0) -> None:
        super().__init__(warmup_steps=warmup_steps)
        self.power = power

    def factor(self, progress: float, step: int) -> float:
        return (1.0 - progress) ** self.power


class Cosine(Schedule):
    """Half a cosine from 1 down to `floor`. Loshchilov & Hutter 2017, equation 5, https://arxiv.org/abs/1608.03983.

    >>> Cosine()(500, 1000)
    0.5
    """

    def __init__(self, *, floor: Share = 0.0, warmup_steps: Count = 0) -> None:
        super().__init__(warmup_steps=warmup_steps)
        self.floor = floor

    def factor(self, progress: float, step: int) -> float:
        return self.floor + (1.0 - self.floor) * round(0.5 * (1.0 + math.cos(math.pi * progress)), 12)


class Step(Schedule):
    """Times `gamma` every `every` steps: DeconvNet's ×0.1 every 9000 or 10000.

    >>> round(Step(every=9000)(18000, 20000), 4)
    0.01
    """

    def __init__(
        self, *, every: Annotated[int, Field(ge=1)] = 9000, gamma: Rate = 0.1, warmup_steps: Count = 0
    ) -> None:
        super().__init__(warmup_steps=warmup_steps)
        self.every, self.gamma = every, gamma

    def factor(self, progress: float, step: int) -> float:
        return self.gamma ** (step // self.every)
