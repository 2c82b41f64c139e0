"""Where curves and pictures go: TensorBoard, W&B, MLflow, any logger of Lightning's, or nowhere."""

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from segdeconv.config import TARGET, build, locate
from segdeconv.errors import UsageError
from segdeconv.training.resume import without_changeable_keys


class TensorBoard(TensorBoardLogger):
    """Event files in the run's folder itself, and no empty hparams.yaml beside them."""

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False)

    def save(self) -> None:
        self.experiment.flush()


def build_logger(node: Mapping[str, Any], run: Path) -> Logger | Literal[False]:
    """The logger that a checked `logger` node names, told the run's folder; False for none."""
    if not node:
        return False
    supplied = {"save_dir": str(run)} if "save_dir" in inspect.signature(locate(node, "logger")).parameters else {}
    # Whoever chooses a logger sends it a run, and not reports about himself to its maker.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        logger: Logger = build(node, "logger", **supplied)
    except ModuleNotFoundError as error:
        named = re.search(r"'([\w-]+)", str(error))
        package = named[1] if named else "what it names"
        raise UsageError(f"logger ({node[TARGET]}) needs the package {package} - pip install {package}") from error
    if isinstance(logger, WandbLogger):
        os.environ["WANDB_DIR"] = str(run.absolute())  # a training process that joins the run asks only for this
    return logger


def show_configuration(logger: Logger | Literal[False], config: Mapping[str, Any], run: Path) -> None:
    """Open the logger and give it the config. What it refuses, such as a missing login, becomes one sentence."""
    if not logger:
        return
    text = yaml.safe_dump(dict(config), sort_keys=False)
    try:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("configuration", f"```yaml\n{text}```")
        else:
            logger.log_hyperparams({"run": str(run)} | without_changeable_keys(config))
        if isinstance(logger, MLFlowLogger):  # whose parameters are cut at 250 characters
            logger.experiment.log_text(logger.run_id, text, "configuration.yaml")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"logger={type(logger).__name__} cannot start: {reason} - mend that or choose logger=tensorboard"
        ) from error


def show_picture(logger: Logger, name: str, picture: np.ndarray, step: int) -> None:
    """picture: (H, W, 3) uint8 RGB. A logger of yours gets pictures by having `log_image(name, [picture], step)`."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        key = re.sub(r"[^\w./ -]+", "", name)
        logger.experiment.log_image(logger.run_id, picture, key=key, step=step)
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [picture], step)


def close(logger: Logger | Literal[False]) -> str:
    """End what the logger has open; returns the command that shows what it has kept, or nothing."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()  # or the next job of a multirun would go on with this run
    if isinstance(logger, TensorBoardLogger):
        return f"tensorboard --logdir {logger.save_dir}"
    if isinstance(logger, MLFlowLogger):
        return f"mlflow ui --backend-store-uri {logger.experiment.tracking_uri}"
    return ""
