"""Recomputation of batch norm's statistics over the training images, as the original authors do before testing."""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from segdeconv.checkpoints.checkpoint import AVERAGED, Checkpoint, without_measurements
from segdeconv.data.loading import EvaluationSamples, evaluation_loader
from segdeconv.errors import UsageError
from segdeconv.evaluation.evaluate import restore_dataset
from segdeconv.inference.scorers import with_padding


@torch.no_grad()
def recalibrated(checkpoint: Checkpoint, *, device: torch.device) -> Checkpoint:
    """Return a checkpoint with recomputed running means and variances, and without the state of training.

    Each statistic is the mean over the batches, weighted by their numbers of images: the cumulative average of the
    authors' compute_bn_statistics.py, without the few images that it uses twice. The images of the train split pass
    through the network once, in order, in batches of the training's size, in float32, without augmentation and
    dropout.

    Args:
        checkpoint: The checkpoint.
        device: The device to run on.

    Raises:
        UsageError: The network has no batch norm.
    """
    model = checkpoint.model().to(device).to(memory_format=torch.channels_last)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if not norms:
        raise UsageError(f"{checkpoint.path} has no batch norm to recalibrate - use it as it is")
    settings = checkpoint.config["dataset"]
    dataset, preprocessing = restore_dataset(checkpoint, "train"), checkpoint.preprocessing
    loader = evaluation_loader(
        EvaluationSamples(dataset, preprocessing),
        batch_size=settings["batch_size"],
        num_workers=settings["num_workers"],
        timeout=settings["timeout"],
    )
    score = with_padding(model, model.minimum_size)
    with tqdm(total=len(dataset), desc="recalibrating", unit="image", disable=None) as bar:

        def normalised() -> Iterable[Tensor]:
            for batch in loader:
                yield preprocessing.normalised(batch["image"].to(device))
                bar.update(len(batch["image"]))

        recompute_statistics(norms.values(), score, normalised())
    state = dict(checkpoint.content["state_dict"])
    prefix = AVERAGED if any(name.startswith(AVERAGED) for name in state) else "model."
    for name, norm in norms.items():
        for buffer, value in norm.named_buffers():
            state[f"{prefix}{name}.{buffer}"] = value.cpu()
    return checkpoint.with_state(state, without_measurements(checkpoint.facts))


@torch.no_grad()
def recompute_statistics(
    norms: Collection[_BatchNorm], network: Callable[[Tensor], object], batches: Iterable[Tensor]
) -> None:
    """Replace the running means and variances of norms by their means over batches, weighted by numbers of images.

    Args:
        norms: The norms; their modes and momenta are left as they were.
        network: The network they belong to, which is called with every batch.
        batches: Normalised images, (N, C, H, W).
    """
    before = [(norm, norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.train()  # only the norms: dropout stays off
        norm.reset_running_stats()
    count = 0
    try:
        for images in batches:
            count += len(images)
            for norm in norms:
                norm.momentum = len(images) / count
            network(images)
    finally:
        for norm, training, momentum in before:
            norm.train(training)
            norm.momentum = momentum
