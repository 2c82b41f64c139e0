"""Verification of a finished run: its record, checked against its files, its data, and repetitions of its steps."""

from __future__ import annotations

import csv
import random
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from segdeconv import config as configs
from segdeconv.checkpoints import checkpoint as checkpoints
from segdeconv.checkpoints import locate
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.data import sample_digests
from segdeconv.data.module import build_split, check_dataset
from segdeconv.errors import CheckpointError, MismatchError, SegdeconvError, UsageError
from segdeconv.evaluation import recount, report
from segdeconv.evaluation.evaluate import Evaluation, batches, restore_dataset, versions
from segdeconv.evaluation.learning_curve import METRICS_LIMITS
from segdeconv.inference.segmenter import Segmenter
from segdeconv.system.files import hash_file
from segdeconv.system.plain_data import PlainDataError, read_bytes
from segdeconv.training import record, resume
from segdeconv.training.checkpointing import KEPT, kept_path
from segdeconv.training.repeat import Stretch, absent_groups, obstacle, other_start, repeat, threads_of

TOLERANCE = 1e-6  # of the scores of the same images on another machine
CLOSE = 0.01  # relative difference of a loss after some steps on another machine
SHOWN = 5  # names in a message
UNUSED = ("checkpoint", "checkpoint_sha256", "command", "complete", "config", "versions")  # of a report, by its scores

Status = Literal["passed", "failed", "not checked", "note"]


@dataclass(frozen=True)
class Check:
    """One check of a run.

    Attributes:
        name: What was checked.
        status: Its outcome; a `note` neither confirms nor refutes the run.
        detail: What was compared, or what differs, one sentence without a full stop.
        exact: Whether the comparison was to the bit.
    """

    name: str
    status: Status
    detail: str
    exact: bool = True


@dataclass
class Verification:
    """The checks of a run, in order, and how they were made.

    Attributes:
        run: The run folder.
        seed: The seed of the choice of images.
        checks: The checks.
        images: The names of the images whose predictions were counted again.
        stretches: For each repeated stretch its first step, number of steps and largest difference of a loss.
        recorded: Versions and machine of the run.
        here: Versions and machine of this process.
        files: The sha256 of each file of the run now.
        seconds: Duration.
    """

    run: Path
    seed: int
    checks: list[Check] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    stretches: list[dict[str, Any]] = field(default_factory=list)
    recorded: dict[str, str] = field(default_factory=dict)
    here: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, name: str, status: Status, detail: str, *, exact: bool = True) -> None:
        """Add a check."""
        text = "".join(letter if letter.isprintable() else " " for letter in detail)  # names in files of others
        self.checks.append(Check(name, status, " ".join(text.split()), exact))

    def of(self, status: Status) -> list[Check]:
        """Return the checks with a status."""
        return [check for check in self.checks if check.status == status]

    @property
    def other_machine(self) -> list[str]:
        """What differs between the machine and versions of the run and these, such as `torch 2.14 -> 2.15`."""
        names = sorted({*self.recorded, *self.here}) if self.recorded else []
        return [
            f"{name} {self.recorded.get(name)} -> {self.here.get(name)}"
            for name in names
            if self.recorded.get(name) != self.here.get(name)
        ]

    @property
    def verdict(self) -> str:
        """The result in one sentence, without a full stop."""
        if failed := self.of("failed"):
            first, others = failed[0], f" (and {len(failed) - 1} more checks differ)" if failed[1:] else ""
            cause = f"; first of the versions that differ: {self.other_machine[0]}" if self.other_machine else ""
            return f"{first.name} differs first: {first.detail}{others}{cause}"
        exact = all(check.exact for check in self.of("passed"))
        result = "same bits" if exact else f"same scores within {TOLERANCE:g} on another machine"
        if exact and self.other_machine:
            result += f", also with other versions ({', '.join(self.other_machine)})"
        unmade = self.of("not checked")
        return (
            result if not unmade else f"{result} in the checks made; not checked: {_listed([c.name for c in unmade])}"
        )

    def as_plain_data(self) -> dict[str, Any]:
        """Return the content of verify.json."""
        return {
            "verdict": self.verdict,
            "complete": not self.of("not checked"),
            "run": str(self.run),
            "checks": [vars(check) for check in self.checks],
            "seed": self.seed,
            "images": self.images,
            "stretches": self.stretches,
            "versions_of_run": self.recorded,
            "versions_here": self.here,
            "files": self.files,
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "seconds": round(self.seconds, 1),
        }


def verify(
    run: Path,
    *,
    steps: int = 5,
    images: int | None = 20,
    seed: int | None = None,
    trust: Collection[str] = (),
    overrides: Sequence[str] = (),
    sums: str | None = None,
) -> Verification:
    """Check a finished run against its own record.

    Args:
        run: The run folder.
        steps: Steps of each stretch to repeat; 0 repeats none.
        images: Number of images whose predictions are counted again, rounded up to whole batches; None for all.
        seed: Seed of the choice of images; None for one from the time.
        trust: Classes of the user's own that the config may name.
        overrides: `key=value` of the data set, such as dataset.root=DIR.
        sums: The sha256 of SHA256SUMS as it was published; None to leave it out.

    Raises:
        CheckpointError: A checkpoint cannot be read safely, or names a class that is not trusted.
        UsageError: The folder contains no finished run.
    """
    started = time.monotonic()
    result = Verification(run, random.SystemRandom().randrange(10**6) if seed is None else seed)
    if not (run / "report.json").is_file():
        raise UsageError(
            f"{run} has no report.json, so it is not a finished run - give a run folder, or resume the run"
        )
    _check_files(result, sums)
    best_path = run / locate.BEST if (run / locate.BEST).is_file() else run / locate.LAST
    best, last = (_read(result, path, trust, overrides) for path in (best_path, run / locate.LAST))
    try:
        content = report.read_report(run / "report.json")
    except PlainDataError as error:
        result.add("report.json", "failed", f"report.json {error}")
        content = {}
    recorded = content.get("versions")
    if isinstance(recorded, Mapping):
        result.recorded = {str(name): str(value) for name, value in recorded.items()}
    with threads_of(result.recorded):
        device = _device(result.recorded)
        result.here = versions(device)
        if best is not None:
            _check_config(result, best, last, content)
            data = _check_data(result, best, last)
            _check_report(result, content, best)
            _check_validation(result, content, best)
            _check_scores(result, content, best, device, images, data)
        else:
            for name in ("config", "data", "report.json", "scores"):
                result.add(name, "not checked", f"{best_path.name} cannot be read")
        _check_stretches(result, last, trust, overrides, steps)
    if result.other_machine:
        result.add("versions", "note", f"other than in the run: {', '.join(result.other_machine)}")
    elif result.recorded:
        result.add("versions", "passed", "those of the run, and the same kind of machine")
    else:
        result.add("versions", "not checked", "the report names none")
    result.seconds = time.monotonic() - started
    return result


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _device(recorded: Mapping[str, str]) -> torch.device:
    name = str(recorded.get("device", "")).partition(" ")[0]
    return torch.device("cuda" if name == "cuda" and torch.cuda.is_available() else "cpu")


def _check_files(result: Verification, published: str | None) -> None:
    """Compare the files of the run with the hashes in SHA256SUMS."""
    run, path = result.run, result.run / record.SUMS
    own = {file.name for pattern in record.FILES for file in run.glob(pattern)}
    names = sorted(own | {file.name for file in run.glob("*.ckpt")})
    result.files = {name: hash_file(run / name) for name in names}
    if not path.is_file():
        result.add("files", "not checked", f"the run has no {record.SUMS}; an earlier version trained it")
        return
    digest = hash_file(path)
    result.files[record.SUMS] = digest
    if published is not None and published.lower() != digest:
        result.add("files", "failed", f"{record.SUMS} has the sha256 {digest}, not the published {published}")
        return
    try:
        text = read_bytes(path).decode()
    except (PlainDataError, UnicodeDecodeError):
        text = ""
    listed = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)}
    changed = [name for name, digest in listed.items() if result.files.get(name) not in (None, digest)]
    missing = [name for name in listed if name not in result.files]
    added = [name for name in sorted(own) if name not in listed]
    if changed or missing or added or not listed:
        parts = [
            f"{_listed(names)} {text}"
            for names, text in (
                (changed, "changed after the run wrote it"),
                (missing, "missing"),
                (added, "not in the list"),
            )
            if names
        ]
        result.add("files", "failed", "; ".join(parts) or f"{record.SUMS} lists no files")
    else:
        against = f", and {record.SUMS} the published hash" if published else ""
        result.add("files", "passed", f"all {len(listed)} have the sha256 in {record.SUMS}{against}")
    if beside := [name for name in names if name not in own and name not in listed]:
        result.add("added files", "note", f"{_listed(beside)} not written by the training, and not checked")


def _read(result: Verification, path: Path, trust: Collection[str], overrides: Sequence[str]) -> Checkpoint | None:
    """Return a checkpoint, or None with a failed check if its file is missing or damaged."""
    if not path.is_file():
        result.add(path.name, "failed", f"{path.name} is missing")
        return None
    try:
        checkpoints.verify(path)
    except CheckpointError:
        result.add(path.name, "failed", f"{path.name} does not have the sha256 in its sidecar")
        return None
    return checkpoints.read(path, trust=trust, overrides=overrides)


def _check_config(result: Verification, best: Checkpoint, last: Checkpoint | None, content: Mapping[str, Any]) -> None:
    """Compare config.yaml with the configs in the checkpoints and in the report."""
    trained = _stored_config(last or best)
    try:
        written = resume.read_config(result.run)
    except (UsageError, OSError) as error:
        result.add("config", "failed", f"config.yaml cannot be read: {str(error).partition(' - ')[0]}")
        return
    groups = {name: node for name, node in written.items() if name in trained}
    completed = ("mean", "std", "classes")  # of the data set, where the config leaves them to the run
    if isinstance(groups.get("dataset"), Mapping):
        groups["dataset"] = {
            name: trained["dataset"].get(name) if name in completed and value is None else value
            for name, value in groups["dataset"].items()
        }
        for name in completed:
            if name in trained["dataset"]:
                groups["dataset"].setdefault(name, trained["dataset"][name])
    problems = [
        f"config.yaml has {key}={_value(written, key)}, and the run was trained with {key}={_value(trained, key)}"
        for key in resume.differing_keys(trained, groups)
    ]
    of_best = _stored_config(best)
    problems += [
        f"report.json has config {key}={_value(content.get('config'), key)}, and its checkpoint {_value(of_best, key)}"
        for key in resume.differing_keys(of_best, content.get("config"))
    ]
    if problems:
        more = f" (and {len(problems) - 1} more keys)" if problems[1:] else ""
        result.add("config", "failed", problems[0] + more)
    else:
        result.add("config", "passed", "config.yaml, report.json and the checkpoints have the same values")


def _stored_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the config in the file of a checkpoint, without overrides."""
    config: dict[str, Any] = configs.rename_keys(checkpoint.content["hyper_parameters"]["config"], checkpoint.path)
    return config


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _check_data(result: Verification, best: Checkpoint, last: Checkpoint | None) -> bool:
    """Compare every image and mask with data.csv, and that with the checkpoints; return whether they are the same."""
    path = result.run / sample_digests.NAME
    stored = (last or best).facts.get("data")
    if not isinstance(stored, Mapping) or not path.is_file():
        why = f"the run has no {sample_digests.NAME}" if not path.is_file() else "its checkpoints have no hash of it"
        result.add("data", "not checked", why)
        return True
    try:
        digests = sample_digests.read(path)
        node = check_dataset(best.dataset_node())
        problems = [
            f"{sample_digests.NAME} is not the one of {(last or best).path.name} ({split})"
            for split, digest in stored.items()
            if sample_digests.combined(digests.get(split, [])) != digest
        ]
        for split in stored:
            problems += sample_digests.changes(build_split({**node, "checksums": None}, split), digests.get(split, []))
    except PlainDataError as error:
        result.add("data", "failed", f"{path.name} {error}")
        return False
    except UsageError as error:
        result.add("data", "not checked", str(error))
        return False
    if problems:
        result.add("data", "failed", _listed(problems))
    else:
        count = sum(map(len, digests.values()))
        result.add("data", "passed", f"{count} images and masks of {' and '.join(digests)} have the recorded hashes")
    return not problems


def _check_report(result: Verification, content: Mapping[str, Any], best: Checkpoint) -> None:
    """Derive the scores of the report from the counts of its images."""
    if content.get("checkpoint_sha256") != result.files.get(best.path.name):
        result.add("report.json", "failed", f"its scores are of another {best.path.name}, by checkpoint_sha256")
        return
    images = content.get("images")
    if (
        not isinstance(images, list)
        or not images
        or not all(isinstance(image, Mapping) and "cells" in image for image in images)
    ):
        result.add("report.json", "not checked", "it has no counts of its images; an earlier version wrote it")
        return
    if difference := recount.inconsistency(content, best.classes):
        result.add("report.json", "failed", difference)
    else:
        result.add("report.json", "passed", f"the counts of its {len(images)} images give all totals and scores")


def _check_validation(result: Verification, content: Mapping[str, Any], best: Checkpoint) -> None:
    """Compare the scores of the report with those of the validation that wrote the best checkpoint."""
    step, row = best.content.get("global_step"), None
    try:
        rows = csv.DictReader(read_bytes(result.run / "metrics.csv", METRICS_LIMITS).decode().splitlines())
        row = next((row for row in rows if row.get("step") == str(step)), None)
    except (OSError, PlainDataError, ValueError, csv.Error):
        result.add("metrics.csv", "failed", "it cannot be read")
        return
    whole = _value(_stored_config(best), "trainer.limit_val_batches") in (None, 1.0)
    alone = content.get("split") == "val" and not _value(_stored_config(best), "trainer.overfit_batches")
    if row is None or not whole or not alone or best.path.name != locate.BEST:
        result.add("metrics.csv", "note", "it has no validation of all images at the step of the scored checkpoint")
        return
    try:
        expected = {
            "val/miou": content["miou"],
            "val/pixel_accuracy": content["pixel_accuracy"],
            "val/mean_accuracy": content["mean_accuracy"],
            "val/frequency_weighted_iou": content["frequency_weighted_iou"],
            **{f"val/iou/{entry['name']}": entry["iou"] for entry in content["classes"]},
        }
        gaps = {
            name: abs(float(row[name]) - value)
            for name, value in expected.items()
            if value is not None or float(row[name]) == float(row[name])
        }
    except (KeyError, TypeError, ValueError):
        result.add("metrics.csv", "failed", f"its row of step {step} does not have the scores of report.json")
        return
    worst = max(gaps, key=lambda name: gaps[name], default="")
    limit = 0.0 if _processes(best) == 1 else 1e-4  # a batch of other images is rounded otherwise
    if worst and gaps[worst] > limit:
        detail = f"{worst} of step {step} is {row[worst]}, and {expected[worst]} in report.json"
        result.add("metrics.csv", "failed", detail)
    else:
        result.add("metrics.csv", "passed", f"the validation of step {step} has the scores of report.json")


def _processes(checkpoint: Checkpoint) -> int:
    stretches = _recorded(checkpoint)
    return int(stretches[0].conditions.get("processes", 1)) if stretches else 1


def _check_scores(
    result: Verification,
    content: Mapping[str, Any],
    best: Checkpoint,
    device: torch.device,
    images: int | None,
    data_is_same: bool,
) -> None:
    """Predict and count some images, or all, again."""
    if images == 0:
        result.add("scores", "not checked", "--images 0")
        return
    if absent := absent_groups({name: best.config[name] for name in ("model", "dataset")}):
        result.add("scores", "not checked", f"{absent[0]} was an object of a program, which no file describes")
        return
    try:
        dataset = restore_dataset(best, str(content.get("split") or "val"))
        segmenter = Segmenter(best, device=device)
        chosen = batches(segmenter, dataset)
        if images is not None:
            random.Random(result.seed).shuffle(chosen)
            kept, count = [], 0
            for batch in chosen:
                if count >= images:
                    break
                kept.append(batch)
                count += len(batch)
            chosen = sorted(kept, key=lambda batch: batch.start)
        places = [place for batch in chosen for place in batch]
        outlines = images is None and content.get("boundary_f1") is not None
        evaluation = Evaluation.of(segmenter, dataset, outlines=outlines, places=places)
    except SegdeconvError as error:
        result.add(
            "scores", "failed" if data_is_same and not isinstance(error, UsageError) else "not checked", str(error)
        )
        return
    result.images = [dataset.names[place] for place in places]
    counted = evaluation.breakdown.report()["images"]
    try:
        entries = [content["images"][place] for place in places]
        recorded = recount.counts_of({"images": entries}, len(dataset.classes), dataset.classes.ignore_index).images
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        result.add("scores", "not checked", f"report.json has no counts of these images ({type(error).__name__})")
        return
    difference = recount.first_difference(content["images"], [{"name": name} for name in dataset.names], "images")
    for entry, now in zip(entries, counted, strict=True):
        if difference:
            break
        if found := recount.first_difference(entry, now):
            difference = f"{now['name']}: {found}"
    whole = evaluation.report() if images is None else {}
    whole = {name: value for name, value in whole.items() if name not in UNUSED}
    difference = difference or recount.first_difference(content, whole)
    subject = f"{len(places)} of {len(dataset)} images (seed {result.seed})" if images is not None else "all images"
    if not difference:
        result.add("scores", "passed", f"{subject}, predicted again, have the recorded counts")
    elif not result.other_machine:
        result.add("scores", "failed", difference)
    else:
        gap = recount.largest_gap(recorded, evaluation.breakdown.images, len(dataset.classes))
        detail = f"{subject}: the largest difference of a score is {gap:.1e} ({difference})"
        result.add("scores", "passed" if gap <= TOLERANCE else "failed", detail, exact=False)


def _recorded(checkpoint: Checkpoint) -> list[Stretch]:
    """Return the stretches in a checkpoint; none for one of an earlier version.

    Raises:
        UsageError: They have another form.
    """
    try:
        state = checkpoint.content.get("callbacks", {}).get(record.STATE)
        return [] if state is None else [Stretch.of(entry) for entry in state["stretches"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"the record of steps in {checkpoint.path.name} is damaged ({error})") from error


def _check_stretches(
    result: Verification, last: Checkpoint | None, trust: Collection[str], overrides: Sequence[str], steps: int
) -> None:
    """Repeat some steps from the seed and from every checkpoint that was kept."""
    name = "steps"
    if last is None or not steps:
        result.add(name, "not checked", f"{locate.LAST} cannot be read" if last is None else "--steps 0")
        return
    try:
        stretches = [stretch for stretch in _recorded(last) if stretch.losses]
    except UsageError as error:
        result.add(name, "failed", str(error))
        return
    if not stretches:
        result.add(name, "not checked", f"{locate.LAST} has no record of steps; an earlier version trained it")
        return
    later = {stretch.start for stretch in stretches} - {0}
    for stretch in stretches:
        label = f"steps after {stretch.start}" if stretch.start else "steps from the seed"
        try:
            _check_stretch(result, stretch, label, last, trust, overrides, min(steps, len(stretch.losses)), bool(later))
        except MismatchError as error:
            result.add(label, "failed", str(error))
        except CheckpointError:
            raise
        except SegdeconvError as error:
            result.add(label, "not checked", str(error))
    for path in sorted(result.run.glob(KEPT.format("*"))):
        if path not in {kept_path(result.run, start) for start in later} and _has_steps_after(path, last):
            result.add(path.name, "note", f"{locate.LAST} has no record of the steps after it")


def _has_steps_after(path: Path, last: Checkpoint) -> bool:
    """Return whether steps follow the checkpoint of a path, which is that of the last step in the end of a run."""
    step = path.name.removeprefix(KEPT.partition("{")[0]).removesuffix(".ckpt")
    final = last.content.get("global_step")
    return step.isdecimal() and isinstance(final, int) and int(step) < final


def _check_stretch(
    result: Verification,
    stretch: Stretch,
    label: str,
    last: Checkpoint,
    trust: Collection[str],
    overrides: Sequence[str],
    steps: int,
    others: bool,
) -> None:
    if why := obstacle(stretch):
        result.add(label, "not checked", why)
        return
    if not stretch.start:
        source = last
        if start := other_start(source.config):
            status: Status = "note" if others else "not checked"
            result.add(label, status, f"training began with {start}, which is not read or downloaded here")
            return
    else:
        path = kept_path(result.run, stretch.start)
        if not path.is_file():
            result.add(label, "not checked", f"{path.name} is not there")
            return
        read = _read(result, path, trust, overrides)
        if read is None:
            result.add(label, "not checked", f"{path.name} cannot be read")
            return
        source = read
        digest = record.hash_weights(source.content["state_dict"])
        if stretch.weights.get(0) != digest or source.content.get("global_step") != stretch.start:
            result.add(label, "failed", f"{path.name} does not have the weights of step {stretch.start}")
            return
    if record.hash_config(_stored_config(source)) != stretch.conditions.get("config"):
        detail = "the steps were trained with another config than the checkpoint has"
        result.add(label, "failed" if stretch.start else "note", detail)
        return
    with threads_of(stretch.conditions["versions"]):
        here = versions(_device(stretch.conditions["versions"]))
        repeated = repeat(source, stretch, steps, result.run, beginning=not stretch.start)
    gap = stretch.gap(repeated)
    result.stretches.append({"start": stretch.start, "steps": len(repeated.losses), "largest_difference": gap})
    difference = stretch.difference(repeated)
    deterministic = _value(source.config, "trainer.deterministic")
    on_gpu = not str(stretch.conditions["versions"]["device"]).startswith("cpu")
    hashed = ", ".join(str(distance) for distance in sorted(stretch.weights) if distance in repeated.weights)
    if len(repeated.losses) != steps:
        result.add(label, "failed", f"only {len(repeated.losses)} of {steps} steps could be repeated")
    elif not difference:
        counted = f"{steps} step{'s' * (steps > 1)} repeated"
        result.add(label, "passed", f"{counted}: the same losses, and the same weights after {hashed}")
    elif stretch.conditions["versions"] != here:
        detail = f"{difference}; the largest relative difference of a loss is {gap:.1e}"
        result.add(label, "passed" if gap <= CLOSE else "failed", detail, exact=False)
    elif on_gpu and not deterministic:
        result.add(label, "not checked", f"a GPU repeats bits with trainer.deterministic=true only; {difference}")
    else:
        result.add(label, "failed", difference)
