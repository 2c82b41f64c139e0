"""Segmentation networks, one file per architecture, and their layers, encoders and pretrained VGG weights.

May import `errors`, `system`, `switches`, `config` and `classes`.
"""

from segdeconv.models.base import SegmentationModel, check_model
from segdeconv.models.basic import BilinearBasic, FCNBasic, SegNetBasic
from segdeconv.models.build import build_model, create_model, list_models
from segdeconv.models.deconvnet import DeconvNet
from segdeconv.models.deeplab_largefov import DeepLabLargeFOV
from segdeconv.models.fcn import FCN
from segdeconv.models.fpn import FPN
from segdeconv.models.segnet import SegNet
from segdeconv.models.unet import UNet

__all__ = [
    "FCN",
    "FPN",
    "BilinearBasic",
    "DeconvNet",
    "DeepLabLargeFOV",
    "FCNBasic",
    "SegNet",
    "SegNetBasic",
    "SegmentationModel",
    "UNet",
    "build_model",
    "check_model",
    "create_model",
    "list_models",
]
