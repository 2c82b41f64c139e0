"""The decoder study: the table of made-up reports, the paper's orderings, and the command."""

import csv
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

import segdeconv.train
from segdeconv.cli.overrides import compose
from segdeconv.errors import DivergedError, UsageError
from segdeconv.experiments.benchmarks import harness
from segdeconv.experiments.study import costs, paper, series, table
from segdeconv.training.config_check import check_config

ROOT = Path(__file__).parents[2]
MODELS = tuple(variant.model for variant in paper.VARIANTS)
CPU = torch.device("cpu")
COSTS = {model: costs.Costs(1000 + index, 2000, 3.5, 400, 100) for index, model in enumerate(MODELS)}


def write_report(plan, key, seed, scores, **items):
    """Write a report.json; `scores` are fractions by its keys."""
    path = plan.run(key, seed) / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"boundary_f1": None, **scores, **items}))


def fractions(percents):
    return {name: percent / 100 for name, percent in zip(paper.SCORES.values(), percents, strict=True)}


# The results of the paper.


def test_every_row_of_the_papers_table_has_a_config():
    assert len(MODELS) == 8
    for variant in paper.VARIANTS:
        assert variant.model.replace("_", "") == variant.name.replace("-", "").lower()
        assert (ROOT / "configs" / "model" / f"{variant.model}.yaml").is_file()


def test_verdicts_on_the_papers_table_equal_those_by_hand():
    """The expected verdicts are worked out by hand, for the weighted and then the unweighted loss."""
    worst, full, larger = (
        "bilinear interpolation without learning is the worst",
        "the best stores the encoder's maps in full",
        "a larger decoder is better for a given encoder",
    )
    held = {
        ("median_frequency", worst): "G mIoU BF",  # C: 61.1, above three others
        ("median_frequency", full): "G C mIoU",  # BF: FCN-Basic's 38.11 is highest
        ("median_frequency", larger): "C mIoU",  # G: 80.5 and 80.5; BF: FCN-Basic, and NoAddition 31.96 to 30.47
        ("none", worst): "C mIoU BF",  # G: NoAddition's 82.3 is lower than 82.7
        ("none", full): "G C mIoU",  # BF: FCN-Basic again
        ("none", larger): "C mIoU",  # G: 83.5 to FCN-Basic's 83.9; BF: 37.13 to 37.33
        ("both", "class weighting raises the mean accuracy"): "C",
        ("both", "class weighting mostly raises the mean IoU"): "mIoU",
        (
            "both",
            "more pixels are correct without class weighting",
        ): "",  # FCN-Basic-NoDimReduction: 84.1 with, 83.5 without
    }
    scores_held = {key: [] for key in held}
    for ordering in paper.orderings(paper.CLASS_WEIGHTINGS):
        holds = paper.judge(ordering, paper.published).holds
        assert holds is not None
        scores_held[ordering.class_weighting, ordering.claim] += [ordering.score] * holds
    assert {key: " ".join(scores) for key, scores in scores_held.items()} == held


def test_orderings_between_class_weightings_need_both():
    assert len(paper.orderings(["none"])) == 12
    assert len(paper.orderings(paper.CLASS_WEIGHTINGS)) == 27


# Verdicts.

A, B, C, D = (("none", name) for name in "abcd")


def verdict(scores, above, below, **options):
    comparison = paper.Comparison(above, below, best=options.pop("best", False))
    ordering = paper.Ordering("", "none", "G", (comparison,), **options)
    return paper.judge(ordering, lambda key, score: scores.get(key[1]))


def test_all_of_above_must_exceed_all_of_below_unless_only_the_best_has_to():
    scores = {"a": 5.0, "b": 3.0, "c": 4.0, "d": 2.0}
    assert verdict(scores, (A, C), (B, D)) == ((1.0,), True)
    assert verdict(scores, (A, B), (C, D)) == ((-1.0,), False)
    assert verdict(scores, (A, B), (C, D), best=True) == ((1.0,), True)


def test_an_ordering_does_not_hold_for_a_tie_and_is_open_for_a_missing_score():
    assert verdict({"a": 2.0, "b": 2.0}, (A,), (B,)) == ((0.0,), False)
    assert verdict({"a": 2.0}, (A,), (B,)) == ((None,), None)


def test_most_is_more_than_half():
    pairs = tuple(paper.Comparison((above,), (below,)) for above, below in ((A, B), (B, C), (C, D), (D, A)))
    ordering = paper.Ordering("", "none", "G", pairs, most=True)
    assert paper.judge(ordering, lambda key, _: {"a": 4, "b": 3, "c": 2, "d": 1}[key[1]]) == ((1, 1, 1, -3), True)
    assert paper.judge(ordering, lambda key, _: {"a": 2, "b": 1, "c": 2, "d": 1}[key[1]]) == ((1, -1, 1, -1), False)
    assert not paper.judge(ordering._replace(most=False), lambda key, _: "dcba".index(key[1])).holds


# The table.


@pytest.fixture
def plan(tmp_path):
    return table.Plan(tmp_path, MODELS, ("median_frequency",), (0, 1, 2))


def test_means_and_spreads_are_over_the_finished_runs(plan):
    key = ("median_frequency", "fcn_basic")
    write_report(plan, key, 0, {"miou": 0.30, "pixel_accuracy": 0.5, "mean_accuracy": 0.4, "boundary_f1": 0.2})
    write_report(plan, key, 1, {"miou": 0.34, "pixel_accuracy": 0.7, "mean_accuracy": 0.4})
    write_report(plan, key, 2, {"miou": 0.99, "pixel_accuracy": 0.9, "mean_accuracy": 0.9}, complete=False)
    (row,) = (row for row in table.content(plan, COSTS, {})["networks"] if row["model"] == "fcn_basic")
    assert row["seeds"] == [0, 1]
    assert row["mean"]["mIoU"] == pytest.approx(32)
    assert row["spread"]["mIoU"] == pytest.approx(math.sqrt(8))  # (2² + 2²) / (2 - 1)
    assert row["mean"]["G"] == pytest.approx(60)
    assert row["spread"]["C"] == pytest.approx(0)
    assert row["mean"]["BF"] is None  # one of the two has none
    assert row["paper"] == {
        "scores": {"G": 81.7, "C": 62.4, "mIoU": 47.3, "BF": 38.11},
        "parameters": 0.65, "forward_ms": 24.2, "storage": 11,
    }  # fmt: skip


def test_the_papers_numbers_yield_the_papers_verdicts(plan):
    for variant in paper.VARIANTS:
        for seed in plan.seeds:
            scores = fractions(variant.scores["median_frequency"])
            write_report(plan, ("median_frequency", variant.model), seed, scores)
    text = table.write(plan, COSTS, {"command": "study"})
    study = json.loads((plan.out / "study.json").read_text())
    assert study["complete"]
    assert len(study["orderings"]) == 12
    ties = 0
    for ordering in study["orderings"]:
        margins = [comparison["margin"] for comparison in ordering["comparisons"]]
        ties += any(abs(margin) < 1e-9 for margin in margins)
        if not any(abs(margin) < 1e-9 for margin in margins):
            assert ordering["holds"] == ordering["holds_in_paper"]
            assert ordering["seeds_held"] == (3 if ordering["holds"] else 0)
        assert ordering["seeds_judged"] == 3
    assert ties == 1  # FCN-Basic-NoAddition's 80.5, with and without reduction
    assert (plan.out / "study.md").read_text() == text
    assert "| FCN-Basic | 81.7 ± 0.0 | 62.4 ± 0.0 | 47.3 ± 0.0 | 38.1 ± 0.0 | 81.7 / 62.4 / 47.3 / 38.11 | 3 |" in text
    with (plan.out / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == [variant.name for variant in paper.VARIANTS]
    assert float(rows[1]["mIoU"]) == pytest.approx(47.7)
    assert rows[5]["storage_paper"] == ""  # n/a


def test_networks_without_runs_have_dashes(plan):
    write_report(plan, ("median_frequency", "segnet_basic"), 1, {"miou": 0.5})
    text = table.write(plan, COSTS, {})
    assert "| SegNet-Basic | – | – | 50.0 | – |" in text
    assert "| FCN-Basic | – | – | – | – |" in text
    study = json.loads((plan.out / "study.json").read_text())
    assert not study["complete"]
    assert {ordering["holds"] for ordering in study["orderings"]} == {None}
    lines = text.splitlines()
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {8, 10}


def test_seeds_are_judged_one_by_one_and_by_their_mean(plan):
    for seed, (bilinear, others) in enumerate([(0.1, 0.2), (0.3, 0.2), (0.1, 0.2)]):
        for model in MODELS:
            value = bilinear if model == "bilinear_interpolation" else others
            write_report(plan, ("median_frequency", model), seed, {"miou": value})
    (worst,) = (
        ordering
        for ordering in table.content(plan, COSTS, {})["orderings"]
        if ordering["score"] == "mIoU" and "worst" in ordering["claim"]
    )
    assert worst["holds"] is True
    assert (worst["seeds_held"], worst["seeds_judged"]) == (2, 3)
    assert worst["comparisons"][0]["margin"] == pytest.approx(20 - 50 / 3)


# Costs.


def test_kept_counts_bytes_of_switches_a_quarter_if_packed_and_four_bytes_per_value_of_maps(monkeypatch):
    monkeypatch.setattr(costs, "median_time", lambda forward, **limits: 0.25)
    pixels = 45 * 60 + 23 * 30 + 12 * 15  # of 90x120, where the inputs of the second and fourth pool have odd sides
    windows = pixels + 6 * 8
    expected = {
        "bilinear_interpolation": (0, 0),
        "segnet_basic": (64 * windows, 16 * windows),
        "segnet_basic_encoder_addition": (64 * windows + 256 * pixels, 16 * windows + 256 * pixels),
        "segnet_basic_single_channel_decoder": (64 * windows, 16 * windows),
        "fcn_basic": (44 * pixels, 44 * pixels),
        "fcn_basic_no_addition": (0, 0),
        "fcn_basic_no_dim_reduction": (256 * pixels, 256 * pixels),
        "fcn_basic_no_addition_no_dim_reduction": (0, 0),
    }
    for model, (kept, packed) in expected.items():
        node = check_config(compose([f"model={model}"], ROOT / "configs")[0])["model"]
        measured = costs.measure(node, 11, 3, (90, 120), CPU)
        assert (measured.kept, measured.packed) == (kept, packed), model
        assert measured.parameters == measured.full_parameters
        assert measured.forward_ms == 250


def test_one_slow_pass_does_not_change_the_median_time(monkeypatch):
    clock = iter([0, 9, 10, 11, 20, 21, 30, 80])  # passes of 9 (warming up), 1, 1 and 50 seconds
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    assert harness.median_time(lambda: None, seconds=costs.MAX_SECONDS, max_calls=costs.MAX_FORWARDS) == 1


# The command.

TINY = ("dataset=shapes", "dataset.num_train=24", "dataset.num_val=4", "dataset.side=32", "dataset.size=[32,40]")
FAST = ("dataset.num_workers=0", "model.width=4", "trainer.max_epochs=1", "logger=none")


def run_study(monkeypatch, folder, *words):
    script = ROOT / "scripts" / "study.py"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["study.py", "--quick", "--out", "out", *TINY, *FAST, *words])
    runpy.run_path(str(script), run_name="study")["main"]()
    return json.loads((folder / "out" / "study.json").read_text())


@pytest.mark.slow
def test_an_interrupted_study_resumes_and_repeats_no_run(tmp_path, monkeypatch, capsys):
    trained = []
    train = segdeconv.train.train

    def interrupt_the_second(config, run, **options):
        trained.append(run)
        if len(trained) == 2:
            raise KeyboardInterrupt
        train(config, run, **options)

    monkeypatch.setattr(series, "train", interrupt_the_second)
    monkeypatch.setattr(costs, "MAX_SECONDS", 0.0)
    two = ("--models", "fcn_basic,bilinear_interpolation")
    with pytest.raises(KeyboardInterrupt):
        run_study(monkeypatch, tmp_path, *two)
    assert [row["seeds"] for row in json.loads((tmp_path / "out" / "study.json").read_text())["networks"]] == [[0], []]

    content = run_study(monkeypatch, tmp_path, *two)
    assert [run.parts[-2] for run in trained] == ["bilinear_interpolation", "fcn_basic", "fcn_basic"]
    assert [row["seeds"] for row in content["networks"]] == [[0], [0]]
    assert all(0 <= row["mean"][score] <= 100 for row in content["networks"] for score in ("G", "C", "mIoU"))
    run_study(monkeypatch, tmp_path, *two)
    assert len(trained) == 3

    with pytest.raises(UsageError, match=r"was trained with different values of optimizer.lr - use those values or"):
        run_study(monkeypatch, tmp_path, *two, "optimizer.lr=0.01")
    report = json.loads((tmp_path / "out/median_frequency/fcn_basic/seed0/report.json").read_text())
    assert "model=fcn_basic" in report["command"]
    assert "hydra.run.dir=out/median_frequency/fcn_basic/seed0" in report["command"]
    assert "=== 2 of 2: FCN-Basic, median_frequency, seed 0" in capsys.readouterr().out


def test_a_run_that_diverges_leaves_its_row_empty_and_the_others_are_trained(tmp_path, monkeypatch, capsys):
    def diverge(config, run, **options):
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(series, "train", diverge)
    monkeypatch.setattr(costs, "MAX_SECONDS", 0.0)
    content = run_study(monkeypatch, tmp_path, "--models", "fcn_basic,segnet_basic")
    assert [row["seeds"] for row in content["networks"]] == [[], []]
    assert "FCN-Basic has no scores: the loss is nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--models", "fcn_basik"), "--models: unknown name 'fcn_basik' - did you mean 'fcn_basic'?"),
        (
            ("--class-weighting", "median"),
            "--class-weighting: unknown name 'median' - did you mean 'median_frequency'?",
        ),
        (("--seeds", "a"), "--seeds a: expected integers - write for example --seeds 0,1,2"),
        (("--split", "tset"), "unknown split 'tset' - the splits are train, val, test"),
        (("seed=3",), "seed=3 is not allowed: the study sets this key - use --seeds"),
        (("model=segnet",), "model=segnet is not allowed: the study sets this key - use --models"),
        (("model.widht=3",), "unknown key model.widht - did you mean 'width'?"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_trained(tmp_path, monkeypatch, words, message):
    with pytest.raises(UsageError) as caught:
        run_study(monkeypatch, tmp_path, *words)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("experiment", ["decoder_study", "decoder_study_quick"])
def test_every_network_composes_with_the_config_of_the_study(experiment):
    for model in MODELS:
        composed, choices = compose([f"experiment={experiment}", f"model={model}"], ROOT / "configs")
        config = check_config(composed)
        assert choices["model"] == model
        assert config["model"]["switch_source"] == "post_relu"
        assert config["optimizer"]["_target_"] == "segdeconv.optimization.sgd"
        assert (config["optimizer"]["lr"], config["optimizer"]["momentum"]) == (0.1, 0.9)
        assert config["dataset"]["batch_size"] == 12
        assert (config["dataset"]["mean"], config["dataset"]["std"]) == ([0, 0, 0], [1, 1, 1])
        assert config["loss"]["class_weighting"] == "median_frequency"
        assert config["augment"] == {}
