"""Loggers for scalars and images: TensorBoard, W&B, MLflow, any Lightning logger, or none."""

import inspect
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from segdeconv.config import TARGET, build, locate
from segdeconv.errors import UsageError, first_line
from segdeconv.system.files import encode, is_utf8
from segdeconv.training.resume import CHANGEABLE_KEYS, LENGTH_KEYS, without_keys


class TensorBoard(TensorBoardLogger):
    """TensorBoard logger that writes event files into the run folder itself, without an empty hparams.yaml.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False)

    def save(self) -> None:
        self.experiment.flush()


def build_logger(node: Mapping[str, Any], run: Path) -> Logger | Literal[False]:
    """Build the logger of a checked `logger` node.

    Args:
        node: The node; empty for no logger.
        run: The run folder, passed as `save_dir` if the logger accepts it.

    Returns:
        The logger, or False for none.

    Raises:
        UsageError: The logger's package is not installed.
    """
    if not node:
        return False
    supplied = {"save_dir": str(run)} if "save_dir" in inspect.signature(locate(node, "logger")).parameters else {}
    # Choosing a logger is consent to log a run, not to send telemetry to its vendor.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    logger = build(node, "logger", **supplied)
    if not isinstance(logger, Logger):
        raise UsageError(f"logger ({node[TARGET]}) is not a Lightning logger - choose one, or logger=none")
    if isinstance(logger, TensorBoardLogger) and not is_utf8(str(run)):
        raise UsageError(
            f"{run}: TensorBoard cannot write to a run folder whose name is not UTF-8 - choose another folder, or "
            "logger=none"
        )
    if isinstance(logger, WandbLogger):
        os.environ["WANDB_DIR"] = str(run.absolute())  # spawned training processes read only this variable
    return logger


def log_config(
    logger: Logger | Literal[False], config: Mapping[str, Any], run: Path, *, new_length: bool = False
) -> None:
    """Open the logger and log the config.

    Args:
        logger: The logger, or False.
        config: The checked config.
        run: The run folder.
        new_length: The run resumes with another length, which MLflow refuses to log again.

    Raises:
        UsageError: The logger cannot start, for example because of a missing login.
    """
    if not logger:
        return
    text = yaml.safe_dump(dict(config), sort_keys=False)
    try:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("configuration", f"```yaml\n{text}```")
        else:
            changeable = CHANGEABLE_KEYS + LENGTH_KEYS * new_length
            logger.log_hyperparams({"run": str(run)} | without_keys(config, changeable))
        if isinstance(logger, MLFlowLogger):  # parameters are truncated at 250 characters
            logger.experiment.log_text(logger.run_id, text, "configuration.yaml")
    except Exception as error:
        raise UsageError(
            f"logger={type(logger).__name__} cannot start: {first_line(error)} - fix this or choose logger=tensorboard"
        ) from error


def images_are_due(trainer: Trainer) -> bool:
    """Return whether images are logged at this validation.

    That is so at the validations 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., two per doubling, and at the last one, so a long
    run has hardly more images than a short one. The rule needs no state: a resumed run logs at the same validations.
    """
    validation = (trainer.current_epoch + 1) // (trainer.check_val_every_n_epoch or 1)
    power = validation // 3 if validation % 3 == 0 else validation
    return power & (power - 1) == 0 or trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop


def log_image(logger: Logger, name: str, image: np.ndarray, step: int) -> None:
    """Log an image. Other loggers than those named here need a method `log_image(name, [image], step)`.

    Args:
        logger: The logger.
        name: Title of the image.
        image: (H, W, 3) uint8 RGB.
        step: The optimizer step.
    """
    name = encode(name).decode()  # loggers accept UTF-8 only
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, image, step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        key = re.sub(r"[^\w./ -]+", "", name)
        logger.experiment.log_image(logger.run_id, image, key=key, step=step)
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [image], step)


def close(logger: Logger | Literal[False]) -> str:
    """Close the logger; return the command that displays its logs, or an empty string."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()  # or the next job of a multirun would continue this run
    if isinstance(logger, TensorBoardLogger):
        return shlex.join(["tensorboard", "--logdir", str(logger.save_dir)])
    if isinstance(logger, MLFlowLogger):
        return shlex.join(["mlflow", "ui", "--backend-store-uri", str(logger.experiment.tracking_uri)])
    return ""
