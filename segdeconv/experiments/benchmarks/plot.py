"""Plots of benchmark tables."""

from collections.abc import Sequence
from pathlib import Path

from segdeconv.experiments.benchmarks.parts import Table


def save(tables: Sequence[Table], path: Path) -> None:
    """Write a PNG with a panel for every table that has `bar` or `lines`; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plotted = [table for table in tables if table.bar or table.lines]
    figure, axes = plt.subplots(len(plotted), 1, figsize=(9, 2.6 * len(plotted)), squeeze=False, layout="constrained")
    for axis, table in zip(axes[:, 0], plotted, strict=True):
        axis.set_title(table.title, fontsize=10)
        if table.bar:
            names = [row[""] for row in table.rows]
            axis.barh(names, [row[table.bar] for row in table.rows], color="#4477aa")
            axis.invert_yaxis()
            axis.set_xlabel(table.bar)
        elif table.lines:
            across, up = table.lines
            for name in dict.fromkeys(row[""] for row in table.rows):
                rows = [row for row in table.rows if row[""] == name]
                axis.plot([row[across] for row in rows], [row[up] for row in rows], marker="o", label=name)
            axis.set(xlabel=across, ylabel=up, xlim=(0, None), ylim=(0, None))
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
