"""Shell completion of config groups, their choices and the keys of config files, by Hydra's completion plugins.

The scripts that Hydra prints for a shell call the command again with `-sc query=SHELL`, and the line in COMP_LINE.
"""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from segdeconv import errors

SHELLS = ("bash", "zsh", "fish")
FLAGS = ("-sc", "--shell-completion")
CONSOLE = "segdeconv"
WITH_OVERRIDES = (
    "train",
    "find",
    "inspect_data",
    "convert",
    "describe",
)  # commands of which a config's keys are arguments


def is_completion(words: Sequence[str]) -> bool:
    """Return whether a command line asks for a completion script or a completion."""
    return any(word in FLAGS for word in words)


def run(words: Sequence[str], commands: Sequence[str], configs: Path) -> None:
    """Print the script that a shell evaluates, or the completions of the line in COMP_LINE.

    Args:
        words: `-sc` and `install=SHELL`, `uninstall=SHELL` or `query=SHELL`.
        commands: Names of the commands, the first word that is completed after `segdeconv`.
        configs: The folder of config files.

    Raises:
        UsageError: The action or the shell is unknown.
    """
    action, _, shell = next((word for word in words if not word.startswith("-")), "").partition("=")
    if action not in ("install", "uninstall", "query") or shell not in SHELLS:
        choices = " or ".join(f"install={name}" for name in SHELLS)
        raise errors.UsageError(f"{' '.join(words)} is not a completion command - write -sc and {choices}")
    console = errors.COMMAND_FORMAT.startswith(CONSOLE)
    if action != "query":
        # Hydra names the program after argv[0]: `segdeconv`, or `python` for a script.
        print(_hydra([CONSOLE if console else sys.argv[0]], [f"{action}={shell}"], configs), end="")
        return
    line = os.environ.get("COMP_LINE", "")
    complete, _, last = line.rpartition(" ")
    program, *given = [*complete.split(), last] if line else [""]
    if Path(program).name.startswith("python"):
        given = given[1:]  # the script
    elif program == CONSOLE:
        if len(given) < 2:
            print("\n".join(commands) if shell == "fish" else " ".join(commands))
            return
        name, *given = given
        if name not in WITH_OVERRIDES:
            return
        given = given[1:] if name == "find" else given  # its first word is not an override
    with contextlib.suppress(Exception):  # an error message would be printed into the line that is being typed
        print(_query(given, shell, configs), end="")


def _query(words: Sequence[str], shell: str, configs: Path) -> str:
    """Return the completions of the last word; the ones before it may set keys that no config file has."""
    from segdeconv.cli.overrides import hydra_overrides

    *complete, last = words
    complete = hydra_overrides([word for word in complete if word], configs)
    # The flags of the line apply to the query itself; Hydra looks for overrides and --multirun only.
    flags = [word for word in complete if word.startswith(("--config-dir=", "--config-name="))]
    os.environ["COMP_LINE"] = " ".join([CONSOLE, *(word for word in complete if word not in flags), last])
    return _hydra([CONSOLE], [f"query={shell}"], configs, flags)


def _hydra(program: Sequence[str], actions: Sequence[str], configs: Path, flags: Sequence[str] = ()) -> str:
    """Run Hydra's completion as the program would, and return what it prints."""
    import hydra

    argv, sys.argv = sys.argv, [*program, "-sc", *flags, *actions]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            hydra.main(version_base="1.3", config_path=str(configs), config_name="train")(_never)()
    finally:
        sys.argv = argv
    return output.getvalue()


def _never(config: object) -> None:
    raise AssertionError("a completion runs no job")
