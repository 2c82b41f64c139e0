"""How switches settle while a network learns, as curves and a picture."""

import numpy as np
from pytorch_lightning import Callback, Trainer

from segdeconv.analysis.figures import switches_figure
from segdeconv.analysis.switch_paths import recorded
from segdeconv.analysis.switch_statistics import flip_rate, ties_counted
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.preprocessing import Preprocessing, resize_image
from segdeconv.switches.ops import Pooling
from segdeconv.training.loggers import show_picture
from segdeconv.training.task import SegmentationTask


class SwitchCurves(Callback):
    """After every validation, to the logger: of each pool the share of windows whose winner has changed since the last
    validation (`switches/flip_rate/level 1`, the finest) and of those with more than one maximum (`switches/tie_rate`),
    on a few validation images that stay the same; and the sheet of the switches of the first of them.

    It runs nothing random and writes nothing that a checkpoint or metrics.csv holds, so runs go on to the same bits.
    What was before is not kept in a checkpoint: where a run goes on, the first flip rate is missing.
    """

    def __init__(self, dataset: SegmentationDataset, preprocessing: Preprocessing, *, count: int = 4) -> None:
        self.dataset, self.preprocessing = dataset, preprocessing
        self.places = sorted({int(place) for place in np.linspace(0, len(dataset) - 1, count)})
        self.before: list[list[Pooling]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: SegmentationTask) -> None:  # type: ignore[override]
        if not trainer.is_global_zero or not trainer.loggers:
            return
        network = pl_module.validation_network
        assert network is not None
        now, ties, picture = [], [], None
        for place in self.places:
            image, _, name = self.dataset[place]
            if self.preprocessing.size is not None:
                image = resize_image(image, self.preprocessing.size)
            with recorded(network.model) as pooled, ties_counted(network.model) as rates:
                network.logits(self.preprocessing.normalise(image, name)[None])
            if not pooled:
                return  # its pools keep no switches
            if picture is None and pooled[0].size == image.shape[:2]:
                picture = switches_figure(name, image, pooled, rates)
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
            if picture is not None:
                show_picture(logger, "switches", picture, trainer.global_step)
