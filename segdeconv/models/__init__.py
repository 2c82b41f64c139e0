"""The networks: one architecture, one file, one paper."""

from segdeconv.models.base import SegmentationModel, build_model, check_model
from segdeconv.models.deconvnet import DeconvNet
from segdeconv.models.segnet import SegNet, SegNetBasic

__all__ = ["DeconvNet", "SegNet", "SegNetBasic", "SegmentationModel", "build_model", "check_model"]
