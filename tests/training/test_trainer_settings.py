"""Trainer settings: weight averaging, frozen parts, early stopping, time limits, init_from, diagnostics and memory."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from fakes import Uneven
from tiny_runs import config, state
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segdeconv.checkpoints import checkpoint
from segdeconv.checkpoints.transfer import transfer_weights
from segdeconv.classes import Classes
from segdeconv.cli.own_code import compose
from segdeconv.errors import UsageError
from segdeconv.losses import CrossEntropy
from segdeconv.models import SegNet, build_model
from segdeconv.models.activation_checkpointing import checkpoint_activations
from segdeconv.optimization import Restarts, adamw, average, sgd
from segdeconv.system.devices import fast_precision
from segdeconv.system.files import lock_folder
from segdeconv.train import train
from segdeconv.training import memory as training_memory
from segdeconv.training.config_check import seconds
from segdeconv.training.diagnostics import collapse
from segdeconv.training.memory import estimate
from segdeconv.training.resume import AnyName, find_run, finished
from segdeconv.training.run_folder import claim_folder
from segdeconv.training.stopping import Stopping

TRUST = AnyName()


# Weight averaging


def test_the_average_equals_torchs_including_buffers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ours.load_state_dict(model.state_dict())
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(model)  # the first update copies
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model(torch.randn(2, 3, 8, 8) * 3 + 1)
        average(ours, model, decay=0.9)
        theirs.update_parameters(model)
    for name, value in theirs.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    assert ours[1].num_batches_tracked == 5  # counters are copied, not averaged


def test_a_run_with_averaging_validates_and_saves_the_averaged_weights(tmp_path):
    train(config(trainer__ema=0.99), tmp_path)
    source = checkpoint.read(tmp_path / "best.ckpt", trust=TRUST)
    weights, saved = source.model().state_dict(), source.content["state_dict"]
    assert all(torch.equal(weights[name], saved[f"averaged.{name}"]) for name in weights)
    assert not torch.equal(saved["model.decoder.classifier.weight"], saved["averaged.decoder.classifier.weight"])
    with (tmp_path / "metrics.csv").open() as file:
        rows = {float(row["val/miou"]) for row in csv.DictReader(file)}
    assert json.loads((tmp_path / "report.json").read_text())["miou"] == pytest.approx(max(rows), abs=1e-12)


def test_the_decay_of_the_average_rises_to_its_setting(tmp_path):
    """The decay of step n is min(0.5, (1 + n) / (10 + n))."""
    decays = []

    def recording_average(averaged, model, *, decay):
        decays.append(decay)
        average(averaged, model, decay=decay)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segdeconv.training.task.average", recording_average)
        train(config(trainer__ema=0.5), tmp_path)
    assert [round(decays[step], 4) for step in (0, 1, 2, 8, 17)] == [0.1, 0.1818, 0.25, 0.5, 0.5]


def test_a_resumed_run_with_averaging_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    train(config(trainer__ema=0.9), tmp_path / "uninterrupted")
    original = Stopping.on_train_batch_end

    def crash(self, trainer, *arguments):
        if trainer.global_step == 8:
            raise ArithmeticError
        original(self, trainer, *arguments)

    monkeypatch.setattr(Stopping, "on_train_batch_end", crash)
    with pytest.raises(ArithmeticError):
        train(config(trainer__ema=0.9), tmp_path / "interrupted")
    monkeypatch.setattr(Stopping, "on_train_batch_end", original)
    train({**config(trainer__ema=0.9), "resume": "auto"}, tmp_path / "interrupted")
    expected, resumed = state(tmp_path / "uninterrupted"), state(tmp_path / "interrupted")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


# Batch norm's statistics


@pytest.mark.parametrize("averaged", [None, 0.9])
def test_recalibrated_statistics_are_those_of_the_weights_that_are_validated(tmp_path, averaged):
    changes = {"optimizer": {"_target_": "segdeconv.optimization.adamw", "lr": 0.1}, "augment": {}}
    settings = {"trainer__recalibration_batches": 6, "trainer__ema": averaged, "trainer__max_epochs": 2}
    train(config(**changes, **settings), tmp_path)
    source = checkpoint.read(tmp_path / "last.ckpt", trust=TRUST)
    model, preprocessing = source.model(), source.preprocessing
    first = model.encoder.stages[0][0]
    images = [torch.from_numpy(Uneven("train")[index].image).permute(2, 0, 1)[None] for index in range(24)]
    with torch.no_grad():  # six batches of four are all 24 images, so the mean over batches is that over images
        maps = torch.cat([first.conv(preprocessing.normalised(image)) for image in images])
    torch.testing.assert_close(first.norm.running_mean, maps.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert first.norm.momentum == 0.1


def test_recalibration_changes_no_trained_weight_and_no_frozen_statistic(tmp_path):
    train(config(trainer__max_epochs=2), tmp_path / "without")
    train(config(trainer__max_epochs=2, trainer__recalibration_batches=3), tmp_path / "with")
    before, after = state(tmp_path / "without"), state(tmp_path / "with")
    running = {name for name in before if "running_" in name or name.endswith("num_batches_tracked")}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - running)
    assert not all(torch.equal(before[name], after[name]) for name in running)
    train(
        config(
            trainer__norm="frozen", trainer__recalibration_batches=3, init_from=str(tmp_path / "with" / "last.ckpt")
        ),
        tmp_path / "frozen",
    )
    frozen = state(tmp_path / "frozen")
    assert all(torch.equal(after[name], frozen[name]) for name in running)


# Parts of a network


def test_parts_have_their_own_learning_rates_and_the_longest_name_takes_precedence():
    model = SegNet(3, stages=((4,), (8,)))
    optimizer = sgd(model, lr=0.1, bias_lr=2.0, part_lr={"encoder": 0.1, "encoder.stages.1": 0.5})
    rates = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.encoder.stages[0][0].conv.weight)] == pytest.approx(0.01)
    assert rates[id(model.encoder.stages[1][0].conv.weight)] == pytest.approx(0.05)
    assert rates[id(model.encoder.stages[1][0].conv.bias)] == pytest.approx(0.1)
    assert rates[id(model.decoder.classifier.weight)] == pytest.approx(0.1)
    assert len(rates) == len(list(model.parameters()))


def test_a_frozen_part_does_not_change_in_weights_or_statistics(tmp_path):
    train(config(trainer__max_epochs=1), tmp_path / "free")
    train(config(trainer__max_epochs=1, optimizer__part_lr={"encoder": 0}), tmp_path / "frozen")
    torch.manual_seed(0)
    start = SegNet(3, stages=((4,), (8,))).state_dict()
    free, frozen = state(tmp_path / "free"), state(tmp_path / "frozen")
    for name, value in start.items():
        same = torch.equal(frozen[f"model.{name}"], value)
        assert same == (name.startswith("encoder.")) or name.endswith("conv.bias"), name
        if name.endswith(("weight", "running_mean")):
            assert not torch.equal(free[f"model.{name}"], value), name


def test_an_unknown_part_is_reported_with_a_suggestion():
    with pytest.raises(UsageError, match=r"part_lr: the network has no part 'encodr' - did you mean 'encoder'"):
        adamw(SegNet(3, stages=((4,), (8,))), part_lr={"encodr": 0.1})


# The end of training


def test_training_ends_after_patience_validations_without_a_better_score(tmp_path, monkeypatch, capsys):
    scores = iter([0.1, 0.3, 0.2, 0.25, 0.9])
    keep = "segdeconv.training.checkpointing.Checkpoints.keep"
    from segdeconv.training.checkpointing import Checkpoints

    real = Checkpoints.keep
    monkeypatch.setattr(keep, lambda self, trainer, miou: real(self, trainer, miou and next(scores)))
    train(config(trainer__max_epochs=9, trainer__patience=2), tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    assert "training ends: no mIoU above 0.3000 in 2 validations" in capsys.readouterr().out
    assert finished(tmp_path)
    assert checkpoint.load_plain(tmp_path / "best.ckpt")["global_step"] == 12


def test_a_resumed_run_whose_patience_was_exhausted_trains_no_further(tmp_path, monkeypatch):
    train(config(trainer__max_epochs=2, trainer__patience=1), tmp_path)
    content = checkpoint.load_plain(tmp_path / "last.ckpt")
    (state_key,) = [name for name in content["callbacks"] if "Checkpoints" in name]
    content["callbacks"][state_key] = {"best": 1.0, "waited": 1}
    checkpoint.write(content, tmp_path / "last.ckpt")
    (tmp_path / "report.json").unlink()
    train({**config(trainer__max_epochs=2, trainer__patience=1), "resume": "auto"}, tmp_path)
    assert checkpoint.load_plain(tmp_path / "last.ckpt")["global_step"] == content["global_step"]


def test_a_run_resumed_after_max_time_equals_an_uninterrupted_one(tmp_path, capsys):
    train(config(), tmp_path / "uninterrupted")
    train({**config(), "max_time": "0s"}, tmp_path / "interrupted")
    assert "max_time is over at step 1, saved in" in capsys.readouterr().out
    assert json.loads((tmp_path / "interrupted" / "report.json").read_text())["complete"] is False
    assert not finished(tmp_path / "interrupted")
    other = {"seed": 0, "resume": "auto"}
    assert find_run(other, tmp_path / "new", tmp_path) == tmp_path / "new"
    train({**config(), "resume": "auto", "max_time": "1h"}, tmp_path / "interrupted")
    assert finished(tmp_path / "interrupted")
    expected, resumed = state(tmp_path / "uninterrupted"), state(tmp_path / "interrupted")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    metrics, expected_metrics = (tmp_path / run / "metrics.csv" for run in ("interrupted", "uninterrupted"))
    assert metrics.read_text() == expected_metrics.read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1:02:03", 3723), ("1:00:00:00", 86400), ("90", 90), (90, 90), ("1.5h", 5400)],
)
def test_durations_are_parsed(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["soon", "1:2", "-5", "1h30", ""])
def test_invalid_durations_are_refused(text):
    with pytest.raises(UsageError, match=r"max_time=.* is not a duration - write hours:minutes:seconds"):
        seconds(text)


def test_warm_restarts_begin_each_cycle_at_one():
    """Values computed by hand from equation 5 of the paper, with cycles of 100, 200 and 400 steps."""
    schedule = Restarts(cycles=3, growth=2, floor=0.1)
    expected = {0: 1.0, 50: 0.55, 100: 1.0, 200: 0.55, 300: 1.0, 500: 0.55, 700: 0.1}
    assert {step: round(schedule(step, 700), 6) for step in expected} == expected


# Initialisation from another network

OLD = Classes(("road", "sky", "car"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
NEW = Classes(("car", "boat", "road", "dog"), ((0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)))


def as_checkpoint(model, classes, channels=3):
    return checkpoint.Checkpoint(
        "old.ckpt",
        {"model": {"_target_": "segdeconv.models.SegNet"}},
        {"classes": classes.to_dict(), "preprocessing": {"mean": [0.0] * channels}},
        {"state_dict": {f"model.{name}": value for name, value in model.state_dict().items()}},
    )


def test_the_rows_of_the_head_are_matched_by_class_name():
    torch.manual_seed(0)
    old, new = SegNet(3, stages=((4,), (8,))), SegNet(4, stages=((4,), (8,)))
    fresh = new.decoder.classifier.weight.detach().clone()
    report = transfer_weights(new, NEW, as_checkpoint(old, OLD))
    before, after = old.decoder.classifier.weight, new.decoder.classifier.weight
    assert torch.equal(after[0], before[2])  # car
    assert torch.equal(after[2], before[0])  # road
    assert torch.equal(after[[1, 3]], fresh[[1, 3]])
    assert torch.equal(new.encoder.stages[0][0].conv.weight, old.encoder.stages[0][0].conv.weight)
    assert "classes copied: car, road" in report
    assert "new classes: boat, dog" in report


def test_the_same_classes_in_another_order_are_reordered():
    old, new = SegNet(3, stages=((4,),)), SegNet(3, stages=((4,),))
    reordered = Classes(("sky", "car", "road"), OLD.colours)
    transfer_weights(new, reordered, as_checkpoint(old, OLD))
    assert torch.equal(new.decoder.classifier.bias, old.decoder.classifier.bias[[1, 2, 0]])


def test_tensors_that_are_not_transferred_are_reported():
    old = SegNet(3, stages=((4,), (8,), (6,)))
    report = transfer_weights(SegNet(3, stages=((4,), (8,), (8,))), OLD, as_checkpoint(old, OLD))
    assert "not copied: encoder.stages.2.0.conv.weight (6x8x3x3 in the checkpoint, 8x8x3x3 here)" in report
    assert " and 1 more" in report


def test_where_most_shapes_differ_the_network_that_fits_is_named_in_one_line():
    start, small = checkpoint.read("camvid-small"), SegNet(3, width=0.25)
    report = transfer_weights(small, OLD, start)
    stages = "[[32,32],[64,64],[128,128],[192,192],[192,192,192]]"
    assert report.splitlines()[-1].endswith(
        f"have other shapes or names; its network is model._target_=segdeconv.models.SegNet model.stages={stages} "
        "model.encoder_addition=true"
    )
    assert len(report) < 500


@pytest.mark.parametrize(
    ("model", "start", "classifier", "tensors"),
    [
        ("segnet_small", "camvid-small", "decoder.classifier", 149),
        ("unet_small", "camvid-unet-small", "classifier", 136),
    ],
)
def test_the_network_of_shipped_weights_takes_over_everything_but_the_classifier(model, start, classifier, tensors):
    others = Classes(("water", "oil"), ((0, 0, 0), (1, 1, 1)))
    network = build_model(compose([f"model={model}"])[0]["model"], len(others), 3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = transfer_weights(network, others, checkpoint.read(start))
    after, source = network.state_dict(), checkpoint.read(start).weights
    assert f"{tensors} of {tensors} tensors copied" in report
    assert "its instance statistics are left out: add them after training with calibrate" in report
    for name, value in after.items():
        assert torch.equal(value, before[name] if name.startswith(classifier) else source[name]), name


@pytest.mark.parametrize(
    ("node", "arguments", "named"),
    [
        ({}, {}, ""),
        ({}, {"encoder_addition": True}, "model.encoder_addition=false"),
        ({"encoder_addition": True}, {}, "model.encoder_addition=true"),
        ({"encoder_addition": True}, {"encoder_addition": True}, ""),
        ({"switch_source": "post_relu"}, {"dropout": 0.1}, "model.switch_source=post_relu model.dropout=0.5"),
    ],
)
def test_arguments_that_change_what_the_same_weights_compute_are_reported(node, arguments, named):
    source = as_checkpoint(SegNet(3, stages=((4,), (8,))), OLD)
    source.config["model"].update(node, stages=[[4], [8]])
    report = transfer_weights(SegNet(3, stages=((4,), (8,)), **arguments), OLD, source)
    assert "tensors copied" in report
    assert f"  trained with {named}, unlike this network" in report if named else "trained with" not in report


def test_a_first_convolution_with_other_channels_is_adapted():
    torch.manual_seed(0)
    old, new = SegNet(3, stages=((4,),)).eval(), SegNet(3, in_channels=1, stages=((4,),)).eval()
    transfer_weights(new, OLD, as_checkpoint(old, OLD))
    grey = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(new(grey), old(grey.expand(1, 3, 8, 8)))


def test_networks_without_a_common_layer_are_refused():
    with pytest.raises(UsageError, match=r"init_from=old.ckpt has no layer in common with this network"):
        transfer_weights(
            SegNet(3, stages=((5,),), norm=False), OLD, as_checkpoint(SegNet(3, stages=((7,),), norm=False), OLD)
        )


def test_a_run_starts_from_a_checkpoint_and_a_resumed_one_does_not_load_it_again(tmp_path, capsys):
    train(config(trainer__max_epochs=1), tmp_path / "old")
    source = str(tmp_path / "old" / "best.ckpt")
    frozen = {**config(trainer__max_epochs=1, optimizer__part_lr={"encoder": 0}), "init_from": source}
    capsys.readouterr()
    train(frozen, tmp_path / "new")
    assert f"started from {source}: " in capsys.readouterr().out
    old, new = state(tmp_path / "old", "best"), state(tmp_path / "new")
    same = [torch.equal(old[name], new[name]) for name in old if name.startswith("model.encoder")]
    assert all(same)
    assert same
    (tmp_path / "new" / "report.json").unlink()
    train({**frozen, "resume": "auto"}, tmp_path / "new")
    assert "started from" not in capsys.readouterr().out


# Training diagnostics


def test_a_network_that_predicts_only_one_class_is_detected():
    classes = Uneven.classes
    assert collapse(np.array([[5, 0, 0], [3, 0, 0], [2, 0, 0]]), classes) == "dark"
    assert collapse(np.array([[5, 0, 0], [3, 1, 0], [2, 0, 0]]), classes) is None
    assert collapse(np.array([[5, 0, 0], [0, 0, 0], [0, 0, 0]]), classes) is None  # the masks have no other class


def test_a_collapse_gives_a_warning_with_its_score(tmp_path, capsys, monkeypatch):
    real = SegNet.forward
    monkeypatch.setattr(SegNet, "forward", lambda self, x: real(self, x) + torch.tensor([0, 99, 0])[:, None, None])
    train(config(), tmp_path)
    output = capsys.readouterr().out
    score = json.loads((tmp_path / "report.json").read_text())["miou"]
    assert f"the network predicts 'bright' for every pixel, with a mIoU of {score:.4f}" in output
    assert output.count("the network predicts") == 1  # not at every validation


def test_few_images_for_batch_norm_give_a_warning(tmp_path, capsys):
    train(config(dataset__batch_size=2, trainer__accumulate_grad_batches=4, trainer__max_epochs=1), tmp_path / "2")
    assert "warning: batch norm computes its statistics from 2 images at a time" in capsys.readouterr().out
    train(config(dataset__batch_size=2, trainer__norm="frozen", trainer__max_epochs=1), tmp_path / "frozen")
    train(config(dataset__batch_size=4, trainer__max_epochs=1), tmp_path / "4")
    assert "batch norm computes" not in capsys.readouterr().out


def test_one_value_per_channel_gives_an_error_message(tmp_path):
    changes = {"dataset__side": 4, "dataset__batch_size": 1, "dataset__size": (4, 4)}
    with pytest.raises(UsageError, match=r"batch norm has a single value per channel in a batch of 1 - raise"):
        train(config(model__stages=[[4], [4], [4]], **changes), tmp_path)


def test_waiting_for_images_gives_a_warning(tmp_path, capsys, monkeypatch):
    import time

    real = Uneven.__getitem__
    monkeypatch.setattr("segdeconv.training.diagnostics.MIN_SECONDS", 0.1)
    monkeypatch.setattr(Uneven, "__getitem__", lambda self, index: (time.sleep(0.02), real(self, index))[1])
    train(config(trainer__max_epochs=2), tmp_path)
    output = capsys.readouterr().out
    assert output.count("warning: input is the bottleneck: ") == 1
    assert "dataset.num_workers (now 0)" in output


# Memory


def memory_of(model, loss=None, optimizer=None, size=(64, 64), *, batch_size=2, precision="32-true", **settings):
    """Return the estimate for a step on the CPU."""
    loss, optimizer = loss or CrossEntropy(), optimizer or sgd(model)
    device = torch.device("cpu")
    return estimate(model, loss, optimizer, size, batch_size=batch_size, device=device, precision=precision, **settings)


def test_the_memory_of_weights_equals_the_count_of_their_copies():
    model = SegNet(3, stages=((4,), (8,)))
    count = sum(parameter.numel() for parameter in model.parameters())
    for optimizer, copies in ((sgd(model), 3), (sgd(model, momentum=0), 2), (adamw(model), 4)):
        assert memory_of(model, optimizer=optimizer).weights == 4 * count * copies
    assert memory_of(model, optimizer=adamw(model), averaged=True).weights == 4 * count * 5


def test_the_memory_of_a_batch_is_that_of_the_maps_alive_at_its_peak(monkeypatch):
    """One stage without norm keeps image, convolution, switches, maxima, unpooled map, logits and log-softmax."""
    monkeypatch.setattr(training_memory, "CPU_BUFFERS", 0)
    model = SegNet(3, stages=((16,),), norm=False, switch_source="post_relu")
    pixels = 128 * 128
    minimum = 4 * pixels * (3 + 16 + 16 + 3 + 3) + pixels // 4 * 16
    one, three = (memory_of(model, size=(128, 128), batch_size=images).batch for images in (1, 3))
    assert minimum <= one <= 1.6 * minimum
    assert three == pytest.approx(3 * one, rel=0.02)


def test_half_precision_and_activation_checkpointing_need_less_memory(monkeypatch):
    monkeypatch.setattr(training_memory, "CPU_BUFFERS", 0)
    model = SegNet(3, stages=((16, 16), (16, 16)))
    full, half = (memory_of(model, size=(96, 96), precision=precision).batch for precision in ("32-true", "bf16-mixed"))
    assert half < 0.75 * full
    checkpoint_activations(model)
    assert memory_of(model, size=(96, 96)).batch < 0.75 * full
    assert model.training


class Counting(nn.Module):
    """A loss with a shape that depends on the data."""

    def forward(self, logits, mask):
        return logits.flatten()[mask.flatten().nonzero()].mean()


class Sparse(SegNet):
    """A network with a shape that depends on the data."""

    def forward(self, image):
        return super().forward(image) + image[image > 0].mean()


def test_shapes_that_depend_on_the_data_are_left_out_of_the_memory():
    model = SegNet(3, stages=((4,),))
    plain, counting = memory_of(model), memory_of(model, Counting())
    assert counting.without_loss
    assert not plain.without_loss
    assert counting.batch >= plain.batch
    assert memory_of(Sparse(3, stages=((4,),))) is None


MEASURE = """
import sys, torch
from segdeconv.losses import CrossEntropy
from segdeconv.models import SegNet
from segdeconv.models.activation_checkpointing import checkpoint_activations
from segdeconv.optimization import sgd
from segdeconv.system.devices import autocast
from segdeconv.system.memory import keep_freed, peak
from segdeconv.training.memory import estimate

precision, checkpointing, images = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
if not checkpointing:
    keep_freed(torch.device("cpu"))
model, loss, size = SegNet(11, stages=((32, 32), (64, 64), (128, 128))), CrossEntropy(), (240, 320)
model.to(memory_format=torch.channels_last).train()
if checkpointing:
    checkpoint_activations(model)
optimizer = sgd(model)
memory = estimate(model, loss, optimizer, size, batch_size=images, device=torch.device("cpu"), precision=precision)
image = torch.randn(images, 3, *size).contiguous(memory_format=torch.channels_last)
mask = torch.zeros(images, *size, dtype=torch.int64)
for _ in range(2):
    optimizer.zero_grad()
    with autocast(precision, image.device):
        total, normaliser = loss.sums(model(image), mask)
    (total / normaliser).backward()
    optimizer.step()
print(memory.total, memory.program, peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "checkpointing"), [("32-true", True), ("bf16-mixed", False)])
def test_the_estimated_memory_is_within_a_fifth_of_what_is_measured(precision, checkpointing):
    if precision not in ("32-true", fast_precision()):
        pytest.skip(f"this CPU has no instructions for {precision}: torch converts to float32 and back, in more memory")
    environment = {**os.environ, "SEGDECONV_KEEP_FREED_MEMORY": "1"}
    command = [sys.executable, "-c", MEASURE, precision, str(checkpointing), "8"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    total, program, measured = map(int, result.stdout.split())
    assert measured == pytest.approx(total, rel=0.2)
    assert measured - program == pytest.approx(total - program, rel=0.3)


# Errors of Lightning


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_accelerator_gives_an_error_message(tmp_path):
    with pytest.raises(UsageError, match=r"trainer: .* - change trainer.accelerator or trainer.devices"):
        train(config(trainer__accelerator="gpu"), tmp_path)


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path):
    run = tmp_path / "2026-01-01_00-00-00"
    other = lock_folder(run, "another folder")  # as another process holds it
    assert claim_folder(run) == tmp_path / "2026-01-01_00-00-00-1"
    (run / "config.yaml").touch()
    other.release()
    assert claim_folder(run) == tmp_path / "2026-01-01_00-00-00-1"
    assert claim_folder(tmp_path / "new") == tmp_path / "new"
