"""Train a network with a config composed from configs/ and the command line.

    python scripts/train.py [dataset=NAME] [model=NAME] [experiment=NAME] [key=value ...]

NAME is a file in configs/; a key is an argument of the class that such a file names. A run writes to
runs/<dataset>-<model>/<time>/: best.ckpt, last.ckpt, config.yaml, metrics.csv, report.html, report.json and TensorBoard
events.
resume=auto resumes the newest run of the same config that is unfinished or has fewer epochs.
"""

import os
import sys
from pathlib import Path
from typing import Any

from segdeconv.cli.command import run_command
from segdeconv.cli.own_code import CONFIGS, compose, declared
from segdeconv.errors import UsageError, command


def main() -> None:
    """Pass the command line to Hydra, which calls `train` once per job, with the job's folder."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from segdeconv.config import hydra_overrides, keys_set, to_plain

    typed = command("train", sys.argv[1:])
    sys.argv[1:] = hydra_overrides(sys.argv[1:], CONFIGS)
    named = any(word.startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for word in sys.argv)

    def job(composed: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        from segdeconv.train import train
        from segdeconv.training.autoconfig import unset_keys
        from segdeconv.training.processes import launched_from_outside, rank_from_outside

        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        run = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        runs = Path("runs") / "{dataset}-{model}".format(**hydra_config.runtime.choices)
        try:
            if launched_from_outside() and not named:
                raise UsageError(
                    "torchrun or SLURM started several processes of this command, which would each choose their own "
                    "run folder - set one for all with hydra.run.dir=DIR"
                )
            if launched_from_outside() and rank_from_outside() > 0:
                sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 - only rank 0 prints; open until exit
            config = declared(to_plain(composed, sys.argv[1:]), hydra_config.overrides.task)
            if hydra_config.runtime.choices["dataset"] == "folder" and "auto" not in config:
                config["auto"] = unset_keys(keys_set([*sys.argv[1:], *hydra_config.overrides.task], CONFIGS))
            train(config, run, runs=None if named else runs, typed=typed)
        except Exception as error:
            raise _Failed(error) from error
        finally:
            if not named and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()  # created by Hydra, but the job resumed another run or failed before it began

    if {"-m", "--multirun"} & set(sys.argv[1:]):
        _check_jobs(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors itself and exits with code 1
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(job)()
    except _Failed as failed:
        raise failed.error from failed.error.__cause__
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"the config cannot be composed: {error} - correct the override") from error


def _check_jobs(arguments: list[str]) -> None:
    """Check the config of every job of a multirun, so that an error in the last is reported before the first trains.

    Raises:
        UsageError: A config is invalid.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from segdeconv.training.config_check import check_config

    flags = [word for word in arguments if word.startswith(("--config-dir=", "-cd="))]
    overrides = [word for word in arguments if not word.startswith("-")]
    if any(word.lstrip("+").startswith(("hydra/sweeper", "hydra.sweeper")) for word in overrides):
        return  # another sweeper, such as Optuna's, chooses the jobs while they run
    ((*jobs,),) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), max_batch_size=None)
    for number, job in enumerate(jobs, start=1):
        try:
            check_config(compose([*flags, *job])[0])
        except UsageError as error:
            varying = [word.lstrip("+") for word in job if any(word not in other for other in jobs)]
            raise UsageError(f"job {number} of {len(jobs)} ({', '.join(varying)}): {error}") from error


class _Failed(BaseException):
    """A carrier that brings an exception past Hydra, which would print its own message about any Exception."""

    def __init__(self, error: Exception) -> None:
        self.error = error


if __name__ == "__main__":
    run_command(main, __doc__, needs_reader=True)
