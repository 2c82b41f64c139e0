"""Random splits into train and val: a fraction or one of k folds, with groups of images kept together."""

import re
from collections.abc import Iterable, Mapping, Sequence

from segdeconv.errors import UsageError
from segdeconv.system.seeding import key

Groups = Mapping[str, list[str]]  # the names of the images of each group

# Names of the splits' folders and lists: ours first, then those of other programs.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}


def choose_val(
    names: Sequence[str], val_share: float, folds: int | None, fold: int, *, pattern: str | None, seed: int
) -> tuple[set[str], tuple[str, ...]]:
    """Choose the val images: fold number `fold` of `folds`, or without folds a fraction.

    Args:
        names: The names of all images.
        val_share: Fraction of the images that becomes val, 0..1.
        folds: Number of folds, or None to use `val_share`.
        fold: Index of the fold that is val, from 0.
        pattern: Regular expression of the groups to keep together, see `group`.
        seed: Seed of the split.

    Returns:
        The names of the val images, and notes that describe the split.

    Raises:
        UsageError: `fold` or `pattern` is invalid, or there are too few groups.
    """
    if fold and not folds:
        raise UsageError(f"dataset.fold={fold} needs the number of folds - set dataset.folds too")
    if folds and fold >= folds:
        raise UsageError(
            f"dataset.fold={fold} is out of range for dataset.folds={folds}; folds are numbered from 0 - "
            f"set 0..{folds - 1}"
        )
    groups = group(names, pattern)
    val = split_into_folds(groups, folds, seed)[fold] if folds else draw_share(groups, val_share, seed)
    if not folds and not pattern:
        return val, ()
    part = f"fold {fold} of {folds}" if folds else f"about {val_share:g} of the images"
    grouping = f"; {len(groups)} groups by '{pattern}', none of them in both" if pattern else ""
    return val, (f"val: {part}, drawn with dataset.split_seed={seed}{grouping}",)


def group(names: Iterable[str], pattern: str | None) -> dict[str, list[str]]:
    """Group images that belong together (a patient, a drive).

    Args:
        names: The names of the images.
        pattern: Regular expression whose first group extracts the group from a name; None puts every image into a group
            of its own.

    Returns:
        The names of the images of each group.

    Raises:
        UsageError: `pattern` is invalid, or does not match a name.
    """
    if pattern is None:
        return {name: [name] for name in names}
    way_out = "put the part that identifies a group in parentheses, such as '^(patient[0-9]+)_'"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"dataset.group={pattern} is not a regular expression ({error}) - {way_out}") from error
    if compiled.groups < 1:
        raise UsageError(f"dataset.group={pattern} has no parentheses - {way_out}")
    groups: dict[str, list[str]] = {}
    for name in names:
        match = compiled.search(name)
        if match is None or match[1] is None:
            raise UsageError(f"dataset.group={pattern} does not match the image name '{name}' - {way_out}")
        groups.setdefault(match[1], []).append(name)
    return groups


def draw_share(groups: Groups, part: float, seed: int) -> set[str]:
    """Draw the val images: whole groups in a seeded order, as close as possible to a fraction of all images.

    Args:
        groups: The images of each group.
        part: Fraction of the images, 0..1.
        seed: Seed of the order.

    Raises:
        UsageError: There are fewer than two groups.
    """
    if len(groups) < 2:
        raise UsageError(f"all images are in one group, {list(groups)} - train and val need at least one each")
    target = max(1, round(part * sum(map(len, groups.values()))))
    order = _shuffled(groups, seed)
    chosen: list[str] = []
    for name in order:
        after = len(chosen) + len(groups[name])
        if abs(target - after) < abs(target - len(chosen)):
            chosen += groups[name]
    chosen = chosen or groups[min(order, key=lambda name: len(groups[name]))]
    if len(chosen) == sum(map(len, groups.values())):  # train needs a group too
        last = groups[order[-1]]
        return {name for name in chosen if name not in last}
    return set(chosen)


def split_into_folds(groups: Groups, count: int, seed: int) -> list[set[str]]:
    """Split the images into folds of about equal size; every name is in exactly one fold.

    Groups are taken from the largest to the smallest, ties in a seeded order, and each goes to the fold with the fewest
    images so far.

    Args:
        groups: The images of each group.
        count: Number of folds.
        seed: Seed of the order.

    Returns:
        The names of the images of each fold.

    Raises:
        UsageError: There are more folds than groups.
    """
    if count > len(groups):
        raise UsageError(
            f"dataset.folds={count} is larger than the number of images or groups, {len(groups)} - "
            f"set at most {len(groups)}"
        )
    parts: list[set[str]] = [set() for _ in range(count)]
    for name in sorted(_shuffled(groups, seed), key=lambda name: -len(groups[name])):
        min(parts, key=len).update(groups[name])
    return parts


def _shuffled(groups: Groups, seed: int) -> list[str]:
    return sorted(groups, key=lambda name: key(seed, "split", name))


def require_kept_together(splits: Mapping[str, Iterable[str]], pattern: str) -> None:
    """Check that the given splits do not divide a group of images.

    Args:
        splits: The names of the images of each split.
        pattern: Regular expression of the groups, see `group`.

    Raises:
        UsageError: A group is in two splits.
    """
    owner: dict[str, str] = {}
    for split, names in splits.items():
        for group_name in group(names, pattern):
            if owner.setdefault(group_name, split) != split:
                raise UsageError(
                    f"'{group_name}' (dataset.group={pattern}) is in {owner[group_name]} and in {split}, so its "
                    "score would be meaningless - put all its images into one split"
                )
