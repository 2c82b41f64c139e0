"""Configs of training runs that take seconds, and their weights."""

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
