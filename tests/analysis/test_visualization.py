"""Figures and reports about switches: the maps behind them, and the commands with one checkpoint."""

import json

import numpy as np
import pytest
import torch
from fakes import opened
from PIL import Image
from torch import nn

from segdeconv.analysis.decoder_stages import trace_decoder
from segdeconv.analysis.switch_statistics import flip_rate, shares, tie_rate, ties_counted
from segdeconv.checkpoints import checkpoint
from segdeconv.drawing.panels import Panel, arrows, bars, figure, fitted
from segdeconv.models import SegNet, SegNetBasic, UNet
from segdeconv.switches.ops import max_pool, unpool

SHAPES = ("dataset=shapes", "dataset.num_train=8", "dataset.num_val=4", "dataset.side=32", "dataset.num_workers=0")
BAYESIAN = ("model=bayesian_segnet", "model.stages=[[4],[6],[8]]", "dataset.batch_size=4", "trainer.max_epochs=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, commands):
    """Train a SegNet with dropout on a few shapes, with and without TensorBoard."""
    place = tmp_path_factory.mktemp("sees")
    for run, logger in (("run", "tensorboard"), ("quiet", "none")):
        done = commands("train", *SHAPES, *BAYESIAN, f"logger={logger}", f"hydra.run.dir={run}", cwd=place)
        assert done.code == 0, done.err
    return place


@pytest.mark.slow
def test_curves_of_switches_are_logged_and_do_not_change_training(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "run"))
    events.Reload()
    flips = [event.value for event in events.Scalars("switches/flip_rate/level 1")]
    ties = [event.value for event in events.Scalars("switches/tie_rate/level 3")]
    assert (len(flips), len(ties)) == (1, 2)  # two epochs, of which the first has no previous epoch
    assert 0 < flips[0] < 0.75
    assert "switches" in events.Tags()["images"]
    with_curves, without = (checkpoint.read(trained / run / "last.ckpt") for run in ("run", "quiet"))
    assert all(torch.equal(value, without.weights[name]) for name, value in with_curves.weights.items())
    assert (trained / "run/metrics.csv").read_text() == (trained / "quiet/metrics.csv").read_text()


def test_evaluate_reports_ablation_and_error_detection(trained, commands):
    ckpt = "run/best.ckpt"
    plain = commands("evaluate", ckpt, "--samples", 2, "--out", "plain", cwd=trained)
    full = commands("evaluate", ckpt, "--samples", 2, "--ablate", "--uncertainty", "--out", "full", cwd=trained)
    assert (plain.code, full.code) == (0, 0), full.err
    before, report = (json.loads((trained / out / "report.json").read_text()) for out in ("plain", "full"))
    rows = report["ablation"]
    expected = {"upsampling": "switches", "level": "all", "miou": before["miou"], "boundary_f1": before["boundary_f1"]}
    assert rows[0] == expected
    assert report["miou"] == before["miou"]
    others = [(row["upsampling"], row["level"]) for row in rows[1:]]
    assert others == [(kind, level) for kind in ("shuffled", "corner", "bilinear") for level in ("all", 1, 2, 3)]
    assert len({row["miou"] for row in rows}) > 3
    signals = {row["signal"]: row["auroc"] for row in report["uncertainty"]}
    kinds = [f"{kind}{level}" for kind in ("switches", "moved") for level in ("", " 1", " 2", " 3")]
    assert list(signals) == ["confidence", "entropy", "variance", "mutual information", *kinds]
    assert all(0 <= auroc <= 1 for auroc in signals.values())
    for words in (
        "mean IoU / boundary F1 with another upsampling",
        "error detection by uncertainty",
        "mutual information",
    ):
        assert words in full.out


@pytest.mark.slow
def test_visualize_draws_every_figure_by_default(trained, commands):
    done = commands(
        "visualize", "run/best.ckpt", "--images", 1, "--num-maps", 1, "--samples", 2, "--out", "v", cwd=trained
    )
    assert done.code == 0, done.err
    kinds = ("switches", "flow", "stages", "stability")
    names = [f"val_00000_{kind}" for kind in kinds] + [f"units_encoder.stages.{index}" for index in range(3)]
    page = (trained / "v/index.html").read_text()
    for name in names:
        picture = np.asarray(opened(trained / "v" / f"{name}.png"))
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
        assert f'src="{name}.png"' in page
    assert "7 figures in v" in done.out


def test_visualize_accepts_images_a_class_and_units_by_index(trained, commands, tmp_path):
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (20, 45, 3), dtype=np.uint8)  # below the minimum size
    Image.fromarray(noise).save(tmp_path / "photos/one.png")
    words = ("--only", "stages,units", "--class", "ring", "--layers", "decoder.stages.0", "--maps", "2,0", "--out", "v")
    done = commands("visualize", trained / "run/best.ckpt", tmp_path / "photos", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == [
        "index.html", "one_stages.png", "units_decoder.stages.0.png"
    ]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), [
    (["nowhere"], "nowhere not found - give images, folders, or a quoted pattern"),
    (["--only", "flows"], "--only flows is not a kind of figure - did you mean 'flow'"),
    (["--class", "rin"], "--class rin is not a class of"),
    (["--only", "units", "--layers", "encoder.stage.0"], "the network has no layer 'encoder.stage.0' - did you mean"),
    (["--only", "units", "--maps", "0,99"], "--maps 99: encoder.stages.0 has the maps 0 to 3"),
    (["--maps", "a"], "--maps a is not a list of numbers"),
    (["--images", "0"], "--images=0 is too few"),
])  # fmt: skip
def test_invalid_options_of_visualize_are_reported(trained, commands, words, sentence):
    done = commands("visualize", "run/best.ckpt", *words, "--out", "bad", cwd=trained)
    assert done.code == 2
    assert sentence in done.error_message
    assert not (trained / "bad").exists()


def test_a_trace_equals_a_decoder_written_out_by_hand():
    torch.manual_seed(0)
    network, image = SegNet(3, stages=((4, 4), (6,), (8,))).eval(), torch.randn(1, 3, 21, 30)
    with torch.no_grad():
        x, pooled, _ = network.encoder(image)
        maps = [x]
        sparse = []
        for stage, pooling in zip(network.decoder.stages, reversed(pooled), strict=True):
            sparse.append(unpool(maps[-1], pooling.switches, pooling.size))
            *blocks, _ = stage
            maps.append(nn.Sequential(*blocks)(sparse[-1]))
        logits = network.decoder.classifier(maps[-1])
    label = int(logits[0].argmax(dim=0).flatten().bincount(minlength=3).argmax())
    trace = trace_decoder(network, image, label)
    assert [stage.unit for stage in trace.stages[1:]] == [stage.dense_unit for stage in trace.stages[:-1]]
    assert torch.equal(trace.start, maps[0][0, trace.stages[0].unit])
    for stage, before, after in zip(trace.stages, sparse, maps[1:], strict=True):
        assert torch.equal(stage.unpooled, before[0, stage.unit])
        assert torch.equal(stage.dense, after[0, stage.dense_unit])
    # The last unit is the one whose removal lowers the class most, which is exact for a linear classifier.
    selected = logits[0].argmax(dim=0) == label
    losses = []
    for unit in range(4):
        without = maps[-1].clone()
        without[:, unit] = 0
        with torch.no_grad():
            losses.append(float((logits - network.decoder.classifier(without))[0, label][selected].sum()))
    assert trace.stages[-1].dense_unit == int(np.argmax(losses))
    torch.testing.assert_close(trace.probability, logits.softmax(dim=1)[0, label])


def test_the_last_stage_without_filters_ends_in_the_logits():
    torch.manual_seed(0)
    network, image = SegNet(3, stages=((4,), (6,))).eval(), torch.randn(1, 3, 12, 16)
    trace = trace_decoder(network, image, 2)
    with torch.no_grad():
        assert torch.equal(trace.stages[-1].dense, network(image)[0, 2])
    assert trace.stages[-1].dense_unit == 2


def test_decoders_without_relu_and_without_unpooling():
    trace = trace_decoder(SegNetBasic(2, width=4).eval(), torch.randn(1, 3, 32, 32), 0)
    assert [tuple(stage.dense.shape) for stage in trace.stages] == [(4, 4), (8, 8), (16, 16), (32, 32)]
    with pytest.raises(ValueError, match="UNet does not unpool, so it has no decoder stages to show"):
        trace_decoder(UNet(2, stages=((4,), (8,))).eval(), torch.randn(1, 3, 32, 32), 0)


def test_statistics_of_switches_equal_hand_computed_values():
    x = torch.tensor([[[[5.0, 5, 1, 0], [5, 0, 2, 2], [1, 0, 0, 3], [0, 0, 0, 0]]]])
    # Windows: three fives; two twos; a one; a three.
    assert tie_rate(x) == 0.5
    pooling = max_pool(x)
    assert shares(pooling) == [0.5, 0.25, 0.25, 0.0]
    x[0, 0, 3, 0] = 9
    assert flip_rate(pooling, max_pool(x)) == 0.25
    assert flip_rate(pooling._replace(switches=pooling.switches), max_pool(x, packed=True)) == 0.25
    assert tie_rate(torch.zeros(1, 1, 3, 3)) == 0.75  # the lower right window is a single cell


def test_ties_are_counted_in_the_maps_before_the_pools():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 12, 16)
    for source, max_rate in (("pre_relu", 0.01), ("post_relu", 0.9)):
        network = SegNet(2, stages=((8,), (8,)), switch_source=source).eval()
        with torch.no_grad(), ties_counted(network) as rates:
            network(image)
            network(image)
        assert len(rates) == 2
        with torch.no_grad():
            maps = network.encoder.stages[0](image)
        windows = nn.functional.unfold(maps.transpose(0, 1), 2, stride=2)
        expected = ((windows == windows.amax(dim=1, keepdim=True)).sum(dim=1) > 1).float().mean()
        assert rates[0] == pytest.approx(float(expected))
        assert (rates[0] > 0.01) == (source == "post_relu")
        assert rates[0] < max_rate


def test_figures_are_laid_out_as_specified():
    colours = arrows(np.array([[[0.0, 2.0], [0.0, 0.0], [2.0, 0.0]]]), 2.0)[0]
    assert colours.tolist() == [[255, 0, 0], [255, 255, 255], [127, 255, 0]]  # right, no displacement, down
    chart = bars([0.5, 1.0], [(9, 9, 9), (5, 5, 5)], top=1.0, size=(120, 80))
    assert ((chart == 9).all(axis=2).any(axis=1).sum(), (chart == 5).all(axis=2).any(axis=1).sum()) == (51, 101)
    square = fitted(np.zeros((2, 4, 3), dtype=np.uint8), 8)
    assert (square[:, :, 0] == 0).sum(axis=1).tolist() == [0, 0, 8, 8, 8, 8, 0, 0]
    panel = Panel(np.full((10, 200, 3), 7, dtype=np.uint8), "words " * 30)
    picture = figure("a title", [[panel, panel], [panel]], note="a note")
    assert (picture == 7).all(axis=2).sum() >= 3 * 2000
