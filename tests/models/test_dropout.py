"""Bayesian SegNet: places of dropout as in the authors' files, sampling, Caffe's input, and recalibration."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segdeconv.checkpoints import checkpoint
from segdeconv.cli.overrides import compose
from segdeconv.data.datasets.folder import Folder
from segdeconv.data.module import DataPipeline
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.dropout_sampling import sampled
from segdeconv.models import SegNet, SegNetBasic, build_model
from segdeconv.models.layers import ConvBlock
from segdeconv.system.seeding import key
from segdeconv.train import train
from segdeconv.training.batchnorm_recalibration import recalibrated
from segdeconv.training.config_check import check_config

ROOT = Path(__file__).parents[2]
SLIM = 0.0625


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def probabilities_of(model):
    return lambda image: model(image).float().softmax(dim=1)


# Places of dropout.

# Position of each dropout in the authors' files, as the number of convolutions executed before it, of 26 (SegNet) or 9
# (Basic). The dropout on pool3 comes before conv4_1, and the dropout on conv5_1_D before upsample4.
SEGNET = {
    "none": [],
    # bayesian_segnet_train.prototxt: pool3, pool4, pool5, conv5_1_D, conv4_1_D, conv3_1_D
    "central": [7, 10, 13, 16, 19, 22],
    # segnet_pascal, "Dropout enc-dec": conv1_2, conv2_2, conv3_3, conv4_3, conv5_3, pool5, conv5_1_D .. conv2_1_D
    "voc": [2, 4, 7, 10, 13, 13, 16, 19, 22, 24],
    "encoder": [2, 4, 7, 10, 13],
    "decoder": [16, 19, 22, 24, 25],
    "encoder_decoder": [2, 4, 7, 10, 13, 16, 19, 22, 24, 25],
    "center": [13],
    "classifier": [25],
}
BASIC = {
    "none": [],
    # bayesian_segnet_basic_train.prototxt: pool3, pool4, conv_decode4, conv_decode3
    "central": [3, 4, 5, 6],
    "encoder": [1, 2, 3, 4],
    "decoder": [5, 6, 7, 8],
    "encoder_decoder": [1, 2, 3, 4, 5, 6, 7, 8],
    "center": [4],
    "classifier": [8],
}


def executed(model, image):
    """Return types, inputs and outputs of the convolutions and dropouts, in the order of execution."""
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output: calls.append((type(module), inputs[0], output)))
    with torch.no_grad():
        model(image)
    return calls


def convolutions_before_each_dropout(calls):
    kinds = [kind for kind, *_ in calls]
    return [kinds[:index].count(nn.Conv2d) for index, kind in enumerate(kinds) if kind is nn.Dropout]


@pytest.mark.parametrize("source", ["pre_relu", "post_relu"])
@pytest.mark.parametrize("dropout_at", SEGNET)
def test_segnet_has_dropout_where_the_authors_files_have_it(dropout_at, source):
    model = SegNet(3, width=SLIM, dropout_at=dropout_at, switch_source=source).eval()
    assert convolutions_before_each_dropout(executed(model, torch.randn(1, 3, 33, 47))) == SEGNET[dropout_at]


@pytest.mark.parametrize("dropout_at", BASIC)
def test_segnet_basic_has_dropout_where_the_authors_files_have_it(dropout_at):
    model = SegNetBasic(3, width=4, dropout_at=dropout_at).eval()
    assert convolutions_before_each_dropout(executed(model, torch.randn(1, 3, 33, 47))) == BASIC[dropout_at]


def test_dropout_after_a_pool_acts_on_the_pooled_map_and_before_it_on_the_full_map():
    image = torch.randn(1, 3, 64, 64)
    for dropout_at, sizes in {"encoder": [32, 16, 8, 4, 2], "voc": [64, 32, 16, 8, 4, 2, 4, 8, 16, 32]}.items():
        calls = executed(SegNet(3, width=SLIM, dropout_at=dropout_at).eval(), image)
        assert [inputs.shape[-1] for kind, inputs, _ in calls if kind is nn.Dropout] == sizes


def test_dropout_acts_on_rectified_values_and_drops_single_elements():
    model = SegNet(3, width=0.25, dropout_at="central")
    calls = executed(model, torch.randn(2, 3, 64, 64))
    for _, before, after in [call for call in calls if call[0] is nn.Dropout]:
        assert before.min() >= 0  # after norm and ReLU, in the decoder too
        kept = after != 0
        torch.testing.assert_close(after[kept], 2 * before[kept])
        fraction = (kept & (before > 0)).sum() / (before > 0).sum()
        assert 0.4 < fraction < 0.6
        assert ((after == 0) & (before > 0)).any(dim=(2, 3)).any()
        assert (kept.any(dim=(2, 3)) & ((after == 0) & (before > 0)).any(dim=(2, 3))).any()  # not whole maps


def test_switches_are_not_dropped():
    plain, dropping = SegNet(3, width=SLIM), SegNet(3, width=SLIM, dropout_at="center")
    dropping.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    encoding, dropped = plain.encoder(image), dropping.encoder(image)
    assert all(torch.equal(a.switches, b.switches) for a, b in zip(encoding.pooled, dropped.pooled, strict=True))
    assert not torch.equal(encoding.features, dropped.features)


@pytest.mark.parametrize("network", [SegNet, SegNetBasic])
def test_dropout_has_no_state_and_no_effect_on_a_prediction_without_samples(network):
    torch.manual_seed(1)
    plain = network(3, width=SLIM if network is SegNet else 4).eval()
    torch.manual_seed(1)
    dropping = network(3, width=SLIM if network is SegNet else 4, dropout_at="encoder_decoder").eval()
    assert list(plain.state_dict()) == list(dropping.state_dict())
    image = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        assert torch.equal(plain(image), dropping(image))


def test_the_dropout_probability_can_be_set():
    model = SegNet(3, width=0.25, dropout_at="center", dropout=0.9)
    ((_, before, after),) = [call for call in executed(model, torch.randn(4, 3, 128, 128)) if call[0] is nn.Dropout]
    fraction = ((after > 0) & (before > 0)).sum() / (before > 0).sum()
    assert 0.05 < fraction < 0.15


# Sampling.


def brute_force(model, image, samples, seed):
    """Return the softmax of every pass, one at a time: (samples, N, C, H, W) float64."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    passes = []
    with torch.no_grad():
        for index in range(samples):
            torch.manual_seed(key(seed, "sample", index))
            passes.append(torch.softmax(model(image), dim=1).double())
    model.eval()
    return torch.stack(passes)


def test_sampling_equals_a_plain_loop():
    model = SegNet(4, width=0.25, dropout_at="central").eval()
    image = torch.randn(2, 3, 40, 48)
    drawn = sampled(probabilities_of(model), model, 7, seed=3)(image)
    passes = brute_force(model, image, 7, seed=3)
    mean = passes.mean(dim=0)
    entropy = -(mean * mean.log()).sum(dim=1)
    within = -(passes * passes.log()).sum(dim=2).mean(dim=0)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(drawn.probabilities.double(), mean, **close)
    torch.testing.assert_close(drawn.variance.double(), passes.var(dim=0, unbiased=False), **close)
    torch.testing.assert_close(drawn.uncertainty.double(), passes.var(dim=0, unbiased=False).mean(dim=1), **close)
    torch.testing.assert_close(drawn.entropy.double(), entropy, **close)
    torch.testing.assert_close(drawn.information.double(), entropy - within, **close)
    assert drawn.variance.max() > 1e-3  # so that the tolerance means something


def test_the_same_seed_draws_the_same_samples_and_the_global_generator_is_unchanged():
    model = SegNet(3, width=0.25, dropout_at="central").eval()
    image = torch.randn(1, 3, 40, 48)
    state = torch.get_rng_state()
    first = sampled(probabilities_of(model), model, 3)(image)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again = sampled(probabilities_of(model), model, 3)(image)
    other = sampled(probabilities_of(model), model, 3, seed=1)(image)
    assert torch.equal(first.probabilities, again.probabilities)
    assert not torch.equal(first.probabilities, other.probabilities)


def test_batch_norm_is_unchanged_and_dropout_is_off_afterwards():
    model = SegNet(3, width=0.25, dropout_at="central").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sampled(probabilities_of(model), model, 3)(torch.randn(2, 3, 40, 48))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_sampling_a_network_without_dropout_is_refused():
    for model in (SegNet(3, width=SLIM), SegNet(3, width=SLIM, dropout_at="central", dropout=0.0)):
        with pytest.raises(
            UsageError, match=r"SegNet was trained without dropout, so all samples are the same - leave"
        ):
            sampled(probabilities_of(model), model, 5)
    model = SegNet(3, width=SLIM, dropout_at="central")
    with pytest.raises(UsageError, match=r"samples=-1 is not a valid number of passes"):
        sampled(probabilities_of(model), model, -1)


PEAK = """
import resource, sys, torch
from segdeconv.inference.dropout_sampling import sampled
from segdeconv.models import SegNet
torch.manual_seed(0)
model = SegNet(12, width=0.125, dropout_at="central").eval()
sampled(lambda image: model(image).softmax(dim=1), model, int(sys.argv[1]))(torch.randn(2, 3, 120, 160))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_hundred_samples_take_the_memory_of_ten():
    def peak(samples):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(samples)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return int(done.stdout) / 1024

    # Ninety more results would be 90 x 2 x 12 x 120 x 160 x 4 bytes = 158 MiB.
    assert abs(peak(100) - peak(10)) < 16


# Caffe's input.


def test_bgr_reverses_the_channels_and_their_mean():
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    mean, std = (10.0, 20.0, 30.0), (1.0, 2.0, 4.0)
    rgb, bgr = (Preprocessing(None, mean, std, order=order)(image) for order in ("rgb", "bgr"))
    by_hand = torch.stack([rgb[2], rgb[1], rgb[0]])
    assert torch.equal(bgr, by_hand)
    raw = Preprocessing(None, (0, 0, 0), (1, 1, 1), order="bgr")
    assert np.array_equal(raw(image).permute(1, 2, 0).numpy()[:, :, ::-1], image)
    assert raw(image).permute(1, 2, 0).is_contiguous()  # channels last, as the loader expects
    assert Preprocessing.from_dict(raw.to_dict()) == raw
    older = {key: value for key, value in raw.to_dict().items() if key != "order"}
    assert Preprocessing.from_dict(older).order == "rgb"


def test_bgr_is_refused_unless_images_have_three_channels(tmp_path):
    fakes.folder(tmp_path / "mine")
    splits = [Folder(split, str(tmp_path / "mine")) for split in ("train", "val")]
    for split in splits:
        split.channels = 4
    with pytest.raises(UsageError, match=r"dataset.order=bgr needs images of 3 channels, but they have 4"):
        DataPipeline(*splits, {}, 0, mean=(0,) * 4, std=(1,) * 4, order="bgr")


# From the authors' *_solver.prototxt and *_train.prototxt: base_lr, max_iter, decay_mult of batch norm's scale and
# shift, and dropouts.
@pytest.mark.parametrize(
    ("arguments", "lr", "steps", "norm_decay", "dropouts"),
    [
        (("experiment=segnet_camvid_paper",), 0.001, 40_000, "scale", 0),
        (("experiment=bayesian_segnet_camvid_paper",), 0.001, 60_000, "scale", 6),
        (("experiment=segnet_basic_camvid_paper",), 0.1, 10_000, "all", 0),
        (("experiment=segnet_basic_camvid_paper", "model=bayesian_segnet_basic"), 0.1, 10_000, "all", 4),
    ],
)
def test_the_experiments_have_the_authors_numbers(arguments, lr, steps, norm_decay, dropouts):
    config = check_config(compose(arguments, ROOT / "configs")[0])
    optimizer, dataset = config["optimizer"], config["dataset"]
    assert optimizer["_target_"] == "segdeconv.optimization.sgd"
    assert config["schedule"]["_target_"] == "segdeconv.optimization.Constant"
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (lr, 0.9, 0.0005)
    assert (optimizer["bias_lr"], optimizer["norm_decay"], optimizer["nesterov"]) == (2, norm_decay, False)
    assert config["trainer"]["max_steps"] == steps <= config["trainer"]["max_epochs"] * (367 // 4)
    assert (dataset["size"], dataset["batch_size"], dataset["mean"]) == ([360, 480], 4, [0, 0, 0])
    assert config["augment"] == {}
    assert (config["loss"]["class_weighting"], config["loss"]["normalisation"]) == ("camvid", "pixels")
    model = build_model(config["model"], 11, 3, fresh=True)
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(modules) == dropouts
    assert all(module.p == 0.5 for module in modules)
    if config["model"].get("pretrained", "none") == "none":
        assert (dataset["order"], dataset["std"]) == ("bgr", [1, 1, 1])


# Caffe's statistics, and the commands.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a tiny Bayesian SegNet on raw BGR pixels of 5 + 5 images, and return the folder of run and data."""
    folder = tmp_path_factory.mktemp("bayesian")
    fakes.folder(folder / "mine", layout="lists", num=5)
    dataset = {"root": str(folder / "mine"), "size": [32, 40], "batch_size": 2, "num_workers": 0}
    caffe = {"order": "bgr", "mean": [0, 0, 0], "std": [1, 1, 1]}
    train(
        {
            "dataset": {"_target_": "segdeconv.data.Folder", **dataset, **caffe},
            "model": {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]], "dropout_at": "central"},
            "trainer": {"max_epochs": 2, "precision": "32-true"},
            "logger": {},
        },
        folder / "run",
    )
    return folder


@pytest.fixture
def run_script(trained, monkeypatch):
    """Return a function that runs a script in the folder of `run` and `mine`, in this process, and its exit code."""

    def run(script, *arguments):
        path = ROOT / "scripts" / f"{script}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(path), run_name="__main__")
        return exit_info.value.code

    monkeypatch.chdir(trained)
    return run


def test_recalibrated_statistics_equal_those_computed_over_the_data_in_float64(trained, monkeypatch):
    monkeypatch.chdir(trained)
    best = checkpoint.read("run/best.ckpt")
    written = recalibrated(best, device=torch.device("cpu"))
    dataset = Folder("train", "mine")
    preprocess = Preprocessing.from_dict({**best.facts["preprocessing"], "size": [32, 40]})
    images = torch.stack([preprocess(dataset[index].image) for index in range(len(dataset))]).double()
    assert len(images) % 2 == 1  # the last batch is shorter
    model = best.model().double()
    sums = {}

    def count(block, inputs, name):
        x = block.conv(inputs[0])
        mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3))  # divided by n - 1, as in torch
        before = sums.get(name, (0, 0))
        sums[name] = (before[0] + len(x) * mean, before[1] + len(x) * variance)

    for name, block in model.named_modules():
        if isinstance(block, ConvBlock):
            block.norm.train()
            block.norm.momentum = 0.0
            block.register_forward_pre_hook(lambda block, inputs, name=name: count(block, inputs, name))
    with torch.no_grad():
        for start in range(0, len(images), 2):
            model(images[start : start + 2])
    assert len(sums) == 3
    for name, (mean, variance) in sums.items():
        for buffer, value in (("running_mean", mean), ("running_var", variance)):
            statistics = written.weights[f"{name}.norm.{buffer}"].double()
            torch.testing.assert_close(statistics, value / len(images), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(statistics, best.weights[f"{name}.norm.{buffer}"].double(), rtol=1e-3)


def test_recalibrate_writes_a_checkpoint_that_evaluate_uses(trained, run_script, capsys):
    assert run_script("recalibrate", "run/best.ckpt") == 0
    assert "run/best_recalibrated.ckpt" in capsys.readouterr().out
    best, other = (checkpoint.read(trained / "run" / name) for name in ("best.ckpt", "best_recalibrated.ckpt"))
    changed = {name for name in best.weights if not torch.equal(best.weights[name], other.weights[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    assert (best.config, best.facts) == (other.config, other.facts)
    assert run_script("evaluate", "run/best_recalibrated.ckpt", "--out", "again") == 0
    assert json.loads(Path("again/report.json").read_text())["num_images"] == 5
    assert run_script("recalibrate", "run/best.ckpt", "--out", "run/best.ckpt") == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert run_script("recalibrate", "run/best.ckpt") == 2
    assert "run/best_recalibrated.ckpt exists - choose another --out, or remove it" in capsys.readouterr().err


def test_evaluate_with_samples_scores_their_mean(trained, run_script, capsys):
    assert run_script("evaluate", "run/best.ckpt", "--out", "none") == 0
    assert "most certain pixels by confidence" in capsys.readouterr().out
    assert run_script("evaluate", "run/best.ckpt", "--samples", "5", "--out", "five", "--masks", "five") == 0
    assert "most certain pixels by uncertainty" in capsys.readouterr().out
    none, five = (json.loads(Path(name, "report.json").read_text()) for name in ("none", "five"))
    assert (none["samples"], five["samples"]) == (0, 5)
    assert set(none["calibration"]["accuracy_at_coverage"]) == {"by_confidence"}
    assert set(five["calibration"]["accuracy_at_coverage"]) == {"by_confidence", "by_uncertainty"}
    assert five["calibration"]["accuracy_at_coverage"]["by_uncertainty"]["1"] == pytest.approx(five["pixel_accuracy"])

    best = checkpoint.read("run/best.ckpt")
    dataset = Folder("val", "mine")
    preprocess = Preprocessing.from_dict({**best.facts["preprocessing"], "size": [32, 40]})
    images = torch.stack([preprocess(dataset[index].image) for index in range(2)])  # the first batch
    mean = brute_force(best.model(), images.contiguous(memory_format=torch.channels_last), 5, seed=0).mean(dim=0)
    for index in range(2):
        size = dataset[index].mask.shape
        expected = nn.functional.interpolate(mean[index : index + 1], size=size, mode="bilinear").argmax(dim=1)[0]
        mask = np.array(fakes.opened(Path("five", f"{dataset.names[index]}.png")))
        assert (mask == expected.numpy()).mean() > 0.99


def test_predict_draws_the_uncertainty_of_the_samples_and_writes_probabilities_on_request(run_script):
    assert run_script("predict", "run/best.ckpt", "mine/images/val_0.png", "--out", "plain") == 0
    tables = {"predictions.jsonl", "statistics.csv", ".segdeconv-files"}
    assert {path.name for path in Path("plain").iterdir()} == {"val_0.png", "val_0_overlay.png"} | tables
    options = ("--samples", "4", "--probabilities", "--out", "drawn")
    assert run_script("predict", "run/best.ckpt", "mine/images/val_0.png", *options) == 0
    names = {"val_0.png", "val_0_overlay.png", "val_0_uncertainty.png", "val_0.npy"}
    assert {path.name for path in Path("drawn").iterdir()} == names | tables
    mask = np.array(fakes.opened(Path("drawn/val_0.png")))
    assert fakes.opened(Path("drawn/val_0_uncertainty.png")).size == mask.shape[::-1]
    probabilities = np.load("drawn/val_0.npy").astype(np.float32)
    assert probabilities.shape[1:] == mask.shape
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=5e-3)
    assert (probabilities.argmax(axis=0) == mask).mean() > 0.99  # rounding to float16 makes some scores equal


def test_outputs_that_would_have_the_same_path_are_refused(run_script, capsys):
    Path("photos").mkdir()
    for name in ("x", "x_uncertainty"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(f"photos/{name}.png")
    assert run_script("predict", "run/best.ckpt", "photos", "--out", "both") == 0  # two masks, two overlays
    assert run_script("predict", "run/best.ckpt", "photos", "--samples", "2", "--out", "more") == 2
    assert "have the same output file more/x_uncertainty.png" in capsys.readouterr().err


def test_a_heat_map_gets_brighter_with_its_values():
    brightness = draw.heat(np.array([[0.0, 0.01, 0.02, 0.04]]), 0.04).astype(int).sum(axis=2)[0]
    assert brightness[0] < 10
    assert (np.diff(brightness) > 50).all()
    assert draw.heat(np.zeros((2, 3)), 0.0).max() < 10


@pytest.mark.parametrize("words", [("evaluate", "run/best.ckpt"), ("predict", "run/best.ckpt", "mine/images")])
def test_samples_of_a_network_without_dropout_are_refused_by_the_commands(run_script, words, capsys):
    assert run_script(*words, "--samples", "3", "model.dropout_at=none") == 2
    assert "was trained without dropout" in capsys.readouterr().err


def test_a_network_without_batch_norm_has_nothing_to_recalibrate(trained, monkeypatch):
    monkeypatch.chdir(trained)
    best = checkpoint.read("run/best.ckpt")
    network = SegNet(len(best.classes), stages=((4,), (8,)), norm=False)
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    without = checkpoint.Checkpoint(
        best.path,
        {**best.config, "model": {**best.config["model"], "norm": False}},
        best.facts,
        {**best.content, "state_dict": state},
    )
    with pytest.raises(UsageError, match="has no batch norm to recalibrate"):
        recalibrated(without, device=torch.device("cpu"))
