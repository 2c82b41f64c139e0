"""One run, from a config to the scores of its best checkpoint. Read it top to bottom.

From Python, without Hydra, a config is a dictionary; what it leaves out has its default:

    from segdeconv.train import train

    train(
        {
            "dataset": {"_target_": "segdeconv.data.Folder", "root": "mine", "size": [256, 320]},
            "model": {"_target_": "segdeconv.models.SegNet", "width": 0.5},
        },
        "runs/mine",
    )
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from segdeconv.checkpoints import checkpoint
from segdeconv.config import build, deal
from segdeconv.data.loading import explain_loader_errors
from segdeconv.errors import TimeUp, UsageError, command
from segdeconv.evaluation import report
from segdeconv.evaluation.boundary import Boundaries
from segdeconv.evaluation.calibration import Calibration
from segdeconv.evaluation.evaluate import evaluate, restore_dataset
from segdeconv.inference.segmenter import Segmenter
from segdeconv.training import config_check, resume, run_folder
from segdeconv.training.memory import explain_out_of_memory
from segdeconv.training.prepare import prepare
from segdeconv.training.settings import TrainerSettings


def train(config: Mapping[str, Any], run: str | Path, *, runs: Path | None = None, typed: str | None = None) -> None:
    """Look at the data, fit, evaluate the best checkpoint; all of it into the folder `run`.

    config: nodes `dataset`, `model` and so on as in configs/, each with `_target_` and arguments.
    runs: where resume=auto looks for the run to resume; None where it lies in `run`, if there is one.
    typed: the command that was typed, for the report.
    """
    started = time.time()
    config = config_check.check_config(config)
    run = resume.find_run(config, Path(run), runs)
    resumed = resume.open_run(run, config)
    resumed_path = None if resumed is None else resumed.path
    if resume.finished(run):
        print(f"{run} is finished; its scores are in {run / 'report.json'}")
        return

    # Late, so that a mistake in the config is said at once: Lightning takes 2 s to import.
    from segdeconv.training import loggers
    from segdeconv.training.callbacks import Pictures, Progress, Recorder
    from segdeconv.training.checkpointing import Checkpoints
    from segdeconv.training.data_module import DataModule
    from segdeconv.training.diagnostics import LoaderWait, TrainingDiagnostics
    from segdeconv.training.header import header
    from segdeconv.training.stopping import Stopping
    from segdeconv.training.switch_curves import SwitchCurves
    from segdeconv.training.task import SegmentationTask
    from segdeconv.training.trainer import count_steps, fit, make_trainer

    logger = loggers.build_logger(config["logger"], run)
    made = prepare(config, fresh=resumed is not None)
    if resumed is not None:
        resume.compare(resumed, made.classes, made.facts["fingerprints"])
    settings = TrainerSettings(**deal(config["trainer"], [TrainerSettings])[0])
    checkpoints = Checkpoints(run, resumed=resumed_path, patience=settings.patience)
    deadline = started + config_check.seconds(config["max_time"]) if config["max_time"] is not None else None
    stopping = Stopping(checkpoints, deadline=deadline)
    recorder = Recorder(run, checkpoints, stopping)
    waiting = LoaderWait()
    curves_of_switches = SwitchCurves(made.data.val, made.data.preprocessing)
    shown = [Pictures(made.data.val), curves_of_switches, Progress(recorder, waiting), TrainingDiagnostics(waiting)]
    callbacks = [waiting, *shown, stopping, checkpoints, recorder]
    trainer = make_trainer(run, callbacks, logger, settings, resumed)
    kept = {name: node for name, node in config.items() if name not in resume.CHANGEABLE_KEYS}
    task = SegmentationTask(
        made.model,
        made.loss,
        made.optimizer,
        build(config["schedule"], "schedule"),
        made.classes,
        seed=config["seed"],
        total_steps=count_steps(made.data, trainer),
        metadata={
            "config": {**kept, "dataset": made.dataset},
            "facts": {**made.facts, "precision": str(trainer.precision)},
        },
        settings=settings,
    )
    loggers.show_configuration(logger, config, run)
    run_folder.require_space(run, task)
    print(header(config, made.data, task, trainer, run, resumed_path), flush=True)
    if resumed is not None:
        resume.compare_machines(resumed, torch.device(trainer.strategy.root_device))
    del resumed  # the trainer loads its content, and then nothing holds it any more

    complete = True
    stopping.listen()
    try:
        with explain_loader_errors(), explain_out_of_memory(config["dataset"]["batch_size"]):
            fit(trainer, task, DataModule(made.data), resumed=resumed_path)
        stopping.raise_if_requested()
    except TimeUp as sentence:
        print(sentence)
        complete = False
    except UsageError:
        stopping.raise_if_requested()  # a worker that died of the same signal is no news
        raise
    finally:
        stopping.stop_listening()
    if not trainer.is_global_zero:
        return
    path = checkpoints.best_path if checkpoints.best_path.is_file() else checkpoints.last_path
    best = checkpoint.read(path, trust=resume.AnyName())
    calibration = Calibration(made.classes.ignore_index)
    boundaries = Boundaries(len(made.classes), made.classes.ignore_index)
    device = torch.device(trainer.strategy.root_device)
    dataset = restore_dataset(best, "val")
    confusion = evaluate(Segmenter(best, device=device), dataset, calibration=calibration, boundaries=boundaries)
    noted: dict[str, Any] = {"command": typed, "checkpoint": str(best.path), "split": "val", "complete": complete}
    noted["calibration"] = calibration.report()
    report.write_json(
        report.report(confusion, len(dataset), made.classes, boundaries=boundaries, **noted), run / "report.json"
    )
    curves = loggers.close(logger)
    print("\n" + report.score_table(confusion, made.classes, calibration, boundaries))
    print(f"\nbest checkpoint: {best.path}\nscores:          {run / 'report.json'}, {run / 'metrics.csv'}")
    if curves:
        print(f"curves:          {curves}")
    trust = [f"--trust={name}" for name in checkpoint.foreign(best.config)]
    print(f"use it:          {command('predict', [str(best.path), *trust])} IMAGE ...")
