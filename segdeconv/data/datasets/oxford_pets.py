"""The Oxford-IIIT Pet data set: cats and dogs with trimaps."""

import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from segdeconv.classes import Classes, default_colours, voc_colours
from segdeconv.data.dataset import FileDataset, Pair, require_root, require_split
from segdeconv.data.files.archives import unpack_tar
from segdeconv.data.files.published import Archive, obtain, unpacked
from segdeconv.data.files.reading import MAX_PIXELS, Exif, read_list, read_mask
from segdeconv.data.splits import choose_val
from segdeconv.errors import UsageError

FOLDER_NAME = "oxford-iiit-pet"  # as in torchvision
DEFAULT_PLACE = f"data/{FOLDER_NAME}"
IMAGES, ANNOTATIONS = "images", "annotations"
EXPECTED = "images/ and annotations/ with trimaps/, trainval.txt and test.txt"
HOSTS = ("https://thor.robots.ox.ac.uk/~vgg/data/pets", "https://www.robots.ox.ac.uk/~vgg/data/pets/data")

# sha256: tensorflow/datasets, oxford_iiit_pet/checksums.tsv; the same in pytorch/vision, prototype/datasets/_builtin.
ARCHIVES = {
    IMAGES: Archive(
        "images.tar.gz",
        "the images, 0.8 GB",
        tuple(f"{host}/images.tar.gz" for host in HOSTS),
        "67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d",
    ),
    ANNOTATIONS: Archive(
        "annotations.tar.gz",
        "lists and trimaps, 19 MB",
        tuple(f"{host}/annotations.tar.gz" for host in HOSTS),
        "52425fb6de5c424942b7626b428656fcbd798db970a937df61750c0f1d358e91",
    ),
}
SELECTED = {
    IMAGES: (f"{IMAGES}/",),
    ANNOTATIONS: tuple(f"{ANNOTATIONS}/{name}" for name in ("trimaps/", "trainval.txt", "test.txt", "README")),
}

SPECIES = ("cat", "dog")
# By class id 1..37: tensorflow/datasets, oxford_iiit_pet_dataset_builder.py; spelled as in the names of the images.
BREEDS = (
    "Abyssinian", "american_bulldog", "american_pit_bull_terrier", "basset_hound", "beagle", "Bengal", "Birman",
    "Bombay", "boxer", "British_Shorthair", "chihuahua", "Egyptian_Mau", "english_cocker_spaniel", "english_setter",
    "german_shorthaired", "great_pyrenees", "havanese", "japanese_chin", "keeshond", "leonberger", "Maine_Coon",
    "miniature_pinscher", "newfoundland", "Persian", "pomeranian", "pug", "Ragdoll", "Russian_Blue", "saint_bernard",
    "samoyed", "scottish_terrier", "shiba_inu", "Siamese", "Sphynx", "staffordshire_bull_terrier", "wheaten_terrier",
    "yorkshire_terrier",
)  # fmt: skip
Detail = Literal["pet", "species", "breed"]
ANIMALS: dict[Detail, tuple[str, ...]] = {"pet": ("pet",), "species": SPECIES, "breed": BREEDS}
# Labels of the trimaps, from the README of annotations.tar.gz: 1 the animal, 2 the background, 3 the border.
TRIMAP = Classes(
    ("background", "pet", "border"), default_colours(("background", "pet", "border"), (2, 1, 3)), labels=(2, 1, 3)
)


class OxfordPets(FileDataset):
    """Photographs of one cat or dog each, of 37 breeds.

    **Content**: 3680 images for training, a fraction of which becomes val, and 3669 test images, of many sizes.

    **Layout**: `images/NAME.jpg`, trimaps `annotations/trimaps/NAME.png`, and lists `annotations/{trainval,test}.txt`
    of lines `NAME class species breed`. Trimaps are 1 on the animal, 2 on the background and 3 on the border.

    **Classes**: background and pet; or background, cat and dog; or background and the 37 breeds. The border is ignored,
    or is the last class.

    **Cite**: Parkhi, Vedaldi, Zisserman, Jawahar: Cats and dogs, 2012.

    Args:
        split: `train`, `val` or `test`.
        root: The folder of images/ and annotations/, or one that contains it as oxford-iiit-pet. By default
            data/oxford-iiit-pet, into which missing archives are downloaded (0.8 GB). An archive in this folder is used
            without a download.
        detail: The class of an animal: `pet`, its species or its breed.
        border: Whether label 3 is ignored or a class.
        val_share: Fraction of trainval that becomes val, 0..1.
        split_seed: Seed of the random split.
        exif: See `read_image`. Ignored by default, as in torchvision.
        max_pixels: Largest number of pixels of an image.

    Raises:
        UsageError: The files cannot be found or downloaded, a list is invalid, or `split` is unknown.
    """

    def __init__(
        self,
        split: str,
        root: str | None = None,
        *,
        detail: Detail = "pet",
        border: Literal["ignore", "class"] = "ignore",
        val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2,
        split_seed: int = 0,
        exif: Exif = "ignore",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        require_split(split, self.split_names)
        folder = _find_or_unpack(root)
        listed = _listed(folder / ANNOTATIONS / ("test.txt" if split == "test" else "trainval.txt"), detail)
        if split != "test":
            val, _ = choose_val(list(listed), val_share, None, 0, pattern=None, seed=split_seed)
            listed = {name: animal for name, animal in listed.items() if (name in val) == (split == "val")}
            self.notes = (f"val: about {val_share:g} of trainval, drawn with dataset.split_seed={split_seed}",)
        pairs = [
            Pair(folder / IMAGES / f"{name}.jpg", folder / ANNOTATIONS / "trimaps" / f"{name}.png", name)
            for name in listed
        ]
        # The trimaps do not distinguish animals; the lists give species and breed.
        names = ("background", *ANIMALS[detail], *(("border",) if border == "class" else ()))
        classes = Classes(
            names,
            default_colours(names, range(len(names))),
            ignore_colour=voc_colours(256)[255] if border == "ignore" else None,
            labels=TRIMAP.labels[: len(names)] if detail == "pet" else (),
            ignored_labels=TRIMAP.labels[2:] if border == "ignore" else (),
        )
        super().__init__(split, classes, pairs, exif=exif, max_pixels=max_pixels)
        self.animals = list(listed.values())

    def read_mask(self, index: int) -> np.ndarray:
        trimap = read_mask(self.pairs[index].mask, TRIMAP, max_pixels=self.max_pixels)
        border = self.classes.names.index("border") if "border" in self.classes.names else self.classes.ignore_index
        table = np.full(256, self.classes.ignore_index, dtype=np.uint8)
        table[:3] = 0, self.animals[index], border
        return table[trimap]

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}\n{self.animals}"


def _listed(listing: Path, detail: Detail) -> dict[str, int]:
    """Return the class of the animal in each image, by name."""
    if not listing.is_file():
        raise UsageError(f"{listing} is missing - restore it from annotations.tar.gz")
    listed: dict[str, int] = {}
    for number, line in read_list(listing):
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"(\w+)_(\d+) (\d+) ([12]) \d+", line)
        if not match or not 1 <= int(match[3]) <= len(BREEDS):
            raise UsageError(
                f"{listing}, line {number}: '{line}' does not have the form 'Abyssinian_100 1 1 1' - restore the list"
            )
        name, breed = f"{match[1]}_{match[2]}", BREEDS[int(match[3]) - 1]
        if breed != match[1]:
            raise UsageError(f"{listing}, line {number}: {name} has class {match[3]}, {breed} - restore the list")
        if name in listed:
            raise UsageError(f"{listing}, line {number}: '{name}' is listed twice - list every image once")
        listed[name] = {"pet": 1, "species": int(match[4]), "breed": int(match[3])}[detail]
    if not listed:
        raise UsageError(f"{listing} lists no image - restore it from annotations.tar.gz")
    return listed


def _find_or_unpack(root: str | None) -> Path:
    place = Path(DEFAULT_PLACE) if root is None else require_root(root, EXPECTED)
    if not (place / ANNOTATIONS).is_dir() and (place / FOLDER_NAME).is_dir():
        place = place / FOLDER_NAME
    missing = [part for part in ARCHIVES if not (place / part).is_dir()]
    lacking = " and ".join(f"{part}/" for part in missing)
    archives = [ARCHIVES[part] for part in missing]
    for archive, path in obtain(archives, place, root, lacking=lacking, instead="the folder of the unpacked archives"):
        part = archive.name.removesuffix(".tar.gz")
        with unpacked(unpack_tar, path, place / part, SELECTED[part]) as unpacked_folder:
            (unpacked_folder / part).rename(place / part)
    return place
