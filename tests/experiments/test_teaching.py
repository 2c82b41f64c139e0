"""The study of teaching by painting: what its script paints, and the whole study on a few tiny images."""

import json

import fakes
import numpy as np
import pytest
import torch

from segdeconv.checkpoints.pretrained import IMAGENET
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.experiments.study import teaching
from segdeconv.models import SegNet
from segdeconv.serving.label.learning import Learner
from segdeconv.serving.label.strokes import IGNORE, draw_stroke

CPU = torch.device("cpu")
RUNS = {teaching.STROKES, teaching.AT_ONCE, teaching.NEW_WEIGHTS}


def test_a_class_without_a_stroke_comes_first_and_then_the_largest_mistake():
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[:, 50:] = 1
    mask[:5] = IGNORE
    painted = np.full(mask.shape, IGNORE, dtype=np.uint8)
    for expected in (0, 1):
        stroke = teaching.next_stroke(mask, painted, None)
        draw_stroke(painted, stroke, mask.shape)
        assert (stroke["class"], set(mask[painted == expected])) == (expected, {expected})
    assert teaching.next_stroke(mask, painted, None) is None  # what is wrong is not known yet
    prediction = mask.copy()
    prediction[20:36, 10:40] = 1
    prediction[38:, 55:] = 0
    stroke = teaching.next_stroke(mask, painted, prediction)
    new = np.full(mask.shape, IGNORE, dtype=np.uint8)
    draw_stroke(new, stroke, mask.shape)
    inside = (prediction == 1) & (mask == 0)
    assert stroke["class"] == 0
    assert inside[new == 0].mean() > 0.95  # a brush may touch the pixels beside its circle
    assert teaching.next_stroke(mask, painted, mask) is None


def test_the_score_is_the_mean_of_intersection_over_union(monkeypatch):
    class Known:
        def probabilities(self, prediction):
            return torch.nn.functional.one_hot(torch.tensor(prediction), 2).permute(2, 0, 1).float()

    mask = np.array([[0, 0, 1, 1], [0, IGNORE, 1, 1]], dtype=np.uint8)
    prediction = np.array([[0, 1, 1, 1], [0, 0, 0, 1]])
    task = teaching.Task([], [(np.zeros((2, 4, 3), np.uint8), mask)], 2)
    assert teaching.miou(Known(), task, [prediction]) == pytest.approx((2 / 4 + 3 / 5) / 2)


def test_strokes_until_a_score_are_those_of_the_first_measurement_that_reaches_it():
    points = [{"strokes": strokes, "miou": miou} for strokes, miou in ((2, 0.3), (4, 0.8), (6, 0.7), (8, 0.9))]
    assert [teaching.strokes_until(points, goal) for goal in (0.5, 0.85, 0.95)] == [4, 8, None]


def test_the_study_teaches_every_start_with_the_same_strokes(tmp_path, capsys, monkeypatch):
    starts = []

    def opened(folder, start):
        starts.append(start)
        return Learner(SegNet(2, stages=((4,), (8,))), (), Preprocessing(None, *IMAGENET), device=CPU), False

    monkeypatch.setattr(teaching, "open_network", opened)
    root = fakes.camvid(tmp_path / "camvid", num=3)
    results = teaching.run(
        tmp_path / "out", root, tasks=("camvid", "shapes"), seeds=(0, 1), photos=1, val=1, strokes=4, steps=1,
        supervised_steps=2,
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "teaching.json").read_text()) == results
    assert results.keys() == {"camvid", "shapes"}
    for by_seed in results.values():
        assert (by_seed["seed0"].keys(), by_seed["seed1"].keys()) == (RUNS | {teaching.EVERY_PIXEL}, RUNS)
        for runs in by_seed.values():
            painted = runs[teaching.STROKES]
            assert [point["strokes"] for point in painted] == [0, 2, 4]
            for label in (teaching.AT_ONCE, teaching.NEW_WEIGHTS):
                (point,) = runs[label]
                assert (point["strokes"], point["steps"]) == (4, painted[-1]["steps"])
                assert 0 <= point["miou"] <= 1
    assert set(starts) == {"camvid-small-286e5fc", "nothing"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-8].startswith("camvid: every pixel ")
    assert lines[-7].startswith("  stroke by stroke: ")
