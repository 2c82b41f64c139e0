"""The data sets. Each is one class, which knows its own classes, and one YAML file in configs/dataset."""

from segdeconv.data.ade20k import ADE20K
from segdeconv.data.camvid import CamVid
from segdeconv.data.cityscapes import Cityscapes
from segdeconv.data.dataset import FileDataset, Pair, Sample, SegmentationDataset
from segdeconv.data.folder import Folder
from segdeconv.data.oxford_pets import OxfordPets
from segdeconv.data.shapes import Shapes
from segdeconv.data.sunrgbd import SUNRGBD
from segdeconv.data.voc import VOC

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
