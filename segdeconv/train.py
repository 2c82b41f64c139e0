"""One run, from a config to the scores of its best checkpoint. Read it top to bottom.

From Python, without Hydra, with names of the files in configs/, or with classes and objects:

    from segdeconv.train import train

    result = train(dataset="folder", dataset__root="mine", model="unet")
    result = train(dataset=(train_set, val_set), model=network, trainer__max_epochs=5)
    result.segmenter.predict("photo.jpg").save("mask.png")
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from segdeconv import config as configs
from segdeconv.checkpoints import checkpoint
from segdeconv.config import build, split_arguments
from segdeconv.data import sample_digests
from segdeconv.data.loading import explain_loader_errors
from segdeconv.drawing import html
from segdeconv.errors import TimeUp, UsageError, command, for_caller
from segdeconv.evaluation import report, report_page
from segdeconv.evaluation.evaluate import Evaluation, restore_dataset, versions
from segdeconv.evaluation.learning_curve import curve_beside
from segdeconv.evaluation.report_page import Evaluated
from segdeconv.inference.segmenter import Segmenter
from segdeconv.training import config_check, resume, run_folder
from segdeconv.training.arguments import read_arguments
from segdeconv.training.memory import explain_out_of_memory
from segdeconv.training.prepare import prepare
from segdeconv.training.result import TrainingResult
from segdeconv.training.settings import TrainerSettings


@torch.random.fork_rng(devices=[])  # a run sets seeds of its own, after which the caller's random numbers go on
def train(
    config: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    *,
    runs: Path | None = None,
    typed: str | None = None,
    **keywords: Any,
) -> TrainingResult:
    """Inspect the data, train, and evaluate the best checkpoint; all files are written to the folder `run`.

    A keyword is a group or a key of the config, with `__` for the dot: `trainer__max_epochs=5`. What is not given has
    the default of configs/train.yaml. A group is one of

    - the name of a file in configs/GROUP, as on the command line: `dataset="camvid"`, `model="unet"`;
    - a class or `functools.partial` of one: `model=MyNetwork`, with `model__width=8` for its arguments;
    - a mapping with `_target_` and arguments;
    - for `callbacks`, one or a list of these, or of objects; for `logger`, a logger of Lightning, or False;
    - for `augment`, one or a list of these, or of transforms of albumentations, such as an `A.Compose`;
    - an object: `dataset=(train_set, val_set)`, data sets of pairs (image, mask), or one of which a fifth becomes val;
      `model=network`, any torch.nn.Module; `loss=function`, of logits (N, C, H, W) and masks (N, H, W);
      `optimizer=optimizer`, of the parameters of `model`. Network, loss and optimizer are copied, so that the same call
      trains the same network again.

    Args:
        config: Groups and keys as a dictionary.
        run: The run folder; by default runs/DATASET-MODEL/TIME.
        runs: The folder in which resume=auto searches for the run to resume; None to resume `run` itself.
        typed: The command line, for the report.
        **keywords: Further groups and keys.

    Returns:
        The run folder, the scores, and the best network.

    Raises:
        SegdeconvError: The config, data, disk or checkpoint is invalid, training diverged or was interrupted.
    """
    started = time.time()
    arguments = read_arguments(config or {}, keywords)
    unnamed = run is None
    if run is None:
        runs = Path("runs") / arguments.name
        run = run_folder.new_folder(runs)
    checked = config_check.check_config(arguments.config)
    objects, config = configs.objects_in(checked), configs.written(checked)
    run = resume.find_run(config, Path(run), runs)
    if unnamed and config["resume"] is None:
        run = run_folder.claim_folder(run)
    result = TrainingResult(run, objects)
    config, resumed, finished, new_length, changed = resume.open_run(run, config)
    resumed_path = None if resumed is None else resumed.path
    if finished:
        longer = ", after no fewer epochs and steps than these, and left as it is" if new_length else ""
        print(f"{run} is finished{longer}; its scores are in {run / 'report.json'}")
        return result
    if arguments.note:
        print(arguments.note, end="\n\n")

    trial = config["trainer"]["fast_dev_run"]
    with run_folder.discard_if_unused(run, trial=bool(trial)):
        # Imported late, so that config errors are reported at once: Lightning takes 2 s to import.
        from segdeconv.training import loggers
        from segdeconv.training.callbacks import ImageLogging, LastValidation, Progress, Recorder
        from segdeconv.training.checkpointing import Checkpoints, kept_count
        from segdeconv.training.data_module import DataModule
        from segdeconv.training.diagnostics import LoaderWait, TrainingDiagnostics
        from segdeconv.training.header import header
        from segdeconv.training.own_callbacks import build_callbacks
        from segdeconv.training.record import SUMS, StepRecord, conditions, write_sums
        from segdeconv.training.stopping import Stopping
        from segdeconv.training.switch_curves import SwitchCurves
        from segdeconv.training.task import SegmentationTask, scalars
        from segdeconv.training.trainer import count_steps, fit, has_progress_bar, make_trainer

        logger = loggers.build_logger({} if trial else checked["logger"], run)
        prepared = prepare(config, objects, fresh=resumed is not None)
        if resumed is None and config["auto"]:
            config = prepared.config
            resume.write_config(run, config)
        if resumed is not None:
            resume.compare(resumed, prepared.classes, prepared.metadata["fingerprints"])
        settings = TrainerSettings(**split_arguments(config["trainer"], [TrainerSettings])[0])
        metrics = [name for split in ("train", "val") for name in scalars(split, None, prepared.classes)]
        own_callbacks = build_callbacks(checked["callbacks"], run, metrics)
        checkpoints = Checkpoints(
            run,
            resumed=resumed_path,
            patience=settings.patience,
            forced=config["resume_force"],
            keep=settings.keep,
        )
        deadline = started + config_check.seconds(config["max_time"]) if config["max_time"] is not None else None
        stopping = Stopping(checkpoints, deadline=deadline)
        recorder = Recorder(run, checkpoints, stopping)
        wait = LoaderWait()
        switch_curves = SwitchCurves(prepared.data.val, prepared.data.preprocessing)
        logging = [ImageLogging(prepared.data.val), switch_curves, TrainingDiagnostics(wait)]
        if settings.enable_progress_bar and not has_progress_bar(own_callbacks):
            logging.append(Progress(recorder, wait))
        step_record = StepRecord(checkpoints)
        callbacks = [LastValidation(), wait, *own_callbacks, *logging, step_record, stopping, checkpoints, recorder]
        trainer = make_trainer(run, callbacks, logger, settings, resumed)
        saved = {**resume.without_keys(config, resume.NOT_IN_CHECKPOINTS), "dataset": prepared.dataset}
        device = torch.device(trainer.strategy.root_device)
        precision = str(trainer.precision)
        step_record.conditions = conditions(saved, prepared.metadata["data"], precision, versions(device))
        task = SegmentationTask(
            prepared.model,
            prepared.loss,
            prepared.optimizer,
            build(config["schedule"], "schedule"),
            prepared.classes,
            seed=config["seed"],
            total_steps=count_steps(prepared.data, trainer.world_size, settings),
            metadata={
                "config": saved,
                "facts": {**prepared.metadata, "precision": precision},
            },
            settings=settings,
            log_to_loggers=False,  # the Recorder does
        )
        if resumed is not None and changed:
            resume.require_compatible(resumed, task, run, changed)
            task.restores_options = not any(key.startswith("optimizer") for key in changed)
        if resumed is not None and new_length:
            steps = resumed.content["global_step"]
            resume.require_more_steps(run, steps, task.total_steps, resume.finished(run))
            before = TrainerSettings(**split_arguments(resumed.config.get("trainer", {}), [TrainerSettings])[0])
            old_total = count_steps(prepared.data, trainer.world_size, before)
            lr = [node["optimizer"]["lr"] for node in (resumed.config, config)]
            resume.warn_of_schedule(task.schedule, lr, steps, old_total, task.total_steps)
        loggers.log_config(logger, config, run, new_length=new_length)
        run_folder.require_space(run, task, kept_count(settings.keep, task))
        print(header(config, prepared.data, task, trainer, run, resumed_path), flush=True)
        if resumed is not None:
            resume.compare_machines(resumed, device)
            resume.record_config(run, config)
        del resumed  # the trainer loads and releases its content

        if not trial and trainer.is_global_zero:
            sample_digests.write(prepared.digests, run / sample_digests.NAME)
        complete = True
        stopping.listen()
        try:
            with (
                run_folder.explain_removed_folder(run),
                explain_loader_errors(),
                explain_out_of_memory(config["dataset"]["batch_size"]),
            ):
                data = DataModule(prepared.data, same_batches=bool(settings.overfit_batches))
                fit(trainer, task, data, resumed=resumed_path)
            stopping.raise_if_requested()
        except TimeUp as message:
            print(message)
            complete = False
        except UsageError:
            stopping.raise_if_requested()  # the same signal may have killed a worker
            raise
        finally:
            stopping.stop_listening()
    if not trainer.is_global_zero:
        return result
    if trial:
        print(f"fast_dev_run: training ({task.total_steps} steps) and validation succeeded; no checkpoint was written")
        return result
    run_folder.require_run_folder(run)
    best = result.checkpoint
    dataset = restore_dataset(best, "val")
    evaluation = Evaluation.of(Segmenter(best, device=device), dataset)
    content = evaluation.report(command=typed, complete=complete)
    shown = Evaluated(content, evaluation.gallery, curve_beside(best.path))
    html.write(report_page.build_page(shown, dataset), run / "report.html")
    sums = write_sums(run, {"report.json": report.as_json(content)})
    report.write_json(content, run / "report.json")  # last, since it marks the run as finished
    curves = loggers.close(logger)
    print(f"\n{evaluation.verdict()}\n\n{evaluation.score_table()}")
    print(f"\nbest checkpoint: {best.path}")
    print(f"report:          {run / 'report.html'} (and report.json, metrics.csv)")
    print(f"record:          {run / SUMS}, sha256 {sums}; check it with: {command('verify', [str(run)])}")
    if curves:
        print(f"curves:          {curves}")
    print(f"use it:          {_use(result)}")
    return result


def _use(result: TrainingResult) -> str:
    """Return how the best checkpoint predicts an image."""
    path, foreign = str(result.best_checkpoint), checkpoint.foreign(result.checkpoint.config)
    arguments = f"{path!r}" + (f", trust={foreign}" if foreign else "")
    if configs.OBJECT in result.checkpoint.config["model"]:
        arguments += ", model=NETWORK"
    typed = f"{command('predict', [path, *(f'--trust={name}' for name in foreign)])} IMAGE ..."
    return for_caller(f"segdeconv.load({arguments}).predict(IMAGE)", typed)
