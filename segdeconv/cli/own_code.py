"""Import of the user's own modules from the current folder, for commands whose arguments name them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from segdeconv.system import CONFIGS

if TYPE_CHECKING:
    from segdeconv.checkpoints.checkpoint import Checkpoint


def find_own_code(names: Iterable[str]) -> None:
    """Add the current folder to sys.path if a name belongs to a module that is not installed.

    The folder is appended, so it hides no installed module. It is added only if needed, so that predicting a folder of
    images never runs code that lies in it.

    Args:
        names: Dotted names of classes that the user typed or trusts.
    """
    for module in {name.partition(".")[0] for name in names}:
        missing = module.isidentifier() and module not in sys.modules and importlib.util.find_spec(module) is None
        if missing and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())


def compose(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Compose a config from configs/ and make the user's own modules that it names importable.

    Returns:
        The config, and the chosen file of each config group.
    """
    from segdeconv.cli.overrides import compose, hydra_overrides  # a late import, since Hydra takes a while

    config, choices = compose(arguments, CONFIGS)
    return declared(config, hydra_overrides(arguments, CONFIGS)), choices


def declared(config: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Make the user's own modules that a composed config names importable, and read its values as their keys declare.

    Args:
        config: The composed config.
        arguments: The arguments it was composed from, in the form of `hydra_overrides`.
    """
    from segdeconv.config import read_as_declared, targets

    find_own_code(targets(config))

    from segdeconv.training.config_check import SCHEMAS

    return read_as_declared(config, arguments, SCHEMAS)


def with_chosen_keys(config: Mapping[str, Any], choices: Mapping[str, str], arguments: Sequence[str]) -> dict[str, Any]:
    """Return a composed config whose `auto` lists the keys that training chooses for images of the user.

    Args:
        config: The composed config.
        choices: The chosen file of each config group.
        arguments: The arguments it was composed from, in the form of `hydra_overrides`.
    """
    if choices["dataset"] != "folder" or "auto" in config:
        return dict(config)

    from segdeconv.cli.overrides import keys_set
    from segdeconv.training.autoconfig import unset_keys

    return {**config, "auto": unset_keys(keys_set(arguments, CONFIGS))}


def print_keys(group: str, arguments: Sequence[str]) -> None:
    """Print the keys of a config group, or of all groups for an empty name, for the classes that a config names."""
    from segdeconv.cli.overrides import compose
    from segdeconv.config import list_groups, targets

    config, choices = compose(arguments, CONFIGS, incomplete=True)
    find_own_code(targets(config))

    from segdeconv.training.config_check import require_known
    from segdeconv.training.keys import keys, table

    require_known(config)
    print(table(keys(config, group), config))
    if group in choices:
        print(f"\n{group}=NAME chooses another file: {', '.join(list_groups(CONFIGS)[group])}")


def read_checkpoint(path: str, trust: Sequence[str], overrides: Sequence[str] = ()) -> Checkpoint:
    """Read a checkpoint with `checkpoint.read` and make the user's own modules that `trust` names importable."""
    from segdeconv.checkpoints import checkpoint  # a late import, since torch takes seconds

    find_own_code(trust)
    return checkpoint.read(path, trust=trust, overrides=overrides)
