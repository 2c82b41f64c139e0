"""segdeconv: train segmentation networks that remember where the maxima were.

>>> import segdeconv
>>> segdeconv.load("best.ckpt").predict("photo.jpg").save("mask.png")  # doctest: +SKIP
"""

import os
from typing import Any

# albumentations asks the package index for a newer version of itself when it is imported; no
# command of ours opens a connection that was not asked for, so this is set before any import of it.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load`, when it is asked for: torch takes seconds to import."""
    if name == "load":
        from segdeconv.inference.segmenter import load

        return load
    raise AttributeError(f"module 'segdeconv' has no attribute '{name}'")
