"""ADE20K, in the form of the scene parsing benchmark of 2016."""

from pathlib import Path

from segdeconv.classes import Classes
from segdeconv.data.dataset import FileDataset, Pair, require_root, require_split
from segdeconv.data.files.archives import unpack_zip
from segdeconv.data.files.published import Archive, obtain, unpacked
from segdeconv.data.files.reading import MAX_PIXELS, Exif
from segdeconv.data.submission import Submission
from segdeconv.errors import UsageError

DEFAULT_PLACE = "data"
FOLDER_NAME = "ADEChallengeData2016"  # as in the archive, so that unpacking it by hand gives the same folder
IMAGES, MASKS = "images", "annotations"
SPLITS = {"train": "training", "val": "validation"}
EXPECTED = f"an {FOLDER_NAME} with {IMAGES}/ and {MASKS}/, each with training/ and validation/"

# No sha256 is published. md5: RJT1990/vision, torchvision/datasets/ade20k.py, and every other loader that has one;
# sha1, for comparison: 219e1696abb36c8ba3a3afe7fb2f4b4606a897c7 in dmlc/gluon-cv, scripts/datasets/ade20k.py.
ARCHIVE = Archive(
    "ADEChallengeData2016.zip",
    "images and masks, 1 GB",
    ("https://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",),
    sha256=None,
    md5="7328b3957e407ddae1d3cbf487f149ef",
)

# Order and names: CSAILVision/sceneparsing, objectInfo150.txt, the first of each line's synonyms. Colours: the
# benchmark's color150.mat, as in open-mmlab/mmsegmentation, mmseg/datasets/ade.py. There, skyscraper has the colour of
# road; here its blue differs by 1.
CLASSES = Classes(
    names=(
        "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet",
        "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water",
        "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence",
        "desk", "rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column",
        "signboard", "chest_of_drawers", "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator",
        "grandstand", "path", "stairs", "runway", "case", "pool_table", "pillow", "screen_door", "stairway",
        "river", "bridge", "bookcase", "blind", "coffee_table", "toilet", "flower", "book", "hill", "bench",
        "countertop", "stove", "palm", "kitchen_island", "computer", "swivel_chair", "boat", "bar",
        "arcade_machine", "hovel", "bus", "towel", "light", "truck", "tower", "chandelier", "awning",
        "streetlight", "booth", "television", "airplane", "dirt_track", "apparel", "pole", "land", "bannister",
        "escalator", "ottoman", "bottle", "buffet", "poster", "stage", "van", "ship", "fountain",
        "conveyer_belt", "canopy", "washer", "plaything", "swimming_pool", "stool", "barrel", "basket",
        "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank", "trade_name",
        "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture", "hood",
        "sconce", "vase", "traffic_light", "tray", "ashcan", "fan", "pier", "crt_screen", "plate", "monitor",
        "bulletin_board", "shower", "radiator", "glass", "clock", "flag",
    ),
    colours=(
        (120, 120, 120), (180, 120, 120), (6, 230, 230), (80, 50, 50), (4, 200, 3), (120, 120, 80), (140, 140, 140),
        (204, 5, 255), (230, 230, 230), (4, 250, 7), (224, 5, 255), (235, 255, 7), (150, 5, 61), (120, 120, 70),
        (8, 255, 51), (255, 6, 82), (143, 255, 140), (204, 255, 4), (255, 51, 7), (204, 70, 3), (0, 102, 200),
        (61, 230, 250), (255, 6, 51), (11, 102, 255), (255, 7, 71), (255, 9, 224), (9, 7, 230), (220, 220, 220),
        (255, 9, 92), (112, 9, 255), (8, 255, 214), (7, 255, 224), (255, 184, 6), (10, 255, 71), (255, 41, 10),
        (7, 255, 255), (224, 255, 8), (102, 8, 255), (255, 61, 6), (255, 194, 7), (255, 122, 8), (0, 255, 20),
        (255, 8, 41), (255, 5, 153), (6, 51, 255), (235, 12, 255), (160, 150, 20), (0, 163, 255), (140, 140, 141),
        (250, 10, 15), (20, 255, 0), (31, 255, 0), (255, 31, 0), (255, 224, 0), (153, 255, 0), (0, 0, 255),
        (255, 71, 0), (0, 235, 255), (0, 173, 255), (31, 0, 255), (11, 200, 200), (255, 82, 0), (0, 255, 245),
        (0, 61, 255), (0, 255, 112), (0, 255, 133), (255, 0, 0), (255, 163, 0), (255, 102, 0), (194, 255, 0),
        (0, 143, 255), (51, 255, 0), (0, 82, 255), (0, 255, 41), (0, 255, 173), (10, 0, 255), (173, 255, 0),
        (0, 255, 153), (255, 92, 0), (255, 0, 255), (255, 0, 245), (255, 0, 102), (255, 173, 0), (255, 0, 20),
        (255, 184, 184), (0, 31, 255), (0, 255, 61), (0, 71, 255), (255, 0, 204), (0, 255, 194), (0, 255, 82),
        (0, 10, 255), (0, 112, 255), (51, 0, 255), (0, 194, 255), (0, 122, 255), (0, 255, 163), (255, 153, 0),
        (0, 255, 10), (255, 112, 0), (143, 255, 0), (82, 0, 255), (163, 255, 0), (255, 235, 0), (8, 184, 170),
        (133, 0, 255), (0, 255, 92), (184, 0, 255), (255, 0, 31), (0, 184, 255), (0, 214, 255), (255, 0, 112),
        (92, 255, 0), (0, 224, 255), (112, 224, 255), (70, 184, 160), (163, 0, 255), (153, 0, 255), (71, 255, 0),
        (255, 0, 163), (255, 204, 0), (255, 0, 143), (0, 255, 235), (133, 255, 0), (255, 0, 235), (245, 0, 255),
        (255, 0, 122), (255, 245, 0), (10, 190, 212), (214, 255, 0), (0, 204, 255), (20, 0, 255), (255, 255, 0),
        (0, 153, 255), (0, 41, 255), (0, 255, 204), (41, 0, 255), (41, 255, 0), (173, 0, 255), (0, 245, 255),
        (71, 0, 255), (122, 0, 255), (0, 255, 184), (0, 92, 255), (184, 255, 0), (0, 133, 255), (255, 214, 0),
        (25, 194, 194), (102, 255, 0), (92, 0, 255),
    ),
    ignore_colour=(0, 0, 0),
    labels=tuple(range(1, 151)),
    ignored_labels=(0,),
)  # fmt: skip

SUBMISSION = Submission(
    title="ADE20K's scene parsing",
    source="https://github.com/CSAILVision/sceneparsing",
    classes=CLASSES,
    image_name=r"ADE_test_\d{8}",
    example="ADE_test_00000001",
    num_images=3352,
)


class ADE20K(FileDataset):
    """Indoor and outdoor scenes of every kind, fully labelled.

    **Content**: 20,210 train and 2000 val images of many sizes; the test images have no public labels.

    **Layout**: ADEChallengeData2016/ with `images/{training,validation}/NAME.jpg` and
    `annotations/{training,validation}/NAME.png`.

    **Classes**: 150. Label 0, other objects, is ignored and label 1, wall, is class 0: masks are read as published,
    without subtracting 1 first. Label 255 is refused, since it means that a mask was changed.

    **Cite**: Zhou, Zhao, Puig, Fidler, Barriuso, Torralba: Semantic understanding of scenes through the ADE20K dataset,
    2016.

    Args:
        split: `train` or `val`.
        root: The folder ADEChallengeData2016, or the one that contains it. By default data, into which the missing
            archive is downloaded (1 GB). An archive in this folder is used without a download.
        exif: See `read_image`. Ignored by default, as in other loaders of this data set.
        max_pixels: Largest number of pixels of an image.

    Raises:
        UsageError: The files cannot be found or downloaded, or `split` is unknown.
    """

    split_names = tuple(SPLITS)

    def __init__(
        self, split: str, root: str | None = None, *, exif: Exif = "ignore", max_pixels: int = MAX_PIXELS
    ) -> None:
        if split == "test":
            raise UsageError("ADE20K's test images have no public labels - use val")
        require_split(split, self.split_names)
        folder = _find_or_unpack(root)
        images = sorted((folder / IMAGES / SPLITS[split]).glob("[!.]*.jpg"))
        if not images:
            raise UsageError(f"{folder / IMAGES / SPLITS[split]} contains no .jpg - restore it")
        masks = folder / MASKS / SPLITS[split]
        pairs = [Pair(image, masks / f"{image.stem}.png", image.stem) for image in images]
        super().__init__(split, CLASSES, pairs, exif=exif, max_pixels=max_pixels)


def _find_or_unpack(root: str | None) -> Path:
    place = Path(DEFAULT_PLACE) if root is None else require_root(root, EXPECTED)
    for folder in (place, place / FOLDER_NAME):
        if (folder / MASKS / "training").is_dir():
            return folder
    folder = place / FOLDER_NAME
    if folder.exists():
        raise UsageError(f"{folder} has no {MASKS}/training - complete it, or move it away so that it is created again")
    for _, path in obtain([ARCHIVE], place, root, lacking=EXPECTED, instead=f"an unpacked {FOLDER_NAME}"):
        with unpacked(
            unpack_zip, path, folder, tuple(f"{FOLDER_NAME}/{part}/" for part in (IMAGES, MASKS))
        ) as unpacked_folder:
            (unpacked_folder / FOLDER_NAME).rename(folder)
    return folder
