"""segdeconv: train segmentation networks that remember where the maxima were."""

import os

# albumentations asks the package index for a newer version of itself when it is imported; no
# command of ours opens a connection that was not asked for, so this is set before any import of it.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

__version__ = "0.1.0"
