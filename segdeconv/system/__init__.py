"""Machine-level services: devices, memory, atomic file writes, signals, standard streams, random seeds.

May import only `errors`.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
# An installed package contains scripts/ and configs/; in a clone they are next to the package.
HOME = _PACKAGE if (_PACKAGE / "scripts").is_dir() else _PACKAGE.parent
CONFIGS = HOME / "configs"

# The environment variable that lets a command, and every process it starts, tune the C library's malloc.
KEEP_FREED = "SEGDECONV_KEEP_FREED_MEMORY"
