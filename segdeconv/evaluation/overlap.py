"""Which images of an evaluation the training has used, so that a report says what its scores are worth."""

from __future__ import annotations

import inspect

from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.config import locate, parameters_of
from segdeconv.data import sample_digests
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.datasets.folder import Folder
from segdeconv.data.datasets.shards import Shards
from segdeconv.evaluation.verdict import Overlap
from segdeconv.system.files import hash_text
from segdeconv.system.plain_data import PlainDataError

CHOSEN_BY_ROOT = (Folder, Shards)  # other data sets are published ones, of which `root` is only the place


def overlap(checkpoint: Checkpoint, dataset: SegmentationDataset) -> Overlap:
    """Return which images of a split the training of a network has used.

    If the files of the split are not those of training, its images are looked up by the hashes of their pixels in
    data.csv beside the checkpoint.

    Args:
        checkpoint: The checkpoint, with the `dataset` node that was evaluated.
        dataset: The split.
    """
    num, split = len(dataset), dataset.split
    train_on_val = bool(checkpoint.config["dataset"].get("train_on_val"))
    try:
        recorded = None
        if checkpoint.facts.get("fingerprints", {}).get(split) != hash_text(dataset.fingerprint):
            recorded = sample_digests.read(checkpoint.path.parent / sample_digests.NAME)
    except (OSError, PlainDataError):
        if not _is_same(checkpoint, dataset):
            return Overlap(num, None, False)
    if recorded is None:
        trained = split == "train" or (split == "val" and train_on_val)
        return Overlap(num, num if trained else 0, split == "val" and not trained)
    whole = dataset.whole
    hashes = dict(zip(whole.names, sample_digests.image_hashes(whole), strict=True))
    used, selecting = ({digest.image for digest in recorded.get(name, [])} for name in ("train", "val"))
    if train_on_val:
        used, selecting = used | selecting, set()
    images = dataset.names if whole is dataset else [name.rpartition("_")[0] for name in dataset.names]  # of crops
    trained_on = sum(hashes[name] in used for name in images)
    return Overlap(num, trained_on, not trained_on and selecting.issuperset(hashes.values()))


def _is_same(checkpoint: Checkpoint, dataset: SegmentationDataset) -> bool:
    """Return whether a split is the one of training as far as the keys show by which it was chosen."""
    owner = locate(checkpoint.config["dataset"], "dataset")
    if "dataset" in checkpoint.overridden or (inspect.isclass(owner) and not isinstance(dataset.unwrapped, owner)):
        return False
    names = {key.removeprefix("dataset.") for key in checkpoint.overridden}
    changed = names & set(parameters_of([owner], "dataset")[0])
    return not changed or (changed == {"root"} and not isinstance(dataset.unwrapped, CHOSEN_BY_ROOT))
