"""The user's own images and masks in a folder."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import Field

from segdeconv.classes import Classes, Colour, pack_colours, voc_colours
from segdeconv.data.dataset import FileDataset, Pair, require_root, require_split
from segdeconv.data.files.reading import MAX_PIXELS, SUFFIXES, Exif, palette, read_labels, read_list
from segdeconv.data.splits import choose_val, require_kept_together
from segdeconv.errors import UsageError

SPLITS = ("train", "val", "test")
IGNORE = 255
MAX_CLASSES = 255
MAX_VALUES = 64  # a mask with more different values is probably a photograph or a resized mask
MASK_ENDINGS = re.compile(r"[_-](mask|masks|label|labels|seg|segmentation|gt|annotation)$", re.IGNORECASE)


class Folder(FileDataset):
    """Your own images and masks, matched by file name.

    **Content**: every image in the folder and its mask of the same name. The suffix may differ, and the mask's name may
    end in `_mask`, `_label` or similar.

    **Layout**: one of

    * `DIR/images`, `DIR/masks` and lists `DIR/train.txt`, `DIR/val.txt` (and `test.txt`), one name per line;
    * `DIR/{train,val,test}/{images,masks}`;
    * `DIR/images` and `DIR/masks` alone: a fraction `val_share` becomes val, or the images are split into `folds`
      folds, of which number `fold` is val and the rest train. Both depend on `split_seed`.

    **Classes**: inferred from the masks of all splits, or named in a YAML file, `DIR/classes.yaml` or `classes=FILE`:
    a list of names for the labels 0, 1, 2, ..., or a mapping from names to labels or colours, where the name `ignore`
    stands for ignored pixels. Inferred classes are one per label, except that 255 is ignored; background and foreground
    for masks of 0 and 255 only; and one per colour for RGB masks.

    **Cite**: your own publication.

    Args:
        split: `train` or `val`, or `test` if the folder has it.
        root: The folder DIR.
        classes: The YAML file of the classes, or its content.
        val_share: Fraction of the images that becomes val, 0..1.
        split_seed: Seed of the random split.
        folds: Number of folds, instead of `val_share`.
        fold: Index of the fold that is val, from 0.
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
        classes: str | dict[str, Any] | list[str] | None = None,
        val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2,
        split_seed: int = 0,
        folds: Annotated[int, Field(ge=2)] | None = None,
        fold: Annotated[int, Field(ge=0)] = 0,
        group: str | None = None,
        channels: Annotated[int, Field(ge=1)] | None = None,
        exif: Exif = "refuse",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        folder = require_root(root, "images/ and masks/, or train/ and val/ with images/ and masks/ in each")
        splits = _stated_splits(folder)
        if splits is None:
            pairs = _pairs(folder)
            if len(pairs) < 2:
                raise UsageError(
                    f"{folder}/images holds {len(pairs)} image with a mask - train and val need at least one each"
                )
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
        require_split(split, tuple(splits))
        parsed = _read_classes(folder, classes)
        if parsed is None:
            parsed = infer_classes(pair.mask for pairs in splits.values() for pair in pairs)
        super().__init__(split, parsed, splits[split], channels=channels, exif=exif, max_pixels=max_pixels)
        self.split_names = tuple(splits)


def _stated_splits(folder: Path) -> dict[str, list[Pair]] | None:
    """Return the splits that sub-folders or lists define, or None without either."""
    folders = [name for name in SPLITS if (folder / name / "images").is_dir()]
    if folders:
        splits = {name: _pairs(folder / name) for name in folders}
        for name in ("train", "val"):
            if name not in splits:
                raise UsageError(
                    f"{folder} has {', '.join(folders)} but no {name}/images - add {folder / name}/images and masks"
                )
        return splits
    listings = [folder / f"{name}.txt" for name in SPLITS if (folder / f"{name}.txt").is_file()]
    if not listings:
        return None
    pairs = _pairs(folder)
    return {listing.stem: _listed(listing, pairs) for listing in listings}


def _pairs(folder: Path) -> list[Pair]:
    """Return the pairs of folder/images and folder/masks, matched by name; sub-folders are part of the name."""
    images, masks = _files(folder / "images"), _files(folder / "masks")
    by_stem: dict[str, Path] = {}
    for name, path in masks.items():
        stem = MASK_ENDINGS.sub("", name)
        if stem in by_stem:
            raise UsageError(f"{by_stem[stem]} and {path} are both masks of '{stem}' - keep one")
        by_stem[stem] = path
    missing = [name for name in images if name not in masks and name not in by_stem]
    if missing:
        others = f" (and {len(missing) - 1} more images have none)" if missing[1:] else ""
        raise UsageError(
            f"{images[missing[0]]} has no mask{others}; a mask has its image's name in {folder / 'masks'} - add it, or "
            "remove the image"
        )
    return [Pair(path, masks.get(name) or by_stem[name], name) for name, path in sorted(images.items())]


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; dataset.root should hold images/ and masks/ - rename or move them")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):  # ._x.jpg: macOS's metadata of x.jpg
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise UsageError(f"{path} and {files[name]} have the same name; a name identifies one image - rename one")
        files[name] = path
    by_folded_name: dict[str, Path] = {}
    for name, path in files.items():
        if (other := by_folded_name.setdefault(name.casefold(), path)) != path:
            raise UsageError(
                f"{path} and {other} differ only in upper and lower case, so other systems treat them as one file - "
                "rename one"
            )
    if not files:
        raise UsageError(f"{folder} contains no image - the supported suffixes are {', '.join(sorted(SUFFIXES))}")
    return files


def _listed(listing: Path, pairs: list[Pair]) -> list[Pair]:
    by_name = {pair.name: pair for pair in pairs}
    listed: dict[str, Pair] = {}
    for number, entry in read_list(listing):
        path = PurePosixPath(entry)
        name = entry if entry in by_name or not path.name else path.with_suffix("").as_posix()
        if name not in by_name:
            raise UsageError(
                f"{listing}, line {number}: image '{entry}' not found - it should be in images/ with its mask"
            )
        if name in listed:
            raise UsageError(f"{listing}, line {number}: '{entry}' is listed twice - list every image once")
        listed[name] = by_name[name]
    if not listed:
        raise UsageError(f"{listing} lists no image - fill it, or delete all lists for a random split")
    return list(listed.values())


def _read_classes(folder: Path, classes: str | Mapping[str, Any] | list[str] | None) -> Classes | None:
    if isinstance(classes, Mapping) and {"names", "colours", "labels"} <= set(classes):
        return Classes.from_dict(classes)  # the classes of a checkpoint
    if classes is None:
        path = folder / "classes.yaml"
        if not path.is_file():
            return None
    elif isinstance(classes, str):
        path = Path(classes)
        if not path.is_file():
            raise UsageError(f"dataset.classes={classes} is not a file - give a YAML file of class names")
    else:
        return _parse_classes(classes, "dataset.classes")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML ({error}) - write one class per line: 'name: label'") from error
    return _parse_classes(content, str(path))


def _parse_classes(content: Any, source: str) -> Classes:
    """Parse a list of names, or a mapping from names to labels, [r, g, b] or '#rrggbb'."""
    if isinstance(content, list):
        if any(isinstance(name, list | dict) for name in content):
            raise UsageError(f"{source}: {content} is not a list of names - write one name per line, or 'name: label'")
        if len({str(name) for name in content}) != len(content):
            raise UsageError(f"{source}: the class names {content} are not all different - rename the duplicates")
        content = {name: label for label, name in enumerate(content)}
    if not isinstance(content, Mapping) or not content:
        raise UsageError(
            f"{source} contains no classes - write one per line: 'name: label' or 'name: [red, green, blue]'"
        )
    entries = {str(name): _label_or_colour(value, str(name), source) for name, value in content.items()}
    ignored = entries.pop("ignore", None)
    kinds = {type(entry) for entry in entries.values()} | ({type(ignored)} if ignored is not None else set())
    if len(kinds) > 1:
        raise UsageError(f"{source} mixes labels and colours - give every class a label, or every class a colour")
    names = tuple(entries)
    if ignored is not None and ignored in entries.values():
        raise UsageError(f"{source}: {ignored} is both a class and ignore - give it one meaning")
    if kinds == {tuple}:
        colours = tuple(entry for entry in entries.values() if isinstance(entry, tuple))
        return Classes(names, colours, IGNORE, ignore_colour=ignored if isinstance(ignored, tuple) else None)
    labels = tuple(entry for entry in entries.values() if isinstance(entry, int))
    # Class indices are 0..C-1, so any other ignored label can also serve as ignore_index.
    if isinstance(ignored, int) and ignored < len(names):
        raise UsageError(
            f"{source}: the ignored label {ignored} is one of the class indices 0..{len(names) - 1} - label ignored "
            "pixels 255"
        )
    return Classes(names, voc_colours(len(names)), ignored if isinstance(ignored, int) else IGNORE, labels)


def _label_or_colour(value: Any, name: str, source: str) -> int | Colour:
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)
    if isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in value):
        return value[0], value[1], value[2]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255:
        return value
    raise UsageError(
        f"{source}: class '{name}' is {value!r} - give a label 0..255, a colour [red, green, blue] or '#rrggbb'"
    )


def infer_classes(masks: Iterable[Path]) -> Classes:
    """Infer the classes from the labels or colours of mask files.

    Raises:
        UsageError: The masks mix labels and colours, or have too many different values.
    """
    present: dict[int, set[int]] = {2: set(), 3: set()}  # labels and colours, by the dimensions of their masks
    label_colours: list[Colour] | None = None
    example = {}
    for path in masks:
        mask = read_labels(path)
        if mask.ndim == 2:
            label_colours = label_colours or palette(path)
        values = set(np.unique(mask if mask.ndim == 2 else pack_colours(mask)).tolist())
        present[mask.ndim] |= values
        example[mask.ndim] = path
        if len(values) > MAX_VALUES or max(map(len, present.values())) > MAX_CLASSES:
            kind = "labels" if mask.ndim == 2 else "colours"
            raise UsageError(
                f"mask {path} has {len(values)} different {kind}, too many to be classes - it seems to be a photograph "
                "or a mask that was resized with interpolation; name the classes in classes.yaml or save labels"
            )
    if all(present.values()):
        raise UsageError(
            f"mask {example[2]} holds labels and mask {example[3]} colours - save all masks in the same way"
        )
    if present[3]:
        return _classes_of_colours(sorted(present[3]))
    return _classes_of_labels(sorted(present[2]), label_colours)


def _classes_of_labels(labels: list[int], palette: list[Colour] | None) -> Classes:
    if labels == [0, IGNORE]:
        return Classes(("background", "foreground"), ((0, 0, 0), (255, 255, 255)), labels=(0, IGNORE))
    labels = [label for label in labels if label != IGNORE]
    names = tuple(f"class_{label}" for label in labels)
    distinct = palette is not None and len({palette[label] for label in labels if label < 256}) == len(labels)
    colours = tuple(palette[label] for label in labels) if palette and distinct else voc_colours(len(labels))
    return Classes(names, colours, labels=tuple(labels))


def _classes_of_colours(packed: list[int]) -> Classes:
    colours = tuple((value >> 16, value >> 8 & 255, value & 255) for value in packed)
    if set(colours) == {(0, 0, 0), (255, 255, 255)}:
        return Classes(("background", "foreground"), colours)
    return Classes(tuple(f"colour_{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours), colours)
