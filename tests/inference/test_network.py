"""The network prepared for inference, compared with direct computation, and settings that exclude each other."""

import copy
import pickle
import re

import fakes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import segdeconv
from segdeconv.checkpoints import checkpoint
from segdeconv.errors import UsageError
from segdeconv.inference.crf import CRF
from segdeconv.inference.dropout_sampling import sampled
from segdeconv.inference.network import Network
from segdeconv.inference.predictors import PredictionSettings, RegionSettings, ensemble, whole_image
from segdeconv.inference.scorers import ClassScores
from segdeconv.inference.segmenter import Segmenter
from segdeconv.inference.tiling import parts
from segdeconv.models import SegNet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SegNet(5, stages=((4,), (8,)), dropout_at="central").eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "best.ckpt"
    return fakes.untrained(path, {"_target_": "segdeconv.data.Shapes", "num_train": 2})


def test_scores_equal_those_of_the_model_on_images_padded_to_its_minimum_size(model):
    images = torch.randn(2, 3, 9, 40)
    with torch.no_grad():
        expected = model(F.pad(images, (0, 0, 0, 23)))[:, :, :9]
    scores = Network(model, CPU, "32-true")(images)
    torch.testing.assert_close(scores.values, expected, rtol=1e-4, atol=1e-5)
    assert not scores.is_probability
    assert scores.uncertainty is None


def test_flipped_and_sampled_predictions_are_probabilities(model):
    images = torch.randn(2, 3, 33, 40)
    flipped = Network(model, CPU, "32-true", flip=True)(images)
    with torch.no_grad():
        expected = (model(images).softmax(1) + model(images.flip(-1)).softmax(1).flip(-1)) / 2
    assert flipped.is_probability
    torch.testing.assert_close(flipped.values, expected, rtol=1e-4, atol=1e-5)
    samples = Network(model, CPU, "32-true", samples=3)(images)
    # Dropout draws random numbers in memory order.
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    by_hand = sampled(lambda batch: last(batch).softmax(dim=1), last, 3)(
        images.contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(samples.probabilities(), by_hand.probabilities, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(samples.uncertainty, by_hand.uncertainty, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(samples.information, by_hand.information, rtol=1e-3, atol=1e-5)


def test_scores_of_one_image_of_a_batch_are_resized_with_their_uncertainty():
    values, uncertainty = torch.randn(3, 4, 6, 8), torch.rand(3, 6, 8)
    one = ClassScores(values, False, uncertainty).of_image(1, (12, 9))
    expected = F.interpolate(values[1:2], size=(12, 9), mode="bilinear", align_corners=False)
    assert torch.equal(one.values, expected)
    spread = F.interpolate(uncertainty[1:2, None], size=(12, 9), mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(one.uncertainty, spread)
    assert one.information is None


def test_the_parts_of_any_predictor_are_assembled():
    values, uncertainty = torch.randn(1, 4, 20, 30), torch.rand(1, 20, 30)

    def predictor(image, name):
        for rows, columns in parts((20, 30), (7, 11)):
            area = (..., slice(*rows), slice(*columns))
            yield (rows, columns), ClassScores(values[area], True, uncertainty[area])

    scores = whole_image(predictor, np.zeros((20, 30, 3), np.uint8), "x")
    assert torch.equal(scores.values, values)
    assert torch.equal(scores.uncertainty, uncertainty)
    assert scores.is_probability


def test_an_ensemble_of_a_network_with_itself_in_tiles_equals_the_network(trained):
    content = checkpoint.read(trained, overrides=["dataset.size=null"])
    image = np.random.default_rng(0).integers(0, 256, (130, 170, 3)).astype(np.uint8)
    single = Segmenter(content, PredictionSettings(precision="32-true"), device=CPU)
    tiled = Segmenter(content, PredictionSettings(precision="32-true", tile=(72, 72)), device=CPU)
    both = ensemble(tiled.predictor, tiled.predictor, "paper", range(len(content.classes)))
    expected = whole_image(single.predictor, image, "x").probabilities()
    assert (whole_image(both, image, "x").values - expected).abs().max() < 1e-4


def test_the_source_model_of_a_checkpoint_keeps_no_weights(trained):
    network = Network.of(checkpoint.read(trained), device=CPU)
    assert {parameter.device.type for parameter in network.source.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in network.model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": (0, 1)}, "are not valid scales"),
        ({"samples": 3, "scales": (1, 2)}, "samples and scales"),
        ({"crf": CRF(), "samples": 3}, "samples and flip average probabilities"),
        ({"regions": RegionSettings(num=3), "flip": True}, "samples and flip average probabilities"),
        ({"crf": CRF(), "tile": (64, 64)}, "leave out scales and tile"),
        ({"regions": RegionSettings(num=-3)}, "is not a valid number of regions"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        PredictionSettings(**settings)


def test_an_unknown_setting_is_a_type_error():
    with pytest.raises(TypeError, match="flips"):
        PredictionSettings(flips=True)


@pytest.mark.parametrize("number", [1e6, -1e30])
def test_weights_that_become_infinite_in_half_precision_are_refused(model, number):
    large = copy.deepcopy(model)
    next(part for part in large.modules() if isinstance(part, torch.nn.Conv2d)).weight.data.view(-1)[0] = number
    with pytest.raises(UsageError, match=r"precision=16-mixed: the weights of .* exceed .*float16 - use precision="):
        Network(large, CPU, "16-mixed")
    Network(large, CPU, "bf16-mixed")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tile": 128}, {"tile": (128, 128)}),
        ({"tile": [64, 128]}, {"tile": (64, 128)}),
        ({"scales": 1}, {"scales": (1.0,)}),
        ({"scales": np.array([0.5, 1])}, {"scales": (0.5, 1.0)}),
        ({"min_area": np.int64(3)}, {"min_area": 3}),
        ({"flip": "no"}, {"flip": False}),
    ],
)
def test_settings_are_what_their_types_declare(given, expected):
    settings = PredictionSettings(**given)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"flip": "maybe"}, "flip=maybe: input should be a valid boolean"),
        ({"scales": "0.5,1"}, "scales=0.5,1: "),
        ({"memory": "1GB"}, "memory=1GB: input should be a valid integer"),
        ({"tile": (64,)}, "tile=(64,): "),
        ({"min_area": 1.5}, "min_area=1.5: input should be a valid integer"),
        ({"ensemble_mode": "mean"}, "ensemble_mode=mean: input should be 'paper' or 'released'"),
        ({"crf": True}, "crf is of type bool - give a CRF"),
        ({"regions": 5}, "regions is of type int - give a RegionSettings"),
        ({"samples": -1}, "samples=-1 is not a valid number of passes"),
        ({"samples": 2, "scales": (0.5, 1)}, "samples and scales cannot be combined"),
        ({"precision": "int8", "samples": 2}, "samples is not supported in precision int8"),
        ({"second": "nothing.ckpt"}, "nothing.ckpt"),
    ],
)
def test_a_setting_of_another_form_gets_one_line(given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        segdeconv.load("camvid-basic", **given)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_segmenters_and_predictions_can_be_sent_to_other_processes(trained, duplicate):
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    segmenter = segdeconv.load(trained, flip=True)
    prediction = segmenter.predict(image)
    other, sent = duplicate(segmenter), duplicate(prediction)
    assert other.settings == segmenter.settings
    np.testing.assert_array_equal(other.predict(image).mask, prediction.mask)
    np.testing.assert_array_equal(sent.probabilities(), prediction.probabilities())
    assert prediction == prediction
    assert len({prediction, sent}) == 2
