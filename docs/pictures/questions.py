"""Draw the figures of docs/questions.md into this folder: python docs/pictures/questions.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from segdeconv.models import FPN
from segdeconv.models.layers import bilinear_kernel
from segdeconv.switches import max_pool, unpool

HERE = Path(__file__).parent


def save(name: str, panels: list[tuple[str, torch.Tensor]], *, numbers: bool = False, top: float | None = None) -> None:
    """Save maps side by side with their titles.

    Args:
        name: File name in this folder.
        panels: Title and (H, W) map of each panel.
        numbers: Write every value into its cell.
        top: Value of the brightest colour; None for the maximum.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(2.2 * len(panels), 2.5), layout="constrained")
    for axis, (title, map_) in zip(axes, panels, strict=True):
        axis.imshow(map_, cmap="Blues" if numbers else "viridis", vmin=0 if numbers else None, vmax=top)
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[])
        if numbers:
            for (row, column), value in (
                (index, map_[index].item())
                for index in map_.new_ones(map_.shape).nonzero().unbind()
                for index in [tuple(index.tolist())]
            ):
                axis.text(
                    column,
                    row,
                    f"{value:g}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="black" if value < 7 else "white",
                )
    figure.savefig(HERE / name, dpi=100)
    plt.close(figure)


def main() -> None:
    """Draw all figures."""
    torch.manual_seed(0)
    x = torch.tensor([[1.0, 5, 2, 0], [3, 4, 9, 1], [8, 7, 6, 2], [0, 1, 3, 4]])[None, None]
    features, switches, size = max_pool(x)
    panels = [("before pooling", x), ("maxima", features), ("switches", switches.float())]
    panels += [("unpooled", unpool(features, switches, size))]
    panels += [("bilinear, for comparison", F.interpolate(features, scale_factor=2, mode="bilinear"))]
    save("questions_unpooling.png", [(title, map_[0, 0].round(decimals=1)) for title, map_ in panels], numbers=True)

    maps = torch.zeros(1, 3, 5, 5)
    maps[0, 0, 1, 1], maps[0, 1, 2, 2], maps[0, 2, 2, 1] = 1.0, 2.0, 1.5
    weight = torch.cat([bilinear_kernel(1, 4), torch.ones(1, 1, 4, 4) / 4, torch.eye(4)[None, None] / 2])
    parts = [F.conv_transpose2d(maps[:, [c]], weight[[c]], stride=2, padding=1)[0, 0] for c in range(3)]
    together = F.conv_transpose2d(maps, weight, stride=2, padding=1)[0, 0]
    panels = [(f"map {c + 1} spread by its kernel", part) for c, part in enumerate(parts)]
    save("questions_transposed.png", [*panels, ("their sum: one output map", together)], top=1.0)

    network = FPN(2, stages=((8,), (8,), (8,), (8,), (8,)), channels=16).eval()
    image = torch.zeros(1, 3, 128, 128)
    image[..., 40:90, 30:100] = 2.0
    with torch.no_grad():
        levels = network.levels(image)
        combined = network.combine(levels, image)
    panels = [(f"level {n}: {m.shape[-2]}x{m.shape[-1]}", m[0, 0]) for n, m in enumerate(levels, 1)]
    save("questions_pyramid.png", [*panels, ("combined: 128x128", combined[0, 0])])


if __name__ == "__main__":
    main()
