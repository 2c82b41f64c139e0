"""`hydra/sweeper=optuna`: the values of a multirun's jobs are chosen by Optuna from the scores of the jobs before.

Akiba et al. 2019, https://arxiv.org/abs/1907.10902. Hydra's own plugin, hydra-optuna-sweeper, requires Optuna 2.
"""

import importlib
import math
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.sweeper import Sweeper

from segdeconv.errors import UsageError, did_you_mean

SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "cmaes": "CmaEsSampler"}
DIRECTIONS = ("maximize", "minimize")


class OptunaSweeper(Sweeper):
    """Sweeper that runs trials of an Optuna study.

    Args:
        n_trials: Trials of the whole study; those that a storage contains already are not run again.
        n_jobs: Trials that the launcher gets at once.
        direction: `maximize` or `minimize` the value that a job returns.
        sampler: One of `SAMPLERS`.
        seed: Seed of the sampler; None for another one each time.
        storage: URL of a database, such as sqlite:///study.db, in which the study is kept; None for none.
        study_name: Name of the study in the storage.
        params: By key, the values to choose from as on the command line, such as `interval(1e-4, 1e-1)`.
    """

    def __init__(
        self,
        n_trials: int = 20,
        n_jobs: int = 1,
        direction: str = "maximize",
        sampler: str = "tpe",
        seed: int | None = 0,
        storage: str | None = None,
        study_name: str = "segdeconv",
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.n_trials, self.n_jobs, self.direction, self.sampler = n_trials, n_jobs, direction, sampler
        self.seed, self.storage, self.study_name, self.params = seed, storage, study_name, dict(params or {})
        self.launcher: Any = None
        self.config: Any = None
        self.hydra_context: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep Hydra's context and create the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that the study lacks.

        Raises:
            UsageError: Optuna is not installed, a setting is wrong, or nothing is to be chosen.
        """
        study = self._open_study()
        from optuna.trial import TrialState  # imported late: Optuna is optional

        fixed, distributions = self._split(arguments)
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        number = len(ended)
        if ended:
            print(f"study {self.study_name}: {number} of {self.n_trials} trials are in {self.storage}")
        while number < self.n_trials:
            trials = [study.ask(distributions) for _ in range(min(self.n_jobs, self.n_trials - number))]
            jobs = [(*fixed, *(f"{key}={value}" for key, value in trial.params.items())) for trial in trials]
            results = self.launcher.launch(jobs, initial_job_idx=number)
            for trial, result in zip(trials, results, strict=True):
                score = result.return_value if result.status == JobStatus.COMPLETED else None
                if score is not None and math.isfinite(score):
                    study.tell(trial, score)
                else:
                    study.tell(trial, state=TrialState.FAIL)
            number += len(trials)
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not done:
            raise UsageError(f"all {self.n_trials} trials failed - correct the config, or narrow the values")
        best = " ".join(f"{key.lstrip('+')}={value}" for key, value in study.best_params.items())
        print(f"\nbest of {len(done)} trials: {best} - {study.best_value:.4f}")

    def _open_study(self) -> Any:
        try:
            import optuna
        except ImportError as error:
            raise UsageError("hydra/sweeper=optuna needs the package optuna - pip install optuna") from error
        if self.sampler not in SAMPLERS:
            way_out = did_you_mean(self.sampler, SAMPLERS)
            raise UsageError(f"unknown hydra.sweeper.sampler '{self.sampler}' - {way_out}")
        if self.direction not in DIRECTIONS:
            way_out = did_you_mean(self.direction, DIRECTIONS)
            raise UsageError(f"unknown hydra.sweeper.direction '{self.direction}' - {way_out}")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(
                storage=self.storage, study_name=self.study_name, direction=self.direction, load_if_exists=True
            )
            # A resumed study goes on with other random numbers than those that its first trials were drawn with.
            seed = None if self.seed is None else self.seed + len(study.trials)
            study.sampler = getattr(optuna.samplers, SAMPLERS[self.sampler])(seed=seed)
        except Exception as error:  # of the database, too
            reason = str(error).partition("\n")[0]
            where = f"hydra.sweeper.storage={self.storage}, sampler={self.sampler}"
            raise UsageError(f"Optuna cannot open the study ({where}): {reason} - correct hydra.sweeper") from error
        return study

    def _split(self, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """Return the overrides that all trials share, and the distributions of the others by their key."""
        groups = self.hydra_context.config_loader.list_groups("")
        typed = {word.partition("=")[0].lstrip("+") for word in arguments}  # takes precedence over `params`
        params = [
            f"{'' if key in groups else '++'}{key}={value}" for key, value in self.params.items() if key not in typed
        ]
        fixed, distributions = [], {}
        for override in OverridesParser.create().parse_overrides([*params, *arguments]):
            if override.is_sweep_override():
                distributions[override.get_key_element()] = distribution(override)
            else:
                fixed.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
        if not distributions:
            example = "'optimizer.lr=tag(log, interval(1e-4, 1e-1))'"
            raise UsageError(f"hydra/sweeper=optuna has nothing to choose - give for example {example}")
        return fixed, distributions


def distribution(override: Any) -> Any:
    """Return the values that a sweep of Hydra's grammar allows, as a distribution of Optuna.

    Choices are categories. Ranges and intervals are numbers, on a logarithmic scale with `tag(log, interval(a, b))`;
    `int(interval(a, b))` is an interval of whole numbers.

    Raises:
        UsageError: The sweep has no value.
    """
    from optuna import distributions

    value = override.value()
    try:
        if override.is_interval_sweep():
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            kind = distributions.IntDistribution if whole else distributions.FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        values = list(override.sweep_iterator())
        if not override.is_range_sweep() or value.shuffle:
            return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
        kind = distributions.IntDistribution if isinstance(values[0], int) else distributions.FloatDistribution
        return kind(min(values), max(values), step=abs(value.step))
    except (ValueError, IndexError) as error:
        raise UsageError(f"{override.input_line}: {error} - correct the values") from error


def register() -> None:
    """Let Hydra find the sweeper by the name in configs/hydra/sweeper/optuna.yaml.

    Hydra accepts plugins only from the package `hydra_plugins`, which would be a second package to install. So a module
    of that name exists in this process only.
    """
    try:
        package = importlib.import_module("hydra_plugins")  # of other plugins
    except ImportError:
        package = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        package.__path__ = []
    module = sys.modules[f"{package.__name__}.segdeconv"] = ModuleType(f"{package.__name__}.segdeconv")
    for owner, name, value in ((package, "segdeconv", module), (module, "OptunaSweeper", OptunaSweeper)):
        setattr(owner, name, value)
    OptunaSweeper.__module__ = module.__name__
    Plugins.instance().register(OptunaSweeper)
