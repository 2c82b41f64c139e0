"""Contestants of the benchmarks: training steps and inference passes of several implementations."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segdeconv.experiments.benchmarks.usual import UsualSegNet
from segdeconv.inference.network import Network, prepare_for_inference
from segdeconv.inference.quantization import INT8, is_supported, measure_ranges
from segdeconv.losses import CrossEntropy
from segdeconv.models import FCN, FPN, SegmentationModel, SegNet, SegNetBasic, UNet
from segdeconv.optimization import sgd
from segdeconv.system.devices import autocast, fast_precision
from segdeconv.system.memory import keep_freed

Step = Callable[[], None]


class Task(NamedTuple):
    """The input and output of every contestant.

    Attributes:
        batch: Number of images per batch.
        size: Input size (H, W).
        classes: Number of classes.
        device: Device of the network and the images.
    """

    batch: int
    size: tuple[int, int]
    classes: int
    device: torch.device

    def images(self) -> Tensor:
        return torch.randn(self.batch, 3, *self.size, generator=torch.Generator().manual_seed(0)).to(self.device)

    def mask(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.classes, (self.batch, *self.size), generator=generator).to(self.device)


def usual_training(network: nn.Module, task: Task, precision: str) -> Step:
    """Return a training step as in tutorials: forward, cross-entropy, backward, SGD."""
    network.to(task.device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    image, mask = task.images(), task.mask()

    def step() -> None:
        optimizer.zero_grad()
        with autocast(precision, task.device):
            loss = F.cross_entropy(network(image).float(), mask)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def usual_inference(network: nn.Module, task: Task, precision: str) -> Step:
    """Return a forward pass that ends with the class of every pixel."""
    network.to(task.device).eval()
    image = task.images()

    def step() -> None:
        with torch.inference_mode(), autocast(precision, task.device):
            network(image).argmax(dim=1)

    return step


def segdeconv_training(network: SegmentationModel, task: Task, precision: str, *, compiled: bool = False) -> Step:
    """Return a training step as in `SegmentationTask`, without Lightning."""
    keep_freed(task.device)
    network.to(task.device).to(memory_format=torch.channels_last).train()
    if compiled:
        network.compile()
    loss = CrossEntropy(ignore_index=255).to(task.device)
    optimizer = sgd(network, lr=1e-3)
    image, mask = task.images().contiguous(memory_format=torch.channels_last), task.mask()

    def step() -> None:
        optimizer.zero_grad()
        with autocast(precision, task.device):
            total, normaliser = loss.sums(network(image), mask)
        (total / normaliser).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def segdeconv_inference(network: SegmentationModel, task: Task, precision: str) -> Step:
    """Return a forward pass as in evaluate.py and predict.py."""
    prepared = Network(network.eval(), task.device, precision)
    image = task.images()

    def step() -> None:
        prepared(image).values.max(dim=1)

    return step


# The contestants. The tables show their names; ratios are relative to `USUAL`.

USUAL = "usual SegNet, float32"


def usual_segnet(task: Task, precision: str, training: bool, *, channels_last: bool = False) -> Step:
    """Return a step of the SegNet in usual.py, in torch's default memory format or channels last."""
    network = UsualSegNet(task.classes)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    return usual_training(network, task, precision) if training else usual_inference(network, task, precision)


def segdeconv_step(
    task: Task, precision: str, training: bool, kind: type[SegmentationModel] = SegNet, *, compiled: bool = False
) -> Step:
    """Return a step of SegNet or another network on the same encoder, as in train.py or evaluate.py."""
    network = kind(task.classes)
    if training:
        return segdeconv_training(network, task, precision, compiled=compiled)
    return segdeconv_inference(network, task, precision)


def smp_unet(task: Task, precision: str, training: bool) -> Step:
    """Return a step of segmentation-models-pytorch's U-Net on VGG16 with batch norm, in channels-last format."""
    import segmentation_models_pytorch as smp

    network = smp.Unet("vgg16_bn", encoder_weights=None, classes=task.classes).to(memory_format=torch.channels_last)
    return usual_training(network, task, precision) if training else usual_inference(network, task, precision)


def implementations(task: Task, *, training: bool) -> dict[str, Callable[[], Step]]:
    """Return the implementations for this device by name, the usual SegNet first."""
    fast = fast_precision()
    short = fast.partition("-")[0]
    steps: dict[str, Callable[[], Step]] = {USUAL: partial(usual_segnet, task, "32-true", training)}
    if fast != "32-true":
        steps[f"usual SegNet, {short}"] = partial(usual_segnet, task, fast, training)
    name = f"usual SegNet, {'float32' if short == '32' else short}, channels last"
    steps[name] = partial(usual_segnet, task, fast, training, channels_last=True)
    steps[f"segdeconv SegNet, {short}"] = partial(segdeconv_step, task, fast, training)
    if task.device.type == "cuda" and training:
        steps[f"segdeconv SegNet, {short}, compiled"] = partial(segdeconv_step, task, fast, training, compiled=True)
    if task.device.type == "cpu" and not training and is_supported():
        steps["segdeconv SegNet, int8"] = partial(int8_step, task, SegNet)
    if find_spec("segmentation_models_pytorch"):
        steps[f"segmentation-models-pytorch U-Net, {short}"] = partial(smp_unet, task, fast, training)
    return steps


def int8_step(task: Task, kind: type[SegmentationModel]) -> Step:
    """Return an inference pass in 8-bit integers, whose ranges are those of one random image."""
    network = kind(task.classes).eval()
    image = task.images().contiguous(memory_format=torch.channels_last)
    ranges = measure_ranges(prepare_for_inference(network, task.device, "32-true"), [image[:1]])
    prepared = Network(network, task.device, INT8, ranges=ranges)

    def step() -> None:
        prepared(image).values.max(dim=1)

    return step


def int8_pairs(task: Task) -> dict[str, tuple[Callable[[], Step], Callable[[], Step]]]:
    """Return inference passes in the precision that is fast here and in 8 bits, by the name of the network."""
    kinds: dict[str, type[SegmentationModel]] = {
        "SegNet": SegNet, "SegNet-Basic": SegNetBasic, "U-Net": UNet, "FCN-8s": FCN, "FPN": FPN,
    }  # fmt: skip
    fast = fast_precision()
    return {
        name: (partial(segdeconv_step, task, fast, False, kind), partial(int8_step, task, kind))
        for name, kind in kinds.items()
    }


def peers(task: Task, *, training: bool) -> Mapping[str, Callable[[], Step]]:
    """Return segdeconv's networks of the SegNet paper's table 6, which share an encoder, by name."""
    fast = fast_precision()
    kinds: dict[str, type[SegmentationModel]] = {"SegNet": SegNet, "U-Net": UNet, "FCN-8s": FCN}
    return {name: partial(segdeconv_step, task, fast, training, kind) for name, kind in kinds.items()}


def operations(network: nn.Module, task: Task, *, training: bool) -> int:
    """Return the number of multiplications and additions of one repetition, counted by torch on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        logits = network.to("meta")(torch.empty(task.batch, 3, *task.size))
        if training:
            logits.sum().backward()
    return counter.get_total_flops()
