"""torch.compile: every network compiles to one graph, and a compiled run behaves like any other run."""

import functools
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import config, state

from segdeconv.checkpoints import checkpoint
from segdeconv.errors import UsageError
from segdeconv.models import SegNet, build_model, check_model
from segdeconv.train import train
from segdeconv.training import task
from segdeconv.training.resume import AnyName
from segdeconv.training.task import SegmentationTask

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
SLIM = {"width": 0.0625, "fc_width": 8, "depth": 11, "channels": 16, "supervise_levels": True, "pretrained": "none"}


# AdamW would amplify rounding errors, because the gradient of a bias before a batch norm is 0 apart from them.
SGD = {"_target_": "segdeconv.optimization.sgd", "lr": 0.01}
QUICK = ("segnet", "unet")
# Networks of the same parts as others, for which tracing the forward pass is enough.
SIMILAR = {path.stem for path in CONFIGS if path.stem.startswith(("bayesian", "fcn_basic_", "segnet_basic_"))}


VARIANTS = {
    **{path.stem: (path, {}) for path in CONFIGS},
    "segnet without norms": (CONFIGS[0].with_name("segnet.yaml"), {"norm": False}),
    "segnet with soft switches": (CONFIGS[0].with_name("segnet.yaml"), {"switch_source": "soft"}),
    "deconvnet with tied filters": (CONFIGS[0].with_name("deconvnet.yaml"), {"tied": True}),
    "fcn with padding 100": (CONFIGS[0].with_name("fcn.yaml"), {"padding": 100}),
}


def slim(name):
    """Return a network of `VARIANTS` with few channels and logits that are not constant."""
    path, changes = VARIANTS[name]
    node = check_model(yaml.safe_load(path.read_text()))
    settings = {**SLIM, "width": 4} if "basic" in name or name == "bilinear_interpolation" else SLIM
    settings = {key: value for key, value in settings.items() if key in node}
    model = build_model({**node, **settings, **changes}, 3, 3)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.eq(0).all():
            torch.nn.init.normal_(module.weight)
    return model


def outputs(network, model, image):
    """Return the logits, and the gradients of the mean of their squares."""
    model.zero_grad()
    torch.manual_seed(1)
    logits = network(image)
    sum(part.square().mean() for part in logits).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [part.detach() for part in logits] + [gradient.clone() for gradient in gradients]


def assert_compiled_equals_eager(model, backend, **tolerance):
    """Compare a network that is compiled to one graph for all sizes, as in training, with itself."""
    torch._dynamo.reset()
    compiled = torch.compile(model.supervised, fullgraph=True, backend=backend, dynamic=True)
    for size in [(193, 205), (226, 200)] if model.minimum_size > 64 else [(33, 47), (40, 64)]:
        image = torch.randn(2, 3, *size)
        compiled_outputs, expected = (outputs(network, model, image) for network in (compiled, model.supervised))
        for ours, theirs in zip(compiled_outputs, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("name", QUICK)
def test_a_network_is_one_graph_in_training_and_inference(name):
    torch.manual_seed(0)
    model, image = slim(name), torch.randn(2, 3, 36, 45)
    torch._dynamo.reset()
    for training in (True, False):
        model.train(training)
        compiled = torch.compile(model.supervised, fullgraph=True, backend="eager")  # raises on graph breaks
        for ours, expected in zip(
            *(outputs(network, model, image) for network in (compiled, model.supervised)), strict=True
        ):
            torch.testing.assert_close(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_network_is_one_graph_of_any_size_and_equals_eager_in_values_and_gradients(name):
    torch.manual_seed(0)
    assert_compiled_equals_eager(slim(name), "eager" if name in SIMILAR else "aot_eager", rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_segnet_compiled_by_inductor_equals_eager():
    torch.manual_seed(0)
    model = SegNet(3, stages=((4,), (8,)), norm=False)  # few kernels: each is compiled by a C++ compiler
    assert_compiled_equals_eager(model, "inductor", rtol=1e-3, atol=1e-4)


@pytest.fixture
def without_a_compiler(monkeypatch):
    """Replace torch.compile by one that traces but does not compile, and return the calls to it."""
    calls = []
    real = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda function: calls.append(function) or real(function))
    torch._dynamo.reset()
    return calls


@pytest.mark.slow
def test_a_compiled_run_writes_ordinary_checkpoints_and_can_be_resumed(
    tmp_path, monkeypatch, capsys, without_a_compiler
):
    train(config(optimizer=SGD, trainer__max_epochs=2, trainer__compile=False), tmp_path / "plain")
    assert "precision 32-true, channels last, not compiled" in capsys.readouterr().out
    assert not without_a_compiler

    train(config(optimizer=SGD, trainer__max_epochs=2, trainer__compile=True), tmp_path / "compiled")
    assert "precision 32-true, channels last, compiled" in capsys.readouterr().out
    assert len(without_a_compiler) == 1
    plain, compiled = state(tmp_path / "plain"), state(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert torch.isfinite(checkpoint.read(tmp_path / "compiled" / "best.ckpt", trust=AnyName()).model()(
        torch.zeros(1, 3, 32, 32)
    )).all()  # fmt: skip

    step = SegmentationTask.on_train_batch_start

    def die(self, batch, batch_idx):
        if self.global_step == 8:
            raise ArithmeticError
        step(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationTask, "on_train_batch_start", die)
    with pytest.raises(ArithmeticError):
        train(config(optimizer=SGD, trainer__max_epochs=2, trainer__compile=True), tmp_path / "cut")
    monkeypatch.setattr(SegmentationTask, "on_train_batch_start", step)
    train({**config(optimizer=SGD, trainer__max_epochs=2, trainer__compile=True), "resume": "auto"}, tmp_path / "cut")
    resumed = state(tmp_path / "cut")
    assert all(torch.equal(resumed[name], compiled[name]) for name in compiled)


def test_a_compiled_network_raises_the_errors_of_the_network(tmp_path, without_a_compiler):
    small = {"_target_": "segdeconv.models.DeconvNet", "width": 0.0625, "fc_width": 8, "depth": 11}
    with pytest.raises(UsageError, match=r"an image of 32x32 .* is too small for DeconvNet"):
        train({**config(trainer__compile=True), "model": small}, tmp_path)


@pytest.mark.parametrize(
    ("setting", "device", "runs", "expected"),
    [
        ("auto", "cpu", True, False),
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),  # Triton does not run there
        (True, "cpu", False, True),
        (False, "cuda", True, False),
    ],
)
def test_auto_compiles_where_triton_runs_on_a_gpu(setting, device, runs, expected, monkeypatch):
    monkeypatch.setattr(task, "load_triton_kernels", lambda device: object() if runs else None)
    segmentation_task = SegmentationTask.__new__(SegmentationTask)
    segmentation_task.__dict__.update(compilation=setting, activation_checkpointing=False)
    assert segmentation_task.compiles(torch.device(device)) is expected
