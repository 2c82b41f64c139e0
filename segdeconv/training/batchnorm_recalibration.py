"""Recomputation of batch norm's statistics over the training images, as the original authors do before testing."""

import dataclasses

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from segdeconv.checkpoints.checkpoint import AVERAGED, Checkpoint
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
    for norm in norms.values():
        norm.train()  # only the norms: dropout stays off
        norm.reset_running_stats()
    score = with_padding(model, model.minimum_size)
    count = 0
    with tqdm(total=len(dataset), desc="recalibrating", unit="image", disable=None) as bar:
        for batch in loader:
            images = len(batch["image"])
            count += images
            for norm in norms.values():
                norm.momentum = images / count
            score(preprocessing.normalised(batch["image"].to(device)))
            bar.update(images)
    state = dict(checkpoint.content["state_dict"])
    prefix = AVERAGED if any(name.startswith(AVERAGED) for name in state) else "model."
    for name, norm in norms.items():
        for buffer, value in norm.named_buffers():
            state[f"{prefix}{name}.{buffer}"] = value.cpu()
    kept = {key: checkpoint.content[key] for key in ("hyper_parameters", "segdeconv")}
    return dataclasses.replace(checkpoint, content={**kept, "state_dict": state})
