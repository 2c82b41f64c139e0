"""The console command `segdeconv COMMAND ...`, which runs the scripts in scripts/ from any folder."""

import ast
import runpy
import sys
from pathlib import Path

from segdeconv import __version__, errors
from segdeconv.cli import command, completion
from segdeconv.system import CONFIGS, HOME


def commands() -> dict[str, Path]:
    """Return the path of every script by the name of its command."""
    return {path.stem: path for path in sorted((HOME / "scripts").glob("*.py"))}


def summary(script: Path) -> str:
    """Return the first line of a script's docstring."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    return docstring.splitlines()[0] if docstring else ""


def overview() -> str:
    """Return the text that `segdeconv --help` prints."""
    scripts = commands()
    width = max(map(len, scripts))
    lines = [f"    {name:<{width}}  {summary(script)}" for name, script in scripts.items()]
    return "\n".join(
        ["segdeconv COMMAND ...", "", *lines, "", "segdeconv COMMAND --help shows the options of a command."]
    )


def run() -> None:
    """Run the script that the command line names, as `python scripts/NAME.py` does.

    Raises:
        UsageError: The command is unknown.
    """
    if sys.argv[1:2] == ["help"]:  # segdeconv help COMMAND
        sys.argv[1:] = [*sys.argv[2:3], "--help"]
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(overview())
        return
    if name in ("-V", "--version"):
        print(f"segdeconv {__version__}")
        return
    scripts = commands()
    if name in completion.FLAGS:
        errors.COMMAND_FORMAT = "segdeconv {}"
        completion.run(sys.argv[1:], list(scripts), CONFIGS)
        return
    if name not in scripts:
        raise errors.UsageError(f"unknown command '{name}' - {errors.did_you_mean(name, scripts)}")
    errors.COMMAND_FORMAT = "segdeconv {}"
    # The script's own path, since worker processes and the processes of further devices start it again.
    sys.argv[:2] = [str(scripts[name])]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """Run the console command `segdeconv`."""
    command.run_command(run)
