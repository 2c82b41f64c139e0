"""Teaching by painting: mean IoU after each stroke, from several starts, against every pixel and against new weights.

    python -c "from segdeconv.experiments.study import teaching; teaching.run('runs/teaching', '/data/CamVid')"

A script paints in place of a person: first a stroke of each class in the photo, then strokes inside the largest regions
where the network is wrong. After each stroke the network learns for some steps, as on the page of `label`. The same
strokes are then learned at once, also from new weights; and every pixel of all train photos is learned once, as the
score to compare with.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.datasets.camvid import CamVid
from segdeconv.data.datasets.shapes import Shapes
from segdeconv.data.preprocessing import resize_image, resize_mask
from segdeconv.evaluation.report import write_json
from segdeconv.serving.label.learning import Example, Kept, Learner, Scope
from segdeconv.serving.label.network import NOTHING, SMALL, open_network
from segdeconv.serving.label.strokes import IGNORE, Stroke, draw_stroke

STROKES_PER_PHOTO = 6
SHARE = 0.9  # of the score with every pixel, which is to be reached
STROKES = "stroke by stroke"
AT_ONCE, NEW_WEIGHTS = "the same strokes at once", "the same strokes at once from new weights"
EVERY_PIXEL = "every pixel"


class Task(NamedTuple):
    """What is taught.

    Attributes:
        train: (h, w, 3) uint8 images and (h, w) uint8 masks of class indices, 255 for ignored pixels.
        val: The same, to measure on.
        num_classes: Number of classes.
    """

    train: list[tuple[np.ndarray, np.ndarray]]
    val: list[tuple[np.ndarray, np.ndarray]]
    num_classes: int


class Point(NamedTuple):
    """A measurement.

    Attributes:
        strokes: Strokes so far.
        photos: Photos with a stroke.
        steps: Steps of learning so far.
        seconds: Their time on the processor, summed over its cores, encoders of painted photos included.
        miou: Mean IoU on val, 0..1.
    """

    strokes: int
    photos: int
    steps: int
    seconds: float
    miou: float


def camvid(root: str, learner: Learner, names: Sequence[str], *, photos: int, val: int) -> Task:
    """Return CamVid with photos spread over the drives.

    Args:
        root: Its folder.
        learner: The network, which sees photos at its own size.
        names: The classes; other pixels are ignored, or for a single class, a second one.
        photos: Number of train photos.
        val: Number of val photos.
    """
    splits = CamVid("train", root), CamVid("val", root)
    table = np.full(256, IGNORE, dtype=np.uint8)
    if len(names) == 1:
        table[: len(splits[0].classes)] = 1
    for index, name in enumerate(names):
        table[splits[0].classes.names.index(name)] = index
    num_classes = max(2, len(names))
    return Task(_read(splits[0], photos, learner, table), _read(splits[1], val, learner, table), num_classes)


def shapes(learner: Learner, *, photos: int, val: int) -> Task:
    """Return the synthetic objects against their background, which no network here has seen."""
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[: len(Shapes.classes)] = 1
    table[0] = 0
    splits = Shapes("train", num_train=200, side=192), Shapes("val", num_val=val, side=192)
    return Task(_read(splits[0], photos, learner, table), _read(splits[1], val, learner, table), 2)


def _read(
    dataset: SegmentationDataset, count: int, learner: Learner, table: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = []
    for index in np.linspace(0, len(dataset) - 1, count).round().astype(int):
        sample = dataset[int(index)]
        size = learner.size((sample.image.shape[0], sample.image.shape[1]))
        pairs.append((resize_image(sample.image, size), resize_mask(table[sample.mask], size)))
    return pairs


def next_stroke(mask: np.ndarray, painted: np.ndarray, prediction: np.ndarray | None) -> Stroke | None:
    """Return the stroke that a person would paint next: a line inside a region, as long as fits.

    Args:
        mask: (h, w) uint8, the true class indices.
        painted: (h, w) uint8, what is painted so far.
        prediction: (h, w) uint8 class indices; None before the network has learned.

    Returns:
        A stroke in the largest region of a class that is not painted yet, else in the largest region where the
        prediction is wrong; None if there is none.
    """
    areas = []
    new = [label for label in np.unique(mask) if label != IGNORE and not (painted == label).any()]
    for label in new or np.unique(mask[mask != IGNORE]):
        wrong = mask == label
        if not new:
            if prediction is None:
                continue
            wrong &= (prediction != label) & (painted == IGNORE)
        count, regions, statistics, _ = cv2.connectedComponentsWithStats(wrong.astype(np.uint8))
        areas += [(statistics[i, cv2.CC_STAT_AREA], int(label), regions == i) for i in range(1, count)]
    if not areas:
        return None
    _, label, region = max(areas, key=lambda area: area[0])
    inside = cv2.distanceTransform(np.pad(region.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    radius = float(np.clip(inside.max() / 2, 1, 6))
    y, x = np.unravel_index(inside.argmax(), inside.shape)
    rows, columns = np.nonzero(inside > radius)
    best, length = (int(y), int(x)), 0.0
    for row, column in list(zip(rows, columns, strict=True))[:: max(1, len(rows) // 300)]:
        along = np.linspace(0, 1, 24)
        line = (y + along * (row - y)).round().astype(int), (x + along * (column - x)).round().astype(int)
        distance = float(np.hypot(row - y, column - x))
        if distance > length and (inside[line] > radius).all():
            best, length = (int(row), int(column)), distance
    points = [[float(x) + 0.5, float(y) + 0.5], [best[1] + 0.5, best[0] + 0.5]]
    return {"tool": "brush", "class": label, "radius": radius, "points": points}


def miou(learner: Learner, task: Task, kept: Sequence[Kept]) -> float:
    """Return the mean IoU on val."""
    hits, unions = np.zeros(task.num_classes), np.zeros(task.num_classes)
    for each, (_, mask) in zip(kept, task.val, strict=True):
        valid = mask != IGNORE
        predicted = learner.probabilities(each).argmax(dim=0).numpy()[valid]
        for label in range(task.num_classes):
            of_class, found = mask[valid] == label, predicted == label
            hits[label] += (of_class & found).sum()
            unions[label] += (of_class | found).sum()
    return float((hits / np.maximum(unions, 1)).mean())


class Teaching:
    """A network with its photos, which is taught and measured.

    Args:
        start: See `open_network`.
        task: Returns the task for a learner.
        scope: What learns.
        seed: Of the order of the train photos, and of what is random in learning.
    """

    def __init__(
        self,
        start: str,
        task: Callable[[Learner], Task],
        *,
        scope: Scope = "decoder",
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.learner, _ = open_network(Path("none"), start)
        self.learner.random = np.random.default_rng(seed)
        self.task = task(self.learner)
        np.random.default_rng(seed).shuffle(self.task.train)
        self.scope = scope
        self.learner.set_classes([f"class {index}" for index in range(self.task.num_classes)])
        self.seconds, self.steps = 0.0, 0
        self.version = -1
        self.kept: list[Kept] = []

    def learn(self, painted: dict[int, np.ndarray], steps: int) -> None:
        """Learn from masks by photo."""
        started = time.process_time()
        examples = [
            Example(self.learner.keep(self.task.train[index][0]), self.task.train[index][0], mask)
            for index, mask in painted.items()
        ]
        learned = self.learner.learn(lambda: examples, seconds=600, max_steps=steps, scope=self.scope)
        self.seconds += time.process_time() - started
        self.steps += learned.steps

    def predict(self, index: int) -> np.ndarray:
        """Return the (h, w) uint8 class indices of a train photo."""
        kept = self.learner.keep(self.task.train[index][0])
        return self.learner.probabilities(kept).argmax(dim=0).numpy().astype(np.uint8)

    def score(self) -> float:
        """Return the mean IoU on val."""
        if self.version != self.learner.encoder_version:
            self.version = self.learner.encoder_version
            self.kept = [self.learner.keep(image) for image, _ in self.task.val]
        return miou(self.learner, self.task, self.kept)


def paint(teaching: Teaching, *, strokes: int, steps: int, every: int = 2) -> tuple[list[Point], list[Any]]:
    """Paint stroke by stroke, learn after each, and measure; return the measurements and the strokes by photo."""
    painted: dict[int, np.ndarray] = {}
    script: list[tuple[int, Stroke]] = []
    points = [Point(0, 0, 0, 0.0, teaching.score())]
    photo = 0
    while len(script) < strokes and photo < len(teaching.task.train):
        image, mask = teaching.task.train[photo]
        size = (image.shape[0], image.shape[1])
        painted[photo] = np.full(size, IGNORE, dtype=np.uint8)
        for _ in range(STROKES_PER_PHOTO):
            learned = len(np.unique(np.concatenate([each.ravel() for each in painted.values()]))) > 2
            stroke = next_stroke(mask, painted[photo], teaching.predict(photo) if learned else None)
            if stroke is None or len(script) == strokes:
                break
            draw_stroke(painted[photo], stroke, size)
            script.append((photo, stroke))
            if len(np.unique(np.concatenate([each.ravel() for each in painted.values()]))) > 2:
                teaching.learn(painted, steps)
            if len(script) % every == 0:
                points.append(Point(len(script), photo + 1, teaching.steps, teaching.seconds, teaching.score()))
                print(f"  {points[-1]}", flush=True)
        photo += 1
    return points, script


def replay(
    teaching: Teaching,
    script: Sequence[tuple[int, Stroke]],
    *,
    steps: int,
    painted: dict[int, np.ndarray] | None = None,
) -> list[Point]:
    """Learn at once from strokes that another network was taught with, or from given masks, and measure.

    Args:
        teaching: The network.
        script: Strokes by photo.
        steps: Steps of learning.
        painted: Masks by photo in place of strokes.
    """
    if painted is None:
        painted = {}
        for photo, stroke in script:
            image = teaching.task.train[photo][0]
            size = (image.shape[0], image.shape[1])
            draw_stroke(painted.setdefault(photo, np.full(size, IGNORE, dtype=np.uint8)), stroke, size)
    teaching.learn(painted, steps)
    points = [Point(len(script), len(painted), teaching.steps, teaching.seconds, teaching.score())]
    print(f"  {points[-1]}", flush=True)
    return points


def run(
    out: str | Path,
    camvid_root: str,
    *,
    tasks: Sequence[str] = ("camvid", "tree", "shapes"),
    seeds: Sequence[int] = (0, 1, 2),
    photos: int = 16,
    val: int = 12,
    strokes: int = 12,
    steps: int = 8,
    supervised_steps: int = 100,
) -> dict[str, Any]:
    """Teach each task, compare, write teaching.json and print its summary.

    Args:
        out: The folder.
        camvid_root: The folder of CamVid; for `shapes` alone it is not read.
        tasks: Of `camvid` (road, sky and building), `tree` (against all else) and `shapes`.
        seeds: Of the order of the photos, and of what is random in learning.
        photos: Number of train photos.
        val: Number of val photos.
        strokes: Number of strokes.
        steps: Steps of learning after each; of the same order as five seconds on two idle CPU cores.
        supervised_steps: Steps of learning from every pixel, with the first seed only.

    Returns:
        What teaching.json holds: by task and seed, the measurements of each run as dicts of `Point`.
    """
    builders: dict[str, Callable[[Learner], Task]] = {
        "camvid": lambda learner: camvid(camvid_root, learner, ("road", "sky", "building"), photos=photos, val=val),
        "tree": lambda learner: camvid(camvid_root, learner, ("tree",), photos=photos, val=val),
        "shapes": lambda learner: shapes(learner, photos=photos, val=val),
    }
    results: dict[str, Any] = {}
    for name in tasks:
        task, by_seed = builders[name], results.setdefault(name, {})
        for seed in seeds:
            runs = by_seed.setdefault(f"seed{seed}", {})

            def measured(label: str, points: Sequence[Point], runs: dict[str, Any] = runs) -> None:
                runs[label] = [point._asdict() for point in points]
                write_json(results, Path(out) / "teaching.json")

            def started(label: str, name: str = name, seed: int = seed) -> None:
                print(f"{name}, seed {seed}: {label}", flush=True)

            started(STROKES)
            taught, script = paint(Teaching(SMALL, task, seed=seed), strokes=strokes, steps=steps)
            measured(STROKES, taught)
            total = max(1, taught[-1].steps)
            for label, start in ((AT_ONCE, SMALL), (NEW_WEIGHTS, NOTHING)):
                started(label)
                scope: Scope = "all" if start == NOTHING else "decoder"
                measured(label, replay(Teaching(start, task, scope=scope, seed=seed), script, steps=total))
            if seed == seeds[0]:
                started(EVERY_PIXEL)
                teaching = Teaching(SMALL, task, scope="all", seed=seed)
                complete = {index: mask for index, (_, mask) in enumerate(teaching.task.train)}
                measured(EVERY_PIXEL, replay(teaching, [], steps=supervised_steps, painted=complete))
    print("\n".join(summary(results)), flush=True)
    return results


def strokes_until(points: Sequence[Any], goal: float) -> int | None:
    """Return the strokes of the first measurement, a dict of `Point`, that reaches a mean IoU; None if none does."""
    return next((point["strokes"] for point in points if point["miou"] >= goal), None)


def summary(results: dict[str, Any]) -> list[str]:
    """Return lines for people: for each task and run the last mean IoU and the strokes until SHARE, seed by seed."""
    lines = []
    for name, by_seed in results.items():
        best = next(runs[EVERY_PIXEL][-1]["miou"] for runs in by_seed.values() if EVERY_PIXEL in runs)
        lines.append(f"{name}: {EVERY_PIXEL} {best:.1%}; {SHARE:.0%} of it is {SHARE * best:.1%}")
        for label in (STROKES, AT_ONCE, NEW_WEIGHTS):
            of_run = [runs[label] for runs in by_seed.values()]
            scores = ", ".join(f"{points[-1]['miou']:.1%}" for points in of_run)
            seconds = ", ".join(f"{points[-1]['seconds']:.0f}" for points in of_run)
            line = f"  {label}: {scores} after {of_run[0][-1]['strokes']} strokes ({seconds} s)"
            if len(of_run[0]) > 1:
                reached = [strokes_until(points, SHARE * best) for points in of_run]
                counts = ", ".join("-" if each is None else str(each) for each in reached)
                line += f"; {SHARE:.0%} after {counts} strokes"
            lines.append(line)
    return lines
