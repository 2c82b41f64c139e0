"""Compare speed and memory with the usual implementation of SegNet, and write a table and a plot.

    python scripts/benchmark.py [speed] [int8] [memory] [growth] [kernels] [input] [--size 360,480] [--batch 2]
                                [--repeats 5] [--classes 11] [--root CAMVID] [--out DIR]

speed    training steps and inference passes in turn, and the machine's matrix products for reference
int8     inference in 8-bit integers on a CPU, for five networks
memory   peak memory, each measured in a separate process, also of U-Net and FCN-8s
growth   time and memory by number of pixels, images and classes
kernels  pooling and unpooling compared with torch's, and with a copy
input    images per second, from the disk and from the cache

The default is speed. Writes DIR/benchmark.md, benchmark.json and, if matplotlib is installed, benchmark.png.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from segdeconv.cli.command import ArgumentParser, run_command
from segdeconv.errors import UsageError, command, did_you_mean

PARTS = ("speed", "int8", "memory", "growth", "kernels", "input")


def main() -> None:
    """Run the chosen benchmarks, print the tables and write them."""
    parser = ArgumentParser("benchmark.py", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default speed)")
    parser.add_argument("--size", default="360,480", help="height,width (default 360,480)")
    parser.add_argument("--batch", type=int, default=2, help="images per batch (default 2)")
    parser.add_argument("--classes", type=int, default=11, help="number of classes (default 11)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, whose median is shown (default 5)")
    parser.add_argument("--root", type=Path, help="CamVid's folder, for input (default: built-in images)")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="folder (default: benchmark)")
    arguments = parser.parse_args()
    chosen = arguments.parts or ["speed"]
    for part in chosen:
        if part not in PARTS:
            raise UsageError(f"unknown part '{part}' - {did_you_mean(part, PARTS)}")
    try:
        height, width = map(int, arguments.size.split(","))
    except ValueError:
        raise UsageError(f"--size {arguments.size} is not a size - write height,width, for example 360,480") from None
    if min(height, width, arguments.batch, arguments.classes, arguments.repeats) < 1:
        raise UsageError("--size, --batch, --classes and --repeats must be positive - give 1 or more")

    import torch

    from segdeconv.evaluation.report import write_json
    from segdeconv.experiments.benchmarks import contestants, parts, plot
    from segdeconv.system.devices import best_device

    task = contestants.Task(arguments.batch, (height, width), arguments.classes, best_device())
    measures: dict[str, Callable[[], Iterator[parts.Table]]] = {
        "speed": lambda: parts.speed(task, arguments.repeats),
        "int8": lambda: parts.int8(task._replace(device=torch.device("cpu")), arguments.repeats),
        "memory": lambda: parts.memory(task),
        "growth": lambda: parts.growth(task, arguments.repeats),
        "kernels": lambda: parts.kernels(task.device),
        "input": lambda: parts.images(arguments.root, task.size),
    }
    tables = []
    for part in chosen:
        for table in measures[part]():
            print(f"\n{table.markdown()}", flush=True)
            tables.append(table)
    metadata = {"command": command("benchmark", sys.argv[1:]), **parts.machine(task.device)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    head = "# Benchmark\n\n" + "\n".join(f"* {name}: {value}" for name, value in metadata.items())
    text = "\n".join([head, *(f"\n{table.markdown()}" for table in tables)])
    (arguments.out / "benchmark.md").write_text(text, encoding="utf-8")
    rows = [{"title": table.title, "rows": table.rows, "note": table.note} for table in tables]
    write_json({**metadata, "tables": rows}, arguments.out / "benchmark.json")
    if find_spec("matplotlib"):
        plot.save(tables, arguments.out / "benchmark.png")
    else:
        print("no plot: matplotlib is not installed - pip install matplotlib")
    print("\n".join(str(path) for path in sorted(arguments.out.glob("benchmark.*"))))


if __name__ == "__main__":
    run_command(main)
