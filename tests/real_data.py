"""The real data sets, on machines that have them."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
REAL_CAMVID = SHARED / "CamVid"
needs_camvid = pytest.mark.skipif(not REAL_CAMVID.is_dir(), reason=f"CamVid was not found in {REAL_CAMVID}")

# Pixels per class as counted in reference/originals.md; void is last.
PIXEL_COUNTS = {
    "train": [
        10_682_767, 14_750_079, 623_349, 20_076_880, 2_845_085, 6_166_762, 743_859, 714_595, 3_719_877, 405_385,
        184_967, 2_503_995,
    ],
    "val": [
        1_601_620, 4_531_180, 98_499, 5_053_176, 1_521_751, 2_851_125, 155_724, 537_197, 304_716, 113_531, 387_010,
        297_271,
    ],
}  # fmt: skip
