"""Tables that compare configs: the table of made-up runs, and the command with tiny runs."""

import json
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch

from segdeconv.checkpoints import cards, checkpoint
from segdeconv.cli.overrides import compose
from segdeconv.errors import DivergedError, Interrupted, UsageError
from segdeconv.experiments.study import results, series
from segdeconv.training.config_check import check_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TABLES = sorted(results.TABLES.glob("*.yaml"))


def write_run(plan, row, view, seed, miou, **items):
    run = plan.run(row, view, seed)
    run.mkdir(parents=True)
    report = {"miou": miou, "pixel_accuracy": 0.9, "mean_accuracy": None, "boundary_f1": 0.5, **items}
    (run / "report.json").write_text(json.dumps(report))
    return run


@pytest.fixture
def plan(tmp_path):
    return results.Plan(
        "Tiny", ["a=1"], {"One": ["b=2"], "Two, too": ["a=3"]}, {"val": [], "new": ["c=4"]}, (0, 1), tmp_path
    )


def test_the_last_argument_for_a_key_applies(plan, tmp_path):
    assert plan.config("One", "val", 1) == ["a=1", "b=2", "seed=1"]
    assert plan.config("Two, too", "new", 0) == ["a=3", "c=4", "seed=0"]
    other = results.Plan("", ["+a=1"], {"r": ["b=2"]}, {"v": ["b=3"]}, (0,), tmp_path, ["a=9"])
    assert other.config("r", "v", 0) == ["a=9", "b=3", "seed=0"]


def test_every_run_has_its_own_folder(plan):
    runs = [plan.run(*job) for job in plan.jobs]
    assert len(set(runs)) == len(runs) == 8
    assert plan.run("Two, too", "new", 1) == plan.out / "two-too" / "new" / "seed1"


def test_scores_are_means_over_the_finished_runs_of_a_view(plan):
    write_run(plan, "One", "val", 0, 0.5)
    write_run(plan, "One", "val", 1, 0.6)
    write_run(plan, "One", "new", 0, 0.4)
    write_run(plan, "One", "new", 1, 0.9, complete=False)
    (plan.run("One", "val", 0) / "cost.json").write_text(
        json.dumps({"seconds": 90.0, "memory": 3 << 20, "device": "CPU", "commit": "abc1234"})
    )
    content = results.content(plan, {"command": "results tiny"})
    first, second = content["rows"]
    assert first["views"]["val"]["mean"]["mIoU"] == pytest.approx(55)
    assert first["views"]["val"]["spread"]["mIoU"] == pytest.approx(statistics.stdev([50, 60]))
    assert first["views"]["val"]["mean"]["C"] is None
    assert first["views"]["new"]["mean"]["mIoU"] == pytest.approx(40)
    assert first["views"]["new"]["spread"]["mIoU"] is None
    assert (first["seconds"], first["memory"], first["commits"]) == (90, 3 << 20, ["abc1234"])
    assert second["views"]["val"]["mean"]["mIoU"] is None
    text = results.markdown(content)
    assert "| One | 55.0 ± 7.1 | 90.0 ± 0.0 | – | 50.0 ± 0.0 | 40.0 | 2 | – | 1.5 | 3 MiB |" in text
    assert "| Two, too | – | – | – | – | – | 0 | – | – | – |" in text
    assert "All with `a=1`." in text
    assert "* commits: abc1234" in text


def test_curves_cover_every_seed_and_skip_epochs_without_validation(plan):
    first, second = (write_run(plan, "One", "val", seed, 0.5) for seed in (0, 1))
    (first / "metrics.csv").write_text("epoch,val/miou\n0,nan\n1,0.25\n2,nan\n3,0.5\n")
    (second / "metrics.csv").write_text("epoch,val/miou\n0,nan\n1,0.125\n")
    assert results.curves(plan) == {"One": [[(2, 25.0), (4, 50.0)], [(2, 12.5)]]}
    assert results.draw(plan, plan.out / "curves.png")
    assert (plan.out / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: {a: [b=1]}", "must have views, each with a name and a list of key=value"),
        ("views: {v: []}\nrows: {a: b=1}", "must have rows, each with a name and a list"),
        ("views: {v: []}\nrows: {a: [b]}", "must have rows, each with a name and a list"),
        ("views: {v: []}\nrows: {A b: [], a-b: []}", "two rows have the same folder name"),
        ("views: {v: []}\nrows: {a: []}\nwords: x=1", "words must be a list"),
        ("- a", "must have rows"),
        ("rows:\n  a: [x[1]]\n", r"is not YAML \(expected ',' or ']', but got '\[', line 2\)"),
        ("a: !!python/object/apply:os.system [ls]", r"is not YAML of plain values \(line 1 has the tag"),
    ],
)
def test_a_file_without_a_table_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        results.read_results(path)


def test_the_names_of_a_table_are_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("title: 1e3\nviews: {no: []}\nrows: {1: [seed=1], 李明: [], Straße: []}\n", encoding="utf-8")
    table = results.read_results(path)
    assert (table["title"], list(table["views"]), list(table["rows"])) == ("1e3", ["no"], ["1", "李明", "Straße"])
    assert [results.slug(name) for name in table["rows"]] == ["1", "李明", "straße"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.stem == "camvid_steps"), id=path.stem)  # 30 rows
        for path in TABLES
    ],
)
def test_every_config_of_every_table_composes_and_is_different(path, tmp_path):
    plan = results.Plan(**results.read_results(path), seeds=(0,), out=tmp_path)
    configs = [check_config(compose(plan.config(*job), CONFIGS)[0]) for job in plan.jobs]
    assert all(config not in configs[:index] for index, config in enumerate(configs))


# The command.

TINY = """
title: Tiny
words:
  [dataset=shapes, dataset.num_train=24, dataset.num_val=4, dataset.side=32, "dataset.size=[32,40]", model=segnet_basic]
views: {val: [], others: [dataset.num_val=5]}
rows:
  Slim: [model.width=4]
  Slimmer, Muon: [model.width=3, optimizer=muon]
"""
FAST = ("dataset.num_workers=0", "trainer.max_epochs=1", "logger=none")


def run_results(monkeypatch, folder, *words):
    (folder / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["results.py", "tiny.yaml", "--out", "out", *FAST, *words])
    runpy.run_path(str(ROOT / "scripts" / "results.py"), run_name="results")["main"]()
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.mark.slow
def test_a_table_is_trained_once_resumes_after_an_interruption_and_writes_weights(tmp_path, monkeypatch, capsys):
    trained = []
    train = series.train

    def interrupt_the_second(config, run, **options):
        trained.append(run)
        if len(trained) == 2:
            raise Interrupted("stopped by SIGTERM at step 3, saved - resume it with resume=auto", 143)
        train(config, run, **options)

    monkeypatch.setattr(series, "train", interrupt_the_second)
    with pytest.raises(Interrupted, match="saved - resume it with the same command") as caught:
        run_results(monkeypatch, tmp_path)
    assert caught.value.exit_code == 143
    content = run_results(monkeypatch, tmp_path, "--weights")
    assert [run.parts[1:] for run in trained] == [
        ("slim", "val", "seed0"), ("slim", "others", "seed0"), ("slim", "others", "seed0"),
        ("slimmer-muon", "val", "seed0"), ("slimmer-muon", "others", "seed0"),
    ]  # fmt: skip
    assert [row["parameters"] for row in content["rows"]] == [
        sum(p.numel() for p in checkpoint.read(run / "best.ckpt").model().parameters())
        for run in (trained[0], trained[3])
    ]
    for row in content["rows"]:
        assert all(0 <= row["views"][view]["mean"]["mIoU"] <= 100 for view in ("val", "others"))
        assert row["seconds"] > 0
        assert row["memory"] > 10 << 20
    run_results(monkeypatch, tmp_path, "--table")
    assert len(trained) == 5
    assert "Slimmer, Muon, others, seed 0" in capsys.readouterr().out

    path = tmp_path / "out" / "weights" / "slimmer-muon-seed0.safetensors"
    half, best = checkpoint.read(path), checkpoint.read(trained[3] / "best.ckpt")
    assert all(torch.allclose(half.weights[name], value, atol=1e-3) for name, value in best.weights.items())
    card = json.loads(cards.card_of(path).read_text())
    assert card["scores"]["mIoU"] == pytest.approx(content["rows"][1]["views"]["val"]["mean"]["mIoU"] / 100)
    assert "model.width=3" in card["command"]
    assert card["cost"]["seconds"] > 0

    with pytest.raises(UsageError, match=r"was trained with different values of optimizer.lr - use those values or"):
        run_results(monkeypatch, tmp_path, "optimizer.lr=0.5")


def test_a_run_that_diverges_leaves_its_row_empty_and_the_others_are_trained(tmp_path, monkeypatch, capsys):
    def diverge(config, run, **options):
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(series, "train", diverge)
    content = run_results(monkeypatch, tmp_path, "--rows", "slim", "--views", "val")
    assert [row["name"] for row in content["rows"]] == ["Slim"]
    assert content["rows"][0]["views"]["val"]["runs"] == {}
    assert "Slim, val, seed 0 has no scores: the loss is nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rows", "slin"), "--rows: unknown name 'slin' - did you mean 'slim'?"),
        (("--views", "test"), "--views: unknown name 'test'"),
        (("--seeds", "a"), "--seeds a: expected integers"),
        (("seed=3",), "seed=3 is not allowed: the results table sets this key - use --seeds"),
        (("model.widht=3",), "unknown key model.widht - did you mean 'width'?"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_trained(tmp_path, monkeypatch, words, message):
    with pytest.raises(UsageError) as caught:
        run_results(monkeypatch, tmp_path, *words)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_table_is_reported_with_similar_names(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["results.py", "canvid"])
    with pytest.raises(UsageError, match="unknown table canvid - did you mean 'camvid'"):
        runpy.run_path(str(ROOT / "scripts" / "results.py"), run_name="results")["main"]()
