"""Workers on Windows and macOS are spawned, so everything that they need must be picklable."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fakes
import numpy as np
import pytest
import torch

from segdeconv.checkpoints import checkpoint
from segdeconv.cli.overrides import compose
from segdeconv.training.config_check import check_config
from segdeconv.training.data_module import DataModule
from segdeconv.training.prepare import prepare

CONFIGS = Path(__file__).parents[2] / "configs"
AUGMENTS = sorted(path.stem for path in (CONFIGS / "augment").glob("*.yaml"))


def loaders(*arguments):
    """Return the training and the evaluation loader of a config, as in a run."""
    config, _ = compose([*arguments, "dataset.num_workers=1", "model.stages=[[4]]"], CONFIGS)
    data = DataModule(prepare(check_config(config)).data)
    data.trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1, global_rank=0, world_size=1)
    return data.train_dataloader(), data.val_dataloader()


def same(first, second):
    if isinstance(first, torch.Tensor | np.ndarray):
        return bool((np.asarray(first) == np.asarray(second)).all())
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("dataset", ["shapes", "folder", "camvid"])
def test_the_state_of_a_worker_is_the_same_after_pickling(tmp_path, dataset, augment):
    arguments = {
        "shapes": ["dataset.num_train=4", "dataset.num_val=2", "dataset.batch_size=2"],
        "folder": [f"dataset.root={tmp_path}", "dataset.batch_size=2", "dataset.size=[32,32]"],
        "camvid": [f"dataset.root={tmp_path}", "dataset.batch_size=2", "dataset.size=[32,32]"],
    }[dataset]
    if dataset != "shapes":
        getattr(fakes, dataset)(tmp_path)
    for loader, key in zip(loaders(f"dataset={dataset}", f"augment={augment}", *arguments), [(3, 1), 1], strict=True):
        samples, collate, prepare_worker = pickle.loads(
            pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn))
        )
        assert collate is loader.collate_fn
        assert prepare_worker is loader.worker_init_fn
        assert same(samples[key], loader.dataset[key])


TRAINING = """
import sys

from segdeconv.train import train

if __name__ == "__main__":
    import torch.multiprocessing

    torch.multiprocessing.set_start_method(sys.argv[1])
    train(
        {
            "dataset": {
                "_target_": "segdeconv.data.Shapes",
                "num_train": 4, "num_val": 2, "size": [32, 32], "batch_size": 2, "num_workers": int(sys.argv[2]),
            },
            "model": {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]},
            "trainer": {"max_epochs": 1, "precision": "32-true", "accelerator": "cpu"},
        },
        sys.argv[3],
    )
"""


@pytest.mark.slow
def test_spawned_workers_train_the_same_network(tmp_path):
    (tmp_path / "script.py").write_text(TRAINING)
    for method, workers in (("spawn", "2"), ("fork", "0")):
        arguments = [sys.executable, "script.py", method, workers, method]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
    spawned, forked = (checkpoint.read(tmp_path / method / "last.ckpt").weights for method in ("spawn", "fork"))
    assert spawned.keys() == forked.keys()
    assert all(torch.equal(spawned[name], forked[name]) for name in spawned)
