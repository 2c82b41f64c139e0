"""Train a network: compose a recipe, look at the data, fit, evaluate the best checkpoint.

    python scripts/train.py [dataset=NAME] [model=NAME] [experiment=NAME] [key=value ...]

The names are files in configs/; keys are arguments of the classes that those files name. A run writes into
runs/<dataset>-<model>/<time>/: best.ckpt, last.ckpt, config.yaml, metrics.csv, report.json, TensorBoard events.
resume=auto goes on with the newest unfinished run of the same recipe.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from segdeconv.errors import run_command

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main() -> None:
    """Give Hydra the command line; it calls `train` once per job, with the job's folder."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    import hydra

    from segdeconv.config import front_door, plain

    command = shlex.join(["python", "scripts/train.py", *sys.argv[1:]])
    sys.argv[1:] = [*front_door(sys.argv[1:], CONFIGS), *folder_to_resume(sys.argv[1:])]

    def job(composed: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        try:
            folder = Path(HydraConfig.get().runtime.output_dir)
            train(
                plain(composed),
                folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder,
                command,
            )
        except Exception as error:
            raise _Failed(error) from error

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(job)()
    except _Failed as failed:
        raise failed.error from failed.error.__cause__


class _Failed(BaseException):
    """Carries an error past Hydra, which would print lines of its own about any Exception."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def folder_to_resume(arguments: list[str]) -> list[str]:
    """The override by which Hydra uses the folder of the run that `resume=` means."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if given.get("resume", "null") == "null":
        return []
    from segdeconv.config import compose
    from segdeconv.runs import check_recipe, find_run

    recipe, choices = compose(arguments, CONFIGS)
    named = Path(given["hydra.run.dir"]) if "hydra.run.dir" in given else None
    folder_of_runs = Path("runs") / f"{choices['dataset']}-{choices['model']}"
    folder = find_run(given["resume"], check_recipe(recipe), named, folder_of_runs)
    return [] if folder in (None, named) else [f"hydra.run.dir={folder}"]


def train(recipe: dict[str, Any], run: Path, command: str) -> None:
    """One run in its folder, from a composed recipe to the scores of its best checkpoint."""
    import torch
    import yaml
    from pytorch_lightning.loggers import TensorBoardLogger

    from segdeconv import balancing, checkpoint, config, report, runs, training
    from segdeconv.callbacks import Pictures, Progress, Recorder, Stopping
    from segdeconv.data.inspection import inspect_all, table
    from segdeconv.data.module import DataModule, build_transforms
    from segdeconv.task import SegmentationTask

    recipe = runs.check_recipe(recipe)
    resumed = runs.open_run(run, recipe)
    if (run / "report.json").is_file():
        print(f"{run} is finished; its scores are in {run / 'report.json'}")
        return

    settings, source = config.split(recipe["dataset"], DataModule)
    train_split, val_split = (config.build(source, "dataset", split=split) for split in ("train", "val"))
    classes = train_split.classes
    seen, _ = inspect_all([train_split, val_split])
    loss_settings, loss_source = config.split(recipe["loss"], balancing.class_weights)
    weights = balancing.class_weights(seen.pixels[:-1], seen.image_pixels[:-1], **loss_settings)
    print(table(seen, classes, weights), end="\n\n")

    transforms = build_transforms(recipe["augment"], ignore_index=classes.ignore_index, mean=settings["mean"])
    data = DataModule(train_split, val_split, transforms, recipe["seed"], **settings)
    torch.manual_seed(recipe["seed"])
    fresh = {"pretrained": "none"} if resumed and "pretrained" in recipe["model"] else {}
    model = config.build({**recipe["model"], **fresh}, "model", num_classes=len(classes))

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
    facts = {"command": command, "checkpoint": str(best.path), "split": "val"}
    report.write_json(report.report(confusion, num_images, classes, **facts), run / "report.json")
    print("\n" + report.table(confusion, classes))
    print(f"\nbest checkpoint: {best.path}\nscores:          {run / 'report.json'}, {run / 'metrics.csv'}")
    print(f"curves:          tensorboard --logdir {run}")
    print(f"use it:          python scripts/predict.py {best.path} IMAGE ...")


if __name__ == "__main__":
    run_command(main)
