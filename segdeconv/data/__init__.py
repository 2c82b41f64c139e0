"""Data sets (one module each in datasets/), decoding, inspection, augmentation and loading of batches.

A data set is a class and a YAML file in configs/dataset. In the order of the packages, `data` may import everything up
to `summary`.
"""

from segdeconv.data.dataset import FileDataset, Pair, Sample, SegmentationDataset
from segdeconv.data.datasets.ade20k import ADE20K
from segdeconv.data.datasets.camvid import CamVid
from segdeconv.data.datasets.cityscapes import Cityscapes
from segdeconv.data.datasets.folder import Folder
from segdeconv.data.datasets.oxford_pets import OxfordPets
from segdeconv.data.datasets.shapes import Shapes
from segdeconv.data.datasets.shards import Shards
from segdeconv.data.datasets.sunrgbd import SUNRGBD
from segdeconv.data.datasets.voc import VOC

__all__ = [
    "ADE20K",
    "SUNRGBD",
    "VOC",
    "CamVid",
    "Cityscapes",
    "FileDataset",
    "Folder",
    "OxfordPets",
    "Pair",
    "Sample",
    "SegmentationDataset",
    "Shapes",
    "Shards",
]
