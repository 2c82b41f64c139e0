"""The networks: one architecture, one file, one paper."""

from segdeconv.models.base import SegmentationModel
from segdeconv.models.segnet import SegNet, SegNetBasic

__all__ = ["SegNet", "SegNetBasic", "SegmentationModel"]
