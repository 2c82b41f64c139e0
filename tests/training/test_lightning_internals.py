"""The installed Lightning has the undocumented attributes and behaviour that segdeconv relies on."""

import inspect

import pytest
import pytorch_lightning
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader

from segdeconv.training.lightning_internals import Processes, canonical_loops, resume_at_epoch_start, spawning_launcher
from segdeconv.training.processes import launched_from_outside

CHANGED = f"pytorch-lightning {pytorch_lightning.__version__} changed, adapt training/lightning_internals.py: "
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class TinyModule(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return (self.weight - batch).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def keys(node, prefix=""):
    """Return all keys of nested dictionaries, joined by slashes."""
    if not isinstance(node, dict):
        return {prefix}
    return {prefix}.union(*(keys(value, f"{prefix}/{name}") for name, value in node.items()))


@pytest.mark.filterwarnings("ignore")
def test_canonical_loop_counters_equal_those_of_a_lightning_checkpoint(tmp_path):
    trainer = Trainer(max_epochs=2, accumulate_grad_batches=2, default_root_dir=tmp_path, **QUIET)
    data = DataLoader(torch.arange(5.0))
    trainer.fit(TinyModule(), data, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == 6
    epoch, canonical = canonical_loops(content["loops"], 6, 5, 2)
    original = content["loops"]
    assert epoch == 2
    assert keys(canonical) == keys(original), f"{CHANGED}loops {sorted(keys(canonical) ^ keys(original))}"
    for part in ("epoch_progress", "epoch_loop.state_dict", "epoch_loop.automatic_optimization.optim_progress"):
        total, expected = (loops["fit_loop"][part].get("total") for loops in (canonical, original))
        assert total == expected, f"{CHANGED}{part} counts {expected}, not {total}"


@pytest.mark.filterwarnings("ignore")
def test_the_used_and_overridden_attributes_exist(tmp_path):
    trainer = Trainer(strategy=Processes(), devices=2, default_root_dir=tmp_path, **QUIET)
    launcher = spawning_launcher(trainer)
    assert launcher is not None, f"{CHANGED}the launcher of DDPStrategy is {type(trainer.strategy.launcher).__name__}"
    assert list(inspect.signature(launcher.kill).parameters) == ["signum"], f"{CHANGED}kill of the launcher"
    for name in ("setup_environment", "validation_step", "on_exception", "lightning_module", "precision_plugin"):
        assert hasattr(DDPStrategy, name), f"{CHANGED}DDPStrategy has no {name}"
    assert hasattr(trainer.precision_plugin, "val_step_context"), f"{CHANGED}precision_plugin.val_step_context"
    assert hasattr(trainer.fit_loop.epoch_loop, "restarting"), f"{CHANGED}fit_loop.epoch_loop.restarting"
    trainer.fit_loop.epoch_loop.restarting = True
    resume_at_epoch_start(trainer)
    assert not trainer.fit_loop.epoch_loop.restarting, f"{CHANGED}fit_loop.epoch_loop.restarting"


ELASTIC = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        (ELASTIC, True),
        ({**ELASTIC, "WORLD_SIZE": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "night"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "night"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "interactive"}, False),
    ],
)
def test_an_external_launcher_is_detected_as_by_lightning(monkeypatch, variables, expected):
    for name in [*ELASTIC, "SLURM_NTASKS", "SLURM_JOB_NAME"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    torchrun, slurm = TorchElasticEnvironment.detect(), SLURMEnvironment.detect()
    size = int(variables.get("WORLD_SIZE" if torchrun else "SLURM_NTASKS", 1))
    assert launched_from_outside() == ((torchrun or slurm) and size > 1) == expected, f"{CHANGED}detection of launchers"


def test_one_process_has_no_launcher(tmp_path):
    assert spawning_launcher(Trainer(devices=1, default_root_dir=tmp_path, **QUIET)) is None
