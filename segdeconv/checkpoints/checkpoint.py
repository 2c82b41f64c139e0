"""Checkpoint files: written atomically, verified before they are read, and plain data that cannot run code.

A file contains `hyper_parameters = {"config": ..., "facts": ...}` beside the weights: *config* is the config of the
run, *facts* the metadata of its data (classes, preprocessing, class weights). Both are plain data, so a checkpoint
alone, in an empty directory, is enough to evaluate and predict. Weights alone are shared as .safetensors with a card
(cards.py) and read like any other checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from segdeconv.checkpoints import cards, hub, locate
from segdeconv.checkpoints.pickle_check import PickleError, check_archive
from segdeconv.checkpoints.schema import check_config, check_metadata
from segdeconv.classes import Classes
from segdeconv.config import ABSENT, OBJECT, TARGET, current_key, override, rename_keys, targets, with_objects
from segdeconv.errors import CheckpointError, UsageError, for_caller, warn
from segdeconv.losses.adapter import TORCH_LOSSES
from segdeconv.models import SegmentationModel, build_model, check_model
from segdeconv.models.adapter import network_stand_in
from segdeconv.models.base import WithoutMemory
from segdeconv.models.instance_batch_norm import set_instance_statistics
from segdeconv.optimization import TORCH_OPTIMIZERS
from segdeconv.system.files import hash_file, replace_text, replacing_path
from segdeconv.system.plain_data import Limits, PlainDataError, check_plain

if TYPE_CHECKING:
    from segdeconv.data.preprocessing import Preprocessing

FORMAT = 1
AVERAGED = "averaged."  # prefix of the names of averaged weights

# Transforms of albumentations that take an image and a mask alone: no function, no file, no other images.
TRANSFORMS = (
    "AdditiveNoise", "AdvancedBlur", "Affine", "AutoContrast", "Blur", "CLAHE", "CenterCrop", "ChannelDropout",
    "ChannelShuffle", "ChromaticAberration", "CoarseDropout", "ColorJitter", "Compose", "ConstrainedCoarseDropout",
    "Crop", "CropAndPad", "CropNonEmptyMaskIfExists", "D4", "Defocus", "Downscale", "ElasticTransform", "Emboss",
    "Equalize", "Erasing", "FancyPCA", "GaussNoise", "GaussianBlur", "GlassBlur", "GridDistortion", "GridDropout",
    "HEStain", "HorizontalFlip", "HueSaturationValue", "ISONoise", "Illumination", "ImageCompression", "InvertImg",
    "LongestMaxSize", "MedianBlur", "MotionBlur", "MultiplicativeNoise", "NoOp", "OneOf", "OneOrOther",
    "OpticalDistortion", "Pad", "PadIfNeeded", "Perspective", "PixelDropout", "PlanckianJitter",
    "PlasmaBrightnessContrast", "PlasmaShadow", "Posterize", "RGBShift", "RandomBrightnessContrast", "RandomCrop",
    "RandomCropFromBorders", "RandomFog", "RandomGamma", "RandomGravel", "RandomGridShuffle", "RandomOrder",
    "RandomRain", "RandomResizedCrop", "RandomRotate90", "RandomScale", "RandomShadow", "RandomSizedCrop", "RandomSnow",
    "RandomSunFlare", "RandomToneCurve", "Resize", "RingingOvershoot", "Rotate", "SafeRotate", "SaltAndPepper",
    "SelectiveChannelTransform", "Sequential", "Sharpen", "ShiftScaleRotate", "ShotNoise", "SmallestMaxSize",
    "Solarize", "SomeOf", "Spatter", "SquareSymmetry", "Superpixels", "ThinPlateSpline", "ToGray", "ToSepia",
    "Transpose", "UnsharpMask", "VerticalFlip", "XYMasking", "ZoomBlur",
)  # fmt: skip
# The targets that a config in a checkpoint may name. Exact names: a prefix such as `torch.` would admit torch.load.
ADMITTED = frozenset(
    {
        "segdeconv.config.absent",  # in place of objects of a program, which are not in the checkpoint
        "segdeconv.data.ADE20K",
        "segdeconv.data.CamVid",
        "segdeconv.data.Cityscapes",
        "segdeconv.data.Folder",
        "segdeconv.data.OxfordPets",
        "segdeconv.data.SUNRGBD",
        "segdeconv.data.Shapes",
        "segdeconv.data.Shards",
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
    | {f"torch.nn.{name}" for name in TORCH_LOSSES}
    | {f"torch.optim.{name}" for name in TORCH_OPTIMIZERS}
    | {f"albumentations.{name}" for name in TRANSFORMS}
)

HASH_LINE = re.compile(r"[0-9a-f]{64}")
PARTS = ("hyper_parameters", "segdeconv", "state_dict")
FOLDER = "working_folder"  # the current folder of training relative to that of the checkpoint, for a relative root
SIDECAR_LINES = 4  # the hash of the current file, and those of files that interrupted writes may have left
SIDECAR_BYTES = 4096  # more than that many lines need; the rest of a longer file is not read
# Metadata that holds for the weights of the checkpoint only.
MEASURED = {
    "int8": "the range of 8-bit maps",
    "temperature": "the temperature, which calibrate fitted,",
    "class_offsets": "the record of the class offsets, which calibrate fitted,",
}
NORMALISATION = ("dataset.mean", "dataset.std", "dataset.order")  # which the metadata holds
REQUIRED_TO_RESUME = frozenset({"global_step", "loops", "optimizer_states"})
CONFIG_LIMITS = Limits(nodes=20_000)  # of config and metadata
CONTENT_LIMITS = Limits(nodes=2_000_000)  # of the whole content, with the state of training
MAX_SHARING = 8  # weights may share memory, as tied ones do
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    Attributes:
        path: The file.
        config: The config that the network was trained with.
        facts: The metadata of the data: classes, preprocessing, precision and others.
        content: The whole content of the file, as plain data.
        folder: The folder in which training was started, to which a relative `dataset.root` of the config refers; None
            if that is unknown, or `dataset.root` was overridden.
        objects: The functions that stand in the config for objects of a program, by group; see `config.stand_in`.
        overridden: The keys of the config that were overridden, such as `dataset.root`.
    """

    path: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    content: dict[str, Any]
    folder: Path | None = None
    objects: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    overridden: frozenset[str] = frozenset()

    @property
    def classes(self) -> Classes:
        """The classes that the network was trained for."""
        return Classes.from_dict(self.facts["classes"])

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of images, with the input size of the config's `dataset.size`."""
        from segdeconv.data.preprocessing import Preprocessing  # imported late: albumentations takes a second

        return Preprocessing.from_dict({**self.facts["preprocessing"], "size": self.config["dataset"]["size"]})

    def dataset_node(self) -> dict[str, Any]:
        """Return the config's `dataset` node, with a `root` that exists from the current folder.

        A relative root is searched in the folder in which training was started, then in the current one.

        Raises:
            UsageError: The root exists in none of them.
        """
        node: dict[str, Any] = with_objects(self.config, self.objects)["dataset"]
        root = node.get("root")
        if self.folder is None or not isinstance(root, str) or "://" in root:
            return node
        here, relative = Path.cwd(), Path(os.path.expanduser(root))
        paths = list(dict.fromkeys(folder / relative for folder in (self.folder, here)))
        for path in paths:
            if path == here / relative and os.path.exists(path):
                return node
            if os.path.exists(path):
                print(f"data set:   {path}, the dataset.root={root} of the training")
                return {**node, "root": str(path)}
        raise UsageError(
            f"the data set of {self.path} was not found: tried {' and '.join(map(str, paths))} - give its folder as "
            "dataset.root=DIR"
        )

    @property
    def card(self) -> dict[str, Any]:
        """What weights need to be read as a checkpoint: the config and the metadata, plain data."""
        return {"format": FORMAT, "config": _shareable(self.config), "facts": self.facts}

    @property
    def sha256(self) -> str:
        """The sha256 of the file, in hex."""
        return hash_file(self.path)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict of the network: the averaged weights if the checkpoint has them, else the last ones."""
        state = self.content["state_dict"]
        prefix = AVERAGED if any(name.startswith(AVERAGED) for name in state) else "model."
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def without_instance_statistics(self) -> Checkpoint:
        """Return the checkpoint with plain batch norm, as 8-bit networks have it, whose maps have fixed ranges."""
        return replace(self, facts={key: value for key, value in self.facts.items() if key != "instance_statistics"})

    def with_model(self, model: SegmentationModel, facts: Mapping[str, Any]) -> Checkpoint:
        """Return a checkpoint of other weights and metadata, without the state of training and of averaged weights."""
        return self.with_state({f"model.{name}": value for name, value in model.state_dict().items()}, facts)

    def with_state(self, state: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Checkpoint:
        """Return a checkpoint of another state dict and other metadata, without the state of training."""
        content = {
            "hyper_parameters": {**self.content["hyper_parameters"], "facts": dict(facts)},
            "segdeconv": self.content["segdeconv"],
            "state_dict": dict(state),
        }
        return replace(self, facts=dict(facts), content=content)

    def model(self) -> SegmentationModel:
        """Build the network from the config and load its weights, in evaluation mode.

        Raises:
            CheckpointError: The weights do not fit the network of the config, or it describes no network.
            UsageError: An override changed the network to one that does not exist.
        """
        node = with_objects(self.config, self.objects)["model"]
        if node[TARGET] == ABSENT:
            raise CheckpointError(
                f"{self.path} was trained from a network object ({node.get(OBJECT)}), which it does not describe - "
                "load it in Python with segdeconv.load(CHECKPOINT, model=NETWORK), given such a network"
            )
        trained_node = self.content.get("hyper_parameters", {}).get("config", {}).get("model")
        try:
            node = check_model(node)
            self._require_fitting_weights(node)
            model = self._build(node)
            model.load_state_dict(self.weights)
            if instance := self.facts.get("instance_statistics"):
                set_instance_statistics(model, instance["weights"])
        except (UsageError, RuntimeError, OverflowError, MemoryError) as error:
            if isinstance(error, UsageError) and self.config["model"] != trained_node:
                raise
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error).partition(" - ")[0]
            raise CheckpointError(
                f"{self.path} does not contain the weights that its config describes ({first}) - it was changed after "
                "training; use another copy"
            ) from error
        model.card = self.card
        return model.eval()

    def _build(self, node: Mapping[str, Any]) -> SegmentationModel:
        return build_model(node, len(self.classes), len(self.facts["preprocessing"]["mean"]), fresh=True)

    def _require_fitting_weights(self, node: Mapping[str, Any]) -> None:
        """Compare the weights with a network that occupies no memory, since the config may describe one of any size."""
        if node[TARGET] not in ADMITTED:  # a trusted class may compute with its weights when it is built
            return
        with WithoutMemory():
            described = self._build(node).state_dict()
        weights = self.weights
        for name, tensor in described.items():
            if name in weights and weights[name].shape != tensor.shape:
                sizes = ("x".join(map(str, shape)) or "scalar" for shape in (weights[name].shape, tensor.shape))
                raise RuntimeError(f"{name}: {' instead of '.join(sizes)}")
        if different := sorted(described.keys() ^ weights.keys()):
            raise RuntimeError(f"{different[0]} is {'missing' if different[0] in described else 'not part of it'}")


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint and its sidecar, replacing the old file only when the new one is complete and on the disk.

    The sidecar `<name>.sha256` is updated before the rename. It lists the new hash first and then the previous ones, so
    that it lists the hash of whichever file an interrupted write leaves, even if several writes in a row are
    interrupted.

    Args:
        content: The content; plain data and tensors.
        path: The file to write.
    """
    with replacing_path(path) as partial:
        try:
            with partial.open("wb") as file:
                torch.save(dict(content), file)
        except RuntimeError as error:  # the error of closing the archive hides the real one
            if error.__context__ is not None:
                raise error.__context__ from None
            raise
        previous = _read_hashes(path) if path.is_file() and sidecar_of(path).is_file() else []
        hashes = list(dict.fromkeys([hash_file(partial), *previous]))[:SIDECAR_LINES]
        replace_text(sidecar_of(path), "".join(f"{digest}  {path.name}\n" for digest in hashes))


def write_weights(
    checkpoint: Checkpoint,
    path: Path,
    *,
    half: bool = False,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights of a checkpoint for sharing, with a card beside them; `read` accepts them as a checkpoint.

    Args:
        checkpoint: The checkpoint. Of averaged and last weights, those that it predicts with are written.
        path: The .safetensors file; the card has the same name with the suffix .json.
        half: See `cards.write`.
        about: Further entries of the card (scores, licence, author); plain data.

    Raises:
        UsageError: See `cards.write`.
    """
    cards.write(path, checkpoint.weights, {**(about or {}), **checkpoint.card}, half=half)


def without_measurements(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata without what was measured on weights that are about to change; a line is printed for each."""
    for name, described in MEASURED.items():
        if facts.get(name) is not None:
            warn(f"{described} of the checkpoint is left out, because its weights change; measure it again afterwards")
    return {name: value for name, value in facts.items() if name not in MEASURED}


def _shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in which an absolute `dataset.root` is reduced to its last part, for privacy."""
    node = config.get("dataset")
    root = node.get("root") if isinstance(node, Mapping) else None
    if isinstance(node, Mapping) and isinstance(root, str) and os.path.isabs(os.path.expanduser(root)):
        node = {**node, "root": os.path.basename(os.path.normpath(root))}
        return {**config, "dataset": node}
    return dict(config)


def relative_folder(folder: Path, start: Path) -> str:
    """Return the working folder of training relative to that of its checkpoint, so that both can be moved together."""
    folder, start = (Path(os.path.realpath(path)) for path in (folder, start))
    return os.path.relpath(folder, start) if folder.anchor == start.anchor else str(folder)  # two drives of Windows


def sidecar_of(path: Path) -> Path:
    """Return the path of the file that lists the hash of a checkpoint."""
    return path.with_name(path.name + ".sha256")


def _read_hashes(path: Path) -> list[str]:
    with sidecar_of(path).open("rb") as file:
        return HASH_LINE.findall(file.read(SIDECAR_BYTES).decode(errors="replace"))


def verify(path: Path) -> None:
    """Check a file against the hashes in its sidecar; a missing sidecar only prints a warning.

    Raises:
        CheckpointError: The sidecar does not list the hash of the file.
    """
    sidecar = sidecar_of(path)
    if not sidecar.is_file():
        warn(f"{sidecar.name} is missing, so {path} cannot be verified")
        return
    if hash_file(path) not in _read_hashes(path):
        raise CheckpointError(
            f"{path} is damaged: its sha256 is not the one in {sidecar.name} - use another checkpoint"
        )


def load_plain(path: Path) -> dict[str, Any]:
    """Verify a checkpoint file and read its content: tensors and plain data. Never unpickles a class.

    Args:
        path: A .ckpt file, or a .safetensors file with its card.

    Raises:
        CheckpointError: The file is damaged, or is not a checkpoint that can be read safely.
    """
    if path.suffix == cards.SUFFIX:
        return _load_weights(path)
    verify(path)
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        content = check_plain(content, CONTENT_LIMITS, leaves=(torch.Tensor,), tuples=True, finite=False)
    except (PickleError, PlainDataError) as error:
        problem = str(error) if isinstance(error, PickleError) else f"it {error}"
        raise CheckpointError(
            f"{path} cannot be read safely as a checkpoint: {problem} - give a file that training wrote"
        ) from error
    except Exception as error:  # torch raises many types for a damaged, foreign or hostile file
        raise CheckpointError(
            f"{path} cannot be read safely as a checkpoint ({type(error).__name__}) - give a file that training wrote"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} contains a {type(content).__name__}, not a checkpoint - give a file that training wrote"
        )
    return content


def _load_weights(path: Path) -> dict[str, Any]:
    """Read weights and their card in the form of a checkpoint's content."""
    card, weights = cards.read_weights(path)
    return {
        "hyper_parameters": {"config": card.get("config"), "facts": card.get("facts")},
        "segdeconv": {"format": card.get("format")},
        "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()},
    }


def foreign(config: Any) -> list[str]:
    """Return the classes that a config names and that are not in ADMITTED; `--trust` has to list them."""
    return sorted(set(targets(config)) - ADMITTED)


def read(
    path: str | Path,
    *,
    trust: Collection[str] = (),
    overrides: Iterable[str] = (),
    model: nn.Module | None = None,
) -> Checkpoint:
    """Read a checkpoint, after checking that it is undamaged and names no foreign classes.

    Args:
        path: A .ckpt file, a run folder, `latest`, a .safetensors file with its card, the name of a shipped network, or
            an address of the Hugging Face Hub; see `locate.resolve_path`.
        trust: Names of further classes that its config may use beside ADMITTED (`--trust package.module.Class`).
        overrides: `key=value` arguments of a command line, applied to the config after it was checked.
        model: A network to load the weights into, in place of the one that the config names; it is copied.

    Raises:
        UsageError: The path is a URL or does not exist, or an override is invalid.
        CheckpointError: The file is damaged, is not a segdeconv checkpoint, was written by a newer version, contains
            weights that are not finite, or names a class that is not trusted.
    """
    if "://" in str(path) and not hub.is_address(path):
        raise UsageError(f"{path} is a URL - download the file and check it first")
    path = locate.resolve_path(path)
    content = load_plain(path)
    if not _has_parts(*(content.get(part) for part in PARTS)):
        raise CheckpointError(f"{path} is not a segdeconv checkpoint - give a file that training wrote")
    hyper_parameters, versions, weights = (content[part] for part in PARTS)
    version = versions.get("format")
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, but this version reads format {FORMAT} - upgrade segdeconv"
        )
    try:
        config, facts = check_plain([hyper_parameters["config"], hyper_parameters["facts"]], CONFIG_LIMITS)
        config = rename_keys(config, path)
        built = [node for group, node in config.items() if model is None or group != "model"]
        unknown = [name for name in foreign([built, facts]) if name not in trust]
        if unknown:
            raise CheckpointError(
                f"{path} names {', '.join(unknown)}, which {'is' if len(unknown) == 1 else 'are'} not part of "
                f"segdeconv - if you trust the author, add "
                + for_caller(f"trust={unknown}", " ".join(f"--trust {name}" for name in unknown))
            )
        check_config(config)
        check_metadata(facts)
        _check_classes(facts)
    except PlainDataError as error:
        raise CheckpointError(
            f"{path} does not contain its config and metadata in the form that training writes ({error}) - give a "
            "file that training wrote"
        ) from error
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    _require_usable_weights(path, weights)
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    overridden = frozenset(current_key(override.partition("=")[0]) for override in overrides)
    recorded = content.get(FOLDER)
    folder = None
    if isinstance(recorded, str) and "dataset.root" not in overridden:
        folder = Path(os.path.normpath(os.path.join(os.path.realpath(path.parent), recorded)))
    objects = {} if model is None else {"model": network_stand_in(model)}
    return Checkpoint(path, _override(config, overrides), facts, content, folder, objects, overridden)


def _override(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    if not overrides:
        return config
    # Imported late: albumentations takes a second.
    from segdeconv.data.module import SCHEMAS, check_pipeline, require_key, with_dataset

    for name in [word.partition("=")[2] for word in overrides if word.startswith("dataset=")]:
        config = {**config, "dataset": with_dataset(config["dataset"], name)}
    overrides = [word for word in overrides if not word.startswith("dataset=")]
    for path in (current_key(word.partition("=")[0]) for word in overrides):
        group, _, name = path.partition(".")
        if (group in config and group not in ("dataset", "model")) or path == "model" or path in NORMALISATION:
            raise UsageError(f"{path} has no effect on a trained network - only other keys of dataset and model have")
        if group == "dataset" and name and TARGET in config.get("dataset", {}):
            require_key(config["dataset"], name.partition(".")[0])
    config = override(config, overrides, {"dataset": SCHEMAS})
    check_pipeline(config["dataset"])
    return config


def _has_parts(hyper_parameters: Any, versions: Any, weights: Any) -> bool:
    """Return whether all parts of a checkpoint are present and have the right types."""
    return (
        isinstance(hyper_parameters, dict)
        and set(hyper_parameters) == {"config", "facts"}  # Lightning would act on `_instantiator` and similar keys
        and all(isinstance(node, dict) for node in hyper_parameters.values())
        and isinstance(hyper_parameters["config"].get("model"), dict)
        and isinstance(versions, dict)
        and isinstance(weights, dict)
        and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items())
    )


def _check_classes(facts: Mapping[str, Any]) -> None:
    try:
        Classes.from_dict(facts["classes"])
    except UsageError as error:
        raise PlainDataError(f"facts.classes: {str(error).partition(' - ')[0]}") from error


def _require_usable_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Check the type and the values of the weights, before anything computes with them."""
    total = 0
    for name, value in weights.items():
        if value.layout != torch.strided or value.is_quantized or value.dtype not in DTYPES:
            raise CheckpointError(
                f"{path} contains weights of an unsupported type ({name}: {value.layout}, {value.dtype}) - give a "
                "file that training wrote"
            )
        total += value.nbytes
        if total > MAX_SHARING * path.stat().st_size:
            raise CheckpointError(
                f"{path} contains weights that are larger than the file ({name}) - give a file that training wrote"
            )
        # The network computes in float32, in which a float64 can be infinite.
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise CheckpointError(f"{path} contains weights that are not finite ({name}) - use an earlier checkpoint")


def require_resumable(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint contains the state of training, not only weights.

    Raises:
        CheckpointError: A part of the state is missing.
    """
    if missing := sorted(REQUIRED_TO_RESUME - set(checkpoint.content)):
        raise CheckpointError(
            f"{checkpoint.path} contains only weights, without {', '.join(missing)} - start from it with "
            f"init_from={checkpoint.path}"
        )
