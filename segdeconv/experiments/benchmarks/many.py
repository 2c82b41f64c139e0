"""Prediction of many image files, compared with the network alone and with the loops of tutorials."""

import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from segdeconv.checkpoints import checkpoint
from segdeconv.data.datasets.shapes import Shapes
from segdeconv.experiments.benchmarks.contestants import Step, Task
from segdeconv.inference.batch import BatchPrediction
from segdeconv.inference.output_folder import LocalFolder
from segdeconv.inference.outputs import Outputs
from segdeconv.inference.progress_log import ProgressLog
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models import SegNet
from segdeconv.system.devices import autocast, fast_precision

LARGE = 4  # times the height and width of the small images


class Pair(NamedTuple):
    """The network alone and the whole of the prediction, from image files to mask files.

    Both predict one image while they are set up, since a repetition would be a long warm-up.

    Attributes:
        network: Sets up forward passes over images in memory, one by one, each up to the class of every pixel.
        complete: Sets up the prediction of the same number of files.
    """

    network: Callable[[], Step]
    complete: Callable[[], Step]


def write_images(folder: Path, size: tuple[int, int], number: int) -> list[Path]:
    """Write JPEG files of a size (H, W) and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = Shapes("train", num_train=min(number, 20), num_val=1, side=max(size))
    paths = [folder / f"{index:04d}.jpg" for index in range(number)]
    for index, path in enumerate(paths):
        image = Image.fromarray(shapes[index % len(shapes)][0])
        image.crop((0, 0, size[1], size[0])).save(path, quality=92)
    return paths


def pairs(task: Task, paths: list[Path]) -> dict[str, Pair]:
    """Return our networks, and torchvision's and segmentation-models-pytorch's in loops of tutorials, by name."""
    number = len(paths)
    found = {
        name: Pair(partial(segmenter_alone, name, task, number), partial(predict_files, name, task, paths))
        for name in ("segdeconv SegNet", "segdeconv camvid-small")
    }
    builds: dict[str, Callable[[int], nn.Module]] = {"torchvision LRASPP": torchvision_lraspp}
    if find_spec("segmentation_models_pytorch"):
        builds["segmentation-models-pytorch U-Net"] = smp_unet
    for name, build in builds.items():
        found[name] = Pair(partial(loop_alone, build, task, number), partial(loop_over_files, build, task, paths))
    return found


def torchvision_lraspp(classes: int) -> nn.Module:
    """Return torchvision's LRASPP on MobileNetV3, whose scores are in a dict."""
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    network: nn.Module = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes)
    return network


def smp_unet(classes: int) -> nn.Module:
    """Return segmentation-models-pytorch's U-Net on VGG16 with batch norm."""
    import segmentation_models_pytorch as smp

    network: nn.Module = smp.Unet("vgg16_bn", encoder_weights=None, classes=classes)
    return network


def _segmenter(name: str, task: Task) -> Segmenter:
    if name.endswith("camvid-small"):
        return Segmenter(checkpoint.read("camvid-small"), report=_ignore)
    with tempfile.TemporaryDirectory() as folder:
        classes = [f"class {index}" for index in range(task.classes)]
        path = SegNet(task.classes).save_pretrained(folder, classes=classes)
        size = f"dataset.size=[{task.size[0]},{task.size[1]}]"
        return Segmenter(checkpoint.read(str(path), overrides=[size]), report=_ignore)


def _ignore(_: str) -> None:
    pass


def segmenter_alone(name: str, task: Task, number: int) -> Step:
    """Return forward passes of a segmenter's network at its input size."""
    segmenter = _segmenter(name, task)
    size = segmenter.preprocessing.size
    assert size is not None  # images of any size are resized to it, as in the loops of other libraries
    image = torch.randn(1, 3, *size, device=segmenter.network.device)

    def step(images: int = number) -> None:
        for _ in range(images):
            segmenter.network(image).values.max(dim=1).indices.cpu()

    step(1)
    return step


def predict_files(name: str, task: Task, paths: list[Path]) -> Step:
    """Return the prediction of files as in predict.py --no-overlay."""
    segmenter, folders = _segmenter(name, task), count()
    root = tempfile.TemporaryDirectory()

    def step(paths: list[Path] = paths) -> None:
        out = Path(root.name) / str(next(folders))
        outputs = Outputs(LocalFolder(out), segmenter.classes, overlay=False)
        with closing(ProgressLog(outputs.folder, {})) as progress_log:
            batch = BatchPrediction(segmenter, outputs, progress_log)
            for _ in batch.run({path.stem: path for path in paths}):
                pass

    step(paths[:1])
    return step


def _classes_of(network: nn.Module, image: Tensor, precision: str) -> Tensor:
    with torch.inference_mode(), autocast(precision, image.device):
        scores = network(image)
        return (scores["out"] if isinstance(scores, dict) else scores).argmax(dim=1)


def _prepared(build: Callable[[int], nn.Module], task: Task) -> nn.Module:
    return build(task.classes).to(task.device).to(memory_format=torch.channels_last).eval()


def loop_alone(build: Callable[[int], nn.Module], task: Task, number: int) -> Step:
    """Return forward passes of another library's network, in the precision that is fast here."""
    network, precision = _prepared(build, task), fast_precision()
    image = torch.randn(1, 3, *_multiple_of_32(task.size), device=task.device)

    def step(images: int = number) -> None:
        for _ in range(images):
            _classes_of(network, image, precision).cpu()

    step(1)
    return step


def loop_over_files(build: Callable[[int], nn.Module], task: Task, paths: list[Path]) -> Step:
    """Return the loop of tutorials: read, resize, normalise, predict and save one image after the other."""
    from torchvision.transforms import v2

    network, precision = _prepared(build, task), fast_precision()
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(_multiple_of_32(task.size)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    out = tempfile.TemporaryDirectory()

    def step(paths: list[Path] = paths) -> None:
        for path in paths:
            image = Image.open(path).convert("RGB")
            classes = _classes_of(network, transform(image)[None].to(task.device), precision)
            mask = Image.fromarray(classes[0].to(torch.uint8).cpu().numpy())
            mask.resize(image.size, Image.Resampling.NEAREST).save(Path(out.name) / f"{path.stem}.png")

    step(paths[:1])
    return step


def _multiple_of_32(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size that other libraries' networks take in place of one."""
    return -(-size[0] // 32) * 32, -(-size[1] // 32) * 32
