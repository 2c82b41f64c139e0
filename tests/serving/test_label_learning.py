"""The network of the labelling page: what it keeps of a photo, and what it learns from strokes."""

import time

import numpy as np
import pytest
import torch

from segdeconv.data.preprocessing import Preprocessing
from segdeconv.models import SegNet
from segdeconv.serving.label import learning
from segdeconv.serving.label.learning import Example, Learner

STAGES = ((4, 4), (8,), (8,))
CPU = torch.device("cpu")


def learner(names=("left", "right"), stages=STAGES, **settings):
    torch.manual_seed(0)
    preprocessing = Preprocessing(None, (120.0, 110.0, 100.0), (60.0, 61.0, 62.0))
    return Learner(SegNet(len(names), stages=stages), names, preprocessing, device=CPU, pixels=64 * 80, **settings)


def photo(seed=0, size=(64, 80)):
    """A photo whose left half is green, and its mask."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 60, (*size, 3), dtype=np.uint8)
    image[:, : size[1] // 2, 1] += 150
    mask = np.ones(size, dtype=np.uint8)
    mask[:, : size[1] // 2] = 0
    return image, mask


def example(teacher, seed=0):
    image, mask = photo(seed)
    target = np.full(mask.shape, 255, dtype=np.uint8)
    target[20:24, 5:30], target[40:44, 50:75] = 0, 1
    return Example(teacher.keep(image), image, target)


def test_what_is_kept_gives_the_networks_own_result():
    teacher = learner()
    image, _ = photo()
    kept = teacher.keep(image)
    with torch.no_grad():
        expected = teacher.network(teacher.preprocessing(image)[None]).softmax(dim=1)[0]
    assert (teacher.probabilities(kept) == expected).all()
    # Two bits for each window and channel, and four bytes for each number of the deepest map.
    windows = 4 * 32 * 40 + 8 * 16 * 20 + 8 * 8 * 10
    assert kept.bytes == windows // 4 + 4 * 8 * 8 * 10


def test_a_square_is_cut_from_every_level_of_what_is_kept():
    teacher = learner()
    encoding = teacher.keep(photo()[0]).encoding
    part = teacher._cut(encoding, (2, 3), (4, 5))
    assert (part.features == encoding.features[:, :, 2:5, 4:9]).all()
    for pooling, whole, cells in zip(part.pooled, encoding.pooled, (4, 2, 1), strict=True):
        assert (pooling.switches == whole.switches[:, :, 2 * cells : 5 * cells, 4 * cells : 9 * cells]).all()
    assert teacher.network.decoder(part).shape == (1, 2, 24, 40)


@pytest.mark.parametrize("scope", ["decoder", "all"])
def test_a_few_strokes_teach_the_rest(scope, monkeypatch):
    monkeypatch.setattr(learning, "LEARNING_RATE", 0.02)  # a tiny network with random weights has more to learn
    teacher = learner(stages=((8,), (16,)), pretrained_decoder=False)
    examples = [example(teacher)]
    before = {name: value.clone() for name, value in teacher.network.encoder.state_dict().items()}
    learned = teacher.learn(lambda: examples, seconds=60, scope=scope, max_steps=30)
    assert learned.steps == 30
    image, mask = photo(seed=1)
    predicted = teacher.probabilities(teacher.keep(image)).argmax(dim=0).numpy()
    assert (predicted == mask).mean() > 0.9
    same = all((before[name] == value).all() for name, value in teacher.network.encoder.state_dict().items())
    assert (same, teacher.encoder_version) == ((True, 0) if scope == "decoder" else (False, 1))


def test_learning_stops_after_its_time_and_sees_strokes_that_arrive_meanwhile():
    teacher = learner()
    first = example(teacher)
    calls = []

    def examples():
        calls.append(None)
        return [first._replace(target=np.full_like(first.target, 255))] if len(calls) > 3 else [first]

    assert teacher.learn(examples, seconds=60).steps == 3
    assert teacher.learn(lambda: [first], seconds=0.3).seconds < 2


def test_reading_photos_is_not_within_the_time_to_learn():
    teacher = learner()
    first = example(teacher)
    calls = []

    def examples():
        if not calls:
            time.sleep(1.0)
        calls.append(None)
        return [first]

    learned = teacher.learn(examples, seconds=0.4)
    assert learned.steps > 1
    assert learned.seconds < 0.9


def test_a_class_that_is_known_keeps_its_row_of_the_classifier():
    teacher = learner(("sky", "road", "car"))
    weights, bias = (tensor.clone() for tensor in teacher.network.decoder.classifier.parameters())
    teacher.set_classes(["car", "tree", "sky"])
    new_weights, new_bias = teacher.network.decoder.classifier.parameters()
    assert (new_weights[[0, 2]] == weights[[2, 0]]).all()
    assert (new_bias[[0, 2]] == bias[[2, 0]]).all()
    assert not (new_weights[1] == weights[1]).any()
    assert teacher.network.num_classes == 3


def rows_of(teacher):
    """The weights and bias of each class, by its name."""
    parts = (tensor.detach().clone() for tensor in teacher.network.decoder.classifier.parameters())
    return dict(zip(teacher.names, zip(*parts, strict=True), strict=True))


def same(rows, others):
    return all((tensor == other).all() for tensor, other in zip(rows, others, strict=True))


def test_a_class_that_was_left_out_or_renamed_keeps_its_row_of_the_classifier():
    teacher = learner(("sky", "road", "car"))
    before = rows_of(teacher)
    teacher.set_classes(["road", "sky"])  # as on the page, where classes are named one after the other
    teacher.set_classes(["road", "sky", "car"])
    assert all(same(rows, before[name]) for name, rows in rows_of(teacher).items())
    teacher.set_classes(["street", "road", "car"], renamed={"road": "street", "sky": "road", "car": "car"})
    after = rows_of(teacher)
    assert same(after["street"], before["road"])
    assert same(after["road"], before["sky"])
    teacher.set_classes(["street", "road", "car", "sky"])  # a new class by the old name of another
    assert not same(rows_of(teacher)["sky"], before["sky"])


def test_the_norms_of_a_random_decoder_get_the_statistics_of_the_photos():
    teacher = learner(pretrained_decoder=False)
    kept = [teacher.keep(photo(seed)[0]) for seed in range(2)]
    norm = teacher.network.decoder.stages[0][0].norm
    outputs = []
    teacher.network.decoder.stages[0][0].conv.register_forward_hook(lambda *call: outputs.append(call[2]))
    teacher._calibrate(kept)
    expected = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, expected)
    assert not any(module.training for module in teacher.network.modules())


def test_the_network_sees_a_photo_in_whole_cells_of_its_deepest_map():
    teacher = learner()
    assert teacher.size((64, 80)) == (64, 80)
    assert teacher.size((30, 40)) == (32, 40)
    height, width = teacher.size((4000, 3000))
    assert (height % 8, width % 8) == (0, 0)
    assert 0.8 < height * width / (64 * 80) < 1.2
    assert height / width == pytest.approx(4 / 3, rel=0.1)
    assert learning.CELLS > 1
