"""Multiruns: the records of their jobs, the table at the end, and the sweeper on Optuna."""

import csv
import json
import math
import statistics

import pytest

from segdeconv.experiments import sweeps
from segdeconv.experiments.sweeps import Job, Row, best_score, read_jobs, rows, summarise

TINY = (
    "dataset.num_train=8", "dataset.num_val=4", "dataset.batch_size=4", "dataset.num_workers=0", "dataset.size=[32,32]",
    "model.stages=[[4],[8]]", "trainer.max_epochs=1", "trainer.precision=32-true", "logger=none",
)  # fmt: skip


def job(number, score, *overrides):
    return Job(number, list(overrides), f"sweep/{number}", score)


def test_jobs_that_differ_only_in_seed_or_fold_are_one_row():
    jobs = [
        job(0, 0.25, "model=unet", "seed=1"),
        job(1, 0.75, "model=unet", "seed=2"),
        job(2, 0.5, "model=unet", "seed=2", "dataset.fold=1"),
        job(3, 0.9, "model=fpn", "seed=1"),
        job(4, None, "model=fpn", "seed=2"),
        job(5, None, "model=fcn", "seed=1"),
        job(6, 0.1, "model=fpn", "seed=1"),  # job 3 once more: the last one counts
    ]
    table = rows(jobs)
    assert [row[:3] for row in table] == [("model=unet", 3, 0), ("model=fpn", 1, 1), ("model=fcn", 0, 1)]
    assert table[0].mean == pytest.approx(0.5)
    assert table[0].deviation == pytest.approx(statistics.stdev([0.25, 0.75, 0.5])) == pytest.approx(0.25)
    assert table[1].mean == 0.1
    assert [math.isnan(value) for row in table[1:] for value in (row.mean, row.deviation)] == [False, True, True, True]


def test_the_table_is_printed_and_written_and_a_truncated_record_left_out(tmp_path, capsys):
    recorder = sweeps.Recorder(tmp_path, Job(0, ["seed=1"], "a"))
    recorder.end(tmp_path / "a", 0.25)
    sweeps.Recorder(tmp_path, Job(1, ["seed=2"], "b")).end(tmp_path / "b", None, "the loss is nan - lower it")
    with (tmp_path / sweeps.JOBS).open("a") as file:
        file.write('{"job": 2, "overri')
    assert [(record.score, record.error) for record in read_jobs(tmp_path)] == [
        (0.25, None),
        (None, "the loss is nan - lower it"),
    ]
    summarise(tmp_path)
    out = capsys.readouterr().out
    assert f"job 0: seed=1 - val/miou 0.2500  {tmp_path / 'a'}\n" in out
    assert "job 1: seed=2 - failed: the loss is nan - lower it\n" in out
    assert "all jobs     1       1         0.2500          -" in out
    with (tmp_path / sweeps.SUMMARY).open() as file:
        assert list(csv.reader(file)) == [list(Row._fields), ["", "1", "1", "0.25", ""]]


def test_a_sweep_without_a_finished_job_has_no_table(tmp_path, capsys):
    summarise(tmp_path)
    assert (capsys.readouterr().out, list(tmp_path.iterdir())) == ("", [])


@pytest.mark.parametrize(("scores", "best"), [(("0.2", "nan", "0.4"), 0.4), (("nan", "nan", "nan"), None)])
def test_the_score_of_a_job_is_the_best_in_its_metrics(tmp_path, scores, best):
    lines = [f"{epoch},{epoch + 1},1.0,1.0,{score}" for epoch, score in enumerate(scores)]
    (tmp_path / "metrics.csv").write_text("\n".join(["epoch,step,train/loss,val/loss,val/miou", *lines, ""]))
    assert best_score(tmp_path) == best


def test_a_sweep_without_optuna_names_the_package(tmp_path, commands):
    try:
        import optuna  # noqa: F401
    except ImportError:
        done = commands("train", "-m", "hydra/sweeper=optuna", "seed=1,2", cwd=tmp_path)
        assert (done.code, done.error_message) == (
            2,
            "hydra/sweeper=optuna needs the package optuna - pip install optuna",
        )


def trials(commands, place, number, *words):
    settings = (f"hydra.sweeper.n_trials={number}", "hydra.sweeper.storage=sqlite:///study.db", "hydra.sweep.dir=sweep")
    return commands("train", "-m", "hydra/sweeper=optuna", *settings, *TINY, *words, cwd=place)


@pytest.mark.extras
def test_optuna_chooses_the_values_of_eight_trials_and_passes_over_diverged_ones(tmp_path, commands):
    import optuna

    words = ("optimizer.lr=tag(log, interval(1e-4, 1e30))", "optimizer=choice(sgd,adamw)", "schedule.power=range(1,3)")
    done = trials(commands, tmp_path, 5, *words)
    assert done.code == 0, done.err
    done = trials(commands, tmp_path, 8, *words)
    assert done.code == 0, done.err
    assert "study segdeconv: 5 of 8 trials are in sqlite:///study.db" in done.out
    jobs = read_jobs(tmp_path / "sweep")
    assert [record.job for record in jobs] == list(range(8))
    study = optuna.load_study(study_name="segdeconv", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [trial.value for trial in study.trials] == [record.score for record in jobs]
    failed = [record for record in jobs if record.score is None]
    assert failed
    assert all("lower optimizer.lr" in record.error for record in failed)
    for record, trial in zip(jobs, study.trials, strict=True):
        chosen = dict(word.split("=") for word in record.overrides)
        assert 1e-4 <= float(chosen["optimizer.lr"]) <= 1e30
        assert (chosen["optimizer"] in ("sgd", "adamw"), chosen["schedule.power"] in ("1", "2")) == (True, True)
        assert chosen == {key.lstrip("+"): str(value) for key, value in trial.params.items()}
        if record.score is not None:
            report = json.loads((tmp_path / record.folder / "report.json").read_text())
            assert record.score == pytest.approx(report["miou"], abs=1e-6)
    assert "mean val/miou" in done.out
    assert f"- {study.best_value:.4f}" in done.out


@pytest.mark.extras
@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("interval(0.1, 2)", "FloatDistribution(high=2.0, log=False, low=0.1, step=None)"),
        ("tag(log, interval(1e-4, 1e-1))", "FloatDistribution(high=0.1, log=True, low=0.0001, step=None)"),
        ("int(interval(1, 8))", "IntDistribution(high=8, log=False, low=1, step=1)"),
        ("range(1, 8, 3)", "IntDistribution(high=7, log=False, low=1, step=3)"),
        ("range(0.5, 2, 0.5)", "FloatDistribution(high=1.5, log=False, low=0.5, step=0.5)"),
        ("choice(a, 'b c', 3)", r"CategoricalDistribution(choices=('a', 'b\\ c', '3'))"),
        ("1, 2", "CategoricalDistribution(choices=('1', '2'))"),
    ],
)
def test_a_sweep_of_hydras_grammar_is_a_distribution(sweep, expected):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from segdeconv.experiments.optuna_sweeper import distribution

    assert repr(distribution(OverridesParser.create().parse_override(f"x={sweep}"))) == expected


@pytest.mark.extras
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("seed=1",), "hydra/sweeper=optuna has nothing to choose"),
        (("optimizer.lr=interval(2,1)",), "- correct the values"),
        (("seed=1,2", "hydra.sweeper.sampler=best"), "unknown hydra.sweeper.sampler 'best' - Available: cmaes, random"),
        (("seed=1,2", "hydra.sweeper.direction=up"), "unknown hydra.sweeper.direction 'up'"),
        (("seed=1,2", "hydra.sweeper.storage=nowhere"), "Optuna cannot open the study (hydra.sweeper.storage=nowhere"),
        (("model.depth=choice(12,13)",), "model.depth=12: input should be 11, 13, 16 or 19"),
        (("optimizer.lr=1e30,1e31", "hydra.sweeper.n_trials=1", *TINY), "all 1 trials failed - correct the config"),
    ],
)  # fmt: skip
def test_a_wrong_setting_of_the_sweeper_is_one_line(words, message, tmp_path, commands):
    done = commands("train", "-m", "hydra/sweeper=optuna", *words, cwd=tmp_path)
    assert done.code == 2, done.err
    assert message in done.error_message
