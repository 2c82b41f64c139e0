"""Temperature scaling: the fit compared with an optimiser of torch, what is refused, and everything that keeps it."""

import json
import shutil

import fakes
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_runs import config

import segdeconv
from segdeconv.checkpoints import checkpoint
from segdeconv.data.dataset import Sample, SegmentationDataset
from segdeconv.errors import CheckpointError, UsageError
from segdeconv.evaluation.calibration import Calibration
from segdeconv.evaluation.evaluate import restore_dataset
from segdeconv.evaluation.temperature import TOLERANCE, calibrated
from segdeconv.export.export import export
from segdeconv.inference.network import Network
from segdeconv.inference.quantization import is_supported, measure_ranges
from segdeconv.train import train

TRUST = ("fakes.Uneven",)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of a few steps, whose networks are overconfident: the logits of the last layer are tripled."""
    folder = tmp_path_factory.mktemp("temperature")
    train(config(trainer__max_epochs=6), folder / "run")
    content = checkpoint.load_plain(folder / "run" / "best.ckpt")
    state = content["state_dict"]
    for name in state:
        if "classifier" in name:
            state[name] = 3 * state[name]
    checkpoint.write(content, folder / "best.ckpt")
    return folder


@pytest.fixture(scope="module")
def original(place):
    return checkpoint.read(place / "best.ckpt", trust=TRUST)


@pytest.fixture(scope="module")
def result(original):
    return calibrated(original, device=torch.device("cpu"))


def logits_and_labels(network):
    """Return the logits, (P, C) float64, and labels, (P,), of all labelled pixels of val, image by image."""
    dataset, model = restore_dataset(network, "val"), network.model().double()
    pairs = []
    for index in range(len(dataset)):
        image, mask, _ = dataset[index]
        with torch.no_grad():
            logits = model(network.preprocessing(image)[None].double())[0].movedim(0, -1)
        labels = torch.as_tensor(mask).long()
        pairs.append((logits[labels != 255], labels[labels != 255]))
    return pairs


def nll(logits, labels):
    return float(F.cross_entropy(logits, labels))


def test_the_temperature_is_that_of_an_optimiser_of_torch_over_all_pixels(original, result):
    pairs = logits_and_labels(original)
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    log_temperature = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_temperature], tolerance_grad=1e-12, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimiser.step(closure)
    best = float(log_temperature.detach().exp())
    fitted = result.facts["temperature"]
    assert best > 1.5
    assert fitted["value"] == pytest.approx(best, rel=TOLERANCE)
    assert (fitted["split"], fitted["images"], fitted["pixels"]) == ("val", len(pairs), len(labels))
    for state, scale in (("before", 1.0), ("after", fitted["value"])):
        calibration = Calibration(255)
        top, prediction = (logits / scale).softmax(dim=1).float().max(dim=1)
        calibration.update(prediction, top, labels)
        assert fitted[state]["nll"] == pytest.approx(nll(logits / scale, labels), rel=1e-5)
        assert fitted[state]["expected_calibration_error"] == pytest.approx(calibration.error, rel=1e-3)
    assert fitted["after"]["nll"] < fitted["before"]["nll"]


def test_the_standard_error_is_that_of_leaving_out_images(original, result):
    """The jackknife over the images is another estimator of the same error."""
    pairs = logits_and_labels(original)
    grid = np.exp(np.linspace(-0.3, 0.3, 121)) * result.facts["temperature"]["value"]
    sums = np.array(
        [[float(F.cross_entropy(z / t, y, reduction="sum")) for t in grid] for z, y in pairs]
    )  # of each image at each temperature
    left_out = []
    for row in sums:
        curve = sums.sum(axis=0) - row
        best = int(curve.argmin())
        assert 0 < best < len(grid) - 1
        second, first, _ = np.polyfit(grid[best - 1 : best + 2], curve[best - 1 : best + 2], 2)
        left_out.append(-first / (2 * second))
    count = len(pairs)
    error = np.sqrt((count - 1) / count * np.square(np.array(left_out) - np.mean(left_out)).sum())
    assert result.facts["temperature"]["standard_error"] == pytest.approx(error, rel=0.35)


def test_calibrating_twice_gives_a_temperature_of_one(original, result, tmp_path):
    checkpoint.write(result.content, tmp_path / "once.ckpt")
    lines = []
    twice = calibrated(
        checkpoint.read(tmp_path / "once.ckpt", trust=TRUST), device=torch.device("cpu"), report=lines.append
    )
    first, second = (network.facts["temperature"] for network in (result, twice))
    assert second["value"] == pytest.approx(first["value"], rel=2 * TOLERANCE)
    assert second["before"]["nll"] == pytest.approx(first["after"]["nll"], abs=1e-6)
    assert f"was calibrated before, by {first['value']:.4f}; on top of that 1.000" in lines[0]


def test_classes_stay_the_same_and_only_the_last_layer_changes(original, result):
    with torch.no_grad():
        image = torch.randn(4, 3, 64, 64)
        before, after = original.model()(image), result.model()(image)
    torch.testing.assert_close(after, before / result.facts["temperature"]["value"])
    assert torch.equal(before.argmax(dim=1), after.argmax(dim=1))
    changed = {name for name in result.weights if not torch.equal(result.weights[name], original.weights[name])}
    assert changed == {"decoder.classifier.weight", "decoder.classifier.bias"}


class Given(SegmentationDataset):
    classes = fakes.Uneven.classes
    split = "val"

    def __init__(self, *masks):
        self.masks, self.names = masks, [f"{index}" for index in range(len(masks))]

    def __getitem__(self, index):
        return Sample(np.full((*self.masks[index].shape, 3), 60, np.uint8), self.masks[index], self.names[index])

    @property
    def fingerprint(self):
        return "given"


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ((), r"split val \(0 images\) has no labelled pixel"),
        ((np.full((32, 32), 255, np.uint8),) * 2, r"split val \(2 images\) has no labelled pixel"),
        ((np.full((32, 32), 1, np.uint8),) * 2, "all labelled pixels of .* are bright, so that no temperature"),
    ],
)
def test_labels_that_determine_no_temperature_are_refused(original, masks, message):
    with pytest.raises(UsageError, match=message):
        calibrated(original, Given(*masks), device=torch.device("cpu"))


def with_logits(original, weight, bias):
    """Return the checkpoint with another last layer."""
    state = dict(original.content["state_dict"])
    prefix = "averaged." if any(name.startswith("averaged.") for name in state) else "model."
    for name, value in (("weight", weight), ("bias", bias)):
        key = f"{prefix}decoder.classifier.{name}"
        state[key] = value(state[key])
    return checkpoint.Checkpoint(
        original.path, original.config, original.facts, {**original.content, "state_dict": state}
    )


def test_a_network_that_is_always_right_or_knows_nothing_has_no_temperature(original):
    masks = np.ones((32, 32), np.uint8), np.zeros((32, 32), np.uint8)
    with pytest.raises(UsageError, match="gives the right classes no higher scores than others"):
        calibrated(with_logits(original, torch.zeros_like, torch.zeros_like), Given(*masks), device=torch.device("cpu"))
    dataset = restore_dataset(original, "val")
    right = [segdeconv.load(original.path, trust=TRUST).predict(dataset[index].image).mask for index in range(3)]
    assert len(np.unique(right)) > 1

    class Right(Given):
        def __getitem__(self, index):
            return Sample(dataset[index].image, self.masks[index], self.names[index])

    with pytest.raises(UsageError, match="is right on all sampled pixels"):
        calibrated(original, Right(*right), device=torch.device("cpu"))


def test_a_single_image_has_no_standard_error_and_a_warning(original, capsys):
    mask = np.ones((32, 32), np.uint8)
    mask[:9] = 0
    done = calibrated(
        with_logits(original, torch.zeros_like, lambda bias: torch.tensor([0.0, 5.0, 1.0])),
        Given(mask),
        device=torch.device("cpu"),
    )
    assert done.facts["temperature"]["standard_error"] is None
    assert "val has 1 images, too few" in "".join(capsys.readouterr())
    # A constant network: T is where the mean logit under the softmax is that of the labels.
    logits = torch.tensor([0.0, 5.0, 1.0], dtype=torch.double) / done.facts["temperature"]["value"]
    share = 9 / 32
    mean = float((logits.softmax(0) * logits).sum())
    assert mean == pytest.approx(float(share * logits[0] + (1 - share) * logits[1]), rel=2e-3)


def test_the_command_writes_a_checkpoint_that_all_commands_use(place, commands, tmp_path):
    words = ("--trust", "fakes.Uneven")
    shutil.copy(fakes.__file__, place)  # a class of the user's own
    before = commands("evaluate", "best.ckpt", *words, "--out", "before", cwd=place)
    assert (before.code, "temperature" in before.out) == (0, False)
    done = commands("calibrate", "best.ckpt", *words, cwd=place)
    assert done.code == 0, done.err
    assert "temperature " in done.out
    assert "written: best_calibrated.ckpt" in done.out
    again = commands("calibrate", "best.ckpt", *words, cwd=place)
    assert (again.code, "best_calibrated.ckpt exists - choose another --out" in again.err) == (2, True)
    for out in ("best.ckpt", "x.safetensors"):
        assert commands("calibrate", "best.ckpt", *words, "--out", out, cwd=place).code == 2

    fitted = checkpoint.read(place / "best_calibrated.ckpt", trust=TRUST).facts["temperature"]
    shown = commands("evaluate", "best_calibrated.ckpt", *words, "--out", tmp_path, cwd=place)
    assert f"temperature {fitted['value']:.3f}" in shown.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["temperature"] == fitted
    error = report["calibration"]["expected_calibration_error"]
    assert error == pytest.approx(fitted["after"]["expected_calibration_error"], abs=1e-6)
    assert f"NLL {fitted['before']['nll']:.4f} before" in (tmp_path / "report.html").read_text()
    words = (*words, "--compare", "best_calibrated.ckpt", "--out", tmp_path)
    assert commands("evaluate", "best.ckpt", *words, cwd=place).code == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("calibrated by one number") == page.count("Network B is calibrated by one number") == 1

    assert report["miou"] == pytest.approx(json.loads((place / "before" / "report.json").read_text())["miou"])


def test_segmenters_and_shared_weights_have_the_calibrated_probabilities(original, result, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    checkpoint.write(result.content, tmp_path / "calibrated.ckpt")
    checkpoint.write_weights(result, tmp_path / "shared.safetensors")
    plain = segdeconv.load(original.path, trust=TRUST)
    temperature = result.facts["temperature"]["value"]
    expected = plain.network(plain.preprocessing(np.asarray(image))[None]).values.float() / temperature
    for path in (tmp_path / "calibrated.ckpt", tmp_path / "shared.safetensors"):
        segmenter = segdeconv.load(path, trust=TRUST)
        assert segmenter.checkpoint.facts["temperature"] == result.facts["temperature"]
        scores = segmenter.network(segmenter.preprocessing(np.asarray(image))[None])
        torch.testing.assert_close(scores.values.float(), expected, rtol=1e-3, atol=1e-3)
        assert np.array_equal(segmenter.predict(image).mask, plain.predict(image).mask)


def test_training_from_a_calibrated_checkpoint_says_that_its_temperature_ends(result, tmp_path, capsys):
    checkpoint.write(result.content, tmp_path / "calibrated.ckpt")
    train(config(trainer__max_steps=1, init_from=str(tmp_path / "calibrated.ckpt")), tmp_path / "next")
    assert "after training: calibrate again" in capsys.readouterr().out
    assert "temperature" not in checkpoint.read(tmp_path / "next" / "last.ckpt", trust=TRUST).facts


def test_a_calibrated_checkpoint_is_not_resumed(result):
    with pytest.raises(CheckpointError, match="contains only weights, without global_step"):
        checkpoint.require_resumable(result)


def test_the_metadata_of_measurements_is_left_out_where_weights_change(capsys):
    facts = {"precision": "32-true", "temperature": {"value": 2.0}, "int8": None}
    assert checkpoint.without_measurements(facts) == {"precision": "32-true"}
    shown = "".join(capsys.readouterr())
    assert "the temperature, which calibrate fitted," in shown
    assert "8-bit" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_exported_files_have_the_calibrated_logits(original, result, suffix, tmp_path):
    path = tmp_path / f"calibrated{suffix}"
    export(result, path)
    image = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        expected = original.model()(image) / result.facts["temperature"]["value"]
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
    else:
        logits = torch.export.load(path).module()(image)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not is_supported(), reason="torch has no integer convolutions for this machine")
def test_8_bit_networks_have_the_calibrated_logits(original, result):
    image = torch.randn(2, 3, 64, 64)
    logits = []
    for network in (original, result):
        prepared = Network.of(network, device=torch.device("cpu"), precision="32-true")
        ranges = measure_ranges(prepared.model, [image])
        logits.append(Network.of(network, precision="int8", ranges=ranges).logits(image))
    expected = logits[0] / result.facts["temperature"]["value"]
    assert float((logits[1] - expected).abs().max()) < 0.02 * float(expected.std())
    stored = {**original.facts, "int8": {"ranges": {}, "split": "val", "images": 1, "float32": 0.5, "int8": 0.5}}
    lines = []
    again = calibrated(
        checkpoint.Checkpoint(original.path, original.config, stored, original.content),
        device=torch.device("cpu"),
        report=lines.append,
    )
    assert "int8" not in again.facts
    assert "the ranges of 8-bit maps are left out" in lines[0]
