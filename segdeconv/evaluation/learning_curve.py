"""The learning curve of a run, read from metrics.csv and laid out as lines of a chart."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from segdeconv.errors import warn
from segdeconv.system.plain_data import Limits, PlainDataError, read_bytes

METRICS_LIMITS = Limits(size=1 << 26)  # a run of a hundred thousand epochs
COLUMNS = ("train/loss", "val/loss", "val/miou")
LARGEST = 1e15  # a loss beyond is left out, like one that is not finite
MAX_POINTS = 400  # of a line; a longer run is drawn with every second epoch, every third, ...
WIDTH, HEIGHT = 400, 160  # of the chart, in the units of its SVG


class LearningCurve(NamedTuple):
    """The scores of a run by epoch.

    Attributes:
        epochs: The number of each epoch, from 1.
        steps: The optimizer steps after each epoch.
        values: For each of `COLUMNS` a value per epoch, None for none.
    """

    epochs: Sequence[int]
    steps: Sequence[int]
    values: dict[str, Sequence[float | None]]

    @property
    def best(self) -> int | None:
        """The index of the epoch with the highest validation mIoU, of equal ones the first; None without validation."""
        scored = [(miou, -index) for index, miou in enumerate(self.values["val/miou"]) if miou is not None]
        return -max(scored)[1] if scored else None


def read_curve(path: Path) -> LearningCurve | None:
    """Read a metrics.csv.

    Args:
        path: The file.

    Returns:
        The curve; None if there is no such file, or it has no complete epoch.

    Raises:
        PlainDataError: The file is not a table of metrics.
        OSError: The file cannot be read.
    """
    if not path.is_file():
        return None
    rows = []
    try:
        for row in csv.DictReader(read_bytes(path, METRICS_LIMITS).decode().splitlines()):
            if None not in row and None not in row.values():  # a row that was truncated by a kill has too few fields
                rows.append(
                    (_integer(row["epoch"]) + 1, _integer(row["step"]), *(_number(row[name]) for name in COLUMNS))
                )
    except (csv.Error, KeyError, ValueError) as error:
        raise PlainDataError("is not a table of metrics") from error
    if not rows:
        return None
    epochs, steps, *values = zip(*rows, strict=True)
    return LearningCurve(epochs, steps, dict(zip(COLUMNS, values, strict=True)))


def curve_beside(checkpoint: Path) -> LearningCurve | None:
    """Return the learning curve of the run of a checkpoint, or None, with a warning if the file cannot be read."""
    path = checkpoint.with_name("metrics.csv")
    try:
        return read_curve(path)
    except (PlainDataError, OSError) as error:
        reason = error if isinstance(error, PlainDataError) else f"cannot be read ({error.strerror})"
        warn(f"{path} {reason}, so the report has no learning curve - correct it, or remove it")
        return None


def _integer(text: str) -> int:
    if not re.fullmatch("[0-9]{1,15}", text):
        raise ValueError(text)
    return int(text)


def _number(text: str) -> float | None:
    return value if abs(value := float(text)) <= LARGEST else None


class Chart(NamedTuple):
    """Lines over the epochs of a run, in the units of an SVG of `WIDTH` x `HEIGHT` whose y axis points down.

    Attributes:
        name: The name of the y axis.
        lines: The points (x, y) of each line by its name.
        y_ticks: The positions and values of the ticks of the y axis.
        x_ticks: The positions of the ticks of the x axis, and the epochs.
        best: The x of the best epoch, None without one.
    """

    name: str
    lines: dict[str, list[tuple[float, float]]]
    y_ticks: list[tuple[float, float]]
    x_ticks: list[tuple[float, int]]
    best: float | None


def charts(curve: LearningCurve) -> list[Chart]:
    """Lay out the losses and the validation mIoU, in percent."""
    losses = {"train": curve.values["train/loss"], "val": curve.values["val/loss"]}
    mious = {"val": [None if value is None else 100 * value for value in curve.values["val/miou"]]}
    present = [value for values in losses.values() for value in values if value is not None]
    loss_ticks = _ticks(min([0.0, *present]), max([0.0, *present]))
    return [_chart("loss", losses, curve, loss_ticks), _chart("mean IoU of val, %", mious, curve, _ticks(0, 100))]


def _chart(name: str, series: Mapping[str, Sequence[float | None]], curve: LearningCurve, ticks: list[float]) -> Chart:
    first, last = curve.epochs[0], curve.epochs[-1]

    def x(epoch: float) -> float:
        return WIDTH * (epoch - first) / (last - first) if last > first else WIDTH / 2

    def y(value: float) -> float:
        return HEIGHT * (ticks[-1] - value) / (ticks[-1] - ticks[0])

    lines = {}
    for label, values in series.items():
        pairs = zip(curve.epochs, values, strict=True)
        points = [(x(epoch), y(value)) for epoch, value in pairs if value is not None]
        stride = max(1, math.ceil(len(points) / MAX_POINTS))
        lines[label] = points[::-stride][::-1]  # from the end, so that the last epoch is among them
    return Chart(
        name,
        lines,
        [(y(tick), tick) for tick in ticks],
        [(x(epoch), epoch) for epoch in sorted({first, (first + last) // 2, last})],
        None if curve.best is None else x(curve.epochs[curve.best]),
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers at equal distances that enclose low and high.

    Examples:
        >>> _ticks(0, 1.12), _ticks(0, 100), _ticks(0, 0)
        ([0.0, 0.5, 1.0, 1.5], [0.0, 20.0, 40.0, 60.0, 80.0, 100.0], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    """
    span = high - low if high - low > 1 / LARGEST else 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 5 >= span)
    return [float(f"{step * count:.6g}") for count in range(math.floor(low / step), math.ceil((low + span) / step) + 1)]
