"""The Oxford-IIIT Pet data set: cats and dogs, cut out."""

import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from segdeconv.classes import Classes, voc_colours
from segdeconv.data.dataset import FileDataset, Pair, require_root, require_split
from segdeconv.data.files.archives import unpack_tar
from segdeconv.data.files.published import Archive, obtain, unpacked
from segdeconv.data.files.reading import MAX_PIXELS, Exif, read_list, read_mask
from segdeconv.data.splits import choose_val
from segdeconv.errors import UsageError

IN_PLACE = "oxford-iiit-pet"  # the name of the folder that torchvision makes
DEFAULT_PLACE = f"data/{IN_PLACE}"
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
WANTED = {
    IMAGES: (f"{IMAGES}/",),
    ANNOTATIONS: tuple(f"{ANNOTATIONS}/{name}" for name in ("trimaps/", "trainval.txt", "test.txt", "README")),
}

SPECIES = ("cat", "dog")
# By class id 1..37: tensorflow/datasets, oxford_iiit_pet_dataset_builder.py; as the names of the images have them.
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
# What the trimaps hold, by the README of annotations.tar.gz: 1 the animal, 2 the background, 3 what lies between.
TRIMAP = Classes(("background", "pet", "border"), voc_colours(3), labels=(2, 1, 3))


class OxfordPets(FileDataset):
    """A photograph of one cat or dog each, of 37 breeds.

    **What**: 3680 images to train on, of which a share becomes val, and 3669 test images, of many sizes.

    **Layout**: `images/NAME.jpg`, trimaps `annotations/trimaps/NAME.png`, and lists `annotations/{trainval,test}.txt`
    of lines `NAME class species breed`. Trimaps are 1 on the animal, 2 on the background and 3 on the border.

    **Classes**: background and pet; or cat and dog, or the 37 breeds, for pet. The border is ignored, or one more
    class, the last.

    **Cite**: Parkhi, Vedaldi, Zisserman, Jawahar: Cats and dogs, 2012.

    root: the folder that holds images and annotations, or one with an oxford-iiit-pet that does. Without one it is
        data/oxford-iiit-pet, and what is absent is fetched there: 0.8 GB. An archive that lies in root is used
        unfetched.
    detail: what the animal is called. border: what label 3 is.
    val_share: of trainval, dealt by split_seed.
    exif: ignored by default, as in torchvision.
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
            self.notes = (f"val: about {val_share:g} of trainval, dealt by dataset.split_seed={split_seed}",)
        pairs = [
            Pair(folder / IMAGES / f"{name}.jpg", folder / ANNOTATIONS / "trimaps" / f"{name}.png", name)
            for name in listed
        ]
        # The trimaps know one animal; the lists say which it is.
        names = ("background", *ANIMALS[detail], *(("border",) if border == "class" else ()))
        classes = Classes(
            names,
            voc_colours(len(names)),
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
    """The class of the animal in each image, by name."""
    if not listing.is_file():
        raise UsageError(f"{listing} is missing - restore it from annotations.tar.gz")
    listed: dict[str, int] = {}
    for number, line in read_list(listing):
        if line.startswith("#"):
            continue
        found = re.fullmatch(r"(\w+)_(\d+) (\d+) ([12]) \d+", line)
        if not found or not 1 <= int(found[3]) <= len(BREEDS):
            raise UsageError(
                f"{listing}, line {number}: '{line}' is not like 'Abyssinian_100 1 1 1' - restore the list"
            )
        name, breed = f"{found[1]}_{found[2]}", BREEDS[int(found[3]) - 1]
        if breed != found[1]:
            raise UsageError(f"{listing}, line {number}: {name} has class {found[3]}, {breed} - restore the list")
        if name in listed:
            raise UsageError(f"{listing}, line {number}: '{name}' is listed twice - an image counts once")
        listed[name] = {"pet": 1, "species": int(found[4]), "breed": int(found[3])}[detail]
    if not listed:
        raise UsageError(f"{listing} names no image - restore it from annotations.tar.gz")
    return listed


def _find_or_unpack(root: str | None) -> Path:
    place = Path(DEFAULT_PLACE) if root is None else require_root(root, EXPECTED)
    if not (place / ANNOTATIONS).is_dir() and (place / IN_PLACE).is_dir():
        place = place / IN_PLACE
    missing = [part for part in ARCHIVES if not (place / part).is_dir()]
    lacking = " and ".join(f"{part}/" for part in missing)
    archives = [ARCHIVES[part] for part in missing]
    for archive, path in obtain(archives, place, root, lacking=lacking, instead="the folder that holds them unpacked"):
        part = archive.name.removesuffix(".tar.gz")
        with unpacked(unpack_tar, path, place / part, WANTED[part]) as new:
            (new / part).rename(place / part)
    return place
