"""Configs of training runs that take seconds, their weights, and what their callbacks see."""

import json
from pathlib import Path

from pytorch_lightning.callbacks import Checkpoint

from segdeconv.checkpoints import checkpoint


def config(**changes):
    nodes = {
        "dataset": {"_target_": "fakes.Uneven", "batch_size": 4, "num_workers": 0},
        "model": {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]},
        "optimizer": {"_target_": "segdeconv.optimization.adamw", "lr": 0.01},
        "schedule": {"_target_": "segdeconv.optimization.Constant"},
        "trainer": {"max_epochs": 3, "precision": "32-true"},
        "logger": {},
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        nodes[group] = {**nodes[group], name: value} if name else value
    return nodes


def state(run, name="last"):
    return checkpoint.load_plain(run / f"{name}.ckpt")["state_dict"]


class Probe(Checkpoint):  # called after the epoch's metrics are logged
    """Writes the metrics that callbacks see, and counts epochs in a state."""

    def __init__(self, file: str):
        self.file, self.epochs = file, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        Path(f"{self.file}{trainer.global_rank}").write_text(json.dumps(self.epochs))

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict):
        self.epochs = state_dict["epochs"]
