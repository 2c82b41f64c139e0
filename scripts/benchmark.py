"""Compare speed and memory with the usual implementation of SegNet, and write a table and a plot.

    python scripts/benchmark.py [speed] [int8] [many] [memory] [growth] [kernels] [input] [--size 360,480] [--batch 2]
                                [--repeats 5] [--classes 11] [--images 12] [--root CAMVID] [--out DIR]
                                [--minutes 8] [--resume]

speed    training steps and inference passes in turn, and the machine's matrix products for reference
int8     inference in 8-bit integers on a CPU, for five networks
many     prediction of image files, compared with the network alone and with loops of other libraries
memory   peak memory, each measured in a separate process, also of U-Net and FCN-8s
growth   time and memory by number of pixels, images and classes
kernels  pooling and unpooling compared with torch's, and with a copy
input    images per second, from the disk and from the cache

The default is speed. Writes DIR/benchmark.md, benchmark.json and, if matplotlib is installed, benchmark.png. Every
table is saved as soon as it is measured: with --resume, a command that was stopped measures only what is missing.
"""

import sys
import time
from importlib.util import find_spec
from pathlib import Path

from segdeconv.cli.command import ArgumentParser, local_path, run_command
from segdeconv.errors import UsageError, command, did_you_mean

PARTS = ("speed", "int8", "many", "memory", "growth", "kernels", "input")


def main() -> None:
    """Run the chosen benchmarks, print the tables and write them."""
    parser = ArgumentParser("benchmark.py", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default speed)")
    parser.add_argument("--size", default="360,480", help="height,width (default 360,480)")
    parser.add_argument("--batch", type=int, default=2, help="images per batch (default 2)")
    parser.add_argument("--classes", type=int, default=11, help="number of classes (default 11)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, whose median is shown (default 5)")
    parser.add_argument("--images", type=int, help="image files for many (default: 12 on a CPU, 200 on a GPU)")
    parser.add_argument("--root", type=local_path, help="CamVid's folder, for input (default: built-in images)")
    parser.add_argument("--out", type=local_path, default=Path("benchmark"), help="folder (default: benchmark)")
    parser.add_argument("--minutes", type=float, help="start no table after this time (default: no limit)")
    parser.add_argument("--resume", action="store_true", help="keep the tables that are already in DIR")
    arguments = parser.parse_args()
    chosen = arguments.parts or ["speed"]
    for part in chosen:
        if part not in PARTS:
            raise UsageError(f"unknown part '{part}' - {did_you_mean(part, PARTS)}")
    try:
        height, width = map(int, arguments.size.split(","))
    except ValueError:
        raise UsageError(f"--size {arguments.size} is not a size - write height,width, for example 360,480") from None
    images = 1 if arguments.images is None else arguments.images
    if min(height, width, arguments.batch, arguments.classes, arguments.repeats, images) < 1:
        raise UsageError("--size, --batch, --classes, --repeats and --images must be positive - give 1 or more")

    from segdeconv.evaluation.report import write_json
    from segdeconv.experiments.benchmarks import contestants, parts, plot
    from segdeconv.system.devices import best_device
    from segdeconv.system.files import replace_text

    task = contestants.Task(arguments.batch, (height, width), arguments.classes, best_device())
    measures: dict[str, list[parts.Measure]] = {
        "speed": parts.speed(task, arguments.repeats),
        "int8": parts.int8(task, arguments.repeats),
        "many": parts.many(task, arguments.repeats, arguments.images),
        "memory": parts.memory(task),
        "growth": parts.growth(task, arguments.repeats),
        "kernels": parts.kernels(task.device),
        "input": parts.images(arguments.root, task.size),
    }
    words = [word for word in sys.argv[1:] if word != "--resume"]
    metadata = {"command": command("benchmark", words), **parts.machine(task.device)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "benchmark.json"
    tables = parts.read_tables(results, metadata) if arguments.resume else {}
    started = time.monotonic()
    for part in chosen:
        for number, measure in enumerate(measures[part]):
            key = f"{part} {number}"
            if key in tables:
                print(f"\n{tables[key].title}: measured before, in {results}")
                continue
            if arguments.minutes and time.monotonic() - started > 60 * arguments.minutes:
                raise UsageError(
                    f"{arguments.minutes} minutes are over before '{key}' - run the command again with --resume, which "
                    "measures the rest"
                )
            tables[key] = measure()
            print(f"\n{tables[key].markdown()}", flush=True)
            write_json({**metadata, "tables": parts.as_plain_data(tables)}, results)
    head = "# Benchmark\n\n" + "\n".join(f"* {name}: {value}" for name, value in metadata.items())
    text = "\n".join([head, *(f"\n{table.markdown()}" for table in tables.values())])
    replace_text(arguments.out / "benchmark.md", text)
    if find_spec("matplotlib"):
        plot.save(list(tables.values()), arguments.out / "benchmark.png")
    else:
        print("no plot: matplotlib is not installed - pip install matplotlib")
    print("\n".join(str(path) for path in sorted(arguments.out.glob("benchmark.*"))))


if __name__ == "__main__":
    run_command(main)
