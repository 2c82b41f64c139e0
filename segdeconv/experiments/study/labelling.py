"""Labelling by rank, by uncertainty alone and at random: mean IoU on CamVid with 40 to 160 labelled images.

    python -c "from segdeconv.experiments.study import labelling; labelling.run('runs/labelling', '/data/CamVid')"

As in practice, a network is trained on the labelled images, ranks the others with it, 40 of them are labelled, and a
new network is trained; the masks of CamVid stand for the person who labels. All methods begin with the same 40 images
of a seed. Running the same command again skips finished runs; `seeds=(0,)` trains those of one seed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segdeconv.analysis import ranking
from segdeconv.analysis.ranking import Measured
from segdeconv.checkpoints import checkpoint
from segdeconv.data.datasets.camvid import CamVid
from segdeconv.evaluation.evaluate import Predicted, evaluate, restore_dataset
from segdeconv.evaluation.metrics import ConfusionMatrix, number, scores
from segdeconv.evaluation.report import write_json
from segdeconv.experiments.study.series import averages, check_same, cost, mean_and_spread, resume_run, rows
from segdeconv.inference.segmenter import Segmenter
from segdeconv.system.files import replace_text, replacing
from segdeconv.training.arguments import read_arguments
from segdeconv.training.config_check import check_config
from segdeconv.training.result import TrainingResult
from segdeconv.training.resume import finished

STEPS = (40, 80, 120, 160)  # numbers of labelled images
METHODS = {"random": "at random", "rank": "by rank", "uncertainty": "by uncertainty alone"}
SCORES = {
    "val": "the 101 val images",
    "others": "the train images that no method labelled",
    "pool": "all 367 train images",
}
DATA, LISTING, POOL = "data", "data/train.txt", "pool.npz"
DIVERSITY = {"rank": ranking.DIVERSITY, "uncertainty": 0.0}

# A narrow SegNet at a third of the size; the same number of steps whatever the number of images.
SETTINGS: dict[str, Any] = {
    "dataset": "camvid",
    "dataset__size": [120, 160],
    "dataset__batch_size": 4,
    "dataset__num_workers": 0,
    "augment": "flip",
    "model": "segnet",
    "model__stages": [[16], [32], [64], [96], [96]],
    "model__encoder_addition": True,
    "loss__class_weighting": "median_frequency",
    "loss__class_weighting_power": 0.5,
    "optimizer": "muon",
    "optimizer__lr": 0.005,
    "optimizer__weight_decay": 0.05,
    "schedule": "cosine",
    "schedule__warmup_steps": 50,
    "trainer__max_steps": 800,
    "trainer__max_epochs": 1000,
    "trainer__check_val_every_n_epoch": 1000,  # only the scores after the last step count
    "trainer__gradient_clip_val": 5.0,
    "trainer__recalibration_batches": 8,
    "trainer__precision": "32-true",
    "logger": None,
}


def run(
    out: str | Path,
    camvid: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = tuple(METHODS),
    **settings: Any,
) -> None:
    """Train the missing runs, and write labelling.md, labelling.json and labelling.png after each.

    Args:
        out: The folder of the runs and tables.
        camvid: CamVid's folder.
        seeds: Seeds of the first images and of the trainings.
        methods: Names in `METHODS`.
        **settings: Arguments of `train` that replace those of `SETTINGS`.

    Raises:
        UsageError: A run in `out` was trained with other settings.
    """
    out, camvid = Path(out), Path(camvid).resolve()
    dataset = CamVid("train", root=str(camvid))
    images = {pair.name: pair.image for pair in dataset.pairs}
    for seed in seeds:
        order = [str(name) for name in np.random.default_rng(seed).permutation(dataset.names)]
        for method in methods:
            labelled: list[str] = []
            for before, count in zip((0, *STEPS), STEPS, strict=False):
                place = folder(out, seed, method, count)
                if not (place / LISTING).is_file():
                    others = [name for name in order if name not in set(labelled)]
                    if before and method != "random":
                        network = TrainingResult(folder(out, seed, method, before)).best_checkpoint
                        others = ranked(network, images, labelled, DIVERSITY[method])
                    write_data(sorted([*labelled, *others[: count - before]]), place / DATA, camvid)
                labelled = listed(place)
                train_on(place, {**SETTINGS, **settings, "seed": seed})
                score_pool(place, camvid)
                write_tables(out)


def folder(out: Path, seed: int, method: str, count: int) -> Path:
    """Return the folder of a run; the runs on the first images are those of all methods."""
    return out / f"seed{seed}" / ("first" if count == STEPS[0] else method) / f"{count:03}"


def ranked(path: Path, images: Mapping[str, Path], labelled: Sequence[str], diversity: float) -> list[str]:
    """Return the names of the images without labels, ranked by a network."""
    segmenter = Segmenter(checkpoint.read(path))
    named = {image: name for name, image in images.items()}

    def measure(names: Sequence[str]) -> list[Measured]:
        return list(ranking.measure(segmenter, [images[name] for name in names]))

    others = measure([name for name in images if name not in set(labelled)])
    return [named[image.path] for image in ranking.rank(others, measure(labelled), diversity=diversity)]


def write_data(names: Sequence[str], data: Path, camvid: Path) -> None:
    """Write a CamVid whose train images are some of CamVid's: links to its files, and a list."""
    data.mkdir(parents=True, exist_ok=True)
    for name in ("train", "trainannot", "val", "valannot", "val.txt"):
        if not (data / name).is_symlink():
            (data / name).symlink_to(camvid / name)
    replace_text(data / "train.txt", "".join(f"train/{name}.png trainannot/{name}.png\n" for name in names))


def listed(place: Path) -> list[str]:
    """Return the names of the images that a run is trained on."""
    return [Path(line.split()[0]).stem for line in (place / LISTING).read_text(encoding="utf-8").splitlines()]


def train_on(place: Path, settings: Mapping[str, Any]) -> None:
    """Train on DIR/data, unless the run is finished.

    Raises:
        UsageError: The run was trained with other settings.
    """
    root = str((place / DATA).resolve())
    config = check_config(read_arguments({}, {**settings, "dataset__root": root}).config)
    check_same(place, config)
    if not finished(place):
        print(f"\n=== {place}\n", flush=True)
        resume_run(config, place, name=str(place), typed=f"labelling.run(...), {place}")


def score_pool(place: Path, camvid: Path) -> None:
    """Write pool.npz, the confusion matrix of each train image, labelled or not, (N, C, C), and their names."""
    if not finished(place) or (place / POOL).is_file():
        return
    loaded = checkpoint.read(TrainingResult(place).best_checkpoint, overrides=[f"dataset.root={camvid}"])
    dataset = restore_dataset(loaded, "train")
    matrix, matrices = ConfusionMatrix(len(dataset.classes), dataset.classes.ignore_index), []

    def count(predicted: Predicted) -> None:
        matrix.update(torch.from_numpy(predicted.prediction), torch.from_numpy(predicted.mask))
        matrices.append(matrix.compute())
        matrix.reset()

    evaluate(Segmenter(loaded), dataset, on_prediction=count)
    with replacing(place / POOL) as file:
        np.savez(file, names=dataset.names, confusion=np.stack(matrices))


def pool_scores(out: Path, seed: int, method: str, count: int) -> dict[str, float | None]:
    """Return the mean IoU of a run on the images that no method has labelled, on all train images, and by drive.

    None where there are no images.
    """
    with np.load(folder(out, seed, method, count) / POOL, allow_pickle=False) as content:
        names, confusion = content["names"].tolist(), content["confusion"]
    places = [folder(out, seed, other, count) for other in METHODS]
    labelled = {name for place in places if (place / POOL).is_file() for name in listed(place)}
    drives = {part: [drive(name) == part for name in names] for part in sorted(set(map(drive, names)))}
    parts = {"others": [name not in labelled for name in names], "pool": [True] * len(names), **drives}
    return {part: number(scores(confusion[np.array(chosen)].sum(axis=0)).miou) for part, chosen in parts.items()}


def drive(name: str) -> str:
    """Return the drive of an image.

    Examples:
        >>> drive("0006R0_f00930")
        '0006R0'
    """
    return name.partition("_")[0]


def results(out: Path) -> list[dict[str, Any]]:
    """Return the mean IoUs of all finished runs in percent, by method and number of images.

    `val` is on the val images, `others` on the train images that no method has labelled by then with this seed, `pool`
    on all train images, and a drive on its train images; `images` counts the labelled images of each drive.
    """
    table = []
    for method, title in METHODS.items():
        for count in STEPS:
            seeds = sorted(int(path.name[4:]) for path in out.glob("seed*"))
            places = {seed: folder(out, seed, method, count) for seed in seeds}
            places = {seed: place for seed, place in places.items() if (place / POOL).is_file()}
            runs: dict[str, dict[str, float | None]] = {}
            for seed, place in places.items():
                fractions = {"val": TrainingResult(place).scores["miou"], **pool_scores(out, seed, method, count)}
                runs[f"seed{seed}"] = {
                    name: None if value is None else 100 * value for name, value in fractions.items()
                }
            names = list(next(iter(runs.values()), {}))
            drives = [drive(name) for place in places.values() for name in listed(place)]
            table.append(
                {
                    "method": title,
                    "labelled": count,
                    "runs": runs,
                    **averages({name: [run[name] for run in runs.values()] for name in names}),
                    "images": {name: drives.count(name) / len(places) for name in sorted(set(drives))},
                    "seconds": [cost(place).get("seconds") for place in places.values()],
                    "commits": sorted({str(cost(place).get("commit")) for place in places.values()}),
                    "devices": sorted({str(cost(place).get("device")) for place in places.values()}),
                }
            )
    return table


def write_tables(out: Path) -> str:
    """Write labelling.json, labelling.md and, with matplotlib, labelling.png, and return the Markdown."""
    table = results(out)
    write_json({"rows": table}, out / "labelling.json")
    lines = ["# Labelling by rank and at random"]
    columns = [f"{count} images" for count in STEPS]
    for score, what in SCORES.items():
        lines += ["", f"Mean IoU on {what} in percent, mean ± standard deviation over seeds", ""]
        cells = []
        for title in METHODS.values():
            entries = [row for row in table if row["method"] == title]
            cells.append([title, *(mean_and_spread(row, score) if row["runs"] else "–" for row in entries)])
        lines += rows(["labelled", *columns], cells)
    lines += ["", "Mean IoU of each run, also on the train images of each drive", ""]
    cells = []
    for row in table:
        for seed, run_scores in row["runs"].items():
            shown = ["–" if value is None else f"{value:.1f}" for value in run_scores.values()]
            cells.append([row["method"], str(row["labelled"]), seed.removeprefix("seed"), *shown])
    names = next((list(run_scores) for row in table for run_scores in row["runs"].values()), [])
    lines += rows(["labelled", "images", "seed", *names], cells)
    lines += ["", "Labelled images of each drive, mean over seeds", ""]
    drives = sorted({name for row in table for name in row["images"]})
    cells = [
        [row["method"], str(row["labelled"]), *(f"{row['images'].get(name, 0):.0f}" for name in drives)]
        for row in table
        if row["runs"]
    ]
    lines += rows(["labelled", "images", *drives], cells)
    text = "\n".join(lines) + "\n"
    replace_text(out / "labelling.md", text)
    draw(table, out / "labelling.png")
    return text


def draw(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the mean IoU over the number of labelled images; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SCORES), figsize=(12, 3.6), layout="constrained")
    for axis, (score, what) in zip(axes, SCORES.items(), strict=True):
        for colour, title in enumerate(METHODS.values()):
            entries = [row for row in table if row["method"] == title and row["runs"]]
            if len(entries) > 1:
                means = [row["mean"][score] for row in entries]
                axis.plot([row["labelled"] for row in entries], means, f"C{colour}", label=title)
                points = [(row["labelled"], run[score]) for row in entries for run in row["runs"].values()]
                axis.plot(*zip(*points, strict=True), f"C{colour}.", alpha=0.5)
        axis.set(xlabel="labelled images", ylabel="mean IoU, %", title=what, xticks=STEPS)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
