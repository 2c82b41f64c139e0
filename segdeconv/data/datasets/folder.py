"""The user's own images and masks in a folder."""

import os
import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from segdeconv.classes import Classes
from segdeconv.data.annotations import AnnotatedFolder, classes_of, find_annotations
from segdeconv.data.annotations.class_labels import Labels, Unlabelled
from segdeconv.data.annotations.shapes import malformed
from segdeconv.data.class_file import (
    COLOUR_TABLES,
    find_class_file,
    find_colour_tables,
    given_classes,
    read_class_file,
)
from segdeconv.data.class_file import NAMES as CLASS_FILES
from segdeconv.data.class_inference import infer_classes
from segdeconv.data.dataset import FileDataset, Pair, require_root, require_split
from segdeconv.data.files.finding import find_files
from segdeconv.data.files.reading import MAX_PIXELS, Exif, StoredMask, image_size, read_mask
from segdeconv.data.folder_names import IMAGES, MASKS, candidates, find_folder
from segdeconv.data.pairing import Folders, count, find_folders, has_masks_beside, read_split_list
from segdeconv.data.splits import SPLITS, choose_val, require_kept_together
from segdeconv.errors import UsageError

LIST_LIKE = re.compile(r"(train|val|test|class|label).*\.(txt|csv|tsv|lst|json|ya?ml|names)$", re.IGNORECASE)


class Folder(FileDataset):
    """Your own images and masks, matched by file name.

    **Content**: every image in the folder and its mask of the same name. The suffix may differ, the mask's name may end
    in `_mask`, `_label` or similar, and all names may have a common beginning and end, as in `img_01` and `mask_01_L`.
    Hidden and system folders are left out, links are followed, and a warning counts every file that is not used.

    **Layout**: one of

    * `DIR/images`, `DIR/masks` and lists `DIR/train.txt`, `DIR/val.txt` (and `test.txt`), one image per line: its name,
      its path, or its path and that of its mask;
    * `DIR/{train,val,test}/{images,masks}`;
    * `DIR/{images,masks}/{train,val,test}`; the images of test may have no masks, and are not scored then;
    * images in `DIR/{train,val,test}` and masks in `DIR/{train,val,test}_masks`, val being optional;
    * images with their masks beside them, `NAME.jpg` and `NAME_mask.png`, in DIR or in `DIR/{train,val,test}`;
    * images anywhere in DIR and the annotations of a labelling tool instead of masks, see `annotations`;
    * `DIR/images` and `DIR/masks` alone: a fraction `val_share` becomes val, or the images are split into `folds`
      folds, of which number `fold` is val and the rest train. Both depend on `split_seed`.

    Folders may have other usual names for images (`img`, `JPEGImages`, ...) and masks (`labels`, `SegmentationClass`,
    ...), which `segdeconv.data.folder_names` lists; a note names those that are read.

    **Classes**: inferred from the masks of all splits, or named in a file, `DIR/classes.yaml` or `classes=FILE`: a list
    of names for the labels 0, 1, 2, ..., or a mapping from names to labels or colours, where the name `ignore` stands
    for ignored pixels (any integer, such as -9999, or several). A text file `DIR/classes.txt` has one name per line.
    Tables of colours of other programs are read if the masks have these colours: `class_dict.csv` (name,r,g,b),
    `label_colors.txt` (r g b name) and `labelmap.txt` (name:r,g,b::).
    Where the table gives colours, they decide for palette images too. Inferred classes are one per label, except that
    255 is ignored unless all labels are levels of grey; background and foreground for masks of 0 and 255 only; and one
    per colour for RGB masks and for palettes that differ between files.

    **Cite**: your own publication.

    Args:
        split: `train` or `val`, or `test` if the folder has it.
        root: The folder DIR.
        classes: The YAML file of the classes, or its content.
        val_share: Fraction of the images that becomes val, 0..1.
        split_seed: Seed of the random split.
        folds: Number of folds, instead of `val_share`.
        fold: Index of the fold that is val, from 0.
        annotations: Polygons and masks of a labelling tool instead of mask files: the annotation file, a folder of
            them, or a mapping from splits to files. None finds them if DIR has no masks.
        unlabelled: What pixels without any annotation are: background, or ignored.
        images: The folder of the images, below DIR, if its name is not recognised; `{}` stands for the name of the
            split, as in `{}/rgb`.
        masks: The folder of the masks in the same way; that of the images if masks lie beside them.
        mask_name: The name of an image's mask, with `{}` for the name of the image, such as `mask_{}`; None recognises
            it.
        absent_classes: Whether training is refused if a class of the table has no pixel in any mask while other pixels
            are ignored, which may be that class.
        group: A regular expression whose first group extracts from an image's name the group it belongs to (a patient,
            a drive), such as `^(patient[0-9]+)_`. The images of a group are never in two splits.
        channels: None reads every image as 8-bit RGB. A number reads JPEG, PNG, BMP, WEBP, TIFF and .npy files of that
            many channels exactly as stored, with 8 or 16 bits.
        exif: See `read_image`.
        max_pixels: Largest number of pixels of an image.

    Raises:
        UsageError: The folder has another layout, an image has no mask, a list or the classes are invalid, or `split`
            is unknown.
    """

    def __init__(
        self,
        split: str,
        root: str,
        *,
        classes: str | dict[str | int, Any] | list[str] | None = None,
        val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2,
        split_seed: int = 0,
        folds: Annotated[int, Field(ge=2)] | None = None,
        fold: Annotated[int, Field(ge=0)] = 0,
        annotations: str | dict[str, str] | None = None,
        unlabelled: Unlabelled = "background",
        images: str | None = None,
        masks: str | None = None,
        mask_name: str | None = None,
        absent_classes: Literal["refuse", "allow"] = "refuse",
        group: str | None = None,
        channels: Annotated[int, Field(ge=1)] | None = None,
        exif: Exif = "refuse",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        folder = require_root(root, "images/ and masks/, or train/ and val/ with images/ and masks/ in each")
        annotated = None
        given = {key: value for key, value in (("images", images), ("masks", masks)) if value is not None}
        if given and annotations is not None:
            raise UsageError(
                f"dataset.{min(given)} has no effect with dataset.annotations, which name the images - set one of them"
            )
        if annotations is not None or not (given or _has_masks(folder)):
            annotated = find_annotations(folder, annotations)
        if annotated is None:
            layout = _find_layout(folder, mask_name, given)
        else:
            layout = _annotated_layout(folder, annotated, given=annotations is not None)
        splits = layout.splits
        if splits is None:
            pairs = layout.folders[0].pairs
            if len(pairs) < 2:
                where = f"{layout.folders[0].where[0]} holds" if annotated is None else f"{folder} holds"
                raise UsageError(f"{where} {len(pairs)} image with a mask - train and val need at least one each")
            names = [pair.name for pair in pairs]
            val, self.notes = choose_val(names, val_share, folds, fold, pattern=group, seed=split_seed)
            splits = {
                "train": [pair for pair in pairs if pair.name not in val],
                "val": [pair for pair in pairs if pair.name in val],
            }
        elif folds or fold:
            raise UsageError(
                f"dataset.folds={folds} has no effect, since {folder} defines its own train and val - leave out "
                "dataset.folds and dataset.fold, or remove its lists or folders"
            )
        elif group:
            require_kept_together({name: [pair.name for pair in pairs] for name, pairs in splits.items()}, group)
        if split == "test" and layout.unscored is not None:
            raise UsageError(
                f"{layout.unscored[1]} holds no masks of the test images, so they cannot be scored - add the masks, "
                "evaluate val, or use predict"
            )
        require_split(split, tuple(splits))
        used = [pair for pairs in splits.values() for pair in pairs]
        if annotated is None:
            names_read, unread_folders = _describe_names(folder, layout)
            self.notes = (*self.notes, *names_read)
            layout.warnings.extend(unread_folders)
        tool_files = annotated.sources if annotated else frozenset()
        parsed, lines = _read_classes(folder, classes, tool_files, None if annotated else used[0].mask)
        self.labels: Labels | None = None
        if annotated is not None:
            self.labels = classes_of(annotated, parsed, unlabelled)
            self.entries = [annotated.entries[pair.name] for pair in splits[split]]
            parsed = self.labels.classes
            self.notes = (*self.notes, _describe_annotations(annotated))
        elif parsed is None:
            parsed, assumptions = infer_classes([pair.mask for pair in used])
            lines = (*lines, *assumptions)
            self.inferred_classes = True
        super().__init__(split, parsed, splits[split], channels=channels, exif=exif, max_pixels=max_pixels)
        self.split_names = tuple(splits)
        self.own_classes = absent_classes == "refuse"
        unread = _describe_unread(folder, Path(classes) if isinstance(classes, str) else None, tool_files)
        self.warnings = (*layout.warnings, *unread, *_describe_unused(layout.folders, used), *lines)
        self.inventory = _count_files(layout.folders, used)

    def read_mask(self, index: int) -> np.ndarray:
        if self.labels is None:
            return super().read_mask(index)
        entry, image = self.entries[index], self.pairs[index].image
        size = entry.size or image_size(image, exif=self.exif, max_pixels=self.max_pixels)
        with malformed(entry.source):
            return entry.draw(self.labels.indices, size, self.labels.background)

    def stored_mask(self, index: int) -> StoredMask:
        if self.labels is None:
            return super().stored_mask(index)
        labels = np.full(256, self.classes.ignored_labels[0], dtype=np.int64)
        labels[: len(self.classes)] = self.classes.labels
        return StoredMask(labels[self.read_mask(index)], None, None)

    def describe_mask(self, index: int) -> str:
        if self.labels is None:
            return super().describe_mask(index)
        return f"{self.entries[index].source}: the annotation of {self.entries[index].file}"

    @property
    def fingerprint(self) -> str:
        return super().fingerprint + (f"\n{self.labels.background}" if self.labels else "")


class _Layout(NamedTuple):
    """The files of a data set, and how they are split.

    Attributes:
        folders: The folders of images and masks; none if lists name both files of every pair.
        splits: The pairs of each split that sub-folders or lists define; None without either.
        warnings: A line for each folder that is left out.
        unscored: The images of test and the missing or empty folder of their masks; test is not a split then.
    """

    folders: list[Folders]
    splits: dict[str, list[Pair]] | None
    warnings: list[str]
    unscored: tuple[Path, Path] | None = None


def _find_layout(root: Path, mask_name: str | None, given: Mapping[str, str]) -> _Layout:
    """Find the splits, images and masks of a folder.

    Args:
        root: The folder.
        mask_name: `dataset.mask_name`.
        given: `dataset.images` and `dataset.masks`, if they are set.

    Raises:
        UsageError: The folder has none of the layouts of `Folder`, or an image has no mask.
    """
    if any("{}" in name for name in given.values()):
        return _in_folders(_given_splits(root, given), mask_name, [])
    images = root / "images"
    ours = _stated(root, lambda name: (root / name / "images").is_dir())
    lists = _stated_lists(root)
    # A synonym of images/ states no splits where images/ or lists exist, so that exact names win.
    if not given and (ours or not (lists or images.is_dir())):
        inside = {name: find_folder(root, [name]) for names in SPLITS.values() for name in names}
        outer = _stated(root, lambda name: find_folder(inside[name], IMAGES) is not None)
        if outer and (missing := {"train", "val"} - set(outer)):
            name = min(missing)
            raise UsageError(
                f"{root} has {', '.join(outer.values())} but no {name}/images - add {root / name}/images and masks"
            )
        left_out = [f"{images}: left out, since {' and '.join(outer.values())} have images - move it into one of them"]
        if outer:
            places = {split: _place(inside[name] or root / name) for split, name in outer.items()}
            return _in_folders(places, mask_name, left_out if images.is_dir() else [])
    if lists:
        if missing := {"train", "val"} - set(lists):
            name = min(missing)
            raise UsageError(
                f"{root} has {', '.join(lists.values())} but no {name}.txt - add it, or remove all lists for a random "
                "split"
            )
        known = given or images.is_dir() or len(candidates(root, IMAGES)) == len(candidates(root, MASKS)) == 1
        whole = find_folders(*_place(root, given), mask_name) if known else None
        splits = {split: read_split_list(root / name, root, whole) for split, name in lists.items()}
        return _Layout([] if whole is None else [whole], splits, [])
    images, masks = _place(root, given)
    inner = _stated(images, lambda name: find_folder(images, [name]) is not None)
    if {"train", "val"} <= set(inner):
        places = {
            split: (find_folder(images, [name]) or images / name, find_folder(masks, [name]) or masks / name)
            for split, name in inner.items()
        }
        beside = set(find_files(images).files).difference(*(find_files(place).files for place, _ in places.values()))
        line = (
            f"{images}: left out {count(beside, 'image')} in none of the folders {', '.join(inner.values())} - move "
            "them into one of these"
        )
        return _in_folders(places, mask_name, [line] if beside else [])
    if not (images.is_dir() or masks.is_dir()) and (places := _neighbours(root) or _side_by_side(root, mask_name)):
        return _in_folders(places, mask_name, [])
    if not masks.is_dir() and has_masks_beside(root, mask_name):
        images = masks = root
    return _Layout([find_folders(images, masks, mask_name)], None, [])


def _place(parent: Path, given: Mapping[str, str] = MappingProxyType({})) -> tuple[Path, Path]:
    """Return the folders of images and of masks in a folder, images/ and masks/ if it has none."""
    images, masks = (
        _given_folder(parent, kind, given[kind]) if kind in given else find_folder(parent, names) or parent / kind
        for kind, names in (("images", IMAGES), ("masks", MASKS))
    )
    return images, masks


def _given_folder(root: Path, kind: str, name: str) -> Path:
    folder = root / name
    if not folder.is_dir() or not Path(os.path.abspath(folder)).is_relative_to(os.path.abspath(root)):
        present = [path.name for path in sorted(root.iterdir()) if path.is_dir()]
        raise UsageError(
            f"dataset.{kind}={name} is not a folder in {root}, which holds {', '.join(present[:10]) or 'no folder'}"
            f"{', ...' if present[10:] else ''} - give a folder below dataset.root"
        )
    return folder


def _given_splits(root: Path, given: Mapping[str, str]) -> dict[str, tuple[Path, Path]]:
    """Return the folders of each split that `dataset.images` and `dataset.masks` with {} for the split name."""
    if len(given) < 2 or not all("{}" in name for name in given.values()):
        raise UsageError(
            f"dataset.images={given.get('images')} and dataset.masks={given.get('masks')} do not both have {{}}, which "
            "stands for the split - write it in both or in neither"
        )
    images, masks = given["images"], given["masks"]
    stated = _stated(root, lambda name: (root / images.replace("{}", name)).is_dir())
    for split in ("train", *stated):
        name = stated.get(split, split)
        _given_folder(root, "images", images.replace("{}", name))
        if split != "test":
            _given_folder(root, "masks", masks.replace("{}", name))
    return {
        split: (root / images.replace("{}", name), root / masks.replace("{}", name)) for split, name in stated.items()
    }


def _neighbours(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of each split that lie beside each other: train and train_masks, train_images and trainannot.

    There are none unless train has a folder of masks.
    """
    images = {
        name: find_folder(root, [name + word for word in IMAGES]) or find_folder(root, [name])
        for names in SPLITS.values()
        for name in names
    }
    masks = {name: find_folder(root, [name + word for word in MASKS]) for name in images}
    stated = _stated(root, lambda name: images[name] is not None)
    if masks.get(stated.get("train", "")) is None:
        return {}
    return {
        split: (images[name] or root / name, masks[name] or root / f"{name}_masks") for split, name in stated.items()
    }


def _side_by_side(root: Path, mask_name: str | None) -> dict[str, tuple[Path, Path]]:
    """Return the folder of each split that holds masks beside their images."""
    inside = {name: find_folder(root, [name]) for names in SPLITS.values() for name in names}
    places = {}
    for split, name in _stated(root, lambda name: inside[name] is not None).items():
        folder = inside[name] or root / name
        places[split] = folder, folder if has_masks_beside(folder, mask_name) else folder / "masks"
    return {} if "train" not in places or len(set(places["train"])) > 1 else places


def _has_masks(root: Path) -> bool:
    return any(
        (root / name / "masks").is_dir() for name in ("", *(name for names in SPLITS.values() for name in names))
    )


def _annotated_layout(root: Path, annotated: AnnotatedFolder, *, given: bool) -> _Layout:
    """Return the splits that the annotations, or lists in the root, state."""
    masks = {name: entry.source for name, entry in annotated.entries.items()}
    common = Path(os.path.commonpath([path.parent for path in annotated.images.values()]))
    whole = Folders(annotated.images, masks, None, (common, root), ())
    warnings = list(annotated.warnings)
    reason = "dataset.annotations is set" if given else f"there are annotations ({annotated.tool})"
    for folder in candidates(root, MASKS):
        if not any(image.is_relative_to(folder) for image in annotated.images.values()):
            warnings.append(f"{folder}: not read, since {reason} - remove one of them")
    if lists := _stated_lists(root):
        if missing := {"train", "val"} - set(lists):
            raise UsageError(
                f"{root} has {', '.join(lists.values())} but no {min(missing)}.txt - add it, or remove all lists"
            )
        return _Layout(
            [whole], {split: read_split_list(root / name, root, whole) for split, name in lists.items()}, warnings
        )
    stated: dict[str, list[Pair]] = {}
    for pair in whole.pairs:
        stated.setdefault(annotated.entries[pair.name].split or "", []).append(pair)
    if {"train", "val"} <= set(stated):
        if outside := stated.pop("", []):
            warnings.append(f"{root}: left out {count([pair.image for pair in outside], 'image')} in no split")
        return _Layout([whole], stated, warnings)
    return _Layout([whole], None, warnings)


def _describe_annotations(annotated: AnnotatedFolder) -> str:
    shapes = sum(len(entry.shapes) for entry in annotated.entries.values())
    empty = sum(not entry.shapes for entry in annotated.entries.values())
    without = f", {empty} of them without a region" if empty else ""
    return f"annotations: {annotated.tool}, {len(annotated.entries)} images{without}, {shapes} regions"


def _stated_lists(root: Path) -> dict[str, str]:
    """Return the file name of the list of each split that has one: train.txt, or train_list.txt as in PaddleSeg."""
    endings = (".txt", "_list.txt")
    names = {
        name: [name + ending for ending in endings if (root / (name + ending)).is_file()]
        for names in SPLITS.values()
        for name in names
    }
    stated = _stated(root, lambda name: bool(names[name]))
    for split, name in stated.items():
        if names[name][1:]:
            raise UsageError(f"{root} has both {' and '.join(names[name])} for the {split} split - keep one")
    return {split: names[name][0] for split, name in stated.items()}


def _describe_unread(root: Path, table: Path | None, tool_files: Set[Path]) -> list[str]:
    """Return a line for files that look like lists of a split or tables of classes, but are not read."""
    tables = [path.name for path in (*find_colour_tables(root), *([table] if table else []))]
    read = {*_stated_lists(root).values(), *CLASS_FILES, *tables}
    files = [path for path in sorted(root.iterdir()) if path.name not in read and path.is_file()]
    files = [path for path in files if path not in tool_files]
    unread = [path for path in files if LIST_LIKE.search(path.name)]
    if not unread:
        return []
    return [
        f"{root}: left out {count(unread, 'file')}, since lists are named train.txt, val.txt and test.txt, and tables "
        "of classes classes.yaml or classes.txt - to use them, rename them, and write a table as 'name: label' or "
        "'name: [red, green, blue]' in each line"
    ]


def _stated(root: Path, exists: Callable[[str], bool]) -> dict[str, str]:
    """Return the name, among `SPLITS`, of the folder or list of each split that has one.

    Raises:
        UsageError: A split has two.
    """
    stated = {}
    for split, names in SPLITS.items():
        present = [name for name in names if exists(name)]
        if present[1:]:
            raise UsageError(f"{root} has both {present[0]} and {present[1]} for the {split} split - keep one")
        if present:
            stated[split] = present[0]
    return stated


def _in_folders(places: Mapping[str, tuple[Path, Path]], mask_name: str | None, warnings: list[str]) -> _Layout:
    """Return the splits whose images and masks are in two folders each; test is left out if it has no masks.

    Without a folder of val, the images of train are split.
    """
    unscored = None
    folders = {}
    for split, (images, masks) in places.items():
        if split == "test" and not (masks.is_dir() and find_files(masks).files):  # challenges keep these masks
            unscored = images, masks
            present = count(find_files(images).files, "image")
            warnings.append(f"{images}: test has {present} without masks, so it is not scored - add {masks}")
        else:
            folders[split] = find_folders(images, masks, mask_name)
    if set(folders) == {"train"}:
        return _Layout([folders["train"]], None, warnings, unscored)
    if missing := {"train", "val"} - set(folders):
        raise UsageError(
            f"{places['train'][0].parent} has images and masks of {' and '.join(folders)} but not of {min(missing)} - "
            f"add those of {min(missing)}"
        )
    splits = {split: folder.pairs for split, folder in folders.items()}
    return _Layout(list(folders.values()), splits, warnings, unscored)


def _describe_names(root: Path, layout: _Layout) -> tuple[tuple[str, ...], list[str]]:
    """Return lines about folders that are read although they are not named images and masks, and about the others.

    Returns:
        A note, and a warning if other folders hold images.
    """
    where = [folder.where for folder in layout.folders]
    inside = [tuple(folder.relative_to(root).parts for folder in place) for place in where]
    if all("images" in images and "masks" in masks for images, masks in inside):
        return (), []
    pairs = [f"{images} and {masks}" if images != masks else f"{images} for both" for images, masks in where]
    read = [folder for place in (*where, *([layout.unscored] if layout.unscored else [])) for folder in place]
    others = [
        path.name
        for path in sorted(root.iterdir())
        if path.is_dir()
        and not path.name.startswith(".")
        and not any(folder.is_relative_to(path) or path.is_relative_to(folder) for folder in read)
        and find_files(path).files
    ]
    left_out = f"{root}: left out the images in {', '.join(others)}, which are not read - move them elsewhere"
    return (f"folders of images and masks: {', '.join(pairs)}",), [left_out] if others else []


def _describe_unused(folders: list[Folders], used: list[Pair]) -> list[str]:
    """Return a line for every kind of file that is left out, and for every assumption about names."""
    lines: list[str] = []
    in_use = {pair.image for pair in used}
    for folder in folders:
        lines += folder.skipped
        if unlisted := sorted(set(folder.images.values()) - in_use):
            lines.append(f"{folder.where[0]}: left out {count(unlisted, 'image')} in no list - add them to a list")
        elif (pairing := vars(folder).get("pairing")) and pairing.assumption:  # cached if names were matched
            lines.append(pairing.assumption)
        if unused := sorted(set(folder.masks.values()) - {pair.mask for pair in used}):
            lines.append(
                f"{folder.where[1]}: left out {count(unused, 'mask')} without an image - add the images, or remove them"
            )
    return lines


def _count_files(folders: list[Folders], used: list[Pair]) -> tuple[tuple[str, int], ...]:
    images = sum(len(folder.images) for folder in folders) if folders else len(used)
    masks = sum(len(folder.masks) for folder in folders) if folders else len(used)
    return (("images", images), ("masks", masks), ("pairs in use", len(used)))


def _read_classes(
    folder: Path, classes: str | Mapping[Any, Any] | list[str] | None, tool_files: Set[Path], mask: Path | None
) -> tuple[Classes | None, tuple[str, ...]]:
    """Return the classes of a checkpoint, of `dataset.classes` or of a file in the folder, and lines about them.

    Args:
        folder: The folder.
        classes: `dataset.classes`.
        tool_files: The files of the annotations.
        mask: A mask, which decides whether a table of colours of another program is meant; None for annotations.
    """
    if classes is not None:
        return given_classes(classes), ()
    path, unread = find_class_file(folder)
    if path is None or path in tool_files:
        return None, tuple(unread)
    parsed = read_class_file(path)
    if path.name in COLOUR_TABLES:
        reason = "annotations name the classes"
        try:
            if mask is not None:
                read_mask(mask, parsed)
                return parsed, tuple(unread)
        except UsageError as error:
            reason, _, _ = str(error).partition(" - ")
        return None, (f"{path}: not read, since {reason} - write a classes.yaml to name the classes", *unread)
    return parsed, tuple(unread)
