"""segdeconv: train and use segmentation networks that unpool with recorded max-pooling switches.

Examples:
    >>> import segdeconv
    >>> segdeconv.load("best.ckpt").predict("photo.jpg").save("mask.png")  # doctest: +SKIP
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segdeconv.inference.segmenter import load as load

# albumentations asks the package index for a newer version when it is imported. No command opens a connection without
# being asked to, so this is set before albumentations is imported.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `load` on first use, because torch takes seconds to import."""
    if name == "load":
        from segdeconv.inference.segmenter import load

        return load
    raise AttributeError(f"module 'segdeconv' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # for tab completion before the first use
