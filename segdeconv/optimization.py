"""Optimizers, parameter groups and learning rate schedules."""

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from segdeconv.config import OBJECT, TARGET, build, check, is_foreign, locate, stand_in, type_name, without_defaults
from segdeconv.errors import UsageError, did_you_mean
from segdeconv.system.devices import fast_precision

Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0)]
NormDecay = Literal["none", "scale", "all"]
Parts = dict[str, Annotated[float, Field(ge=0)]]
SUPPLIED = ("model", "params")  # arguments of an optimizer that a config may not set
# Optimizers of torch.optim that update any parameters, once for each gradient. The others need sparse gradients, a
# function that computes the loss again, or matrices only.
TORCH_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
)  # fmt: skip
SCHEDULES = ("Constant", "Cosine", "Poly", "Restarts", "Step")


def sgd(
    model: nn.Module,
    *,
    lr: Rate = 0.1,
    momentum: Fraction = 0.9,
    weight_decay: Decay = 5e-4,
    nesterov: bool = False,
    bias_lr: Rate = 1.0,
    norm_decay: NormDecay = "none",
    part_lr: Parts | None = None,
) -> Optimizer:
    """Create stochastic gradient descent with momentum.

    Args:
        model: The network.
        lr: Learning rate.
        momentum: Momentum.
        weight_decay: Weight decay.
        nesterov: Use Nesterov momentum.
        bias_lr: Factor on the learning rate of the biases of layers other than norms; 2 in the original training files.
        norm_decay: Parameters of batch norm with weight decay. `none`; `scale`, as in SegNet's training files; `all`,
            scale and shift, as in SegNet-Basic's, which keep Caffe's defaults.
        part_lr: Factors on the learning rate of parts of the network; see `parameter_groups`.
    """
    groups = parameter_groups(model, lr, weight_decay, bias_lr=bias_lr, norm_decay=norm_decay, part_lr=part_lr)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def adamw(
    model: nn.Module,
    *,
    lr: Rate = 1e-3,
    weight_decay: Decay = 0.01,
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
    part_lr: Parts | None = None,
) -> Optimizer:
    """Create Adam with decoupled weight decay. Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.

    Args:
        model: The network.
        lr: Learning rate.
        weight_decay: Weight decay.
        betas: Decay rates of the averages of the gradient and of its square.
        part_lr: Factors on the learning rate of parts of the network; see `parameter_groups`.
    """
    groups = parameter_groups(model, lr, weight_decay, part_lr=part_lr)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]))


def muon(
    model: nn.Module,
    *,
    lr: Rate = 1e-3,
    weight_decay: Decay = 0.01,
    momentum: Fraction = 0.95,
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
    part_lr: Parts | None = None,
) -> Optimizer:
    """Create Muon, which orthogonalises the momentum of each weight, with AdamW for biases and norms.

    Args:
        model: The network.
        lr: Learning rate, on the scale of AdamW's.
        weight_decay: Weight decay, on the scale of AdamW's.
        momentum: Momentum of the weights.
        betas: AdamW's decay rates for biases and norms.
        part_lr: Factors on the learning rate of parts of the network; see `parameter_groups`.
    """
    groups = parameter_groups(model, lr, weight_decay, part_lr=part_lr)
    return Muon(groups, lr=lr, momentum=momentum, betas=(betas[0], betas[1]))


class Muon(torch.optim.AdamW):
    """Muon: steps along the orthogonalised momentum for parameters of two or more dimensions, and AdamW for the others.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the weight of a convolution, (out, in, h, w), is a
    matrix of `out` rows. The step is scaled to the size of AdamW's, so that AdamW's learning rates and decays can be
    used: Liu et al. 2025, section 2.2, https://arxiv.org/abs/2502.16982. torch.optim.Muon accepts matrices only.

    Args:
        groups: Parameter groups.
        lr: Learning rate.
        momentum: Momentum of the weights.
        betas: AdamW's decay rates for all other parameters.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas)
        for group in self.param_groups:
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters and return the loss of the closure, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights: list[tuple[dict[str, Any], nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim > 1 and parameter.grad is not None:
                    weights.append((group, parameter, parameter.grad))
                    parameter.grad = None  # so that AdamW skips it
        super().step()
        # A GPU updates all weights together, which needs fewer launches; a CPU one after the other, from its cache.
        together = len(weights) if any(gradient.is_cuda for _, _, gradient in weights) else 1
        for first in range(0, len(weights), together):
            self._step_weights(weights[first : first + together])
        return loss

    def _step_weights(self, weights: list[tuple[dict[str, Any], nn.Parameter, Tensor]]) -> None:
        """Update weights, given with their group and their gradient."""
        nesterovs = []
        for group, parameter, gradient in weights:
            parameter.grad = gradient
            state = self.state[parameter]
            if not state:
                # AdamW expects a step count of every parameter when it loads a state.
                state.update(momentum_buffer=torch.zeros_like(gradient), step=torch.zeros(()))
            state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            nesterovs.append(gradient.lerp(state["momentum_buffer"], group["momentum"]))
        for (group, parameter, _), direction in zip(weights, orthogonal(nesterovs), strict=True):
            size = 0.2 * math.sqrt(max(len(parameter), parameter[0].numel()))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-group["lr"] * size)


def orthogonal(filters: Sequence[Tensor]) -> list[Tensor]:
    """Approximate the matrices with orthogonal rows nearest to filters: most singular values become 0.7..1.2.

    Runs five Newton-Schulz steps with the quintic polynomial that raises small singular values fastest, in bfloat16
    where the machine multiplies it faster (elsewhere it is 10 to 20 times slower). Sums and multiples of all matrices
    take one call, since a GPU computes them faster than they are launched; the result does not depend on what else is
    in the list.

    Args:
        filters: Tensors (out, ...) of two or more dimensions.

    Returns:
        Tensors of the shapes and types of `filters`.
    """
    dtype = torch.bfloat16 if fast_precision() == "bf16-mixed" else torch.float32
    # The channels-last memory order; any order gives the same.
    rows = [tensor.permute(0, *range(2, tensor.ndim), 1) for tensor in filters]
    matrices = [tensor.reshape(len(tensor), -1).to(dtype) for tensor in rows]
    tall = [len(matrix) > matrix.shape[1] for matrix in matrices]
    xs = [matrix.T if is_tall else matrix for matrix, is_tall in zip(matrices, tall, strict=True)]
    xs = [x / x.norm().clamp_min(1e-7) for x in xs]
    for _ in range(5):
        # x = 3.4445 x + (-4.7750 gram + 2.0315 gram @ gram) @ x. Not in place: torch._foreach_mul_ rounds the factor to
        # bfloat16 on a CPU (2.15).
        grams = [x @ x.T for x in xs]
        squares = [scaled @ gram for scaled, gram in zip(torch._foreach_mul(grams, 2.0315), grams, strict=True)]
        sums = torch._foreach_add(torch._foreach_mul(grams, -4.7750), squares)
        products = [total @ x for total, x in zip(sums, xs, strict=True)]
        xs = list(torch._foreach_add(torch._foreach_mul(xs, 3.4445), products))
    xs = [x.T if is_tall else x for x, is_tall in zip(xs, tall, strict=True)]
    return [
        x.to(tensor.dtype).reshape(row.shape).permute(0, -1, *range(1, tensor.ndim - 1))
        for x, row, tensor in zip(xs, rows, filters, strict=True)
    ]


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    bias_lr: float = 1.0,
    norm_decay: NormDecay = "none",
    part_lr: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Divide the parameters of a network into groups by weight decay and learning rate.

    Biases and norms (one-dimensional parameters) have no weight decay by default. Schedules scale the `base_lr` of a
    group.

    Args:
        model: The network. The parameters of frozen parts stop requiring gradients.
        lr: Learning rate.
        weight_decay: Weight decay.
        bias_lr: See `sgd`.
        norm_decay: See `sgd`.
        part_lr: Factors on the learning rate by the name of a part, such as {"encoder": 0.1, "encoder.stages.0": 0};
            for nested parts the longest name counts. A part with factor 0 is frozen.

    Raises:
        UsageError: The network has no part of a name in `part_lr`.
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
    norm_parameters = {
        id(parameter): name
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for name, parameter in module.named_parameters()
    }
    decaying = {"none": (), "scale": ("weight",), "all": ("weight", "bias")}[norm_decay]
    for name, parameter in model.named_parameters():
        containing = [part for part in parts if name.startswith(f"{part}.")]
        factor = parts[max(containing, key=len)] if containing else 1.0
        if factor == 0:
            parameter.requires_grad_(False)
        if name.endswith("bias") and id(parameter) not in norm_parameters:
            factor *= bias_lr
        if parameter.requires_grad:
            decays = parameter.ndim > 1 or norm_parameters.get(id(parameter)) in decaying
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


def optimizer_node(optimizer: Optimizer, network: nn.Module | None) -> dict[str, Any]:
    """Return the `optimizer` node of an optimizer object, of which a copy updates the copy of the network.

    Args:
        optimizer: The optimizer.
        network: The network whose parameters it updates.

    Raises:
        UsageError: It updates other parameters.
    """
    name = type(optimizer).__name__
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = list(network.parameters()) if network is not None else []
    if not {id(parameter) for parameter in own} <= {id(parameter) for parameter in parameters}:
        raise UsageError(
            f"optimizer ({name}) updates parameters of another network - give the network that it was made for as "
            "model, or the name of an optimizer, such as adamw"
        )

    def optimizer_given(*, model: nn.Module, lr: float, object: str = "") -> Optimizer:
        copies = {id(old): new for old, new in zip(parameters, model.parameters(), strict=True)}
        copied = copy.deepcopy(optimizer, dict(copies))
        for group in copied.param_groups:
            group.setdefault("base_lr", group["lr"])
        return copied

    return {
        TARGET: stand_in(optimizer_given),
        OBJECT: type_name(optimizer),
        "lr": float(optimizer.param_groups[0]["lr"]),
    }


def check_optimizer(node: Mapping[str, Any]) -> dict[str, Any]:
    """Check the `optimizer` node of a config and return it with its learning rate, and the defaults of segdeconv's own.

    Args:
        node: Names a function of the network (`model`), or a class of torch.optim or the same form (`params`).

    Raises:
        UsageError: It is not an optimizer that can be used, a key is unknown, or a value is invalid.
    """
    target = locate(node, "optimizer")
    own_torch = str(getattr(target, "__module__", "")).startswith("torch.")
    if (inspect.isclass(target) and not issubclass(target, Optimizer)) or (
        own_torch and getattr(target, "__name__", "") not in TORCH_OPTIMIZERS
    ):
        raise UsageError(
            f"optimizer._target_={node[TARGET]} cannot be used as an optimizer - use adamw, muon or sgd, or of "
            f"torch.optim {', '.join(TORCH_OPTIMIZERS)}"
        )
    checked = check(node, "optimizer", [target], supplied=SUPPLIED)
    if not is_foreign(target):
        return checked
    return {**without_defaults(checked, node, target), **{name: checked[name] for name in ("lr",) if name in checked}}


def build_optimizer(node: Mapping[str, Any], model: nn.Module) -> Optimizer:
    """Build the optimizer of a checked `optimizer` node for the parameters of a network.

    Raises:
        UsageError: It rejects its arguments, or does not return an optimizer.
    """
    takes = inspect.signature(locate(node, "optimizer")).parameters
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    supplied = {"params": parameters} if "params" in takes and "model" not in takes else {"model": model}
    optimizer = build(node, "optimizer", **supplied)
    if not isinstance(optimizer, Optimizer):
        returned = type(optimizer).__name__
        raise UsageError(f"optimizer ({node[TARGET]}) returns a {returned}, not a torch.optim.Optimizer")
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])  # which the schedule scales
    return optimizer


def check_schedule(node: Mapping[str, Any]) -> dict[str, Any]:
    """Check the `schedule` node of a config and return it with defaults filled in.

    Raises:
        UsageError: It is not a `Schedule`, a key is unknown, or a value is invalid.
    """
    target = locate(node, "schedule")
    if not inspect.isclass(target) or not issubclass(target, Schedule):
        raise UsageError(
            f"schedule._target_={node[TARGET]} is not a segdeconv.optimization.Schedule - derive it from that, or use "
            f"{', '.join(SCHEDULES)}"
        )
    return check(node, "schedule", [target])


@torch.no_grad()
def average(into: nn.Module, model: nn.Module, *, decay: float) -> None:
    """Update an exponential moving average of a network's parameters and floating-point buffers, in place.

    The running means and variances of batch norm are averaged together with the weights; counters are copied.

    Args:
        into: The average.
        model: The network.
        decay: Weight of the old average.
    """
    averages, values = [*into.parameters(), *into.buffers()], [*model.parameters(), *model.buffers()]
    floating = [tensor.is_floating_point() for tensor in averages]
    torch._foreach_lerp_(list(compress(averages, floating)), list(compress(values, floating)), 1.0 - decay)
    for old, new in zip(averages, values, strict=True):
        if not old.is_floating_point():
            old.copy_(new)


class Schedule(ABC):
    """Base class of schedules, which give a factor on the learning rate as a function of the optimizer step.

    Args:
        warmup_steps: Number of first steps over which the factor rises linearly from nearly 0.
    """

    def __init__(self, *, warmup_steps: Count = 0) -> None:
        self.warmup_steps = warmup_steps

    def __call__(self, step: int, total_steps: int) -> float:
        """Return the factor of a step, 0 .. total_steps - 1."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        rest = max(1, total_steps - self.warmup_steps)
        return self.factor(min(1.0, (step - self.warmup_steps) / rest), step)

    @abstractmethod
    def factor(self, progress: float, step: int) -> float:
        """Return the factor after the warm-up.

        Args:
            progress: Fraction of the steps after the warm-up that are done, 0..1.
            step: Number of steps that are done, including the warm-up.
        """


class Constant(Schedule):
    """Constant learning rate, as in SegNet's training files.

    Args:
        warmup_steps: See `Schedule`.

    Examples:
        >>> Constant()(500, 1000)
        1.0
    """

    def factor(self, progress: float, step: int) -> float:
        return 1.0


class Poly(Schedule):
    """Polynomial decay, (1 - progress) ** power.

    Chen et al. 2016 (DeepLab), section 4.1, https://arxiv.org/abs/1606.00915.

    Args:
        power: Exponent.
        warmup_steps: See `Schedule`.

    Examples:
        >>> Poly(power=2)(500, 1000)
        0.25
    """

    def __init__(self, *, power: Rate = 0.9, warmup_steps: Count = 0) -> None:
        super().__init__(warmup_steps=warmup_steps)
        self.power = power

    def factor(self, progress: float, step: int) -> float:
        return (1.0 - progress) ** self.power


class Cosine(Schedule):
    """Cosine decay from 1 to `floor`.

    Loshchilov & Hutter 2017, equation 5, https://arxiv.org/abs/1608.03983.

    Args:
        floor: Final factor.
        warmup_steps: See `Schedule`.

    Examples:
        >>> Cosine()(500, 1000)
        0.5
    """

    def __init__(self, *, floor: Fraction = 0.0, warmup_steps: Count = 0) -> None:
        super().__init__(warmup_steps=warmup_steps)
        self.floor = floor

    def factor(self, progress: float, step: int) -> float:
        return half_cosine(progress, self.floor)


class Restarts(Schedule):
    """Cosine decay with warm restarts: each cycle starts again from 1.

    Loshchilov & Hutter 2017, section 3, https://arxiv.org/abs/1608.03983.

    Args:
        cycles: Number of cycles.
        growth: Length of each cycle divided by the length of the one before (the paper's T_mult).
        floor: Final factor of each cycle.
        warmup_steps: See `Schedule`.

    Examples:
        >>> [Restarts(cycles=2, growth=3)(step, 400) for step in (0, 50, 100, 250)]
        [1.0, 0.5, 1.0, 0.5]
    """

    def __init__(
        self,
        *,
        cycles: Annotated[int, Field(ge=1)] = 3,
        growth: Annotated[float, Field(ge=1)] = 1.0,
        floor: Fraction = 0.0,
        warmup_steps: Count = 0,
    ) -> None:
        super().__init__(warmup_steps=warmup_steps)
        self.cycles, self.growth, self.floor = cycles, growth, floor

    def factor(self, progress: float, step: int) -> float:
        lengths = [self.growth**cycle for cycle in range(self.cycles)]
        position = progress * sum(lengths)
        rounding = 1e-12 * sum(lengths)  # of the position, which is just below the end of a cycle at some restarts
        for length in lengths[:-1]:
            if position < length - rounding:
                return half_cosine(position / length, self.floor)
            position -= length
        return half_cosine(position / lengths[-1], self.floor)


def half_cosine(progress: float, floor: float) -> float:
    """Return the factor of a cosine decay from 1 to `floor` as progress goes from 0 to 1."""
    return floor + (1.0 - floor) * round(0.5 * (1.0 + math.cos(math.pi * progress)), 12)


class Step(Schedule):
    """Step decay: multiplies the factor by `gamma` every `every` steps, as DeconvNet by 0.1 every 9000 or 10000.

    Args:
        every: Number of steps between changes.
        gamma: Factor of each change.
        warmup_steps: See `Schedule`.

    Examples:
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
