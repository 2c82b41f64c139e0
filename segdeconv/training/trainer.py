"""Lightning's Trainer with the settings of a run, and fitting in one or several processes."""

import math
import re
import signal
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import CheckpointIO, Precision
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.config import TARGET, build
from segdeconv.data.module import DataPipeline
from segdeconv.errors import Interrupted, UsageError, error_from_traceback, warn
from segdeconv.system.devices import resolve_precision
from segdeconv.system.interruption import INTERRUPTION, exit_at_once
from segdeconv.training.checkpointing import Checkpoints, VerifiedCheckpoints
from segdeconv.training.lightning_internals import TIMEOUT, Processes, quieten, spawning_launcher
from segdeconv.training.own_callbacks import callback_error, explain_errors
from segdeconv.training.processes import RESUME_HINT, STOP_SIGNALS, interrupted
from segdeconv.training.settings import TrainerSettings

PROFILERS = {"simple": "SimpleProfiler", "advanced": "AdvancedProfiler", "pytorch": "PyTorchProfiler"}

# The errors of torch.distributed's backends where a process waits for another.
TIMED_OUT = re.compile(r"Timed out waiting|timed out after|Watchdog caught collective operation timeout", re.IGNORECASE)


def make_trainer(
    run: Path,
    callbacks: list[Callback],
    logger: Logger | Literal[False],
    settings: TrainerSettings,
    resumed: Checkpoint | None,
) -> Trainer:
    """Return a Trainer that writes verified checkpoints and prints nothing itself.

    Args:
        run: The run folder.
        callbacks: The callbacks, in order.
        logger: The logger, or False.
        settings: The settings of the trainer.
        resumed: The checkpoint to resume from. With several processes, each reads the file again.

    Raises:
        UsageError: The settings do not fit the machine.
    """
    quieten()
    accelerator, devices, num_nodes = settings.accelerator, settings.devices, settings.num_nodes
    if accelerator == "auto" and not torch.cuda.is_available():
        accelerator = "mps" if torch.backends.mps.is_available() else "cpu"
    if accelerator == "cpu" and devices == "auto":
        devices = 1
    if settings.norm == "sync" and accelerator == "cpu":
        raise UsageError(
            "trainer.norm=sync works on accelerators only - on a CPU use trainer.norm=batch (statistics of each "
            "process) or trainer.norm=frozen"
        )
    if settings.limit_test_batches != 1.0:
        warn(
            "trainer.limit_test_batches changes nothing: a run has no test loop, and evaluates its best checkpoint on "
            "all validation images"
        )
    plugins = build_plugins(settings)
    try:
        several = count_processes(accelerator, devices, num_nodes) > 1
        device = torch.device("cpu") if accelerator == "cpu" else None
        precision = resolve_precision(settings.precision, device=device)
        return Trainer(
            default_root_dir=run,
            accelerator=accelerator,
            strategy=Processes() if several else "auto",
            accumulate_grad_batches=settings.accumulate_grad_batches,
            sync_batchnorm=settings.norm == "sync",
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,  # type: ignore[arg-type]
            max_epochs=settings.max_epochs,
            max_steps=settings.max_steps,
            gradient_clip_val=settings.gradient_clip_val,
            check_val_every_n_epoch=settings.check_val_every_n_epoch,
            deterministic=settings.deterministic,
            callbacks=callbacks,
            logger=logger,
            plugins=[VerifiedCheckpoints(None if several else resumed), *plugins],
            num_sanity_val_steps=0,
            limit_train_batches=settings.train_batches,
            limit_val_batches=settings.val_batches,
            limit_test_batches=settings.limit_test_batches,
            fast_dev_run=settings.fast_dev_run,
            log_every_n_steps=settings.log_every_n_steps,
            profiler=build_profiler(settings, run),
            use_distributed_sampler=False,  # our sampler distributes the samples
            enable_checkpointing=any(isinstance(callback, Checkpoints) for callback in callbacks),
            enable_progress_bar=has_progress_bar(callbacks),
            enable_model_summary=False,
        )
    except MisconfigurationException as error:
        raise UsageError(f"trainer: {error} - change trainer.accelerator or trainer.devices") from error
    except UsageError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # two callbacks with the same state, a misplaced plugin
        raise UsageError(f"callbacks and trainer.plugins do not fit together: {first_sentence(error)}") from error


def has_progress_bar(callbacks: Iterable[Callback]) -> bool:
    """Return whether one of the callbacks is a progress bar of Lightning, which replaces that of a run."""
    return any(isinstance(callback, ProgressBar) for callback in callbacks)


def build_plugins(settings: TrainerSettings) -> list[Any]:
    """Build the plugins of `trainer.plugins`.

    Raises:
        UsageError: A plugin would replace the checkpoints or the precision of a run.
    """
    plugins = []
    for index, node in enumerate(settings.plugins or []):
        plugin = build(node, f"trainer.plugins.{index}")
        for kind, reason in {
            CheckpointIO: "checkpoints of a run are always written and read with verification; leave it out",
            Precision: "set trainer.precision",
        }.items():
            if isinstance(plugin, kind):
                raise UsageError(f"trainer.plugins.{index} ({node[TARGET]}) cannot be used in a run - {reason}")
        plugins.append(plugin)
    return plugins


def build_profiler(settings: TrainerSettings, run: Path) -> Profiler | None:
    """Build the profiler, which writes to the run folder: Lightning's messages, to which it would print, are silent."""
    profiler = settings.profiler
    if isinstance(profiler, str):
        profiler = {TARGET: f"pytorch_lightning.profilers.{PROFILERS[profiler]}"}
    if profiler is None:
        return None
    return typing.cast(Profiler, build({"dirpath": str(run), "filename": "profile", **profiler}, "trainer.profiler"))


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, without the line breaks of a long one."""
    return re.split(r"(?<=[.!?]) ", " ".join(str(error).split()), maxsplit=1)[0].rstrip(".") or type(error).__name__


def batches_per_epoch(batches: int, limit: int | float) -> int:
    """Return the number of batches of an epoch after a limit, as Lightning does.

    Args:
        batches: Batches of the whole epoch in this process.
        limit: A number of batches (int) or a fraction of them (float), such as `trainer.limit_train_batches`.

    Raises:
        UsageError: The fraction is less than one batch.
    """
    limited = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if batches and not limited:
        raise UsageError(
            f"trainer.limit_train_batches={limit} of {batches} batches is less than one - give a larger fraction, or "
            "a number of batches"
        )
    return int(limited)


def count_steps(data: DataPipeline, world_size: int, settings: TrainerSettings) -> int:
    """Return the number of optimizer steps of the whole run."""
    batches = batches_per_epoch(data.batches_per_epoch(world_size), settings.train_batches)
    epochs = 1 if settings.fast_dev_run else settings.max_epochs
    steps = math.ceil(batches / settings.accumulate_grad_batches) * epochs
    return min(steps, settings.max_steps) if settings.max_steps > 0 else steps


def count_processes(accelerator: str, devices: int | str, num_nodes: int) -> int:
    """Return the number of processes of a Trainer with these settings.

    Raises:
        UsageError: `devices` is not a number of CPU processes.
    """
    if accelerator == "gpu":
        indices = CUDAAccelerator.parse_devices(-1 if devices == "auto" else devices)
        return len(indices or []) * num_nodes
    if accelerator == "mps" or devices == "auto":
        return num_nodes
    if not str(devices).isdecimal() or int(devices) < 1:
        raise UsageError(f"trainer.devices={devices} is not a number of CPU processes - give a positive integer")
    return int(devices) * num_nodes


def fit(trainer: Trainer, task: LightningModule, data: LightningDataModule, *, resumed: Path | None) -> None:
    """Run trainer.fit, and raise the errors of spawned processes as if they had occurred in this one.

    Args:
        trainer: The trainer.
        task: The task to train.
        data: The training and validation batches.
        resumed: The checkpoint to resume from.

    Raises:
        Interrupted: A signal ended the run.
        UsageError: A process was killed.
    """
    launcher = spawning_launcher(trainer)
    if launcher is None:
        with explain_errors():
            trainer.fit(task, datamodule=data, ckpt_path=resumed, weights_only=True)
        return
    try:
        with _forward_signals(launcher.kill) as received:
            trainer.fit(task, datamodule=data, ckpt_path=resumed, weights_only=True)
        if received:
            raise interrupted(received[0])
    except ProcessRaisedException as error:
        cause = error_from_traceback(str(error))
        if cause is None and (reason := callback_error(str(error))):
            cause = UsageError(f"callbacks: {reason} - change or remove the callback")
        if isinstance(cause, Interrupted) and received:
            cause.exit_code = STOP_SIGNALS[received[0]]
        if cause is None and received:  # the signal arrived before the process could handle it
            raise interrupted(received[0]) from None
        if cause is None and TIMED_OUT.search(str(error)):
            raise UsageError(
                f"a training process has not answered for {TIMEOUT.seconds} s: it is stopped, or waits for a disk or a "
                f"GPU - {RESUME_HINT}"
            ) from None
        if cause is None:
            raise
        raise cause from None
    except ProcessExitedException as error:
        if received:  # the signal arrived before the process could handle it
            raise interrupted(received[0]) from None
        raise UsageError(
            f"a training process was killed ({error}) - if the machine ran out of memory, lower dataset.batch_size; "
            f"{RESUME_HINT}"
        ) from None


@contextmanager
def _forward_signals(kill: Callable[[int], None]) -> Iterator[list[int]]:
    """Forward the signals that this process receives to the training processes, which save and exit.

    Yields:
        The list of received signals.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if INTERRUPTION.again(number):
            exit_at_once(number, "interrupted twice, nothing more was saved - resume with resume=auto")
        # Never SIGINT: a terminal sends it to the processes too, and a second one makes them exit without saving.
        kill(signal.SIGTERM)

    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, forward) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
