"""Checkpoints of a small network, and a pickle that would run code, for tests of files."""

import os

from segdeconv.classes import Classes, voc_colours
from segdeconv.models import SegNet

CLASSES = Classes(("ground", "thing"), voc_colours(2))


def content(**changes):
    model = SegNet(2, stages=((4,), (4,)))
    config = {"model": {"_target_": "segdeconv.models.SegNet", "stages": [[4], [4]]}, "seed": 0}
    made = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {
            "config": config,
            "facts": {"classes": CLASSES.to_dict(), "preprocessing": {"mean": [0.0] * 3}},
        },
        "segdeconv": {"format": 1},
    }
    return made | changes


class Touch:
    """Unpickled without care, it creates its marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)
