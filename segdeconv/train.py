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

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning.loggers import TensorBoardLogger

from segdeconv import balancing, checkpoint, config, report, runs, training
from segdeconv.callbacks import Pictures, Progress, Recorder, Stopping
from segdeconv.data.inspection import inspect_all, table
from segdeconv.data.module import DataModule, build_split, build_transforms
from segdeconv.models import build_model
from segdeconv.task import SegmentationTask


def train(recipe: Mapping[str, Any], run: str | Path, *, command: str | None = None) -> None:
    """Look at the data, fit, evaluate the best checkpoint; all of it into the folder `run`.

    recipe: nodes `dataset`, `model` and so on as in configs/, each with `_target_` and arguments.
    command: what was typed, for the report.
    """
    run = Path(run)
    recipe = runs.check_recipe(recipe)
    resumed = runs.open_run(run, recipe)
    if (run / "report.json").is_file():
        print(f"{run} is finished; its scores are in {run / 'report.json'}")
        return

    settings, source = config.split(recipe["dataset"], DataModule)
    train_split, val_split = (build_split(recipe["dataset"], split) for split in ("train", "val"))
    classes = train_split.classes
    seen, _ = inspect_all([train_split, val_split])
    loss_settings, loss_source = config.split(recipe["loss"], balancing.class_weights)
    weights = balancing.class_weights(seen.pixels[:-1], seen.image_pixels[:-1], **loss_settings)
    print(table(seen, classes, weights), end="\n\n")

    transforms = build_transforms(recipe["augment"], ignore_index=classes.ignore_index, mean=settings["mean"])
    data = DataModule(train_split, val_split, transforms, recipe["seed"], **settings)
    torch.manual_seed(recipe["seed"])
    model = build_model(recipe["model"], len(classes), data.preprocessing.channels, fresh=resumed is not None)

    checkpoints = training.Checkpoints(run)
    recorder = Recorder(run, checkpoints)
    callbacks = [Pictures(val_split), Progress(recorder), Stopping(checkpoints), checkpoints, recorder]
    logger = TensorBoardLogger(run, name="", version="", default_hp_metric=False)
    trainer = training.make_trainer(run, callbacks, logger, **recipe["trainer"])
    total_steps = training.count_steps(data, trainer)

    if "classes" in source:  # found in the masks: from here on they are a choice, so that a new mask cannot change them
        source = {**source, "classes": classes.plain()}
    facts = {
        "classes": classes.plain(),
        "preprocessing": data.preprocessing.plain(),
        "class_weights": weights,
        "precision": str(trainer.precision),
    }
    task = SegmentationTask(
        model,
        config.build(loss_source, "loss", class_weights=weights, ignore_index=classes.ignore_index),
        config.build(recipe["optimizer"], "optimizer", model=model),
        config.build(recipe["schedule"], "schedule"),
        classes,
        seed=recipe["seed"],
        total_steps=total_steps,
        remembered={"config": {**recipe, "dataset": {**source, **settings}}, "facts": facts},
    )
    logger.experiment.add_text("configuration", f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```")
    print(runs.header(recipe, data, task, trainer, run, resumed), flush=True)

    trainer.fit(task, datamodule=data, ckpt_path=resumed, weights_only=True)
    if not trainer.is_global_zero:
        return
    best = checkpoint.read(checkpoints.best_path, trust=runs.AnyName())
    confusion, num_images = report.evaluate(best, "val", device=torch.device(trainer.strategy.root_device))
    noted = {"command": command, "checkpoint": str(best.path), "split": "val"}
    report.write_json(report.report(confusion, num_images, classes, **noted), run / "report.json")
    print("\n" + report.table(confusion, classes))
    print(f"\nbest checkpoint: {best.path}\nscores:          {run / 'report.json'}, {run / 'metrics.csv'}")
    print(f"curves:          tensorboard --logdir {run}")
    print(f"use it:          python scripts/predict.py {best.path} IMAGE ...")
