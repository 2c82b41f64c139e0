"""Losses, modules that map (logits, mask) to a scalar and leave out ignored pixels, and class weights.

May import `errors`, `system`, `switches`, `config` and `classes`.
"""

from segdeconv.losses.base import LogitAdjusted, PixelLoss, loss_sums
from segdeconv.losses.combined import Sum, build_loss, check_loss, compute_class_weights
from segdeconv.losses.pixelwise import OHEM, CrossEntropy, Focal
from segdeconv.losses.regions import Dice, LovaszSoftmax

__all__ = [
    "OHEM",
    "CrossEntropy",
    "Dice",
    "Focal",
    "LogitAdjusted",
    "LovaszSoftmax",
    "PixelLoss",
    "Sum",
    "build_loss",
    "check_loss",
    "compute_class_weights",
    "loss_sums",
]
