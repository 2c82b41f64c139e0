"""Losses: modules from (logits, mask) to a scalar, none of which counts ignored pixels; class weights.

May import `errors`, `system`, `switches`, `config` and `classes`.
"""

from segdeconv.losses.base import LogitAdjusted, PixelLoss, loss_sums
from segdeconv.losses.combined import Sum, balance, build_loss, check_loss
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
    "balance",
    "build_loss",
    "check_loss",
    "loss_sums",
]
