"""The network of a labelling session on the disk: where it starts, and where it is saved."""

import inspect
import json
import shutil
from collections.abc import Collection
from pathlib import Path

from segdeconv.checkpoints import cards, checkpoint, hub
from segdeconv.checkpoints.pretrained import IMAGENET
from segdeconv.classes import Classes
from segdeconv.config import TARGET
from segdeconv.data.preprocessing import Preprocessing, Size
from segdeconv.errors import UsageError, warn
from segdeconv.models.segnet import SegNet
from segdeconv.models.vgg import load_vgg, vgg_depth, vgg_weights
from segdeconv.serving.label.learning import PIXELS, Learner
from segdeconv.system.devices import best_device, resolve_precision

NOTHING, IMAGENET_ENCODER = "nothing", "imagenet"  # starts that are no checkpoint
VGG_SUFFIX = ".pth"  # of torchvision's files, which are no checkpoint either
SMALL = "camvid-small-286e5fc"  # camvid-small before it got the encoder addition
NETWORK = "network"  # the folder in that of the session
STAGES = ((32, 32), (64, 64), (128, 128), (192, 192), (192, 192, 192))  # of SMALL


def open_network(
    folder: Path, start: str, *, trust: Collection[str] = (), pixels: int = PIXELS, precision: str = "auto"
) -> tuple[Learner, dict[int, str] | None]:
    """Return the network of a session: the one that it has saved, or the one that it starts from.

    Args:
        folder: The session's folder, DIR/session.
        start: `nothing`, `imagenet` (VGG11 with torchvision's weights, which are downloaded), the path of a torchvision
            VGG file (.pth) or a checkpoint.
        trust: See `checkpoint.read`.
        pixels: See `Learner`.
        precision: `auto` or one of `devices.PRECISIONS`.

    Returns:
        The learner, and the names by label of the classes of a network that the session has saved; None if it starts.

    Raises:
        UsageError: The network is none that learns from strokes.
        CheckpointError: A checkpoint cannot be read.
    """
    saved = saved_network(folder)
    device = best_device()
    if saved is None and (start in (NOTHING, IMAGENET_ENCODER) or start.endswith(VGG_SUFFIX)):
        learner = Learner(
            SegNet(2, stages=STAGES) if start == NOTHING else _vgg(start),
            (),
            Preprocessing(None, *IMAGENET),
            device=device,
            precision=resolve_precision(precision),
            pixels=pixels,
            pretrained_decoder=False,
            pretrained_encoder=start != NOTHING,
        )
        return learner, None
    source = checkpoint.read(saved if saved is not None else start, trust=trust)
    network, preprocessing = source.model(), source.preprocessing
    decoder = network.decoder if isinstance(network, SegNet) else None
    maps = [option for option in ("encoder_addition", "encoder_concatenation") if getattr(decoder, option, False)]
    if not isinstance(network, SegNet) or maps:
        raise UsageError(
            f"{source.path} is a {' with '.join([type(network).__name__, *maps])}, and label needs a SegNet whose "
            "decoder learns from switches alone - train one with model=segnet, or leave the checkpoint out for "
            f"{SMALL}"
        )
    if preprocessing.as_stored or preprocessing.channels != 3 or preprocessing.bits != 8:
        raise UsageError(
            f"{source.path} takes {preprocessing.channels} channels as stored, and label shows RGB photos - give a "
            "checkpoint of RGB images"
        )
    if source.facts.get("temperature"):
        warn(f"the temperature of {source.path} does not hold for what the network is going to learn")
    learner = Learner(
        network,
        source.classes.names,
        preprocessing,
        device=device,
        precision=resolve_precision(precision, source.facts["precision"]),
        pixels=pixels,
    )
    if saved is None:
        return learner, None
    return learner, dict(zip(source.classes.labels, source.classes.names, strict=True))


def _vgg(start: str) -> SegNet:
    """Return a network whose encoder has the weights of torchvision."""
    way_out = f"give the path of a torchvision VGG file ({VGG_SUFFIX}), or start from {SMALL} or {NOTHING}"
    if start != IMAGENET_ENCODER and not Path(start).is_file():
        raise UsageError(f"{start} not found - {way_out}")
    try:
        state = vgg_weights(start, depth=11, norm=True)
    except UsageError as error:  # its own way out is that of `train`
        raise UsageError(f"{str(error).partition(' - ')[0]} - {way_out}") from error
    assert state is not None, "only `none` has no weights"
    network = SegNet(2, depth=vgg_depth(state, source=start))
    load_vgg(network.encoder, state, source=start)
    return network


def saved_network(folder: Path) -> Path | None:
    """Return the weights that a session has saved; None if there are none.

    A process that was killed between the two renames of `save_network` leaves those of the round before.
    """
    for name in (NETWORK, f"{NETWORK}.old"):
        path = folder / name / hub.WEIGHTS
        if path.is_file() and cards.card_of(path).is_file():
            return path
    return None


def save_network(folder: Path, learner: Learner, classes: Classes, size: Size) -> None:
    """Save the network, which every command then reads: `predict DIR/session/network photo.jpg`.

    Args:
        folder: The session's folder, DIR/session.
        learner: The network.
        classes: Its classes.
        size: (H, W) of its input, for the commands, which resize every image to it.
    """
    network = learner.network
    preprocessing = learner.preprocessing.to_dict() | {"size": None}
    network.card = {
        "format": checkpoint.FORMAT,
        "config": {"dataset": {"size": list(size)}},
        "facts": {"preprocessing": preprocessing, "precision": learner.precision},
    }
    new, current, old = (folder / name for name in (f"{NETWORK}.new", NETWORK, f"{NETWORK}.old"))
    shutil.rmtree(new, ignore_errors=True)
    network.save_pretrained(new, classes=classes)
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    new.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def train_words(root: Path, session: Path | None, learner: Learner) -> list[str]:
    """Return the words of a `train` command for the data set that a session has stored.

    Args:
        root: The folder DIR.
        session: The session's folder, DIR/session, whose network training starts from; None if it has not learned.
        learner: The network.
    """
    words = ["dataset=folder", f"dataset.root={root}"]
    if session is None:
        return words
    node = learner.network.node
    assert node is not None, "the arguments of a SegNet are plain data"
    defaults = {name: parameter.default for name, parameter in inspect.signature(SegNet).parameters.items()}
    own = {
        name: value for name, value in node.items() if name not in (TARGET, "pretrained") and value != defaults[name]
    }
    words.append("model=segnet")
    words += [f"model.{name}={json.dumps(value, separators=(',', ':'))}" for name, value in own.items()]
    return [*words, f"init_from={session / NETWORK}"]


def describe_start(start: str, resumed: bool) -> str:
    """Return a line about where the network comes from."""
    if resumed:
        if start != SMALL:
            warn(f"{start} is not read, since the session resumes with the network that it has learned")
        return "resumed with the network that it has learned"
    return {NOTHING: "a new network", IMAGENET_ENCODER: "VGG11 with the weights of ImageNet"}.get(start, start)
