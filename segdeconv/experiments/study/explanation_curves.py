"""Deletion and insertion curves of explanations: which attribution finds the pixels that a prediction depends on?

    python -c "from segdeconv.experiments.study import explanation_curves as c; c.run('camvid-small', '/data/CamVid')"

For some pixels of CamVid's val, every method orders the pixels of the image by what they contribute to the logit of the
predicted class. *Deletion* replaces the first of them by the mean colour; the better the order, the faster the
probability of the class at the explained pixel falls. *Insertion* starts from a blurred image and restores the first of
them; the better the order, the faster it rises. Petsiuk, Das, Saenko 2018, section 4.1,
https://arxiv.org/abs/1806.07421, there for images with one label each. Since a single pixel depends on a small part of
a large image, the parts are geometric here, from 1/2000 to 3/10 of the image, and a score is the mean over them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.analysis.contributions import AffineGraph
from segdeconv.analysis.switch_paths import recorded
from segdeconv.checkpoints import checkpoint
from segdeconv.evaluation.evaluate import restore_dataset
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models import SegmentationModel

PARTS = (0.0005, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # of the pixels, deleted or inserted
STEPS = 32  # of the path of integrated gradients
BLUR = 10.0  # pixels, standard deviation of the blurred image of the insertion
NEAR = 2.0  # pixels, standard deviation of the blurred contributions


class Target(NamedTuple):
    """An explained number: the logit of a class at a pixel of the network's input."""

    class_: int
    y: int
    x: int

    def of(self, logits: Tensor) -> Tensor:
        """Return the (N,) numbers of (N, K, H, W) logits."""
        return logits[:, self.class_, self.y, self.x]


def attributions(network: nn.Module, image: Tensor, target: Target, *, seed: int = 0) -> dict[str, Tensor]:
    """Return what every pixel contributes by several methods, (H, W) each; the order of the values matters only.

    Args:
        network: A network with an `Encoder`, in evaluation mode.
        image: (1, C, H, W), normalised.
        target: The explained number.
        seed: Seed of the random order.
    """
    graph = AffineGraph(network, image)
    found = graph.contributions(target.of(graph.logits)[0])
    pools = [map_ for map_ in found.maps if map_.name.startswith("pool ")]
    shown = pools[::2]  # neighbouring levels hardly differ
    contributions = found.pixels.sum(dim=0)
    blurred = cv2.GaussianBlur(contributions.numpy(), (0, 0), NEAR)
    height, width = contributions.shape
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    distance = (rows - target.y) ** 2 + (columns - target.x) ** 2
    methods = {
        "contributions (gradient x input)": contributions,
        "contributions, blurred": torch.from_numpy(blurred),
        **{f"contributions through {map_.name}": _enlarged(map_.values, contributions) for map_ in shown},
        "gradient": gradient(network, image, target).abs().sum(dim=0),
        "integrated gradients": integrated_gradients(network, image, target).sum(dim=0),
        "Seg-Grad-CAM, deepest map": _enlarged(grad_cam(network, image, target, len(pools)), contributions),
        "Seg-Grad-CAM, pool 3": _enlarged(grad_cam(network, image, target, min(3, len(pools))), contributions),
        "distance from the pixel": -distance.float(),
        "random": torch.rand(height, width, generator=torch.Generator().manual_seed(seed)),
    }
    return {name: values.cpu() for name, values in methods.items()}


def gradient(network: nn.Module, image: Tensor, target: Target) -> Tensor:
    """Return the gradient of the number, (C, H, W). Simonyan et al. 2014, https://arxiv.org/abs/1312.6034."""
    image = image.detach().clone().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(target.of(network(image)).sum(), image)
    return found[0]


def integrated_gradients(network: nn.Module, image: Tensor, target: Target, steps: int = STEPS) -> Tensor:
    """Return integrated gradients from the mean colour, (C, H, W), by the midpoint rule.

    Sundararajan, Taly, Yan 2017, equation 1, https://arxiv.org/abs/1703.01365.
    """
    total = sum(gradient(network, image * ((step + 0.5) / steps), target) for step in range(steps))
    return image[0] * total / steps


def grad_cam(network: nn.Module, image: Tensor, target: Target, level: int) -> Tensor:
    """Return Grad-CAM at the output of a pool, (h, w): maps weighted by their mean gradients, rectified.

    Selvaraju et al. 2017, equations 1 and 2, https://arxiv.org/abs/1610.02391, for the logits of a set of pixels as in
    Vinogradova et al. 2020, https://arxiv.org/abs/2002.11434; here the set is one pixel.
    """
    with torch.enable_grad(), recorded(network) as pooled:
        value = target.of(network(image.detach().clone().requires_grad_())).sum()
        maps = pooled[level - 1].features
        (slope,) = torch.autograd.grad(value, maps)
    return (slope.mean(dim=(2, 3), keepdim=True) * maps.detach()).sum(dim=1)[0].relu()


def curves(
    score: Callable[[Tensor], Tensor], image: Tensor, blurred: Tensor, importance: Tensor
) -> tuple[list[float], list[float]]:
    """Return the scores after deletion and insertion of the most important part of the pixels, by PARTS.

    Args:
        score: (1, C, H, W) -> the score.
        image: (1, C, H, W), normalised; zero is the mean colour.
        blurred: The image that insertion starts from.
        importance: (H, W); of equal pixels, those above and on the left come first.
    """
    order = importance.flatten().argsort(descending=True, stable=True)
    deletion, insertion = [], []
    for part in PARTS:
        chosen = torch.zeros(order.numel(), dtype=torch.bool)
        chosen[order[: max(1, round(part * order.numel()))]] = True
        inside = chosen.view(importance.shape).to(image.device)
        deletion.append(float(score(image.masked_fill(inside, 0.0))))
        insertion.append(float(score(torch.where(inside, image, blurred))))
    return deletion, insertion


def compare(network: SegmentationModel, image: Tensor, target: Target) -> dict[str, tuple[list[float], list[float]]]:
    """Return the `curves` of every method: the probability of the class at the pixel."""

    def probability(changed: Tensor) -> Tensor:
        with torch.inference_mode():
            logits = network(changed)[0, :, target.y, target.x]
        return logits.softmax(dim=0)[target.class_]

    rows = np.ascontiguousarray(image[0].permute(1, 2, 0).cpu().numpy())
    blurred = torch.from_numpy(cv2.GaussianBlur(rows, (0, 0), BLUR)).permute(2, 0, 1)[None].to(image)
    methods = attributions(network, image, target)
    return {name: curves(probability, image, blurred, values) for name, values in methods.items()}


def _enlarged(values: Tensor, like: Tensor) -> Tensor:
    """Resize (h, w) values bilinearly to the size of a map, at which equal ones hardly occur."""
    return F.interpolate(values[None, None].cpu(), size=like.shape, mode="bilinear", align_corners=False)[0, 0]


def table(scores: Mapping[str, list[tuple[float, float]]]) -> str:
    """Return the mean scores of every method as a table, the best sum of insertion minus deletion first."""
    means = {name: np.mean(pairs, axis=0) for name, pairs in scores.items()}
    lines = ["| method | deletion (lower is better) | insertion (higher is better) |", "|---|---|---|"]
    for name, (deletion, insertion) in sorted(means.items(), key=lambda entry: entry[1][0] - entry[1][1]):
        lines.append(f"| {name} | {deletion:.3f} | {insertion:.3f} |")
    return "\n".join(lines)


def run(network: str | Path, camvid: str | Path, *, num: int = 15, seed: int = 0) -> None:
    """Compare the methods at a random labelled pixel in each of `num` images of val; print the table after each."""
    loaded = checkpoint.read(network, overrides=[f"dataset.root={camvid}"])
    segmenter = Segmenter(loaded)
    dataset, random = restore_dataset(loaded, "val"), np.random.default_rng(seed)
    model = segmenter.float32_model
    scores: dict[str, list[tuple[float, float]]] = {}
    for index in np.linspace(0, len(dataset) - 1, num).round().astype(int).tolist():
        stored, mask, name = dataset[index]
        image = segmenter.preprocessing(stored)[None].to(segmenter.network.device)
        rows, columns = np.nonzero(mask != loaded.classes.ignore_index)
        at = random.integers(len(rows))
        y, x = (
            int(place[at] * new / old)
            for place, new, old in zip((rows, columns), image.shape[2:], mask.shape, strict=True)
        )
        with torch.inference_mode():
            class_ = int(model(image)[0, :, y, x].argmax())
        for method, (deletion, insertion) in compare(model, image, Target(class_, y, x)).items():
            scores.setdefault(method, []).append((float(np.mean(deletion)), float(np.mean(insertion))))
        print(f"\n{name} y {y}, x {x}: {loaded.classes.names[class_]}; so far:\n{table(scores)}", flush=True)
