"""Parts of scripts/benchmark.py. Each returns functions that measure one table, whose first column names the row."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from segdeconv.errors import UsageError
from segdeconv.experiments.benchmarks import contestants, harness, peak
from segdeconv.experiments.benchmarks import input as input_
from segdeconv.experiments.benchmarks import kernels as kernels_
from segdeconv.experiments.benchmarks import many as many_
from segdeconv.experiments.benchmarks.contestants import USUAL, Task
from segdeconv.experiments.benchmarks.harness import Timing
from segdeconv.models import SegNet
from segdeconv.system.devices import fast_precision

MIB = 2**20
MANY = {"cpu": 12, "cuda": 200}  # image files per repetition, by default


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


Measure = Callable[[], Table]


def _format_cell(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def speed(task: Task, repeats: int) -> list[Measure]:
    """Time training steps and inference passes in turn, and the machine's matrix products before and after them."""
    return [partial(_speed, task, repeats, training) for training in (True, False)]


def _speed(task: Task, repeats: int, training: bool) -> Table:
    types = {"float32": torch.float32}
    if fast_precision() != "32-true":  # elsewhere one product of 4096x4096 takes minutes
        types["bfloat16"] = torch.bfloat16
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
    return Table(title, rows, bar="images a second", note=note)


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
            peak_ = peaks["float32" if name == USUAL or "bfloat16" not in peaks else "bfloat16"]
            row["of the matrix peak"] = fastest / peak_
    return row


def int8(task: Task, repeats: int) -> list[Measure]:
    """Time inference in the precision that is fast here and in 8-bit integers, network by network."""
    return [partial(_int8, task._replace(device=torch.device("cpu")), repeats)]


def _int8(task: Task, repeats: int) -> Table:
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
    return Table(f"Inference in 8 bits, {where}", rows, bar="times", note=f"Shortest of {repeats}, in turn.")


def many(task: Task, repeats: int, number: int | None = None) -> list[Measure]:
    """Compare the prediction of a number of image files with the network alone, for small and large images."""
    number = number or MANY.get(task.device.type, 12)
    return [partial(_many, task, repeats, number, scale) for scale in (1, many_.LARGE)]


def _many(task: Task, repeats: int, number: int, scale: int) -> Table:
    rows, size = [], (scale * task.size[0], scale * task.size[1])
    with tempfile.TemporaryDirectory() as folder:
        paths = many_.write_images(Path(folder), size, number)
        for name, pair in many_.pairs(task, paths).items():
            timings = harness.race(pair._asdict(), repeats=repeats, warm_up=False)
            best = {key: min(timing.times) for key, timing in timings.items()}
            rows.append(
                {
                    "": name,
                    "network alone, images a second": number / best["network"],
                    "from file to file": number / best["complete"],
                    "share": best["network"] / best["complete"],
                }
            )
    title = f"Prediction of {number} JPEG files of {size[0]}x{size[1]}"
    return Table(title, rows, bar="share", note=f"Shortest of {repeats}, in turn.")


def memory(task: Task) -> list[Measure]:
    """Measure the peak memory of training and inference, also of the networks in the SegNet paper's table 6."""
    return [partial(_memory, task, training, peers) for training in (True, False) for peers in (False, True)]


def _memory(task: Task, training: bool, peers: bool) -> Table:
    builds = contestants.peers if peers else contestants.implementations
    timings = harness.race(builds(task, training=training), repeats=1)
    first = next(iter(timings.values())).memory
    rows = [
        {"": name, "peak memory, MiB": round(timing.memory / MIB), "share of the first": timing.memory / first}
        for name, timing in timings.items()
    ]
    title = "networks with the same encoder" if peers else "compared with the usual SegNet"
    what = "Training" if training else "Inference"
    where = f"{task.batch} images of {task.size[0]}x{task.size[1]}"
    return Table(f"{what} memory, {title}, {where}", rows, bar="peak memory, MiB")


def growth(task: Task, repeats: int) -> list[Measure]:
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
    return [partial(_growth, factor, points, repeats) for factor, points in factors.items()]


def _growth(factor: str, points: list[tuple[float, Task]], repeats: int) -> Table:
    builds = {
        f"{value:.0f}": partial(contestants.segdeconv_step, point, fast_precision(), True) for value, point in points
    }
    timings = harness.race(builds, repeats=repeats)
    rows = [
        {"": "SegNet, training step", factor: int(float(name)), "seconds": timing.seconds,
         "peak memory, MiB": round(timing.memory / MIB)}
        for name, timing in timings.items()
    ]  # fmt: skip
    return Table(f"Growth with {factor}", rows, lines=(factor, "seconds"))


def kernels(device: torch.device) -> list[Measure]:
    """Time pooling and unpooling, and compare them with torch's and with a copy."""
    return [partial(_kernels, device)]


def _kernels(device: torch.device) -> Table:
    batch = 32 if device.type == "cuda" else 2  # the time of 8 on a GPU is about that of launching a kernel
    rows = [{"": row.pop("what"), **row} for row in kernels_.measure(device=device, shape=(batch, 64, 360, 480))]
    return Table(f"Pooling and unpooling, {batch} images with 64 channels of 360x480", rows, bar="share_of_copy")


def images(root: Path | None, size: tuple[int, int]) -> list[Measure]:
    """Measure decoding, augmentation and loading in images per second."""
    return [partial(_images, root, size)]


def _images(root: Path | None, size: tuple[int, int]) -> Table:
    rows = input_.measure(None if root is None else str(root), size=size)
    rows = [{"": row["what"], "images a second": row["images_per_s"], "of a core": row["per_core"]} for row in rows]
    source = "CamVid" if root else "built-in images"
    return Table(f"Input, {source}, {size[0]}x{size[1]}", rows, bar="images a second")


def as_plain_data(tables: Mapping[str, Table]) -> list[dict[str, Any]]:
    """Return tables, by the name of the part and a number, as they are written to benchmark.json."""
    return [{"part": part, **asdict(table)} for part, table in tables.items()]


def read_tables(path: Path, metadata: Mapping[str, Any]) -> dict[str, Table]:
    """Read the tables of an earlier run of the same command on the same machine.

    Args:
        path: Its benchmark.json; none are returned if it does not exist.
        metadata: The command and the machine, as in the file.

    Raises:
        UsageError: The file is of another command or machine.
    """
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in metadata.items():
        if content.get(name) != value:
            raise UsageError(
                f"{path} was measured with another {name}: {content.get(name)}, now {value} - give another --out"
            )
    return {
        table.pop("part"): Table(**{**table, "lines": table["lines"] and tuple(table["lines"])})
        for table in content["tables"]
    }


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
