"""From files to batches: data sets (one file each in datasets/), decoding, inspection, augmentation, loading.

May import everything up to `summary`. A data set is one class and one YAML file in configs/dataset.
"""

from segdeconv.data.dataset import FileDataset, Pair, Sample, SegmentationDataset
from segdeconv.data.datasets.ade20k import ADE20K
from segdeconv.data.datasets.camvid import CamVid
from segdeconv.data.datasets.cityscapes import Cityscapes
from segdeconv.data.datasets.folder import Folder
from segdeconv.data.datasets.oxford_pets import OxfordPets
from segdeconv.data.datasets.shapes import Shapes
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
]
