"""Weights to share: NAME.safetensors, and NAME.json beside it, the card that says what they are.

A .safetensors file is numbers with their names and can hold nothing that runs; the card is plain JSON: config, facts
and the sha256 of the numbers. The networks that the package ships lie in `segdeconv/checkpoints/weights` in this form.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from segdeconv.errors import CheckpointError, UsageError, did_you_mean
from segdeconv.system.files import replace_text, replacing

SUFFIX = ".safetensors"
SHIPPED = Path(__file__).resolve().parent / "weights"
LONGEST = 1 << 24  # bytes of a card; nobody writes more


def card_of(path: Path) -> Path:
    """The card that belongs to a file of weights."""
    return path.with_suffix(".json")


def write(path: Path, weights: Mapping[str, Tensor], card: Mapping[str, Any], *, half: bool = False) -> None:
    """Write weights and their card, whose `sha256` becomes that of the weights.

    half: float16 for everything of two dimensions or more. Vectors stay as they are: they are few, and the running
        variances of raw pixels are beyond what float16 holds.

    The card is taken away first and written last, so that a cut leaves weights without a card, which are refused, and
    never weights with the card of others.
    """
    if path.suffix != SUFFIX:
        raise UsageError(f"{path} is to hold weights with a card - name it {path.with_suffix(SUFFIX).name}")
    numbers = {name: _halved(name, tensor) if half else tensor for name, tensor in weights.items()}
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in numbers.items()})
    card_of(path).unlink(missing_ok=True)
    with replacing(path) as file:
        file.write(content)
    sha256 = hashlib.sha256(content).hexdigest()
    replace_text(card_of(path), json.dumps({**card, "sha256": sha256}, indent=1) + "\n")


def _halved(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.ndim < 2:
        return tensor
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise UsageError(f"{name} holds numbers beyond what float16 does - write the weights in float32")
    return half


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(card, weights) of a file, verified by the card's sha256; half precision becomes float32.

    Raises CheckpointError where the card is missing or damaged, or the weights are not those it was written with.
    """
    try:
        with card_of(path).open("rb") as file:
            card = json.loads(file.read(LONGEST))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is without its card, {card_of(path).name} - put the .json beside it that was written with it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{card_of(path)} is no card ({type(error).__name__}) - use another copy") from error
    content = path.read_bytes()
    if not isinstance(card, dict) or hashlib.sha256(content).hexdigest() != card.get("sha256"):
        raise CheckpointError(
            f"{path} is damaged or not what {card_of(path).name} was written for: its sha256 is another - use another "
            "copy of both"
        )
    try:
        weights = safetensors.torch.load(content)
    except Exception as error:  # of types of its own
        raise CheckpointError(
            f"{path} is not a .safetensors file that can be read ({type(error).__name__}) - use another copy"
        ) from error
    halves = (torch.float16, torch.bfloat16)
    return card, {name: tensor.float() if tensor.dtype in halves else tensor for name, tensor in weights.items()}


def shipped() -> list[str]:
    """The names of the networks that the package ships."""
    return sorted(path.stem for path in SHIPPED.glob(f"*{SUFFIX}"))


def located(path: Path) -> Path:
    """The file that a CHECKPOINT argument means: the one of this path if there is one, else the shipped network.

    Raises UsageError for what is neither.
    """
    if path.is_file():
        return path
    names = shipped()
    if str(path) in names:
        return SHIPPED / f"{path}{SUFFIX}"
    if names and path.parent == Path() and not path.suffix:
        raise UsageError(
            f"there is no checkpoint {path} and no shipped network of this name - {did_you_mean(str(path), names)}"
        )
    raise UsageError(f"there is no checkpoint {path} - give a file such as runs/<dataset>-<model>/<time>/best.ckpt")
