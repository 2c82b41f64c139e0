"""The commands: their shared options, exit codes and error lines, and `segdeconv COMMAND`.

May import everything; nothing but scripts/ imports it.
"""

from segdeconv.cli.main import main

__all__ = ["main"]
