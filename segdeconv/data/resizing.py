"""Images whose scale or proportions the network's input size changes a lot, which one warning per command reports."""

from segdeconv.data.preprocessing import Size
from segdeconv.errors import warn

MAX_FACTOR = 2.0  # by which a side may shrink or grow
MAX_STRETCH = 1.05  # by which the proportions may change; rounding to multiples of 32 changes them too


def stretches(size: Size, target: Size) -> bool:
    """Return whether resizing from `size` to `target`, both (H, W), changes the proportions beyond rounding."""
    ratio = (target[0] * size[1]) / (target[1] * size[0])
    return max(ratio, 1 / ratio) > MAX_STRETCH


def changes_scale(size: Size, target: Size) -> bool:
    """Return whether resizing changes a side by more than MAX_FACTOR or the proportions by more than MAX_STRETCH.

    Examples:
        >>> changes_scale((720, 960), (360, 480)), changes_scale((720, 960), (180, 240))
        (False, True)
        >>> changes_scale((64, 48), (48, 48))
        True
    """
    factors = [new / old for old, new in zip(size, target, strict=True)]
    return stretches(size, target) or any(max(factor, 1 / factor) > MAX_FACTOR for factor in factors)


def describe_resizing(count: str, name: str, size: Size, target: Size, *, training: bool = False) -> str:
    """Return the warning about images whose scale changes a lot.

    Args:
        count: The images, such as `3 of 7 images`.
        name: The name of an example.
        size: (H, W) of the example.
        target: (H, W) that it is resized to.
        training: The way out is that of a training, not of a prediction.
    """
    ways = ["dataset.size=null predicts images at their own scale, which suits a network trained on crops"]
    if training:
        ways = [f"dataset.size=null dataset.crop=[{target[0]},{target[1]}] trains on crops at the scale of the files"]
    if stretches(size, target):
        factor = (target[0] * target[1] / (size[0] * size[1])) ** 0.5
        height, width = (max(1, round(factor * side)) for side in size)
        ways.append(f"dataset.size=[{height},{width}] keeps the proportions of {name}")
    return (
        f"dataset.size: {count} resized by more than a factor of {MAX_FACTOR:g} or stretched, such as {name} from "
        f"{size[0]}x{size[1]} to {target[0]}x{target[1]} (height x{target[0] / size[0]:.2f}, width "
        f"x{target[1] / size[1]:.2f}) - {', or '.join(ways)}"
    )


class ResizedImages:
    """A count of the images whose scale a prediction changes a lot.

    Args:
        target: (H, W) of the network's input, or None if images keep their size.
        at_once: Print the warning about the first image at once, where the last one is not known.
    """

    def __init__(self, target: Size | None, *, at_once: bool = False) -> None:
        self.target, self.at_once = target, at_once
        self.count, self.changed = 0, 0
        self.example: tuple[str, Size] | None = None

    def add(self, name: str, size: Size) -> None:
        """Count an image of this name and (H, W)."""
        self.count += 1
        if self.target is None or not changes_scale(size, self.target):
            return
        self.changed += 1
        if self.example is None:
            self.example = name, size
            if self.at_once:
                warn(describe_resizing("images are", name, size, self.target))

    def merge(self, other: "ResizedImages") -> None:
        """Add the images that another process has counted."""
        self.count, self.changed = self.count + other.count, self.changed + other.changed
        self.example = self.example or other.example

    def warn(self) -> None:
        """Print one warning that counts the images, if there are any."""
        if self.example is not None and self.target is not None:
            several = "is" if self.changed == 1 else "are"
            warn(describe_resizing(f"{self.changed} of {self.count} images {several}", *self.example, self.target))
