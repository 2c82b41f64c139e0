"""The networks: one architecture, one file, one paper."""

from segdeconv.models.base import SegmentationModel, build_model, check_model
from segdeconv.models.segnet import SegNet, SegNetBasic

__all__ = ["SegNet", "SegNetBasic", "SegmentationModel", "build_model", "check_model"]
