"""Weights for sharing: NAME.safetensors and its card, NAME.json, which describes them.

A .safetensors file contains named tensors and cannot contain code. The card is plain JSON: the config, the metadata
(`facts`) and the sha256 of the weights file. The networks shipped with the package lie in
`segdeconv/checkpoints/weights` in this form.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from segdeconv.errors import CheckpointError, UsageError
from segdeconv.system.files import replace_text, replacing
from segdeconv.system.plain_data import PlainDataError, read_json, require_mapping

SUFFIX = ".safetensors"
SHIPPED = Path(__file__).resolve().parent / "weights"


def card_of(path: Path) -> Path:
    """Return the path of the card that belongs to a file of weights."""
    return path.with_suffix(".json")


def write(path: Path, weights: Mapping[str, Tensor], card: Mapping[str, Any], *, half: bool = False) -> None:
    """Write weights and their card, adding the `sha256` of the weights to the card.

    The old card is removed first and the new one written last, so that an interrupted write leaves weights without a
    card, which are refused, and never weights with the wrong card.

    Args:
        path: The .safetensors file.
        weights: The tensors by name.
        card: The content of the card; plain data.
        half: Whether to write tensors of two or more dimensions as float16. Vectors keep their dtype: they are small,
            and the running variances of raw pixels exceed the range of float16.

    Raises:
        UsageError: `path` has another suffix, or a tensor exceeds the range of float16.
    """
    if path.suffix != SUFFIX:
        raise UsageError(f"{path} does not end in {SUFFIX} - name it {path.with_suffix(SUFFIX).name}")
    tensors = {name: _to_half(path, name, tensor) if half else tensor for name, tensor in weights.items()}
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    card_of(path).unlink(missing_ok=True)
    with replacing(path) as file:
        file.write(content)
    sha256 = hashlib.sha256(content).hexdigest()
    replace_text(card_of(path), json.dumps({**card, "sha256": sha256}, indent=1) + "\n")


def _to_half(path: Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.ndim < 2:
        return tensor
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise UsageError(
            f"{path} was not written: {name} contains values beyond the range of float16 - write the weights in "
            "float32, without --half"
        )
    return half


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read weights and their card, verified by the card's sha256.

    Args:
        path: The .safetensors file.

    Returns:
        The card, and the weights by name. Half precision becomes float32.

    Raises:
        CheckpointError: The card is missing or damaged, or does not belong to the weights.
    """
    try:
        card = require_mapping(read_json(card_of(path)))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no card {card_of(path).name} beside it - copy the .json file that was written with it there"
        ) from None
    except PlainDataError as error:
        raise CheckpointError(f"{card_of(path)} is not a valid card: it {error} - use another copy") from error
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != card.get("sha256"):
        raise CheckpointError(
            f"{path} is damaged or does not belong to {card_of(path).name}: its sha256 is not the one in the card - "
            "use another copy of both"
        )
    try:
        weights = safetensors.torch.load(content)
    except Exception as error:  # safetensors raises its own types
        raise CheckpointError(
            f"{path} is not a readable .safetensors file ({type(error).__name__}) - use another copy"
        ) from error
    halves = (torch.float16, torch.bfloat16)
    return dict(card), {name: tensor.float() if tensor.dtype in halves else tensor for name, tensor in weights.items()}


def shipped() -> list[str]:
    """Return the names of the networks shipped with the package."""
    return sorted(path.stem for path in SHIPPED.glob(f"*{SUFFIX}"))
