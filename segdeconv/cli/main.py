"""`segdeconv COMMAND ...`: the commands of scripts/, from any folder."""

import ast
import runpy
import sys
from pathlib import Path

from segdeconv import __version__, errors
from segdeconv.cli import command


def commands() -> dict[str, Path]:
    """Every command by its name: whatever lies in the folder of scripts."""
    return {path.stem: path for path in sorted((command.HOME / "scripts").glob("*.py"))}


def summary(script: Path) -> str:
    """The first line of a script's docstring."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    return docstring.splitlines()[0] if docstring else ""


def overview() -> str:
    """What `segdeconv --help` prints."""
    found = commands()
    width = max(map(len, found))
    lines = [f"    {name:<{width}}  {summary(script)}" for name, script in found.items()]
    return "\n".join(
        ["segdeconv COMMAND ...", "", *lines, "", "segdeconv COMMAND --help says what a command can be told."]
    )


def run() -> None:
    """Run the script that the command line names, as `python scripts/NAME.py` would."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(overview())
        return
    if name == "--version":
        print(f"segdeconv {__version__}")
        return
    found = commands()
    if name not in found:
        raise errors.UsageError(f"there is no command '{name}' - {errors.did_you_mean(name, found)}")
    errors.TYPED = "segdeconv {}"
    # The script's own path, so that what starts it again (worker processes, one process per device) finds it.
    sys.argv[:2] = [str(found[name])]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """The console command `segdeconv`."""
    command.run_command(run)
