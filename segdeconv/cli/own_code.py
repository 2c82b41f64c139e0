"""Modules of the user's own, in the current folder: found by a command that was told their names."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from segdeconv.cli.command import HOME

if TYPE_CHECKING:
    from segdeconv.checkpoints.checkpoint import Checkpoint

CONFIGS = HOME / "configs"


def find_own_code(names: Iterable[str]) -> None:
    """Let the current folder be imported from, if a name is of a module that is not installed.

    It joins the end of sys.path, where it can hide nothing, and only then: whoever labels a folder of pictures runs no
    code that lies among them.

    Args:
        names: dotted names of classes that the user typed or trusts.
    """
    for own in {name.partition(".")[0] for name in names}:
        missing = own.isidentifier() and own not in sys.modules and importlib.util.find_spec(own) is None
        if missing and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())


def compose(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`compose` from configs/, with the user's own modules importable that the configuration names."""
    from segdeconv.config import compose, targets  # late: Hydra takes a while to import

    config, choices = compose(arguments, CONFIGS)
    find_own_code(targets(config))
    return config, choices


def read_checkpoint(path: str, trust: Sequence[str], overrides: Sequence[str] = ()) -> Checkpoint:
    """`checkpoint.read`, with the user's own modules importable that `--trust` names."""
    from segdeconv.checkpoints import checkpoint  # late: torch takes seconds to import

    find_own_code(trust)
    return checkpoint.read(path, trust=trust, overrides=overrides)
