"""The `augment` node of a config: albumentations transforms by name, in order, and compositions such as OneOf."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import cv2
import numpy as np

from segdeconv.config import TARGET, build, check, locate, public_name, type_name, without_defaults
from segdeconv.data.augmentation import GENERATED, Transform, is_composition, is_transform, rounded
from segdeconv.data.preprocessing import OPENCV_CHANNELS
from segdeconv.errors import UsageError, first_line

NEAREST = (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT)
INNER = "transforms"  # the argument of a composition
# Arguments of Compose that have no effect here.
NO_EFFECT = {
    "additional_targets": "samples are an image and a mask",
    "bbox_params": "samples have no boxes",
    "keypoint_params": "samples have no points",
    "save_applied_params": "nobody reads them",
    "seed": "the seed of the run determines every draw",
}
WAY_OUT = (
    "leave it out, or give a subclass of albumentations.ImageOnlyTransform or DualTransform that keeps each argument "
    "of its constructor as an attribute of the same name"
)


def check_augment(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Check the `augment` node of a config: transforms by name, in order; a name set to null is left out.

    Raises:
        UsageError: A transform or key is unknown, or a value is invalid.
    """
    return {name: _check(node, f"augment.{name}") for name, node in nodes.items() if node is not None}


def _check(node: Any, where: str) -> dict[str, Any]:
    if not isinstance(node, Mapping):
        raise UsageError(f"{where}={node} is not a transform, which has a {TARGET} - give one, or null to leave it out")
    # Checked against the signature, since albumentations only warns about unknown arguments.
    target = locate(node, where)
    if not is_composition(target):
        return without_defaults(check(node, where, [target]), node, target)
    for name, reason in NO_EFFECT.items():
        if node.get(name) not in (None, False):
            raise UsageError(f"{where}.{name} has no effect: {reason} - leave it out")
    own = {name: value for name, value in node.items() if name not in (INNER, *NO_EFFECT)}
    checked = without_defaults(check(own, where, [target], supplied=(INNER, *NO_EFFECT)), own, target)
    inner = node.get(INNER)
    if not isinstance(inner, Sequence) or isinstance(inner, str) or not inner:
        raise UsageError(
            f"{where}.{INNER}={inner} is not a list of transforms with a {TARGET} each - give at least one"
        )
    return {**checked, INNER: [_check(one, f"{where}.{INNER}[{index}]") for index, one in enumerate(inner)]}


def build_transforms(nodes: Mapping[str, Any], *, ignore_index: int, mean: Sequence[float]) -> dict[str, Transform]:
    """Build the transforms of a checked `augment` node, which fill the borders of masks with ignore_index.

    Args:
        nodes: An `augment` node.
        ignore_index: Index of ignored pixels.
        mean: Mean of each channel, with which the borders of images are filled.

    Raises:
        UsageError: A transform refuses its arguments, or changes labels.
    """
    return {name: _build(node, f"augment.{name}", ignore_index=ignore_index, mean=mean) for name, node in nodes.items()}


def _build(node: Mapping[str, Any], where: str, *, ignore_index: int, mean: Sequence[float]) -> Transform:
    extra = mask_arguments(locate(node, where), node, ignore_index=ignore_index, fill=mean)
    if INNER in node:
        extra[INNER] = [
            _build(one, f"{where}.{INNER}[{index}]", ignore_index=ignore_index, mean=mean)
            for index, one in enumerate(node[INNER])
        ]
    transform: Transform = build({key: node[key] for key in node if key not in extra}, where, **extra)
    if not is_transform(transform):
        raise UsageError(f"{where} ({node[TARGET]}) is not an albumentations transform - leave it out, or name one")
    return transform


def mask_arguments(
    transform: Any, node: Mapping[str, Any], *, ignore_index: int, fill: Sequence[float]
) -> dict[str, Any]:
    """Return the arguments to add to a transform's config, so that borders are ignored and masks stay aligned.

    By default, albumentations fills masks with 0, which is a class, and resizes them with OpenCV's INTER_NEAREST, which
    takes the pixel before the nearest, so that masks are shifted by 0.4 pixels to the lower right of their images.

    Args:
        transform: The class of the transform.
        node: Its node in the config.
        ignore_index: Index of ignored pixels.
        fill: Fill value of each channel. More than four channels, which OpenCV cannot fill separately, are filled with
            their mean.

    Raises:
        UsageError: The node fills masks with a class, or interpolates them.
    """
    parameters = inspect.signature(transform).parameters
    arguments: dict[str, Any] = {}
    if "fill_mask" in parameters:
        if node.get("fill_mask", ignore_index) != ignore_index:
            raise UsageError(
                f"augment: {node['_target_']} has fill_mask={node['fill_mask']}; borders must be ignored pixels, "
                f"{ignore_index} - leave out fill_mask"
            )
        arguments["fill_mask"] = ignore_index
        if "fill" in parameters and "fill" not in node:
            arguments["fill"] = rounded(fill) if len(fill) <= OPENCV_CHANNELS else float(round(np.mean(fill)))
    if node.get("mask_interpolation", cv2.INTER_NEAREST) not in NEAREST:
        raise UsageError(
            f"augment: {node['_target_']} interpolates masks; labels cannot be interpolated - "
            "leave out mask_interpolation"
        )
    schema = getattr(transform, "InitSchema", None)
    choice = schema.model_fields.get("mask_interpolation") if schema else None
    if choice and "mask_interpolation" not in node and cv2.INTER_NEAREST_EXACT in get_args(choice.annotation):
        arguments["mask_interpolation"] = cv2.INTER_NEAREST_EXACT
    return arguments


def transform_node(transform: Any) -> dict[str, Any]:
    """Return the node that describes an albumentations transform, with the arguments that are not its defaults.

    Args:
        transform: A transform or a composition.

    Examples:
        >>> import albumentations as A
        >>> transform_node(A.OneOf([A.Blur(p=1.0), A.RandomGamma((60, 150))]))["transforms"][1]
        {'_target_': 'albumentations.RandomGamma', 'gamma_limit': [60.0, 150.0]}

    Raises:
        UsageError: No config describes the transform, as one with a function of the program.
    """
    kind = type(transform)
    target = public_name(kind)
    if target is None:
        raise UsageError(
            f"augment: {type_name(transform)} is defined in a function, so that no checkpoint could name it - define "
            "it in a module"
        )
    parameters = inspect.signature(kind).parameters
    try:
        # albumentations' own description; subclasses describe arguments of their parents too, which they do not take.
        described = {key: _plain(value) for key, value in transform.to_dict_private().items() if key in parameters}
        node = {key: value for key, value in described.items() if value != _plain(parameters[key].default)}
        if is_composition(kind):
            return _composition_node(transform, target, node)
        rebuilt = vars(kind(**node))
    except UsageError:
        raise
    except Exception as error:  # NotImplementedError, ValueError, and anything in a transform of the user
        raise UsageError(f"augment: no config can describe {target} ({first_line(error)}) - {WAY_OUT}") from error
    for key, value in vars(transform).items():
        if key not in GENERATED and _differ(_plain(value), _plain(rebuilt.get(key))):
            raise UsageError(f"augment: no config can describe {target}, because of its attribute {key} - {WAY_OUT}")
    return {TARGET: target, **node}


def _composition_node(transform: Any, target: str, node: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in node.items() if key != INNER and value not in ({}, [])}
    for key in NO_EFFECT:  # some of them are not described
        if getattr(transform, key, None):
            own[key] = _plain(getattr(transform, key))
    return {TARGET: target, **own, INNER: [transform_node(inner) for inner in transform.transforms]}


def _differ(value: Any, other: Any) -> bool:
    if isinstance(value, str | int | float | list | dict | None) or callable(value):
        return bool(value != other)
    return type(value) is not type(other)  # an object that the constructor makes


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
