"""The command line: shared options, exit codes and error messages of the commands, and `segdeconv COMMAND`.

May import every other package; only scripts/ imports it.
"""

from segdeconv.cli.main import main

__all__ = ["main"]
