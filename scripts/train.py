"""Train a network with a config composed from configs/ and the command line.

    python scripts/train.py [dataset=NAME] [model=NAME] [experiment=NAME] [key=value ...]
    python scripts/train.py --keys [GROUP]            list the keys, with defaults and meanings
    python scripts/train.py --cfg job [key=value ...] print the config instead of training
    python scripts/train.py -m seed=0,1,2 [...]       train with each value of a sweep

NAME is a file in configs/; a key is an argument of the class that such a file names. A run writes to
runs/<dataset>-<model>/<time>/: best.ckpt, last.ckpt, config.yaml, metrics.csv, report.html, report.json and TensorBoard
events.
resume=auto resumes the newest run of the same config that is unfinished or has fewer epochs.
--config-dir DIR adds a folder of your own config files. Hydra's other flags work too: --hydra-help lists them.
Completion of groups, names and keys in a shell: -sc install=bash, zsh or fish prints the script to evaluate.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from segdeconv.cli import completion
from segdeconv.cli.command import run_command
from segdeconv.cli.main import commands
from segdeconv.cli.own_code import compose, declared, print_keys, with_chosen_keys
from segdeconv.errors import DiskError, Interrupted, SegdeconvError, UsageError, command
from segdeconv.system import CONFIGS


def main() -> None:
    """Pass the command line to Hydra, which calls `job` once per run, with the run's folder."""
    if completion.is_completion(sys.argv[1:]):
        completion.run(sys.argv[1:], list(commands()), CONFIGS)
        return

    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from segdeconv.cli.overrides import (
        fixed_overrides,
        hydra_arguments,
        hydra_overrides,
        parse_flags,
        to_plain,
    )
    from segdeconv.experiments import optuna_sweeper, sweeps

    typed, flags = command("train", sys.argv[1:]), parse_flags(sys.argv[1:])
    words = sys.argv[1:] = hydra_overrides(sys.argv[1:], CONFIGS)
    if flags.keys is not None:
        print_keys(flags.keys, [word for word in words if not word.startswith("--keys")])
        return
    named = any(word.startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for word in words)

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
    def job(composed: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        from segdeconv.train import train
        from segdeconv.training.config_check import check_config
        from segdeconv.training.processes import launched_from_outside, rank_from_outside
        from segdeconv.training.resume import find_run
        from segdeconv.training.run_folder import claim_folder

        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        run = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        runs = Path("runs") / "{dataset}-{model}".format(**hydra_config.runtime.choices)
        first = rank_from_outside() == 0
        recorder = sweeps.Recorder.of(hydra_config, run, fixed_overrides(words)) if flags.multirun and first else None
        try:
            if launched_from_outside() and not named:
                raise UsageError(
                    "torchrun or SLURM started several processes of this command, which would each choose their own "
                    "run folder - set one for all with hydra.run.dir=DIR"
                )
            if not first:
                sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 - only rank 0 prints; open until exit
            config = declared(to_plain(composed, words), hydra_config.overrides.task)
            config = with_chosen_keys(config, hydra_config.runtime.choices, [*words, *hydra_config.overrides.task])
            checked = check_config(config)
            run = find_run(checked, run, None if named else runs)
            if first and not named and not flags.multirun and checked["resume"] is None:
                run = claim_folder(run)
            train(config, run, typed=typed)
            score = sweeps.best_score(run) if first else None
            if recorder is not None:
                recorder.end(run, score)
            return score
        except Exception as error:
            if isinstance(error, SegdeconvError) and not isinstance(error, Interrupted):
                if recorder is not None:
                    recorder.end(run, None, str(error))
                if (
                    flags.multirun
                    and hydra_config.sweeper["_target_"] != sweeps.BASIC
                    and not isinstance(error, DiskError)
                ):
                    raise  # a sweeper that learns from the scores goes on after a failed job
            raise _Failed(error) from error
        finally:
            if not named and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()  # created by Hydra, but the job resumed another run or failed before it began

    if flags.multirun:
        _check_jobs(words)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors itself and exits with code 1
    try:
        if flags.cfg or flags.info or flags.hydra_help:
            _print_config(job, flags.overrides)
        else:
            optuna_sweeper.register()
            with hydra_arguments():
                job()
    except _Failed as failed:
        raise failed.error from failed.error.__cause__
    except (HydraException, OmegaConfBaseException) as error:
        hint = "add hydra/sweeper=optuna" if "INTERVAL_SWEEP" in str(error) else "correct the override"
        raise UsageError(f"the config cannot be composed: {error} - {hint}") from error
    finally:
        if flags.multirun and sweeps.FolderOfSweep.folder is not None:
            sweeps.summarise(sweeps.FolderOfSweep.folder)


def _print_config(job: Callable[[], None], overrides: Sequence[str]) -> None:
    """Let Hydra print the config or what it knows about it; Hydra's own error message becomes a UsageError."""
    from segdeconv.cli.overrides import hydra_arguments
    from segdeconv.training.config_check import require_known

    names = [word.lstrip("+~").partition("=")[0].partition(".")[0] for word in overrides]
    require_known(name for name in names if not name.startswith("hydra") and name != "experiment")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), hydra_arguments():
            job()
    except SystemExit as ended:
        if ended.code:
            raise UsageError(f"{message.getvalue().strip()} - see {command('train', ['--help'])}") from None


def _check_jobs(arguments: list[str]) -> None:
    """Check the config of every job of a multirun, so that an error in the last is reported before the first trains.

    Of a sweep whose sweeper chooses the values while it runs, such as Optuna's, the config with the first value of each
    key is checked.

    Raises:
        UsageError: A config is invalid.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from segdeconv.cli.overrides import first_values
    from segdeconv.training.config_check import check_config

    flags = [word for word in arguments if word.startswith(("--config-dir=", "--config-name="))]
    overrides = [word for word in arguments if not word.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    other_sweeper = any(word.lstrip("+").startswith(("hydra/sweeper", "hydra.sweeper")) for word in overrides)
    if other_sweeper or any(override.is_interval_sweep() for override in parsed):
        check_config(compose([*flags, *first_values(overrides)])[0])
        return
    ((*jobs,),) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    for number, job in enumerate(jobs, start=1):
        try:
            check_config(compose([*flags, *job])[0])
        except UsageError as error:
            if len(jobs) == 1:
                raise
            varying = [word.lstrip("+") for word in job if any(word not in other for other in jobs)]
            raise UsageError(f"job {number} of {len(jobs)} ({', '.join(varying)}): {error}") from error


class _Failed(BaseException):
    """A carrier that brings an exception past Hydra, which would print its own message about any Exception."""

    def __init__(self, error: Exception) -> None:
        self.error = error


if __name__ == "__main__":
    run_command(main, __doc__, needs_reader=True)
