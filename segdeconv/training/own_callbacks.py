"""The `callbacks` group: Lightning's callbacks and the user's own, and those that do not fit a SegmentationTask."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, callbacks
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

from segdeconv.checkpoints.checkpoint import CONTENT_LIMITS
from segdeconv.config import OBJECT, TARGET, build, missing_package
from segdeconv.errors import UsageError, did_you_mean, warn
from segdeconv.system.plain_data import PlainDataError, check_plain

AVERAGE = (
    "validation, best.ckpt and the other commands would use the weights without the average: set trainer.ema=0.999, "
    "which is validated, saved and resumed"
)
# Callbacks that change what a step is, and what to do instead.
REFUSED: dict[type, str] = {
    callbacks.StochasticWeightAveraging: AVERAGE,
    callbacks.WeightAveraging: AVERAGE,
    callbacks.GradientAccumulationScheduler: "schedule and resumption count steps of one size: set "
    "trainer.accumulate_grad_batches",
    callbacks.BaseFinetuning: "a resumed run could not repeat it: set optimizer.part_lr={encoder: 0}, which freezes a "
    "part, and a second run with init_from=",
    callbacks.ModelPruning: "it renames the weights, so that no command could read the checkpoints",
    callbacks.LearningRateFinder: "it changes the run that it starts in: use the command find lr",
    callbacks.BatchSizeFinder: "it changes the run that it starts in: use the command find batch_size",
}


def build_callbacks(nodes: Mapping[str, Mapping[str, Any]], run: Path, metrics: Sequence[str]) -> list[Callback]:
    """Build the callbacks of a checked `callbacks` group.

    Args:
        nodes: The nodes by name, in which functions stand for objects of a program.
        run: The run folder.
        metrics: The names that the run logs.

    Raises:
        UsageError: A node builds no callback, or one that does not fit a run.
    """
    built = {}
    for name, node in nodes.items():
        with explain_errors(f"callbacks.{name} ({_class(node)})"):
            built[name] = build(node, f"callbacks.{name}")
    for name, callback in built.items():
        if not isinstance(callback, Callback):
            raise UsageError(
                f"callbacks.{name} ({_class(nodes[name])}) is not a pytorch_lightning.Callback - inherit from it; the "
                "package lightning has another class of this name"
            )
        folder = getattr(callback, "dirpath", None)
        if isinstance(callback, callbacks.ModelCheckpoint) and folder and Path(folder).resolve() == run.resolve():
            raise UsageError(
                f"callbacks.{name}.dirpath={folder} is the run folder, whose checkpoints it could replace - leave it "
                f"out for {run / 'checkpoints'}"
            )
    require_suitable(built.values())
    library = all(type(callback).__module__.startswith("pytorch_lightning.") for callback in built.values())
    for name, callback in built.items():
        monitor = getattr(callback, "monitor", None)
        if library and monitor is not None and monitor not in metrics:  # a callback of the user may log more
            raise UsageError(f"callbacks.{name}.monitor={monitor} is not logged - {did_you_mean(monitor, metrics)}")
    return list(built.values())


def _class(node: Mapping[str, Any]) -> str:
    return str(node.get(OBJECT, node[TARGET]))


@contextmanager
def explain_errors(where: str = "callbacks") -> Iterator[None]:
    """Turn the errors of Lightning's callbacks about their arguments, a missing package or metric into a UsageError.

    Args:
        where: The key of the callback, for the message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = missing_package(error)
        raise UsageError(f"{where} needs the package {package} - pip install {package}") from error
    except (MisconfigurationException, RuntimeError) as error:
        reason = callback_error(f"{type(error).__name__}: {error}")
        if reason is None:
            raise
        raise UsageError(f"{where}: {reason} - change or remove the callback") from error


def callback_error(text: str) -> str | None:
    """Return the first sentence of the error of a callback in the text of an error or traceback; None for others."""
    match = re.search(
        r"^(?:[\w.]*MisconfigurationException: |RuntimeError: (?=Early stopping conditioned on))(.*?)(?:\. |\.?$)",
        text,
        re.MULTILINE,
    )
    return match and match[1]


def require_suitable(given: Iterable[Callback]) -> None:
    """Check that callbacks fit a SegmentationTask, also in a Trainer of the user.

    Raises:
        UsageError: A callback changes what a step is.
    """
    for callback in given:
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                raise UsageError(f"{type(callback).__name__} does not work with SegmentationTask: {reason}")
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        if isinstance(monitor, str) and mode == "min" and "/" in monitor and not monitor.endswith("/loss"):
            warn(
                f"{type(callback).__name__} takes the lowest {monitor} for the best, since its mode is min; set "
                "mode=max for scores"
            )


def require_plain_state(content: Mapping[str, Any]) -> None:
    """Check that a checkpoint that is about to be written can be read again.

    Args:
        content: Content of the checkpoint, or the part of it that holds the states of callbacks.

    Raises:
        UsageError: A callback has put something else than tensors and plain data into it.
    """
    states = content.get("callbacks", {})
    parts = {name: part for name, part in content.items() if name != "callbacks"}
    for name, part in {**parts, **states}.items():
        try:
            check_plain(part, CONTENT_LIMITS, leaves=(torch.Tensor,), tuples=True, finite=False)
        except PlainDataError as error:
            owner = f"the state of {name}" if name in states else f"{name}, which a callback adds to the checkpoint,"
            raise UsageError(
                f"{owner} {error}, which a checkpoint cannot hold - return tensors, numbers, text, lists, tuples and "
                "dictionaries of them from state_dict()"
            ) from error
