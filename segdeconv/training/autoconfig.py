"""Choice of a run's settings from its images and masks and the machine, for the keys that nobody has set.

The idea is nnU-Net's (Isensee et al. 2021, https://arxiv.org/abs/1809.10486, "Design principles"), for two-dimensional
images and minutes instead of days. The fixed values below were measured on small data sets: docs/own-data.md.

`choose` runs once, before the first step of a new run. The result is an ordinary config: it is written to config.yaml
and the checkpoints, and a resumed run reads it.
"""

import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from segdeconv.config import TARGET, locate
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.inspection import Inspection, map_with_progress
from segdeconv.data.loading import collate_training, for_network
from segdeconv.data.module import build_pipeline, normalisation
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.errors import UsageError, did_you_mean
from segdeconv.losses import build_loss, loss_sums
from segdeconv.models import SegmentationModel, build_model
from segdeconv.optimization import build_optimizer
from segdeconv.system.devices import autocast, best_device, resolve_precision
from segdeconv.system.memory import available, ran_out_of_memory
from segdeconv.training.memory import estimate
from segdeconv.training.processes import launched_from_outside

# The keys that can be chosen, in the order of the table. A group, such as augment, is chosen whole.
KEYS = (
    "dataset.size", "dataset.crop", "dataset.batch_size", "augment", "loss.class_weighting",
    "loss.class_weighting_power", "model.encoder_addition", "model.encoder_concatenation", "optimizer", "schedule",
    "trainer.gradient_clip_val", "model.width", "trainer.recalibration_batches", "trainer.max_epochs",
    "trainer.check_val_every_n_epoch",
)  # fmt: skip

NUM_MASKS = 40  # masks that are measured, evenly spaced in the train split
LONG_SIDE = 1024  # pixels; longer images are reduced if their structures are thick enough
THICK = 12  # pixels that the thinnest class keeps when images are reduced
CROP_AREA = 160 * 160  # pixels of a crop on a CPU; a GPU takes four times as many
LEAST_AREA = 64 * 64  # where memory is short
WIDTHS = (0.25, 0.5, 1.0)
MIN_STEPS, MAX_STEPS = 600, 20_000
WIDER_STEPS = 4000  # a wider network is chosen if so many of its steps fit into the time
UNMEASURED_STEPS = 3000  # where several processes would measure different times
VALIDATIONS = 20
VALIDATION_SHARE = 0.15  # of the time
RARE = 0.03  # share of pixels below which a class is weighted
UPRIGHT = 0.08  # distance of a class's mean row from the centre, relative to the height


class Choice(NamedTuple):
    """A chosen setting.

    Attributes:
        words: The setting as arguments of train.py.
        reason: The reason, for the table.
    """

    words: str
    reason: str


@dataclass(frozen=True)
class Measured:
    """What the choices depend on.

    Attributes:
        num_images: Number of training images.
        size: Median (H, W) of the training images.
        equal_sizes: All training images have one size.
        shares: Share of each class in the pixels that are not ignored.
        thickness: Thickness in pixels of each class that occurs, twice the area divided by the length of the
            boundary: the width of a line, the radius of a disc.
        upright: Classes differ in height within the image, as sky and road do.
    """

    num_images: int
    size: tuple[int, int]
    equal_sizes: bool
    shares: tuple[float, ...]
    thickness: tuple[float, ...]
    upright: bool


def check_keys(keys: Sequence[str]) -> None:
    """Check the value of `auto`.

    Raises:
        UsageError: A key cannot be chosen.
    """
    for key in keys:
        if key not in KEYS:
            raise UsageError(f"auto: {key} cannot be chosen from the data - {did_you_mean(key, KEYS)}")


def unset_keys(typed: set[str]) -> list[str]:
    """Return the keys to choose, given the keys and groups that a command line and its experiment set."""
    return [
        key
        for key in KEYS
        if not any(other == key or other.startswith(f"{key}.") for other in typed)
        and not (key == "model.width" and "model.stages" in typed)
        and not (key == "trainer.max_epochs" and "trainer.max_steps" in typed)
    ]


def choose(
    config: Mapping[str, Any],
    splits: Sequence[SegmentationDataset],
    inspections: Sequence[Inspection],
    *,
    check: Callable[[Mapping[str, Any]], dict[str, Any]],
    seconds: float,
    start: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[Choice]]:
    """Choose values for the keys in `config["auto"]`.

    Args:
        config: The checked config.
        splits: The train and val split.
        inspections: Their inspections.
        check: `check_config`.
        seconds: The time that training may take, `config["time_budget"]`.
        start: The `model` node of the checkpoint whose weights training starts from, if there is one.

    Returns:
        The checked config with the choices, and the choices.
    """
    measured = measure(splits[0], inspections[0])
    if config["dataset"]["train_on_val"]:
        measured = replace(measured, num_images=sum(map(len, splits)))
    draft = _Draft(copy.deepcopy(dict(config)), {})
    accelerator = config["trainer"]["accelerator"]
    device = best_device() if accelerator == "auto" else torch.device({"gpu": "cuda"}.get(accelerator, accelerator))
    _choose_augmentation(draft, measured, coloured=splits[0].channels == 3 and not splits[0].as_stored)
    _choose_loss(draft, measured)
    options = inspect.signature(locate(config["model"], "model")).parameters
    if start is not None and start[TARGET] == config["model"][TARGET]:
        for option in ("encoder_addition", "encoder_concatenation"):
            if option in options:
                draft.set(f"model.{option}", bool(start.get(option)), "as the network that the weights come from")
    elif "encoder_addition" in options:
        reason = "keeps thin structures; for two classes, model=unet may score higher"
        draft.set("model.encoder_addition", True, reason)
    _choose_optimizer(draft)
    with torch.device("meta"):
        least = build_model(config["model"], len(splits[0].classes), splits[0].channels, fresh=True).minimum_size

    def timed(config: Mapping[str, Any]) -> float | None:
        return step_seconds(config, splits, inspections, device)

    area = CROP_AREA * (4 if device.type == "cuda" else 1)
    _choose_input(draft, measured, area, least)
    draft.config = check(draft.config)
    if launched_from_outside():  # several processes would each measure another time and choose other values
        draft.set("model.width", WIDTHS[0], "times are not measured in several processes")
        step = None
    else:
        step = _choose_width(draft, timed, seconds)
        while step is None and draft.is_open("dataset.crop") and area > LEAST_AREA:
            area //= 2  # a step did not fit into memory
            _choose_input(draft, measured, area, least)
            step = _choose_width(draft, timed, seconds)
    _choose_length(draft, measured, inspections[1], step, seconds)
    choices = [draft.choices[key] for key in KEYS if key in draft.choices]
    return check(draft.config), choices


@dataclass
class _Draft:
    """A config in the course of the choices."""

    config: dict[str, Any]
    choices: dict[str, Choice]

    def is_open(self, key: str) -> bool:
        return key in self.config["auto"]

    def set(self, key: str, value: Any, reason: str, words: str | None = None) -> None:
        """Set a key or group, unless the person has set it."""
        if not self.is_open(key):
            return
        group, _, name = key.partition(".")
        if name:
            self.config[group] = {**self.config[group], name: value}
        else:
            self.config[group] = value
        self.choices[key] = Choice(words or f"{key}={_word(value)}", reason)


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def table(choices: Sequence[Choice]) -> str:
    """Format the choices as a table, one line each."""
    width = max(len(choice.words) for choice in choices)
    head = "chosen for these images and this machine; set a key to change it, or auto=[] for fixed defaults:"
    return "\n".join([head, *(f"  {choice.words:<{width}}  {choice.reason}" for choice in choices)])


def measure(train: SegmentationDataset, inspection: Inspection) -> Measured:
    """Measure the sizes and masks of the train split."""
    sizes = [(height, width) for height, width, count in inspection.sizes for _ in range(count)]
    counts = np.array(inspection.pixels[:-1], dtype=float)
    indices = np.unique(np.linspace(0, len(train) - 1, min(NUM_MASKS, len(train))).round().astype(int)).tolist()
    masks = [_measure_mask(mask, len(train.classes)) for mask in _read_masks(train, indices)]
    areas, borders, rows = (np.sum([mask[part] for mask in masks], axis=0) for part in range(3))
    present = areas > 0
    thickness = 2 * areas[present] / np.maximum(borders[present], 1)
    heights = rows[present] / areas[present]
    common = areas[present] > 0.01 * areas.sum()
    median = np.median(np.array(sizes), axis=0)
    return Measured(
        len(train),
        (int(median[0]), int(median[1])),
        len(set(sizes)) == 1,
        tuple((counts / max(1.0, counts.sum())).tolist()),
        tuple(thickness.tolist()),
        bool(np.any(np.abs(heights[common] - 0.5) > UPRIGHT)),
    )


def _read_masks(train: SegmentationDataset, indices: Sequence[int]) -> list[np.ndarray]:
    return map_with_progress(len(indices), lambda position: train[indices[position]].mask, "measuring masks")


def _measure_mask(mask: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the area, the length of the boundary and the sum of relative rows (0..1) of each class."""
    areas = np.bincount(mask.ravel(), minlength=256)[:num_classes]
    borders = np.zeros(num_classes)
    for first, second in ((mask[:-1], mask[1:]), (mask[:, :-1], mask[:, 1:])):
        differing = first != second
        for side in (first, second):
            borders += np.bincount(side[differing], minlength=256)[:num_classes]
    by_row = np.stack([np.bincount(row, minlength=256)[:num_classes] for row in mask])
    return areas, borders, ((np.arange(len(mask)) + 0.5) / len(mask)) @ by_row


def _choose_input(draft: _Draft, measured: Measured, area: int, least: int) -> None:
    """Choose scale, crop and batch size.

    Args:
        draft: The config.
        measured: The measurements.
        area: Pixels of a crop.
        least: Least side of the network's input.
    """
    (height, width), dataset = measured.size, draft.config["dataset"]
    factor, thin = 1, min(measured.thickness, default=1.0)
    while measured.equal_sizes and max(height, width) / factor > LONG_SIDE and thin / (factor + 1) >= THICK:
        factor += 1
    if factor > 1:
        size = [round(height / factor), round(width / factor)]
        draft.set("dataset.size", size, f"1/{factor}: the thinnest class is {thin:.0f} pixels thick")
    else:
        known = f"{height}x{width}" if measured.equal_sizes else f"about {height}x{width}"
        draft.set("dataset.size", None, f"images keep their own scale, {known}")
    scaled = draft.config["dataset"]["size"] or (height, width)
    crop = _crop(scaled, area, least)
    covered = crop[0] * crop[1] / (scaled[0] * scaled[1])
    if draft.is_open("dataset.size") or dataset["size"] is None:  # a typed size alone is trained on whole
        draft.set("dataset.crop", crop, f"{min(1.0, covered):.0%} of an image")
    batch = _batch_size(measured.num_images)
    left = measured.num_images % batch
    reason = f"leaves {left} of {measured.num_images} images out of an epoch, others each time"
    draft.set("dataset.batch_size", batch, reason if left else f"divides {measured.num_images} images")


def _choose_augmentation(draft: _Draft, measured: Measured, *, coloured: bool) -> None:
    if not measured.upright:
        draft.set("augment", TURNS, "the classes show no up direction", "augment=turns")
    elif coloured:
        draft.set("augment", STREET, "classes lie high or low in the images", "augment=street")
    else:  # colour transforms take 8-bit RGB only
        moving = {name: node for name, node in STREET.items() if name != "light"}
        words = "augment=street augment.light=null"
        draft.set("augment", moving, "classes lie high or low in the images, which are not RGB", words)


STREET: dict[str, Any] = {
    "flip": {TARGET: "albumentations.HorizontalFlip", "p": 0.5},
    "scale": {TARGET: "albumentations.RandomScale", "scale_limit": [-0.25, 0.75], "p": 0.9},
    "light": {
        TARGET: "albumentations.ColorJitter", "brightness": [0.7, 1.3], "contrast": [0.7, 1.3],
        "saturation": [0.6, 1.4], "hue": [-0.05, 0.05], "p": 0.8,
    },
}  # fmt: skip
TURNS: dict[str, Any] = {
    "flip": {TARGET: "albumentations.HorizontalFlip", "p": 0.5},
    "turn": {TARGET: "albumentations.RandomRotate90", "p": 0.75},
}


def _crop(size: Sequence[int], area: int, least: int = 32) -> list[int]:
    """Return the crop of about this area and the aspect of the images, in multiples of 32, not beyond the image.

    Examples:
        >>> _crop((360, 480), 160 * 160), _crop((100, 100), 160 * 160), _crop((360, 480), 160 * 160, 193)
        ([128, 192], [128, 128], [224, 224])
    """
    height, width = size
    shrink = min(1.0, math.sqrt(area / (height * width)))
    sides = [round(side * shrink / 32) if shrink < 1 else math.ceil(side / 32) for side in size]
    return [32 * max(side, math.ceil(least / 32)) for side in sides]


def _batch_size(num_images: int) -> int:
    """Return the batch size, 3 to 6, that leaves the fewest images out of an epoch, if equal nearest to 4.

    Examples:
        >>> _batch_size(24), _batch_size(30), _batch_size(29), _batch_size(2)
        (4, 5, 4, 2)
    """
    if num_images < 3:
        return num_images
    return min((4, 5, 3, 6), key=lambda batch: (num_images % batch, abs(batch - 4)) if batch <= num_images else (9, 9))


def _choose_loss(draft: _Draft, measured: Measured) -> None:
    rarest = min((share for share in measured.shares if share > 0), default=1.0)
    if rarest < RARE:
        draft.set("loss.class_weighting", "median_frequency", f"the rarest class has {rarest:.1%} of the pixels")
        draft.set("loss.class_weighting_power", 0.5, "half of the balance, in logarithms")


def _choose_optimizer(draft: _Draft) -> None:
    draft.set(
        "optimizer", {TARGET: "segdeconv.optimization.muon", "lr": 0.005}, "fastest on small sets",
        "optimizer=muon optimizer.lr=0.005",
    )  # fmt: skip
    draft.set(
        "schedule", {TARGET: "segdeconv.optimization.Cosine", "warmup_steps": 50}, "decays to 0 at the last step",
        "schedule=cosine schedule.warmup_steps=50",
    )  # fmt: skip
    draft.set("trainer.gradient_clip_val", 5.0, "against rare large steps")
    draft.set(
        "trainer.recalibration_batches", 16, "statistics of batch norm are those of the weights, in short runs too"
    )


def _choose_width(draft: _Draft, timed: Callable[[Mapping[str, Any]], float | None], seconds: float) -> float | None:
    """Choose the width of a VGG network, and return the seconds of a step, None if they are not known."""
    model = draft.config["model"]
    if "stages" not in inspect.signature(locate(model, "model")).parameters or model.get("stages"):
        return timed(draft.config)
    step = None
    for width in WIDTHS if draft.is_open("model.width") else (model["width"],):
        now = timed({**draft.config, "model": {**model, "width": width}})
        if step is not None and (now is None or seconds / now < WIDER_STEPS):
            break
        chosen, step = width, now
        if now is None:
            break
    wider = f"{WIDER_STEPS} steps of a wider network do not fit into time_budget"
    draft.set("model.width", chosen, wider if chosen < WIDTHS[-1] else "the published width fits into time_budget")
    return step


def step_seconds(
    config: Mapping[str, Any],
    splits: Sequence[SegmentationDataset],
    inspections: Sequence[Inspection],
    device: torch.device,
) -> float | None:
    """Measure the seconds of a training step, from the files to the update; None if it does not fit into memory.

    Args:
        config: The checked config.
        splits: The train and val split.
        inspections: Their inspections.
        device: The device to train on.
    """
    train, seed = splits[0], config["seed"]
    node = {**normalisation(config["dataset"], train, inspections[0]), "cache": "none"}
    pipeline = build_pipeline(node, config["augment"], *splits, seed=seed)
    precision = resolve_precision(config["trainer"]["precision"], device=device)
    model = build_model(config["model"], len(train.classes), pipeline.preprocessing.channels, fresh=True)
    loss = build_loss(config["loss"], class_weights=[1.0] * len(train.classes), ignore_index=train.classes.ignore_index)
    optimizer = build_optimizer(config["optimizer"], model)
    size = pipeline.samples[0, 0]["mask"].shape
    free = available(device)
    memory = estimate(model, loss, optimizer, size, batch_size=pipeline.batch_size, device=device, precision=precision)
    if free and memory and memory.total - memory.program > 0.7 * free:
        return None
    model.to(device).to(memory_format=torch.channels_last).train()
    loss.to(device)
    times = []
    for epoch in range(3):
        started = time.perf_counter()
        indices = range(min(pipeline.batch_size, len(train)))
        batch = collate_training([pipeline.samples[epoch, index] for index in indices])
        try:
            run_step(model, loss, optimizer, batch, pipeline.preprocessing, device, precision)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            return None
        times.append(time.perf_counter() - started)
    return min(times)


def run_step(
    model: SegmentationModel,
    loss: nn.Module,
    optimizer: Optimizer,
    batch: Mapping[str, Any],
    preprocessing: Preprocessing,
    device: torch.device,
    precision: str,
) -> float:
    """Run one training step on a batch of `collate_training`, outside of Lightning, and return the loss."""
    on_device = {name: batch[name].to(device) for name in ("image", "mask")}
    normalised = for_network(on_device, preprocessing)
    with autocast(precision, device):
        total, normaliser = loss_sums(loss, model.supervised(normalised["image"]), normalised["mask"])
    mean = total / normaliser.clamp(min=1.0)
    optimizer.zero_grad()
    mean.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(mean.detach())


def _choose_length(draft: _Draft, measured: Measured, val: Inspection, step: float | None, seconds: float) -> None:
    dataset, budget = draft.config["dataset"], draft.config["time_budget"]
    per_epoch = max(1, measured.num_images // dataset["batch_size"])
    validations = VALIDATIONS
    if step is None:
        epochs = max(1, round(UNMEASURED_STEPS / per_epoch))
        reason = f"{epochs * per_epoch} steps; times were not measured"
    else:
        trained = math.prod(dataset["crop"] or dataset["size"] or measured.size)
        sizes = [(dataset["size"] or (height, width), count) for height, width, count in val.sizes]
        batches = sum(math.prod(size) * count for size, count in sizes) / (trained * dataset["batch_size"])
        # A pass without gradients takes about a third of a training step of as many pixels, and the figures a second.
        validation = step / 3 * (batches + draft.config["trainer"]["recalibration_batches"]) + 1.0
        validations = int(max(4, min(VALIDATIONS, VALIDATION_SHARE * seconds / validation)))
        steps = (seconds - validations * validation) / step
        epochs = max(1, round(min(MAX_STEPS, max(MIN_STEPS, steps)) / per_epoch))
        every = math.ceil(epochs / validations)
        epochs = every * max(1, round(epochs / every))  # so that the last epoch is validated
        minutes = (epochs * per_epoch * step + validations * validation) / 60
        reason = f"{epochs * per_epoch} steps, about {minutes:.0f} min; time_budget={budget}"
        if 60 * minutes > 1.2 * seconds:
            reason += " is too short to train" if epochs > 1 else " is shorter than an epoch"
    draft.set("trainer.max_epochs", epochs, reason)
    every = max(1, math.ceil(draft.config["trainer"]["max_epochs"] / validations))
    draft.set("trainer.check_val_every_n_epoch", every, f"at most {validations} validations")
