"""Which images are for learning and which for scoring: a share, or one of k folds; what belongs together stays so."""

import re
from collections.abc import Iterable, Mapping, Sequence

from segdeconv.errors import UsageError
from segdeconv.system.seeding import key

Groups = Mapping[str, list[str]]  # the names of the images of each group


def choose_val(
    names: Sequence[str], val_share: float, folds: int | None, fold: int, *, pattern: str | None, seed: int
) -> tuple[set[str], tuple[str, ...]]:
    """(the names that are val, what to tell about it): fold number `fold` of `folds`, or without folds a share."""
    if fold and not folds:
        raise UsageError(f"dataset.fold={fold} is one of how many? - give dataset.folds too")
    if folds and fold >= folds:
        raise UsageError(f"dataset.fold={fold} of dataset.folds={folds}: they are counted from 0 - give 0..{folds - 1}")
    groups = group(names, pattern)
    val = deal(groups, folds, seed)[fold] if folds else share(groups, val_share, seed)
    if not folds and not pattern:
        return val, ()
    part = f"fold {fold} of {folds}" if folds else f"about {val_share:g} of the images"
    together = f"; {len(groups)} groups by '{pattern}', none of them in both" if pattern else ""
    return val, (f"val: {part}, dealt by dataset.split_seed={seed}{together}",)


def group(names: Iterable[str], pattern: str | None) -> dict[str, list[str]]:
    """The images by what belongs together (a patient, a drive): what the first group of `pattern` finds in the name.

    Without a pattern every image stands alone.
    """
    if pattern is None:
        return {name: [name] for name in names}
    way_out = "put what belongs together in parentheses, such as '^(patient[0-9]+)_'"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"dataset.group={pattern} is not a regular expression ({error}) - {way_out}") from error
    if compiled.groups < 1:
        raise UsageError(f"dataset.group={pattern} has no group - {way_out}")
    groups: dict[str, list[str]] = {}
    for name in names:
        found = compiled.search(name)
        if found is None or found[1] is None:
            raise UsageError(f"dataset.group={pattern} finds nothing in the image name '{name}' - {way_out}")
        groups.setdefault(found[1], []).append(name)
    return groups


def share(groups: Groups, part: float, seed: int) -> set[str]:
    """The names that are val: whole groups in a seeded order, as near to `part` of all images as they come."""
    if len(groups) < 2:
        raise UsageError(f"all images are of one group, {list(groups)} - train and val need one each, at least")
    wanted = max(1, round(part * sum(map(len, groups.values()))))
    order = _shuffled(groups, seed)
    chosen: list[str] = []
    for name in order:
        after = len(chosen) + len(groups[name])
        if abs(wanted - after) < abs(wanted - len(chosen)):
            chosen += groups[name]
    chosen = chosen or groups[min(order, key=lambda name: len(groups[name]))]
    if len(chosen) == sum(map(len, groups.values())):  # train needs one too
        left = groups[order[-1]]
        return {name for name in chosen if name not in left}
    return set(chosen)


def deal(groups: Groups, count: int, seed: int) -> list[set[str]]:
    """The names of each of `count` parts of about equal size: groups in a seeded order, the largest first, each to the
    part that has the fewest images yet. Every name is in exactly one part.
    """
    if count > len(groups):
        raise UsageError(
            f"dataset.folds={count} and there are {len(groups)} images or groups of them - give at most {len(groups)}"
        )
    parts: list[set[str]] = [set() for _ in range(count)]
    for name in sorted(_shuffled(groups, seed), key=lambda name: -len(groups[name])):
        min(parts, key=len).update(groups[name])
    return parts


def _shuffled(groups: Groups, seed: int) -> list[str]:
    return sorted(groups, key=lambda name: key(seed, "split", name))


def require_kept_together(splits: Mapping[str, Iterable[str]], pattern: str) -> None:
    """One sentence if lists or folders have put what belongs together into two splits."""
    owner: dict[str, str] = {}
    for split, names in splits.items():
        for found in group(names, pattern):
            if owner.setdefault(found, split) != split:
                raise UsageError(
                    f"'{found}' (dataset.group={pattern}) is in {owner[found]} and in {split}: its score would mean "
                    "nothing - put all its images into one"
                )
