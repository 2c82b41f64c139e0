"""A person's own images and masks."""

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
MOST_FOUND = 64  # more different values than this in masks are a photograph, or a resized mask, not labels
MASK_ENDINGS = re.compile(r"[_-](mask|masks|label|labels|seg|segmentation|gt|annotation)$", re.IGNORECASE)


class Folder(FileDataset):
    """Your own images, told apart by name.

    **What**: every image in the folder that has a mask of the same name (the suffix may differ, and the mask's name
    may end in `_mask`, `_label` or the like).

    **Layout**: one of

    * `DIR/images`, `DIR/masks` and lists `DIR/train.txt`, `DIR/val.txt` (and `test.txt`), a name a line;
    * `DIR/{train,val,test}/{images,masks}`;
    * `DIR/images` and `DIR/masks` alone: a share `val_share` becomes val, or the images are dealt into `folds` parts,
      of which number `fold` is val and the rest train; both by `split_seed`.

    **Classes**: found in the masks of all splits, or named in a small YAML file, `DIR/classes.yaml`, or elsewhere by
    `classes=FILE`: a list of names for the labels 0, 1, 2, ..., or a mapping from names to labels or colours; the name
    `ignore` stands for pixels that do not count. Found: label masks give one class per label but 255, which is ignored;
    masks of 0 and 255 alone are background and foreground; RGB masks give one class per colour.

    **Cite**: you.

    classes: the YAML file, or its content.
    group: a regular expression whose first group finds in an image's name what belongs together (a patient, a drive),
        such as `^(patient[0-9]+)_`. Such images are never in two splits.
    channels: None reads every picture as 8-bit RGB. A number reads JPEG, PNG, BMP, WEBP, TIFF and .npy files of that
        many channels exactly as stored, 8 or 16 bit.
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
                    f"{folder}/images holds {len(pairs)} image with a mask - train and val need one each, at least"
                )
            names = [pair.name for pair in pairs]
            val, self.notes = choose_val(names, val_share, folds, fold, pattern=group, seed=split_seed)
            splits = {
                "train": [pair for pair in pairs if pair.name not in val],
                "val": [pair for pair in pairs if pair.name in val],
            }
        elif folds or fold:
            raise UsageError(
                f"dataset.folds={folds} and {folder} says itself what is train and val - leave dataset.folds and "
                "dataset.fold out, or take its lists or folders away"
            )
        elif group:
            require_kept_together({name: [pair.name for pair in pairs] for name, pairs in splits.items()}, group)
        require_split(split, tuple(splits))
        found = _read_classes(folder, classes)
        if found is None:
            found = find_classes(pair.mask for pairs in splits.values() for pair in pairs)
        super().__init__(split, found, splits[split], channels=channels, exif=exif, max_pixels=max_pixels)
        self.split_names = tuple(splits)


def _stated_splits(folder: Path) -> dict[str, list[Pair]] | None:
    """The splits that folders or lists state; None if they are still to be made."""
    own = [name for name in SPLITS if (folder / name / "images").is_dir()]
    if own:
        splits = {name: _pairs(folder / name) for name in own}
        for name in ("train", "val"):
            if name not in splits:
                raise UsageError(
                    f"{folder} has {', '.join(own)} but no {name}/images - add {folder / name}/images and masks"
                )
        return splits
    listings = [folder / f"{name}.txt" for name in SPLITS if (folder / f"{name}.txt").is_file()]
    if not listings:
        return None
    pairs = _pairs(folder)
    return {listing.stem: _listed(listing, pairs) for listing in listings}


def _pairs(folder: Path) -> list[Pair]:
    """The pairs in folder/images and folder/masks, by name; sub-folders are part of the name."""
    images, masks = _files(folder / "images"), _files(folder / "masks")
    bare: dict[str, Path] = {}
    for name, path in masks.items():
        stem = MASK_ENDINGS.sub("", name)
        if stem in bare:
            raise UsageError(f"{bare[stem]} and {path} are both masks of '{stem}' - keep one")
        bare[stem] = path
    missing = [name for name in images if name not in masks and name not in bare]
    if missing:
        others = f" (and {len(missing) - 1} more have none)" if missing[1:] else ""
        raise UsageError(
            f"{images[missing[0]]} has no mask{others}; a mask has its image's name in {folder / 'masks'} - add it or "
            "take the image away"
        )
    return [Pair(path, masks.get(name) or bare[name], name) for name, path in sorted(images.items())]


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; dataset.root should hold images/ and masks/ - rename or move them")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):  # ._x.jpg: macOS's notes on x.jpg
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise UsageError(f"{path} and {files[name]} have the same name - one name is one image; rename one")
        files[name] = path
    alike: dict[str, Path] = {}
    for name, path in files.items():
        if (other := alike.setdefault(name.casefold(), path)) != path:
            raise UsageError(
                f"{path} and {other} differ only in upper and lower case, which other systems take for one file - "
                "rename one"
            )
    if not files:
        raise UsageError(f"{folder} holds no picture - the suffixes are {', '.join(sorted(SUFFIXES))}")
    return files


def _listed(listing: Path, pairs: list[Pair]) -> list[Pair]:
    by_name = {pair.name: pair for pair in pairs}
    chosen: dict[str, Pair] = {}
    for number, entry in read_list(listing):
        path = PurePosixPath(entry)
        name = entry if entry in by_name or not path.name else path.with_suffix("").as_posix()
        if name not in by_name:
            raise UsageError(
                f"{listing}, line {number}: there is no image '{entry}' - it should be in images/ with its mask"
            )
        if name in chosen:
            raise UsageError(f"{listing}, line {number}: '{entry}' is listed twice - an image counts once")
        chosen[name] = by_name[name]
    if not chosen:
        raise UsageError(f"{listing} names no image - fill it, or delete all lists for a random split")
    return list(chosen.values())


def _read_classes(folder: Path, given: str | Mapping[str, Any] | list[str] | None) -> Classes | None:
    if isinstance(given, Mapping) and {"names", "colours", "labels"} <= set(given):
        return Classes.from_dict(given)  # what a checkpoint remembers
    if given is None:
        path = folder / "classes.yaml"
        if not path.is_file():
            return None
    elif isinstance(given, str):
        path = Path(given)
        if not path.is_file():
            raise UsageError(f"dataset.classes={given} is not a file - give a YAML file of class names")
    else:
        return _parse_classes(given, "dataset.classes")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML ({error}) - write one class a line: 'name: label'") from error
    return _parse_classes(content, str(path))


def _parse_classes(content: Any, source: str) -> Classes:
    """A list of names, or a mapping from names to labels, [r, g, b] or '#rrggbb'."""
    if isinstance(content, list):
        if any(isinstance(name, list | dict) for name in content):
            raise UsageError(f"{source}: {content} is no list of names - write one name a line, or 'name: label'")
        if len({str(name) for name in content}) != len(content):
            raise UsageError(f"{source}: the class names {content} are not all different - rename one")
        content = {name: label for label, name in enumerate(content)}
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"{source} holds no classes - write one a line: 'name: label' or 'name: [red, green, blue]'")
    entries = {str(name): _label_or_colour(value, str(name), source) for name, value in content.items()}
    ignored = entries.pop("ignore", None)
    kinds = {type(entry) for entry in entries.values()} | ({type(ignored)} if ignored is not None else set())
    if len(kinds) > 1:
        raise UsageError(f"{source} mixes labels and colours - give every class a label, or every class a colour")
    names = tuple(entries)
    if ignored is not None and ignored in entries.values():
        raise UsageError(f"{source}: {ignored} stands for a class and for ignore - give it one meaning")
    if kinds == {tuple}:
        colours = tuple(entry for entry in entries.values() if isinstance(entry, tuple))
        return Classes(names, colours, IGNORE, ignore_colour=ignored if isinstance(ignored, tuple) else None)
    labels = tuple(entry for entry in entries.values() if isinstance(entry, int))
    # Masks inside the program have 0..C-1, so any ignored label that is none of those can stay as it is.
    if isinstance(ignored, int) and ignored < len(names):
        raise UsageError(
            f"{source}: the ignored label {ignored} lies among the class indices 0..{len(names) - 1} - label ignored "
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


def find_classes(masks: Iterable[Path]) -> Classes:
    """The classes that the masks themselves show."""
    found: dict[int, set[int]] = {2: set(), 3: set()}  # labels, and colours, by the dimensions of their masks
    shown: list[Colour] | None = None
    example = {}
    for path in masks:
        mask = read_labels(path)
        if mask.ndim == 2:
            shown = shown or palette(path)
        values = set(np.unique(mask if mask.ndim == 2 else pack_colours(mask)).tolist())
        found[mask.ndim] |= values
        example[mask.ndim] = path
        if len(values) > MOST_FOUND or max(map(len, found.values())) > MAX_CLASSES:
            kind = "labels" if mask.ndim == 2 else "colours"
            raise UsageError(
                f"mask {path} has {len(values)} different {kind}, too many to be classes - it looks like a photograph "
                "or a mask that was resized with smoothing; name the classes in classes.yaml or save labels"
            )
    if all(found.values()):
        raise UsageError(f"mask {example[2]} holds labels and mask {example[3]} colours - save all masks one way")
    return _found_colours(sorted(found[3])) if found[3] else _found_labels(sorted(found[2]), shown)


def _found_labels(labels: list[int], shown: list[Colour] | None) -> Classes:
    if labels == [0, IGNORE]:
        return Classes(("background", "foreground"), ((0, 0, 0), (255, 255, 255)), labels=(0, IGNORE))
    labels = [label for label in labels if label != IGNORE]
    names = tuple(f"class_{label}" for label in labels)
    distinct = shown is not None and len({shown[label] for label in labels if label < 256}) == len(labels)
    colours = tuple(shown[label] for label in labels) if shown and distinct else voc_colours(len(labels))
    return Classes(names, colours, labels=tuple(labels))


def _found_colours(packed: list[int]) -> Classes:
    colours = tuple((value >> 16, value >> 8 & 255, value & 255) for value in packed)
    if set(colours) == {(0, 0, 0), (255, 255, 255)}:
        return Classes(("background", "foreground"), colours)
    return Classes(tuple(f"colour_{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours), colours)
