"""Who runs against whom: a training step or an inference pass of one network, made ready in its own way."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segdeconv.experiments.benchmarks.usual import UsualSegNet
from segdeconv.inference.network import Network
from segdeconv.losses import CrossEntropy
from segdeconv.models import FCN, SegmentationModel, SegNet, UNet
from segdeconv.optimization import sgd
from segdeconv.system.devices import autocast, fast_precision
from segdeconv.system.memory import keep_freed

Step = Callable[[], None]


class Task(NamedTuple):
    """What every contestant does: batch images of size (H, W) into so many classes, on one device."""

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
    """A step as tutorials have it: forward, cross entropy, backward, SGD."""
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
    """A pass to the classes of all pixels."""
    network.to(task.device).eval()
    image = task.images()

    def step() -> None:
        with torch.inference_mode(), autocast(precision, task.device):
            network(image).argmax(dim=1)

    return step


def our_training(network: SegmentationModel, task: Task, precision: str, *, compiled: bool = False) -> Step:
    """A step as `SegmentationTask` makes it, without Lightning around it."""
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


def our_inference(network: SegmentationModel, task: Task, precision: str) -> Step:
    """A pass as evaluate.py and predict.py make it."""
    prepared = Network(network.eval(), task.device, precision)
    image = task.images()

    def step() -> None:
        prepared(image).values.max(dim=1)

    return step


# Who takes part. The names are what the tables show; `USUAL` is what the others' ratios are to.

USUAL = "usual SegNet, float32"


def usual_segnet(task: Task, precision: str, training: bool) -> Step:
    """The SegNet of usual.py."""
    network = UsualSegNet(task.classes)
    return usual_training(network, task, precision) if training else usual_inference(network, task, precision)


def ours(
    task: Task, precision: str, training: bool, kind: type[SegmentationModel] = SegNet, *, compiled: bool = False
) -> Step:
    """SegNet, or another network on the same encoder, as train.py trains it, or evaluate.py uses it."""
    network = kind(task.classes)
    if training:
        return our_training(network, task, precision, compiled=compiled)
    return our_inference(network, task, precision)


def smp_unet(task: Task, precision: str, training: bool) -> Step:
    """segmentation-models-pytorch's U-Net on VGG16 with batch norm, channels last."""
    import segmentation_models_pytorch as smp

    network = smp.Unet("vgg16_bn", encoder_weights=None, classes=task.classes).to(memory_format=torch.channels_last)
    return usual_training(network, task, precision) if training else usual_inference(network, task, precision)


def runners(task: Task, *, training: bool) -> dict[str, Callable[[], Step]]:
    """Everyone who runs on this device, the usual SegNet first."""
    fast = fast_precision()
    short = fast.partition("-")[0]
    found: dict[str, Callable[[], Step]] = {USUAL: partial(usual_segnet, task, "32-true", training)}
    if fast != "32-true":
        found[f"usual SegNet, {short}"] = partial(usual_segnet, task, fast, training)
    found[f"segdeconv SegNet, {short}"] = partial(ours, task, fast, training)
    if task.device.type == "cuda":
        if training:
            found[f"segdeconv SegNet, {short}, compiled"] = partial(ours, task, fast, training, compiled=True)
        if find_spec("segmentation_models_pytorch"):
            found[f"segmentation-models-pytorch U-Net, {short}"] = partial(smp_unet, task, fast, training)
    return found


def peers(task: Task, *, training: bool) -> Mapping[str, Callable[[], Step]]:
    """The networks of the SegNet paper's table 6, all ours, on the same encoder."""
    fast = fast_precision()
    kinds: dict[str, type[SegmentationModel]] = {"SegNet": SegNet, "U-Net": UNet, "FCN-8s": FCN}
    return {name: partial(ours, task, fast, training, kind) for name, kind in kinds.items()}


def operations(network: nn.Module, task: Task, *, training: bool) -> int:
    """Multiplications and additions of one repetition, as torch counts them, without a number computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        logits = network.to("meta")(torch.empty(task.batch, 3, *task.size))
        if training:
            logits.sum().backward()
    return counter.get_total_flops()
