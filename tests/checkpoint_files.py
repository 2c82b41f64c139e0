"""The content of a small network's checkpoint, and an object whose pickle runs code."""

import os

from segdeconv.classes import Classes, voc_colours
from segdeconv.models import SegNet

CLASSES = Classes(("ground", "thing"), voc_colours(2))


def content(**changes):
    model = SegNet(2, stages=((4,), (4,)))
    config = {"model": {"_target_": "segdeconv.models.SegNet", "stages": [[4], [4]]}, "seed": 0}
    default = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {
            "config": config,
            "facts": {
                "classes": CLASSES.to_dict(),
                "preprocessing": {"mean": [0.0] * 3, "std": [1.0] * 3},
                "precision": "32-true",
            },
        },
        "segdeconv": {"format": 1},
    }
    return default | changes


class Touch:
    """An object that runs `touch MARKER` when it is unpickled without restrictions."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)
