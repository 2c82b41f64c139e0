"""The data sets. Each is one class, which knows its own classes, and one YAML file in configs/dataset."""

from segdeconv.data.camvid import CamVid
from segdeconv.data.dataset import FileDataset, Pair, Sample, SegmentationDataset
from segdeconv.data.folder import Folder
from segdeconv.data.shapes import Shapes
from segdeconv.data.voc import VOC

__all__ = ["VOC", "CamVid", "FileDataset", "Folder", "Pair", "Sample", "SegmentationDataset", "Shapes"]
