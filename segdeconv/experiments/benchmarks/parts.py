"""Parts of scripts/benchmark.py; each yields tables as they are measured, whose first column names the row."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from segdeconv.experiments.benchmarks import contestants, harness, peak
from segdeconv.experiments.benchmarks import input as input_
from segdeconv.experiments.benchmarks import kernels as kernels_
from segdeconv.experiments.benchmarks.contestants import USUAL, Task
from segdeconv.experiments.benchmarks.harness import Timing
from segdeconv.models import SegNet
from segdeconv.system.devices import fast_precision

MIB = 2**20


@dataclass(frozen=True)
class Table:
    """A table that can be printed and plotted.

    Attributes:
        title: Title.
        rows: Dicts with the same keys, which are the header. Numbers are not formatted.
        bar: Column to plot as bars; None for no bars.
        lines: Columns (x, y) to plot as a line for each name in the first column; None for no lines.
        note: Text below the table.
    """

    title: str
    rows: list[dict[str, Any]]
    bar: str | None = None
    lines: tuple[str, str] | None = None
    note: str = ""

    def markdown(self) -> str:
        header = list(self.rows[0])
        cells = [header, ["---"] * len(header), *([_format_cell(row[name]) for name in header] for row in self.rows)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        return f"## {self.title}\n\n{text}\n" + (f"\n{self.note}\n" if self.note else "")


def _format_cell(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def speed(task: Task, repeats: int) -> Iterator[Table]:
    """Time training steps and inference passes in turn, and the machine's matrix products before and after them."""
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for training in (True, False):
        before = {name: peak.matrix_peak(task.device, dtype) for name, dtype in types.items()}
        timings = harness.race(contestants.implementations(task, training=training), repeats=repeats)
        peaks = {name: max(before[name], peak.matrix_peak(task.device, dtype)) for name, dtype in types.items()}
        flop = contestants.operations(SegNet(task.classes), task, training=training)
        rows = [_speed_row(name, timing, timings[USUAL], task, flop, peaks) for name, timing in timings.items()]
        what = "Training step" if training else "Inference pass"
        title = f"{what}, {task.batch} images of {task.size[0]}x{task.size[1]}, {task.classes} classes"
        note = (
            f"Medians of {repeats}, in turn; `best` is the shortest. {flop / 1e9:.0f} GFLOP per batch; matrix "
            f"products reach {' and '.join(f'{speed / 1e9:.0f} GFLOP/s in {name}' for name, speed in peaks.items())}."
        )
        yield Table(title, rows, bar="images a second", note=note)


def _speed_row(
    name: str, timing: Timing, usual: Timing, task: Task, flop: int, peaks: Mapping[str, float]
) -> dict[str, Any]:
    row = {
        "": name,
        "seconds": timing.seconds,
        "best": min(timing.times),
        "images a second": task.batch / timing.seconds,
        "times the usual": usual.seconds / timing.seconds,
        "best times best": min(usual.times) / min(timing.times),
        "peak memory, MiB": round(timing.memory / MIB),
        "GFLOP/s at best": None,
        "of the matrix peak": None,
    }
    if "SegNet" in name:  # the number of operations is SegNet's
        fastest = flop / min(timing.times)
        row["GFLOP/s at best"] = fastest / 1e9
        if "int8" not in name:
            peak_ = peaks["float32" if name == USUAL or fast_precision() == "32-true" else "bfloat16"]
            row["of the matrix peak"] = fastest / peak_
    return row


def int8(task: Task, repeats: int) -> Iterator[Table]:
    """Time inference in the precision that is fast here and in 8-bit integers, network by network."""
    rows = []
    for name, (usual, quantized) in contestants.int8_pairs(task).items():
        timings = harness.race({"fast": usual, "int8": quantized}, repeats=repeats)
        best = {key: min(timing.times) for key, timing in timings.items()}
        rows.append(
            {
                "": name,
                f"{fast_precision()}, seconds": best["fast"],
                "int8, seconds": best["int8"],
                "times": best["fast"] / best["int8"],
                "peak memory, MiB": round(timings["fast"].memory / MIB),
                "int8, MiB": round(timings["int8"].memory / MIB),
            }
        )
    where = f"{task.batch} images of {task.size[0]}x{task.size[1]}, {task.classes} classes"
    yield Table(f"Inference in 8 bits, {where}", rows, bar="times", note=f"Shortest of {repeats}, in turn.")


def memory(task: Task) -> Iterator[Table]:
    """Measure the peak memory of training and inference, also of the networks in the SegNet paper's table 6."""
    for training in (True, False):
        for title, builds in (
            ("compared with the usual SegNet", contestants.implementations(task, training=training)),
            ("networks with the same encoder", contestants.peers(task, training=training)),
        ):
            timings = harness.race(builds, repeats=1)
            first = next(iter(timings.values())).memory
            rows = [
                {"": name, "peak memory, MiB": round(timing.memory / MIB), "share of the first": timing.memory / first}
                for name, timing in timings.items()
            ]
            what = "Training" if training else "Inference"
            where = f"{task.batch} images of {task.size[0]}x{task.size[1]}"
            yield Table(f"{what} memory, {title}, {where}", rows, bar="peak memory, MiB")


def growth(task: Task, repeats: int) -> Iterator[Table]:
    """Measure time and memory of a training step by image area, batch size and classes, one factor at a time."""
    height, width = task.size
    factors: Mapping[str, list[tuple[float, Task]]] = {
        "pixels of an image": [
            (float(h * w), task._replace(size=(h, w)))
            for h, w in ((height // 4, width // 4), (height // 2, width // 2), (height, width))
        ],
        "images": [(float(batch), task._replace(batch=batch)) for batch in (1, 2, 4)],
        "classes": [(float(classes), task._replace(classes=classes)) for classes in (2, 11, 40, 150)],
    }
    for factor, points in factors.items():
        builds = {
            f"{value:.0f}": partial(contestants.segdeconv_step, point, fast_precision(), True)
            for value, point in points
        }
        timings = harness.race(builds, repeats=repeats)
        rows = [
            {"": "SegNet, training step", factor: int(float(name)), "seconds": timing.seconds,
             "peak memory, MiB": round(timing.memory / MIB)}
            for name, timing in timings.items()
        ]  # fmt: skip
        yield Table(f"Growth with {factor}", rows, lines=(factor, "seconds"))


def kernels(device: torch.device) -> Iterator[Table]:
    """Time pooling and unpooling, and compare them with torch's and with a copy."""
    batch = 32 if device.type == "cuda" else 2  # the time of 8 on a GPU is about that of launching a kernel
    rows = [{"": row.pop("what"), **row} for row in kernels_.measure(device=device, shape=(batch, 64, 360, 480))]
    yield Table(f"Pooling and unpooling, {batch} images with 64 channels of 360x480", rows, bar="share_of_copy")


def images(root: Path | None, size: tuple[int, int]) -> Iterator[Table]:
    """Measure decoding, augmentation and loading in images per second."""
    rows = input_.measure(None if root is None else str(root), size=size)
    rows = [{"": row["what"], "images a second": row["images_per_s"], "of a core": row["per_core"]} for row in rows]
    source = "CamVid" if root else "built-in images"
    yield Table(f"Input, {source}, {size[0]}x{size[1]}", rows, bar="images a second")


def machine(device: torch.device) -> dict[str, Any]:
    """Return a description of the machine: device, threads, cores and version of torch."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "CPU"
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2") if flag in flags.split()]
    return f"CPU ({known[0]})" if known else "CPU"
