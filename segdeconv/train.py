"""One run, from a recipe to the scores of its best checkpoint. Read it top to bottom.

From Python, without Hydra, a recipe is a dictionary; what it leaves out has its default:

    from segdeconv.train import train

    train(
        {
            "dataset": {"_target_": "segdeconv.data.Folder", "root": "mine", "size": [256, 320]},
            "model": {"_target_": "segdeconv.models.SegNet", "width": 0.5},
        },
        "runs/mine",
    )
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from segdeconv import (
    balancing,
    checkpoint,
    config,
    loggers,
    processes,
    report,
    run_folder,
    runs,
    scoring,
    training,
    transfer,
)
from segdeconv.boundary import Boundaries
from segdeconv.calibration import Calibration
from segdeconv.callbacks import Pictures, Progress, Recorder, Stopping
from segdeconv.classes import Classes
from segdeconv.data.inspection import inspect_all, table
from segdeconv.data.loading import loader_failures_in_words
from segdeconv.data.module import DataModule, build_split, build_transforms, normalisation
from segdeconv.errors import TimeUp, UsageError, command
from segdeconv.losses import build_loss
from segdeconv.memory import memory_in_words
from segdeconv.models import SegmentationModel, build_model
from segdeconv.switch_curves import SwitchCurves
from segdeconv.task import SegmentationTask
from segdeconv.watch import Waiting, Watch


def train(recipe: Mapping[str, Any], run: str | Path, *, typed: str | None = None) -> None:
    """Look at the data, fit, evaluate the best checkpoint; all of it into the folder `run`.

    recipe: nodes `dataset`, `model` and so on as in configs/, each with `_target_` and arguments.
    typed: the command that was typed, for the report.
    """
    started = time.time()
    run = Path(run)
    recipe = runs.check_recipe(recipe)
    resumed = runs.open_run(run, recipe)
    if runs.finished(run):
        print(f"{run} is finished; its scores are in {run / 'report.json'}")
        return

    logger = loggers.build_logger(recipe["logger"], run)
    made = prepare(recipe, fresh=resumed is not None)
    if resumed is not None:
        runs.compare(resumed, made.classes, made.facts["fingerprints"])
    for_trainer, for_task, for_checkpoints = (config.split(recipe["trainer"], schema)[0] for schema in runs.TRAINER)
    checkpoints = training.Checkpoints(run, resumed=resumed, **for_checkpoints)
    deadline = started + runs.seconds(recipe["max_time"]) if recipe["max_time"] is not None else None
    stopping = Stopping(checkpoints, deadline=deadline)
    recorder = Recorder(run, checkpoints, stopping)
    waiting = Waiting()
    curves_of_switches = SwitchCurves(made.data.val, made.data.preprocessing)
    shown = [Pictures(made.data.val), curves_of_switches, Progress(recorder, waiting), Watch(waiting)]
    callbacks = [waiting, *shown, stopping, checkpoints, recorder]
    trainer = training.make_trainer(run, callbacks, logger, **for_trainer)
    kept = {name: node for name, node in recipe.items() if name not in loggers.NOT_LEARNT}
    task = SegmentationTask(
        made.model,
        made.loss,
        made.optimizer,
        config.build(recipe["schedule"], "schedule"),
        made.classes,
        seed=recipe["seed"],
        total_steps=training.count_steps(made.data, trainer),
        remembered={
            "config": {**kept, "dataset": made.dataset},
            "facts": {**made.facts, "precision": str(trainer.precision)},
        },
        **for_task,
    )
    loggers.show_configuration(logger, recipe, run)
    run_folder.require_space(run, task)
    print(runs.header(recipe, made.data, task, trainer, run, resumed), flush=True)
    if resumed is not None:
        runs.compare_machines(resumed, torch.device(trainer.strategy.root_device))

    complete = True
    stopping.listen()
    try:
        with loader_failures_in_words(), memory_in_words(recipe["dataset"]["batch_size"]):
            processes.fit(trainer, task, made.data, resumed=resumed)
        stopping.leave_if_asked()
    except TimeUp as sentence:
        print(sentence)
        complete = False
    except UsageError:
        stopping.leave_if_asked()  # a worker that died of the same signal is no news
        raise
    finally:
        stopping.listen_no_more()
    if not trainer.is_global_zero:
        return
    path = checkpoints.best_path if checkpoints.best_path.is_file() else checkpoints.last_path
    best = checkpoint.read(path, trust=runs.AnyName())
    calibration = Calibration(made.classes.ignore_index)
    boundaries = Boundaries(len(made.classes), made.classes.ignore_index)
    device = torch.device(trainer.strategy.root_device)
    confusion, num_images = scoring.evaluate(best, "val", device=device, calibration=calibration, boundaries=boundaries)
    noted: dict[str, Any] = {"command": typed, "checkpoint": str(best.path), "split": "val", "complete": complete}
    noted["calibration"] = calibration.report()
    report.write_json(
        report.report(confusion, num_images, made.classes, boundaries=boundaries, **noted), run / "report.json"
    )
    curves = loggers.close(logger)
    print("\n" + report.table(confusion, made.classes, calibration, boundaries))
    print(f"\nbest checkpoint: {best.path}\nscores:          {run / 'report.json'}, {run / 'metrics.csv'}")
    if curves:
        print(f"curves:          {curves}")
    trust = [f"--trust={name}" for name in checkpoint.foreign(best.config)]
    print(f"use it:          {command('predict', [str(best.path), *trust])} IMAGE ...")


class Prepared(NamedTuple):
    """What a recipe's nodes become.

    dataset: the `dataset` node as a checkpoint keeps it; facts: what the data is, plain.
    """

    data: DataModule
    classes: Classes
    model: SegmentationModel
    loss: nn.Module
    optimizer: Optimizer
    dataset: dict[str, Any]
    facts: dict[str, Any]


def prepare(recipe: Mapping[str, Any], *, fresh: bool = False) -> Prepared:
    """Look at the data, say what is in it, and build what learns from it; from a checked recipe.

    fresh: without trained weights, because the checkpoint of a run that goes on is about to be loaded.
    """
    start = None
    if recipe["init_from"] is not None and not fresh:
        start = checkpoint.read(recipe["init_from"], trust=runs.AnyName())
    settings, source = config.split(recipe["dataset"], DataModule)
    train_split, val_split = (build_split(recipe["dataset"], split) for split in ("train", "val"))
    classes = train_split.classes
    seen, _ = inspect_all([train_split, val_split])
    loss_settings, loss_node = config.split(recipe["loss"], balancing.class_weights)
    weights = balancing.class_weights(seen.pixels[:-1], seen.image_pixels[:-1], **loss_settings)
    for note in train_split.notes:
        print(note)
    print(table(seen, classes, weights), end="\n\n")
    settings = normalisation(settings, train_split, seen)
    transforms = build_transforms(recipe["augment"], ignore_index=classes.ignore_index, mean=settings["mean"])
    data = DataModule(train_split, val_split, transforms, recipe["seed"], **settings)

    torch.manual_seed(recipe["seed"])
    channels = data.preprocessing.channels
    model = build_model(recipe["model"], len(classes), channels, fresh=fresh or start is not None)
    if start is not None:
        print(transfer.take_over(model, classes, start), end="\n\n")
    if "classes" in source:  # found in the masks: from here on they are a choice, so that a new mask cannot change them
        source = {**source, "classes": train_split.stored_classes.plain()}
    fingerprints = {
        split.split: hashlib.sha256(split.fingerprint.encode()).hexdigest() for split in (train_split, val_split)
    }
    return Prepared(
        data,
        classes,
        model,
        build_loss(loss_node, class_weights=weights, ignore_index=classes.ignore_index),
        config.build(recipe["optimizer"], "optimizer", model=model),
        {**source, **settings},
        {
            "classes": classes.plain(),
            "preprocessing": data.preprocessing.plain(),
            "class_weights": weights,
            "fingerprints": fingerprints,
        },
    )
