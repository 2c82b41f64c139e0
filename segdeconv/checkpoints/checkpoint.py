"""Checkpoints: whole or not at all, verified before they are read, plain data that runs no code.

A file holds `hyper_parameters = {"config": ..., "facts": ...}` beside the weights: *config* is the config that was
chosen, *facts* what the data is (classes, preprocessing, class weights). Both are plain, so a checkpoint alone, in an
empty directory, is enough to evaluate and predict. Weights alone are shared as .safetensors with a card (cards.py) and
read like any other.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segdeconv.checkpoints import cards
from segdeconv.classes import Classes
from segdeconv.config import override, rename_keys, targets
from segdeconv.errors import CheckpointError, UsageError
from segdeconv.models import SegmentationModel, build_model, check_model
from segdeconv.system.files import hash_file, replace_text, replacing_path

if TYPE_CHECKING:
    from segdeconv.data.preprocessing import Preprocessing

FORMAT = 1
AVERAGED = "averaged."  # what the names of averaged weights begin with

# What a config in a checkpoint may name. Exact names: a prefix such as `torch.` would let torch.load through.
ADMITTED = frozenset(
    {
        "segdeconv.data.ADE20K",
        "segdeconv.data.CamVid",
        "segdeconv.data.Cityscapes",
        "segdeconv.data.Folder",
        "segdeconv.data.OxfordPets",
        "segdeconv.data.SUNRGBD",
        "segdeconv.data.Shapes",
        "segdeconv.data.VOC",
        "segdeconv.losses.CrossEntropy",
        "segdeconv.losses.Dice",
        "segdeconv.losses.Focal",
        "segdeconv.losses.LovaszSoftmax",
        "segdeconv.losses.OHEM",
        "segdeconv.losses.Sum",
        "segdeconv.models.BilinearBasic",
        "segdeconv.models.DeconvNet",
        "segdeconv.models.DeepLabLargeFOV",
        "segdeconv.models.FCN",
        "segdeconv.models.FCNBasic",
        "segdeconv.models.FPN",
        "segdeconv.models.SegNet",
        "segdeconv.models.SegNetBasic",
        "segdeconv.models.UNet",
        "segdeconv.optimization.Constant",
        "segdeconv.optimization.Cosine",
        "segdeconv.optimization.Poly",
        "segdeconv.optimization.Restarts",
        "segdeconv.optimization.Step",
        "segdeconv.optimization.adamw",
        "segdeconv.optimization.muon",
        "segdeconv.optimization.sgd",
    }
    | {
        f"albumentations.{name}"
        for name in (
            "Affine", "Blur", "CLAHE", "ChannelShuffle", "CoarseDropout", "ColorJitter", "ElasticTransform",
            "Equalize", "GaussNoise", "GaussianBlur", "GridDistortion", "HorizontalFlip", "HueSaturationValue",
            "ImageCompression", "MedianBlur", "MotionBlur", "OpticalDistortion", "Perspective", "PlanckianJitter",
            "RGBShift", "RandomBrightnessContrast", "RandomCrop", "RandomGamma", "RandomResizedCrop", "RandomRotate90",
            "RandomScale", "RandomShadow", "RandomToneCurve", "Rotate", "Sharpen", "ShiftScaleRotate", "ToGray",
            "Transpose", "VerticalFlip",
        )
    }
)  # fmt: skip

HASH_LINE = re.compile(r"[0-9a-f]{64}")
PARTS = ("hyper_parameters", "segdeconv", "state_dict")
SIDECAR_LINES = 4  # the file that is there and those that a cut may have left in its place
SIDECAR_BYTES = 4096  # that many lines; a longer file is no sidecar
REQUIRED_TO_RESUME = frozenset({"global_step", "loops", "optimizer_states"})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: the config, the facts of its data, and the whole of its plain content."""

    path: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    content: dict[str, Any]

    @property
    def classes(self) -> Classes:
        """The classes that the network was trained for."""
        return Classes.from_dict(self.facts["classes"])

    @property
    def preprocessing(self) -> Preprocessing:
        """What is done to an image before the network sees it, at the config's `dataset.size`."""
        from segdeconv.data.preprocessing import Preprocessing  # late: albumentations takes a second to import

        return Preprocessing.from_dict({**self.facts["preprocessing"], "size": self.config["dataset"]["size"]})

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hash_file(self.path)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The network's state dict: the average of the weights if one was kept, else the last ones."""
        state = self.content["state_dict"]
        prefix = AVERAGED if any(name.startswith(AVERAGED) for name in state) else "model."
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def model(self) -> SegmentationModel:
        """The network, built from the config, with its weights, in evaluation mode."""
        in_channels = len(self.facts["preprocessing"]["mean"])
        model = build_model(check_model(self.config["model"]), len(self.classes), in_channels, fresh=True)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise CheckpointError(
                f"{self.path} does not hold the weights its config names ({first}) - it was changed after training"
            ) from error
        return model.eval()


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint under its final name only when it is whole and on the disk.

    The sidecar `<name>.sha256` is renewed before the rename. It names the new hash first and then those that it named
    before, so that whichever file a cut leaves is one that the sidecar knows, and also when the next writer is cut too.
    """
    with replacing_path(path) as partial:
        try:
            with partial.open("wb") as file:
                torch.save(dict(content), file)
        except RuntimeError as error:  # torch closes its archive, and hides that the disk was full or a worker died
            if error.__context__ is not None:
                raise error.__context__ from None
            raise
        before = _known(path) if path.is_file() and sidecar_of(path).is_file() else []
        known = list(dict.fromkeys([hash_file(partial), *before]))[:SIDECAR_LINES]
        replace_text(sidecar_of(path), "".join(f"{digest}  {path.name}\n" for digest in known))


def write_weights(
    checkpoint: Checkpoint,
    path: Path,
    *,
    half: bool = False,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write what a checkpoint predicts with, PATH.safetensors, and its card, PATH.json; `read` takes them back.

    half: see `cards.write`. about: what else the card shall say (scores, licence, author); plain data.
    """
    ours = {"format": FORMAT, "config": checkpoint.config, "facts": checkpoint.facts}
    cards.write(path, checkpoint.weights, {**(about or {}), **ours}, half=half)


def sidecar_of(path: Path) -> Path:
    """The file that says what a checkpoint's hash is."""
    return path.with_name(path.name + ".sha256")


def _known(path: Path) -> list[str]:
    with sidecar_of(path).open("rb") as file:
        return HASH_LINE.findall(file.read(SIDECAR_BYTES).decode(errors="replace"))


def verify(path: Path) -> None:
    """Raise CheckpointError unless the file is the one its sidecar names; a missing sidecar is only a warning."""
    sidecar = sidecar_of(path)
    if not sidecar.is_file():
        print(f"segdeconv: warning: {sidecar.name} is missing, so {path} cannot be verified", file=sys.stderr)
        return
    if hash_file(path) not in _known(path):
        raise CheckpointError(
            f"{path} is damaged: its sha256 is not the one in {sidecar.name} - use another checkpoint"
        )


def load_plain(path: Path) -> dict[str, Any]:
    """Verify and read a file of tensors and plain data. Never unpickles a class."""
    if path.suffix == cards.SUFFIX:
        return _load_weights(path)
    verify(path)
    try:
        _require_plain_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged, foreign or hostile file
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read safely ({type(error).__name__}) - give one that training "
            "wrote"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a checkpoint - give one that training wrote"
        )
    return content


def _load_weights(path: Path) -> dict[str, Any]:
    """Weights and their card, as the content of a checkpoint."""
    card, weights = cards.read_weights(path)
    return {
        "hyper_parameters": {"config": card.get("config"), "facts": card.get("facts")},
        "segdeconv": {"format": card.get("format")},
        "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()},
    }


def _require_plain_zip(path: Path) -> None:
    """Only what torch.save writes: not its older formats, each with a reader of its own, and nothing that inflates."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise zipfile.BadZipFile("compressed")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise zipfile.BadZipFile("larger inside than outside")


def foreign(config: Any) -> list[str]:
    """The classes that a config names and that are not of segdeconv: what `--trust` has to say."""
    return sorted(set(targets(config)) - ADMITTED)


def read(path: str | Path, *, trust: Collection[str] = (), overrides: Iterable[str] = ()) -> Checkpoint:
    """Verify, read and admit a checkpoint: a .ckpt, a .safetensors with its card, or the name of a shipped network.

    trust: names of classes beyond ADMITTED that its config may use (`--trust package.module.Class`).
    overrides: `key=value` arguments of a command line, set in the config after it was admitted.
    Raises CheckpointError for a file that is damaged, foreign, newer than this version, whose weights are not finite,
    or that names anything else.
    """
    if "://" in str(path):
        raise UsageError(f"{path} is an address - download the file and check it first")
    path = cards.located(Path(path))
    content = load_plain(path)
    if not _has_parts(*(content.get(part) for part in PARTS)):
        raise CheckpointError(f"{path} is not a checkpoint of segdeconv - give one that training wrote")
    metadata, ours, _ = (content[part] for part in PARTS)
    version = ours.get("format")
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version} and this version reads {FORMAT} - upgrade segdeconv")
    try:
        config, facts = rename_keys(metadata["config"], path), metadata["facts"]
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    unknown = [name for name in foreign([config, facts]) if name not in trust]
    if unknown:
        raise CheckpointError(
            f"{path} names {', '.join(unknown)}, which {'is' if len(unknown) == 1 else 'are'} not of segdeconv - if "
            f"you know the author, add {' '.join(f'--trust {name}' for name in unknown)}"
        )
    _require_facts(path, facts)
    for name, value in content["state_dict"].items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{path} holds weights that are not finite ({name}) - use an earlier checkpoint")
    return Checkpoint(path, override(config, overrides), facts, content)


def _has_parts(metadata: Any, ours: Any, weights: Any) -> bool:
    """Whether the parts of a checkpoint are there, and of their types, before anything in them is used."""
    return (
        isinstance(metadata, dict)
        and set(metadata) == {"config", "facts"}  # Lightning would take `_instantiator` and the like for orders
        and all(isinstance(node, dict) for node in (*metadata.values(), metadata["config"].get("model")))
        and isinstance(ours, dict)
        and isinstance(weights, dict)
        and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items())
    )


def _require_facts(path: Path, facts: dict[str, Any]) -> None:
    try:
        Classes.from_dict(facts["classes"])
        len(facts["preprocessing"]["mean"])
    except Exception as error:  # whatever plain data of other shapes leads to
        raise CheckpointError(
            f"{path} does not say its classes and preprocessing as training writes them ({type(error).__name__}: "
            f"{error}) - give one that training wrote"
        ) from error


def require_resumable(read: Checkpoint) -> None:
    """Raise CheckpointError for weights alone, which say nothing about where training was."""
    if missing := sorted(REQUIRED_TO_RESUME - set(read.content)):
        raise CheckpointError(
            f"{read.path} holds weights only, without {', '.join(missing)} - start from it with init_from={read.path}"
        )
