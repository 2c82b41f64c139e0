"""Optimizers over a network's parameters, and how the learning rate runs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import compress
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from segdeconv.errors import UsageError, did_you_mean
from segdeconv.system.devices import fast_precision

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0)]
NormDecay = Literal["none", "scale", "all"]
Parts = dict[str, Annotated[float, Field(ge=0)]]


def sgd(
    model: nn.Module,
    *,
    lr: Rate = 0.1,
    momentum: Share = 0.9,
    weight_decay: Decay = 5e-4,
    nesterov: bool = False,
    bias_lr: Rate = 1.0,
    norm_decay: NormDecay = "none",
    part_lr: Parts | None = None,
) -> Optimizer:
    """Stochastic gradient descent with momentum.

    bias_lr: factor on the learning rate of biases of layers, not of norms; the originals' training files have 2.
    norm_decay: which parameters of batch norm decay as weights do: `none`; `scale` as in SegNet's training files;
        `all`, the shift too, as in SegNet-Basic's, which say nothing of it.
    part_lr: factors on the learning rate of parts of the network; see `parameter_groups`.
    """
    groups = parameter_groups(model, lr, weight_decay, bias_lr=bias_lr, norm_decay=norm_decay, part_lr=part_lr)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def adamw(
    model: nn.Module,
    *,
    lr: Rate = 1e-3,
    weight_decay: Decay = 0.01,
    betas: tuple[Share, Share] = (0.9, 0.999),
    part_lr: Parts | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay. Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.

    part_lr: factors on the learning rate of parts of the network; see `parameter_groups`.
    """
    groups = parameter_groups(model, lr, weight_decay, part_lr=part_lr)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]))


def muon(
    model: nn.Module,
    *,
    lr: Rate = 1e-3,
    weight_decay: Decay = 0.01,
    momentum: Share = 0.95,
    betas: tuple[Share, Share] = (0.9, 0.999),
    part_lr: Parts | None = None,
) -> Optimizer:
    """Momentum whose every filter bank is made orthogonal, for weights; Adam with decoupled decay for biases and norms.

    lr, weight_decay: on AdamW's scale. momentum: of weights. betas: of biases and norms.
    part_lr: factors on the learning rate of parts of the network; see `parameter_groups`.
    """
    groups = parameter_groups(model, lr, weight_decay, part_lr=part_lr)
    return Muon(groups, lr=lr, momentum=momentum, betas=(betas[0], betas[1]))


class Muon(torch.optim.AdamW):
    """AdamW, but for parameters of two dimensions or more, whose step is their momentum's nearest orthogonal matrix.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; a filter bank (out, in, h, w) is a matrix of `out`
    rows. The step is scaled to the size that AdamW's has, so that its learning rates and decays serve: Liu et al. 2025,
    section 2.2, https://arxiv.org/abs/2502.16982. torch.optim.Muon takes matrices alone.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas)
        for group in self.param_groups:
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights: list[tuple[dict[str, Any], nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim > 1 and parameter.grad is not None:
                    weights.append((group, parameter, parameter.grad))
                    parameter.grad = None  # Adam passes over it
        super().step()
        for group, parameter, gradient in weights:
            parameter.grad = gradient
            state = self.state[parameter]
            if not state:
                # The count is Adam's: its loading of a state asks every parameter for one.
                state.update(momentum_buffer=torch.zeros_like(gradient), step=torch.zeros(()))
            state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            ahead = gradient.lerp(state["momentum_buffer"], group["momentum"])  # Nesterov's
            direction = orthogonal(ahead)
            size = 0.2 * math.sqrt(max(len(parameter), parameter[0].numel()))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-group["lr"] * size)
        return loss


def orthogonal(filters: Tensor) -> Tensor:
    """The nearest matrix of orthogonal rows to (out, ...) filters, roughly: most singular values become 0.7 to 1.2.

    Five Newton-Schulz steps, of the quintic that raises small singular values fastest; in bfloat16 where the machine
    multiplies it faster (where not, it is 10 to 20 times slower).
    """
    dtype = torch.bfloat16 if fast_precision() == "bf16-mixed" else torch.float32
    rows = filters.permute(0, *range(2, filters.ndim), 1)  # as it lies in channels-last memory; the order is no matter
    matrix = rows.reshape(len(filters), -1).to(dtype)
    tall = len(matrix) > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if tall else x
    return x.to(filters.dtype).reshape(rows.shape).permute(0, -1, *range(1, filters.ndim - 1))


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    bias_lr: float = 1.0,
    norm_decay: NormDecay = "none",
    part_lr: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Weights decay; biases and norms (one-dimensional parameters) do not. `base_lr` is what a schedule scales.

    bias_lr, norm_decay: see `sgd`.
    part_lr: factors on the learning rate by the name of a part, such as {"encoder": 0.1, "encoder.stages.0": 0}; of
        names that hold one another the longest counts. A part with 0 is frozen: its parameters ask for no gradient.
    """
    parts = dict(part_lr or {})
    names = {name for name, _ in model.named_modules() if name}
    for part in parts:
        if part not in names:
            raise UsageError(
                f"optimizer.part_lr: the network has no part '{part}' - "
                + did_you_mean(part, {name for name in names if name.count(".") <= part.count(".")})
            )
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    of_norms = {
        id(parameter): name
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for name, parameter in module.named_parameters()
    }
    decaying = {"none": (), "scale": ("weight",), "all": ("weight", "bias")}[norm_decay]
    for name, parameter in model.named_parameters():
        holders = [part for part in parts if name.startswith(f"{part}.")]
        factor = parts[max(holders, key=len)] if holders else 1.0
        if factor == 0:
            parameter.requires_grad_(False)
        if name.endswith("bias") and id(parameter) not in of_norms:
            factor *= bias_lr
        if parameter.requires_grad:
            decays = parameter.ndim > 1 or of_norms.get(id(parameter)) in decaying
            groups.setdefault((factor, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "base_lr": lr * factor,
        }
        for (factor, decays), parameters in groups.items()
        if parameters
    ]


@torch.no_grad()
def average(into: nn.Module, model: nn.Module, *, decay: float) -> None:
    """One step of an exponential moving average of a network's parameters and floating-point buffers, in place.

    Running means and variances of batch norm are averaged with the weights that they belong to; counters are copied.
    """
    mine, theirs = [*into.parameters(), *into.buffers()], [*model.parameters(), *model.buffers()]
    floating = [tensor.is_floating_point() for tensor in mine]
    torch._foreach_lerp_(list(compress(mine, floating)), list(compress(theirs, floating)), 1.0 - decay)
    for old, new in zip(mine, theirs, strict=True):
        if not old.is_floating_point():
            old.copy_(new)


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
        return half_cosine(progress, self.floor)


class Restarts(Schedule):
    """Half cosines, each starting again from 1: warm restarts.

    Loshchilov & Hutter 2017, section 3, https://arxiv.org/abs/1608.03983.

    cycles: how many; growth: how many times longer each is than the one before (the paper's T_mult).

    >>> [Restarts(cycles=2, growth=3)(step, 400) for step in (0, 50, 100, 250)]
    [1.0, 0.5, 1.0, 0.5]
    """

    def __init__(
        self,
        *,
        cycles: Annotated[int, Field(ge=1)] = 3,
        growth: Annotated[float, Field(ge=1)] = 1.0,
        floor: Share = 0.0,
        warmup_steps: Count = 0,
    ) -> None:
        super().__init__(warmup_steps=warmup_steps)
        self.cycles, self.growth, self.floor = cycles, growth, floor

    def factor(self, progress: float, step: int) -> float:
        lengths = [self.growth**cycle for cycle in range(self.cycles)]
        place = progress * sum(lengths)
        for length in lengths[:-1]:
            if place < length:
                return half_cosine(place / length, self.floor)
            place -= length
        return half_cosine(place / lengths[-1], self.floor)


def half_cosine(progress: float, floor: float) -> float:
    """From 1 down to `floor` as progress goes from 0 to 1."""
    return floor + (1.0 - floor) * round(0.5 * (1.0 + math.cos(math.pi * progress)), 12)


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
