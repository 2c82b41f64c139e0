"""Classes and functions of another library than segdeconv; all but the first cannot be used in a config."""

import torch
from torch import nn

from segdeconv.classes import Classes
from segdeconv.data import SegmentationDataset


class Half(nn.Module):
    """A network whose scores have half the resolution of the image."""

    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Conv2d(3, num_classes, 2, stride=2)

    def forward(self, image):
        return {"out": self.layer(image)}


def function(**arguments):
    return "text"


class NoLength(torch.utils.data.Dataset):
    def __init__(self, split):
        self.split = split

    def __getitem__(self, index):
        return torch.zeros(3, 8, 8), torch.zeros(8, 8)


class NoNames(SegmentationDataset):
    classes = Classes(("NoNames", "b"), ((1, 2, 3), (4, 5, 6)), 255, (0, 1))
    fingerprint = "x"

    def __init__(self, split):
        self.split = split

    def __getitem__(self, index):
        return None


class NoSample(NoNames):
    def __init__(self, split):
        self.split, self.names = split, ["NoSample"]


class Broken(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Conv2d(1, num_classes, 1)

    def forward(self, image):
        return self.layer(image)  # of three channels


class Pooled(Broken):
    def forward(self, image):
        return image.mean(dim=(2, 3))


class Text(Broken):
    def forward(self, image):
        return ["a", image]


class FewClasses(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)

    def forward(self, image):
        return self.layer(image)


class Unbuildable(nn.Module):
    def __init__(self, num_classes):
        raise KeyError("no weights")


class MissingPackage(nn.Module):
    def __init__(self, num_classes):
        import a_package_that_nobody_has  # noqa: F401


class BrokenLoss(nn.Module):
    def forward(self, logits, mask):
        raise RuntimeError("BrokenLoss")


class MapLoss(nn.Module):
    def forward(self, logits, mask):
        return logits
