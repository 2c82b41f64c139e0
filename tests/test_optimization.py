"""Schedules compared with torch's schedulers and values computed by hand; parameter groups and optimizers."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from segdeconv.models import SegNetBasic
from segdeconv.optimization import (
    Constant,
    Cosine,
    Poly,
    Restarts,
    Step,
    adamw,
    muon,
    orthogonal,
    parameter_groups,
    sgd,
)

TOTAL = 40


def torch_factors(make):
    """Return the learning rates of a torch scheduler that starts from 1.0."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(TOTAL):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (Constant(), lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        (Poly(power=0.9), lambda optimizer: lr_scheduler.PolynomialLR(optimizer, TOTAL, power=0.9)),
        (Cosine(floor=0.1), lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, TOTAL, eta_min=0.1)),
        (Step(every=9, gamma=0.5), lambda optimizer: lr_scheduler.StepLR(optimizer, 9, gamma=0.5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedule_equals_torch(schedule, make):
    assert [schedule(step, TOTAL) for step in range(TOTAL)] == pytest.approx(torch_factors(make), abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "by_hand"),
    [
        (Constant(), {0: 1, 50: 1, 99: 1}),
        (Poly(power=2), {0: 1, 50: 0.25, 90: 0.01}),
        (Poly(power=1), {0: 1, 25: 0.75, 99: 0.01}),
        (Cosine(), {0: 1, 25: (1 + 0.5**0.5) / 2, 50: 0.5, 75: (1 - 0.5**0.5) / 2}),
        (Cosine(floor=0.2), {0: 1, 50: 0.6}),
        (Step(every=30), {0: 1, 29: 1, 30: 0.1, 60: 0.01, 99: 0.001}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedule_at_steps_computed_by_hand(schedule, by_hand):
    assert {step: schedule(step, 100) for step in by_hand} == pytest.approx(by_hand)


@pytest.mark.parametrize("schedule", [Constant, Poly, Cosine])
def test_warmup_rises_linearly_to_one(schedule):
    factors = [schedule(warmup_steps=4)(step, 100) for step in range(5)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_after_warmup_the_schedule_spans_the_rest():
    # 20 of 100 steps are warm-up; step 60 is halfway through the other 80.
    assert Poly(power=1, warmup_steps=20)(60, 100) == pytest.approx(0.5)
    assert Cosine(warmup_steps=20)(60, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", [Constant, Poly, Cosine, Step])
def test_factor_stays_in_0_to_1_at_the_ends_and_beyond(schedule):
    for warmup in (0, 1, 5):
        for total in (1, 5, 6):
            for step in range(total + 3):
                factor = schedule(warmup_steps=warmup)(step, total)
                assert isinstance(factor, float)
                assert 0 <= factor <= 1


def test_every_parameter_is_in_one_group_and_only_weights_decay():
    model = SegNetBasic(3)
    weights, others = parameter_groups(model, lr=0.1, weight_decay=5e-4)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {id(p) for p in weights["params"]} == {id(module.weight) for module in convolutions}
    expected = [module.bias for module in convolutions + norms] + [module.weight for module in norms]
    assert {id(p) for p in others["params"]} == {id(parameter) for parameter in expected}
    assert (weights["weight_decay"], others["weight_decay"]) == (5e-4, 0.0)
    assert (weights["base_lr"], others["base_lr"]) == (0.1, 0.1)


# (factor on the learning rate, whether it decays), as in the param blocks of the authors' training files. The batch
# norms of SegNet-Basic have no param block and therefore Caffe's defaults.
@pytest.mark.parametrize(
    ("norm_decay", "scale", "shift"), [("none", False, False), ("scale", True, False), ("all", True, True)]
)
def test_parameters_learn_and_decay_as_in_caffes_param_blocks(norm_decay, scale, shift):
    model = SegNetBasic(3)
    optimizer = sgd(model, lr=0.1, weight_decay=5e-4, bias_lr=2.0, norm_decay=norm_decay)
    settings = {
        id(p): (group["base_lr"] / 0.1, group["weight_decay"] == 5e-4)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert len(settings) == sum(len(group["params"]) for group in optimizer.param_groups)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert (settings[id(module.weight)], settings[id(module.bias)]) == ((1, True), (2, False))
        if isinstance(module, nn.BatchNorm2d):
            assert (settings[id(module.weight)], settings[id(module.bias)]) == ((1, scale), (1, shift))


def test_frozen_parameters_are_left_out():
    model = nn.Conv2d(3, 4, 3)
    model.weight.requires_grad_(False)
    (others,) = parameter_groups(model, lr=0.1, weight_decay=0.0)
    assert [id(parameter) for parameter in others["params"]] == [id(model.bias)]


@pytest.mark.parametrize("make", [sgd, adamw, muon])
def test_without_gradient_weights_shrink_and_biases_and_norms_stay(make):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make(model, lr=0.1, weight_decay=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.01 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_sgd_step_with_momentum_by_hand():
    # weight 1, gradient 1, lr 0.1, momentum 0.9, decay 0.5:
    # v1 = 1 + 0.5 = 1.5, w1 = 0.85;  v2 = 0.9 * 1.5 + 1 + 0.5 * 0.85 = 2.775, w2 = 0.85 - 0.2775
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = sgd(layer, lr=0.1, momentum=0.9, weight_decay=0.5)
    for expected in (0.85, 0.5725):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        assert layer.weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (64, 2, 3, 3), (5, 40), (11, 32, 1, 1)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_orthogonal_keeps_the_singular_vectors_and_brings_the_singular_values_near_one(shape, precision, monkeypatch):
    monkeypatch.setattr("segdeconv.optimization.fast_precision", lambda: precision)
    filters = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (result,) = orthogonal([filters.to(memory_format=torch.channels_last) if len(shape) == 4 else filters])
    assert result.shape == filters.shape
    left, _, right = torch.linalg.svd(filters.flatten(1), full_matrices=False)
    values = left.T @ result.flatten(1) @ right.T  # diagonal if the singular vectors are the same
    torch.testing.assert_close(values, values.diagonal().diag(), rtol=0, atol=1e-4 if precision == "32-true" else 0.05)
    assert values.diagonal().min() > 0.6
    assert values.diagonal().max() < 1.25


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_orthogonal_gives_the_bits_of_the_expression_whatever_else_is_in_the_list(precision, monkeypatch):
    monkeypatch.setattr("segdeconv.optimization.fast_precision", lambda: precision)
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    filters = [torch.randn(*shape) for shape in ((16, 24), (24, 16), (5, 40), (16, 24))]
    for result, matrix in zip(orthogonal(filters), filters, strict=True):
        tall = len(matrix) > matrix.shape[1]
        x = (matrix.T if tall else matrix).to(dtype)
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        assert torch.equal(result, (x.T if tall else x).float())


def test_the_first_step_of_muon_has_the_size_of_adamws_and_similar_singular_values():
    layer, other = nn.Conv2d(16, 8, 3, bias=False), nn.Conv2d(16, 8, 3, bias=False)
    other.load_state_dict(layer.state_dict())
    gradient = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    steps = []
    for module, make in ((layer, muon), (other, adamw)):
        before = module.weight.detach().clone()
        module.weight.grad = gradient.clone()
        make(module, lr=0.01, weight_decay=0.0).step()
        steps.append((before - module.weight.detach()).flatten(1))
    muon_step, adamw_step = steps
    values = torch.linalg.svdvals(muon_step)
    assert values.max() / values.min() < 2  # those of AdamW and of the gradient differ much more
    assert (muon_step * gradient.flatten(1)).sum() > 0
    # AdamW's first step moves each weight by lr, and later ones by about a fifth of that, which Muon is scaled to.
    assert 0.001 < muon_step.square().mean().sqrt() < 1.3 * 0.2 * 0.01
    assert adamw_step.abs().mean().item() == pytest.approx(0.01, rel=1e-3)


def test_muon_steps_biases_and_norms_as_adamw():
    generator = torch.Generator().manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make(model, lr=0.01, weight_decay=0.1) for model, make in zip(models, (muon, adamw), strict=True)]
    for _ in range(3):
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs) == (ours.ndim == 1)
        assert ours.grad is not None


def test_muon_with_momentum_by_hand():
    # The orthogonal matrix nearest to a 1x1 matrix is its sign. The momentum after gradients 1 and -2 is 0.05 and
    # -0.0525, with Nesterov 0.0975 and -0.149875. So there is one step down and one up, each of 0.2 * lr times the
    # result of five Newton-Schulz steps from 1.
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = muon(layer, lr=0.1, weight_decay=0.5)
    length = 1.0
    for _ in range(5):
        length = 3.4445 * length - 4.7750 * length**3 + 2.0315 * length**5
    weight = 1.0
    for gradient, sign in ((1.0, -1), (-2.0, 1)):
        layer.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        weight = weight * (1 - 0.1 * 0.5) + sign * 0.1 * 0.2 * length
        assert layer.weight.item() == pytest.approx(weight, abs=2e-4)
    assert optimizer.state[layer.weight]["momentum_buffer"].item() == pytest.approx(0.05 * 0.95 - 0.05 * 2)


def test_muon_resumed_from_its_state_gives_the_same_bits():
    def step_through(model, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    start = nn.Conv2d(3, 4, 3)
    uninterrupted, resumed = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    uninterrupted.load_state_dict(start.state_dict())
    resumed.load_state_dict(start.state_dict())
    step_through(uninterrupted, muon(uninterrupted), range(4))
    first = muon(resumed)
    step_through(resumed, first, range(2))
    second = muon(resumed)
    second.load_state_dict(first.state_dict())
    step_through(resumed, second, range(2, 4))
    for ours, theirs in zip(resumed.parameters(), uninterrupted.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("cycles", "growth"), [(13, 3), (10, 2), (20, 1), (7, 5)])
def test_the_factor_is_one_at_every_restart_however_many_cycles(cycles, growth):
    starts = [sum(growth**cycle for cycle in range(count)) for count in range(cycles + 1)]
    schedule = Restarts(cycles=cycles, growth=growth)
    assert [schedule(start, starts[-1]) for start in starts[:-1]] == [1.0] * cycles
