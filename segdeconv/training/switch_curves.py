"""Statistics of the switches over training, logged as curves and a figure."""

import numpy as np
from pytorch_lightning import Callback, Trainer

from segdeconv.analysis.figures import switches_figure
from segdeconv.analysis.switch_paths import recorded
from segdeconv.analysis.switch_statistics import flip_rate, ties_counted
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.preprocessing import Preprocessing, resize_image
from segdeconv.switches.ops import Pooling
from segdeconv.training.loggers import images_are_due, log_image
from segdeconv.training.task import SegmentationTask


class SwitchCurves(Callback):
    """Logs statistics of the switches of a few fixed validation images after every validation.

    For each level, `switches/flip_rate/level K` (1 is the finest) is the fraction of windows whose winner has changed
    since the last validation, and `switches/tie_rate/level K` the fraction with more than one maximum. The switches of
    the first image are logged as a figure when images are due. Nothing random is run and nothing is saved in
    checkpoints or metrics.csv, so resumed runs stay bit-identical; the first flip rate after resuming is missing.

    Args:
        dataset: The validation split.
        preprocessing: The network's preprocessing.
        count: Number of images.
    """

    def __init__(self, dataset: SegmentationDataset, preprocessing: Preprocessing, *, count: int = 4) -> None:
        self.dataset, self.preprocessing = dataset, preprocessing
        self.indices = sorted({int(index) for index in np.linspace(0, len(dataset) - 1, count)})
        self.before: list[list[Pooling]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: SegmentationTask) -> None:  # type: ignore[override]
        if not trainer.is_global_zero or not trainer.loggers:
            return
        network = pl_module.validation_network
        assert network is not None
        now, ties, figure = [], [], None
        for index in self.indices:
            image, _, name = self.dataset[index]
            if self.preprocessing.size is not None:
                image = resize_image(image, self.preprocessing.size)
            with recorded(network.model) as pooled, ties_counted(network.model) as rates:
                network.logits(self.preprocessing.normalise(image, name)[None])
            if not pooled:
                return  # the network has no switches
            if figure is None and images_are_due(trainer) and pooled[0].size == image.shape[:2]:
                figure = switches_figure(name, image, pooled, rates)
            now.append([pooling._replace(features=pooling.features[:, :, :0]) for pooling in pooled])
            ties.append(list(rates))
        numbers = {}
        for level in range(1, len(now[0]) + 1):
            numbers[f"switches/tie_rate/level {level}"] = float(np.mean([rates[level - 1] for rates in ties]))
            if self.before:
                changed = [flip_rate(old[level - 1], new[level - 1]) for old, new in zip(self.before, now, strict=True)]
                numbers[f"switches/flip_rate/level {level}"] = float(np.mean(changed))
        self.before = now
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
            if figure is not None:
                log_image(logger, "switches", figure, trainer.global_step)
