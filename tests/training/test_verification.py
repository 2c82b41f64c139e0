"""Runs that verify themselves: every change of a file, the data or the config after training is found and named."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fakes
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import config, state

from segdeconv.checkpoints import checkpoint
from segdeconv.data import sample_digests
from segdeconv.errors import CheckpointError, Interrupted, UsageError
from segdeconv.evaluation import recount
from segdeconv.evaluation.report import as_json
from segdeconv.train import train
from segdeconv.training import record
from segdeconv.training.checkpointing import kept_count, spaced_epochs
from segdeconv.training.stopping import Stopping
from segdeconv.training.verification import _recorded, verify

STEPS_PER_EPOCH = 3


def trained(place: Path, **changes):
    """Train the tiny run in place/run on place/mine and return its folder."""
    if not (place / "mine").is_dir():
        fakes.folder(place / "mine", layout="lists", num=6)
    data = {"_target_": "segdeconv.data.Folder", "root": str(place / "mine"), "batch_size": 2, "num_workers": 0}
    train(config(dataset=data, trainer__max_epochs=4, **changes), place / "run")
    return place / "run"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    place = tmp_path_factory.mktemp("original")
    trained(place)
    return place


@pytest.fixture
def run(original, tmp_path):
    """A copy of the finished run and of its data, which the copy's verification reads."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def checked(run, **settings):
    given = {"steps": 2, "images": 2, "seed": 0, "overrides": [f"dataset.root={run.parent / 'mine'}"]}
    return verify(run, **{**given, **settings})


def failures(result):
    return {check.name: check.detail for check in result.of("failed")}


def forge_sums(run):
    """Write the list of hashes again, as someone who hides a change would."""
    paths = {path for pattern in record.FILES for path in run.glob(pattern)}
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(paths)]
    (run / "SHA256SUMS").write_text("".join(lines))


def changed_report(run, change):
    content = json.loads((run / "report.json").read_text())
    change(content)
    (run / "report.json").write_text(as_json(content))


def test_a_run_that_nobody_touched_has_the_same_bits(run):
    result = checked(run, steps=5, images=None)
    assert result.verdict == "same bits"
    assert {check.status for check in result.checks} == {"passed"}
    assert [stretch["start"] for stretch in result.stretches] == [0, 3, 6, 9]
    assert {stretch["steps"] for stretch in result.stretches} == {STEPS_PER_EPOCH}  # the record ends with the epoch
    published = hashlib.sha256((run / "SHA256SUMS").read_bytes()).hexdigest()
    assert checked(run, steps=0, images=0, sums=published).of("failed") == []
    assert failures(checked(run, steps=0, images=0, sums="0" * 64))["files"].startswith("SHA256SUMS has the sha256")


@pytest.mark.parametrize("names", [("best_recalibrated.ckpt",), ("best_calibrated.ckpt", "last_offsets.ckpt")])
def test_a_checkpoint_that_training_does_not_write_is_a_note(run, names):
    for name in names:
        shutil.copy(run / "best.ckpt", run / name)
    result = checked(run, steps=0, images=0)
    assert result.of("failed") == []
    (note,) = result.of("note")
    assert (note.name, note.detail) == (
        "added files",
        f"{', '.join(names)} not written by the training, and not checked",
    )
    record.write_sums(run, {})
    assert not set(names) & {line.split()[1] for line in (run / "SHA256SUMS").read_text().splitlines()}


@pytest.mark.parametrize("name", ["kept-99.ckpt", "previous.ckpt"])
def test_a_checkpoint_with_a_name_of_training_must_be_in_the_list(run, name):
    path = run / "SHA256SUMS"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if name not in line))
    shutil.copy(run / "best.ckpt", run / name)
    assert failures(checked(run, steps=0, images=0))["files"] == f"{name} not in the list"


def numbers(content, where=()):
    """Yield the path of every number of a report that is not about its config, its versions or a file."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if key in ("config", "versions"):
            continue
        if isinstance(value, dict | list):
            yield from numbers(value, (*where, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*where, key)


def test_every_number_of_the_report_is_compared(run):
    content = json.loads((run / "report.json").read_text())
    best = checkpoint.read(run / "best.ckpt")
    paths = list(numbers(content))
    assert len(paths) > 150
    unnoticed = set()
    for path in paths:
        forged = json.loads(json.dumps(content))
        *parents, key = path
        node = forged
        for name in parents:
            node = node[name]
        node[key] += 1
        if not recount.inconsistency(forged, best.classes):
            unnoticed.add(".".join(str(name) for name in path if isinstance(name, str) and name[:1].isalpha()))
    # These do not follow from the counts of the images: only a repetition of the evaluation finds them.
    assert unnoticed <= {
        "boundary_f1", "boundary_f1_dilated", "classes.boundary_f1", "classes.boundary_f1_dilated",
        "images.uncertainty", "by_boundary_distance.from", "by_boundary_distance.to", "by_boundary_distance.miou",
        "by_boundary_distance.pixel_accuracy", "calibration.bins.confidence_from", "calibration.bins.confidence_to",
        "calibration.accuracy_at_coverage.by_confidence",
        "samples", "min_area",
    }  # fmt: skip


def boundary(content):
    content["boundary_f1"] += 1e-6


def number_of_a_class(content):
    content["classes"][1]["iou"] += 1e-9


def consistent(content):
    """Move the pixels of one image from wrong to right, and compute everything else from that, as a forger would."""
    image = content["images"][0]
    cells = [[int(number) for number in cell.split(",")] for cell in image["cells"].split()]
    wrong = next(cell for cell in cells if cell[0] != cell[1])
    right = next((cell for cell in cells if cell[0] == cell[1] == wrong[0]), None)
    if right is None:
        wrong[1] = wrong[0]
    else:
        right[2], wrong[2] = right[2] + wrong[2] - 1, 1
    image["cells"] = " ".join(",".join(map(str, cell)) for cell in cells)
    names = [entry["name"] for entry in content["classes"]]
    classes = fakes_classes(names)
    counts = recount.counts_of(content, len(names), content["ignore_index"])
    confusion = recount.confusion_of(counts.images, len(names))
    from segdeconv.evaluation import report

    derived = report.report(confusion, len(counts.images), classes, breakdown=counts, split="val")
    kept = {name: content[name] for name in ("boundary_f1", "boundary_f1_dilated", "boundary_iou")}
    bounds = [{name: entry[name] for name in kept} for entry in content["classes"]]
    content |= {**derived, **kept, "by_boundary_distance": content["by_boundary_distance"]}
    content["classes"] = [{**entry, **bound} for entry, bound in zip(derived["classes"], bounds, strict=True)]


def fakes_classes(names):
    from segdeconv.classes import Classes, default_colours

    return Classes(tuple(names), default_colours(tuple(names), range(len(names))))


@pytest.mark.parametrize(
    ("change", "settings", "named", "detail"),
    [
        (number_of_a_class, {"images": 0}, "report.json", "classes.1.iou is"),
        (consistent, {"images": 0}, "metrics.csv", "of step"),
        (consistent, {"images": 6}, "scores", "val_0: "),
        (boundary, {"images": None}, "scores", "boundary_f1 is"),
    ],
)
@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "with forged hashes"])
def test_a_tampered_report_is_found(run, change, settings, named, detail, hidden):
    changed_report(run, change)
    if hidden:
        forge_sums(run)
    failed = failures(checked(run, steps=0, **settings))
    assert detail in failed[named]
    assert ("report.json changed after the run wrote it" in failed.get("files", "")) is not hidden


def other_pixel(path):
    pixels = np.array(Image.open(path))
    pixels[(20, 20, 0)[: pixels.ndim]] ^= 1
    Image.fromarray(pixels).save(path)


def other_image(run):
    other_pixel(run.parent / "mine" / "images" / "train_3.png")


def other_mask(run):
    other_pixel(run.parent / "mine" / "masks" / "val_2.png")


def damaged_mask(run):
    path = run.parent / "mine" / "masks" / "val_1.png"
    path.write_bytes(path.read_bytes()[:40])


def missing_image(run):
    lines = (run.parent / "mine" / "val.txt").read_text().splitlines()
    (run.parent / "mine" / "val.txt").write_text("\n".join(lines[:-1]))


def other_seed(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("\nseed: 0\n", "\nseed: 1\n"))


def other_rate(run):
    text = (run / "config.yaml").read_text()
    assert "lr: 0.01\n" in text
    (run / "config.yaml").write_text(text.replace("lr: 0.01\n", "lr: 0.02\n"))


def rewritten(path, change):
    content = checkpoint.load_plain(path)
    change(content)
    path.with_name(f"{path.name}.sha256").unlink()
    checkpoint.write(content, path)


def one_weight(content):
    name = next(name for name in content["state_dict"] if name.endswith("weight"))
    content["state_dict"][name][(0,) * content["state_dict"][name].ndim] += 0.25


def swapped_best(run):
    for suffix in ("", ".sha256"):
        shutil.copy(run / f"kept-3.ckpt{suffix}", run / f"best.ckpt{suffix}")


def changed_kept(run):
    rewritten(run / "kept-6.ckpt", one_weight)


def changed_momentum(run):
    def change(content):
        for entry in content["optimizer_states"][0]["state"].values():
            entry["exp_avg"] *= 2

    rewritten(run / "kept-6.ckpt", change)


def damaged_best(run):
    content = bytearray((run / "best.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "best.ckpt").write_bytes(content)


def forged_losses(run):
    def change(content):
        content["callbacks"]["StepRecord"]["stretches"][1]["losses"][1] += 1e-7

    rewritten(run / "last.ckpt", change)


@pytest.mark.parametrize(
    ("change", "named", "detail"),
    [
        (other_image, "data", "the image of train_3 (train)"),
        (other_mask, "data", "the mask of val_2 (val)"),
        (damaged_mask, "data", "val_1 (val), which cannot be read: "),
        (missing_image, "data", "val image val_5 is missing"),
        (other_seed, "config", "config.yaml has seed=1, and the run was trained with seed=0"),
        (other_rate, "config", "config.yaml has optimizer.lr=0.02, and the run was trained with optimizer.lr=0.01"),
        (swapped_best, "report.json", "another best.ckpt"),
        (damaged_best, "best.ckpt", "does not have the sha256 in its sidecar"),
        (changed_kept, "steps after 6", "kept-6.ckpt does not have the weights of step 6"),
        (changed_momentum, "steps after 6", "the weights after step 7 have other bits"),
        (forged_losses, "steps after 3", "the loss of step 5 is"),
    ],
)
def test_a_change_is_found_and_named_though_the_hashes_are_forged(run, change, named, detail):
    change(run)
    forge_sums(run)
    result = checked(run)
    assert detail in failures(result)[named]
    assert detail in result.verdict or len(result.of("failed")) > 1


def test_a_change_of_any_file_is_named(run):
    for name in ("config.yaml", "data.csv", "metrics.csv", "report.html", "report.json"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(before + b"\n")
        assert failures(checked(run, steps=0, images=0))["files"] == f"{name} changed after the run wrote it"
        (run / name).write_bytes(before)
    (run / "kept-9.ckpt").unlink()
    assert failures(checked(run, steps=0, images=0))["files"] == "kept-9.ckpt missing"


@pytest.mark.parametrize("step", [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 6, 9))])
def test_a_run_that_was_killed_and_resumed_verifies_and_has_the_record_of_another(
    tmp_path, monkeypatch, original, step
):
    before = Stopping.on_train_batch_end

    def at_step(self, trainer, *arguments):
        if trainer.global_step == step:
            self.received = signal.SIGTERM
        before(self, trainer, *arguments)

    monkeypatch.setattr(Stopping, "on_train_batch_end", at_step)
    shutil.copytree(original / "mine", tmp_path / "mine")
    with pytest.raises(Interrupted):
        trained(tmp_path)
    monkeypatch.setattr(Stopping, "on_train_batch_end", before)
    run = trained(tmp_path, resume="auto")
    assert checked(run).verdict == "same bits"
    records = [
        checkpoint.load_plain(folder / "last.ckpt")["callbacks"]["StepRecord"] for folder in (run, original / "run")
    ]
    assert records[0] == records[1]
    assert {path.name for path in run.glob("kept-*")} == {path.name for path in (original / "run").glob("kept-*")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            "trainer__ema": 0.9,
            "model": {"_target_": "segdeconv.models.SegNetBasic", "width": 4, "dropout_at": "central"},
        },
        {"trainer__accumulate_grad_batches": 2, "trainer__recalibration_batches": 1},
        {"trainer__overfit_batches": 2, "augment": {}},
        {"schedule": {"_target_": "segdeconv.optimization.Poly"}, "optimizer__part_lr": {"encoder": 0}},
    ],
    ids=["averaged weights and dropout", "micro-batches", "the same batches", "a schedule and a frozen part"],
)
def test_runs_of_all_kinds_verify(tmp_path, changes):
    result = checked(trained(tmp_path, **changes))
    assert result.verdict == "same bits", result.checks


@pytest.mark.slow
def test_a_longer_run_keeps_its_earlier_record(tmp_path):
    schedule = {"schedule": {"_target_": "segdeconv.optimization.Poly"}}
    run = trained(tmp_path, **schedule)
    data = {"_target_": "segdeconv.data.Folder", "root": str(tmp_path / "mine"), "batch_size": 2, "num_workers": 0}
    train(config(dataset=data, trainer__max_epochs=6, resume="auto", **schedule), run)
    result = checked(run)
    assert result.verdict == "same bits", result.checks
    assert [stretch["start"] for stretch in result.stretches] == [0, 6, 12]


def test_own_code_needs_trust_and_objects_of_a_program_are_not_checked(tmp_path):
    train(config(), tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"fakes\.Uneven, which is not part of segdeconv"):
        verify(tmp_path / "own", steps=1, images=2)
    assert verify(tmp_path / "own", steps=1, images=2, trust=["fakes.Uneven"]).verdict == "same bits"
    network = fakes.Brightness(3)
    train(config(model=network, trainer__max_epochs=1), tmp_path / "objects")
    result = verify(tmp_path / "objects", steps=1, images=2, trust=["fakes.Uneven"])
    assert {check.name for check in result.of("not checked")} == {"scores", "steps from the seed"}
    assert not result.of("failed"), result.checks


JUNK = (None, [], {}, "x", -1, 1e300, [None], {"a": [1]}, [[1]], True)


def test_a_report_or_a_record_of_another_form_is_a_difference(run):
    content = json.loads((run / "report.json").read_text())
    best = checkpoint.read(run / "best.ckpt")
    for key in ("images", "classes", "confusion", "calibration", "by_boundary_distance", "verdict", "by_size"):
        for value in JUNK:
            assert recount.inconsistency({**content, key: value}, best.classes), (key, value)
    for key in ("size", "cells", "miou", "pixels"):
        for value in JUNK:
            image = {**content["images"][0], key: value}
            assert recount.inconsistency({**content, "images": [image, *content["images"][1:]]}, best.classes)
    for value in JUNK[1:4]:
        changed_report(run, lambda report, value=value: report.update(images=value, versions=value, config=value))
        assert checked(run, steps=0, images=2).of("failed")
    last = checkpoint.read(run / "last.ckpt")
    for key in ("start", "conditions", "losses", "weights"):
        for value in JUNK:
            (stretch, *_) = last.content["callbacks"]["StepRecord"]["stretches"]
            forged = replace(last, content={"callbacks": {"StepRecord": {"stretches": [{**stretch, key: value}]}}})
            try:
                _recorded(forged)
            except UsageError as error:
                assert "the record of steps in last.ckpt is damaged" in str(error)  # noqa: PT017


def test_steps_of_several_processes_cannot_be_repeated(run):
    def change(content):
        for stretch in content["callbacks"]["StepRecord"]["stretches"]:
            stretch["conditions"]["processes"] = 2

    rewritten(run / "last.ckpt", change)
    forge_sums(run)
    result = checked(run)
    assert not result.of("failed")
    assert len(result.of("not checked")) == 4
    assert "trained by 2 processes" in result.of("not checked")[0].detail


def test_without_a_record_the_checks_that_cannot_be_made_are_named(run):
    def change(content):
        del content["callbacks"]["StepRecord"]
        del content["hyper_parameters"]["facts"]["data"]

    rewritten(run / "last.ckpt", change)
    (run / "SHA256SUMS").unlink()
    (run / "data.csv").unlink()
    result = checked(run)
    assert [check.name for check in result.of("not checked")] == ["files", "data", "steps"]
    assert result.verdict == "same bits in the checks made; not checked: files, data, steps"
    assert not result.of("failed")


def test_another_machine_is_a_note_and_its_rounding_has_a_tolerance(run, monkeypatch):
    changed_report(run, lambda content: content["versions"].update(torch="1.0"))
    forge_sums(run)
    result = checked(run, steps=0)
    assert [check.name for check in result.of("note")] == ["versions"]
    assert result.verdict.startswith("same bits, also with other versions (torch 1.0 -> ")

    def shifted(first, second, num_classes):
        return gap

    changed_report(run, lambda content: content["images"][0].update(uncertainty=0.123))
    forge_sums(run)
    monkeypatch.setattr(recount, "largest_gap", shifted)
    gap = 1e-7
    result = checked(run, steps=0, images=6)
    assert result.verdict.startswith("same scores within 1e-06 on another machine")
    gap = 1e-5
    result = checked(run, steps=0, images=6)
    assert "scores differs first: " in result.verdict
    assert "first of the versions that differ: torch 1.0 -> " in result.verdict


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "kept"), [("auto", [3, 6, 9]), (0, []), (1, [6]), (2, [6])])
def test_kept_checkpoints_are_spaced(tmp_path, keep, kept):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept-mine.ckpt").write_text("a file of the user's own")
    run = trained(tmp_path, trainer__keep=keep)
    assert (run / "kept-mine.ckpt").read_text() == "a file of the user's own"
    (run / "kept-mine.ckpt").unlink()
    final = STEPS_PER_EPOCH * 4  # linked to last.ckpt, without space of its own
    steps = {int(path.stem.removeprefix("kept-")) for path in run.glob("kept-*.ckpt")}
    assert sorted(steps - {final}) == kept
    for step in kept:
        assert checkpoint.load_plain(run / f"kept-{step}.ckpt")["global_step"] == step
        checkpoint.verify(run / f"kept-{step}.ckpt")


def test_spacing_by_hand():
    for count in (1, 2, 3, 5, 20):
        kept = set()
        for epoch in range(1, 400):
            wanted = set(spaced_epochs(epoch, count))
            assert wanted <= kept | {epoch}  # none that was removed is needed again
            kept = wanted
            assert count / 2 <= len(kept - {epoch}) <= count or epoch <= count
            gaps = np.diff([0, *sorted(kept)])
            assert len(set(gaps.tolist())) <= 1
    layer = torch.nn.Linear(1, 1, bias=False)
    assert kept_count("auto", layer) == 3
    assert kept_count(7, layer) == 7
    with torch.device("meta"):
        large = torch.nn.Linear(1 << 14, 1 << 14, bias=False)  # 1 GiB of weights
    assert kept_count("auto", large) == 0


def test_hashes_of_weights_are_of_bits():
    layer = torch.nn.BatchNorm2d(2)
    first = record.hash_weights(layer.state_dict())
    assert first == record.hash_weights(dict(reversed(layer.state_dict().items())))
    layer.bias.data[0] = -0.0
    assert record.hash_weights(layer.state_dict()) != first
    plain, rearranged = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    rearranged = plain.to(memory_format=torch.channels_last)
    assert record.hash_weights({"w": plain}) == record.hash_weights({"w": rearranged})


def test_the_hashes_of_data_are_those_of_its_pixels(original, tmp_path):
    digests = sample_digests.read(original / "run" / "data.csv")
    assert {split: len(samples) for split, samples in digests.items()} == {"train": 6, "val": 6}
    with (original / "run" / "data.csv").open() as file:
        row = next(csv.DictReader(file))
    pixels = np.array(Image.open(original / "mine" / "images" / f"{row['name']}.png"))
    by_hand = hashlib.blake2b(f"{pixels.shape} |u1".encode() + pixels.tobytes(), digest_size=16).hexdigest()
    assert row["image"] == by_hand


def test_the_table_of_hashes_keeps_every_name(tmp_path):
    names = ["a,b", 'quoted "name"', "caf\udce9", "subfolder/a b", "\u05e9"]
    whole = SimpleNamespace(names=names)
    inspection = SimpleNamespace(digests=["0" * 32] * 5, mask_digests=["1" * 32, "2" * 16, "", "3" * 32, "4" * 32])
    digests = sample_digests.digests_of(inspection, SimpleNamespace(whole=whole))
    assert [digest.mask[:1] for digest in digests] == ["1", "", "", "3", "4"]  # shorter hashes are of earlier versions
    sample_digests.write({"val": digests}, tmp_path / "data.csv")
    read = sample_digests.read(tmp_path / "data.csv")["val"]
    assert read == digests
    assert sample_digests.combined(read) == sample_digests.combined(digests)


def test_the_last_checkpoint_has_the_weights_of_the_record(original):
    stretches = checkpoint.load_plain(original / "run" / "last.ckpt")["callbacks"]["StepRecord"]["stretches"]
    by_start = {stretch["start"]: stretch for stretch in stretches}
    assert by_start[6]["weights"]["0"] == record.hash_weights(state(original / "run", "kept-6"))
    assert [len(stretch["losses"]) for stretch in stretches] == [3, 3, 3, 3]


@pytest.mark.slow
def test_the_command_writes_a_page_and_exits_with_documented_codes(run, commands):
    words = (run, f"dataset.root={run.parent / 'mine'}", "--steps", 1, "--images", 2, "--seed", 7)
    done = commands("verify", *words, cwd=run.parent)
    assert done.code == 0, done.err
    assert "verdict: same bits" in done.out
    content = json.loads((run / "verification" / "verify.json").read_text())
    assert (content["verdict"], content["seed"], len(content["images"])) == ("same bits", 7, 2)
    page = (run / "verification" / "verify.html").read_text()
    assert content["files"]["best.ckpt"] in page
    assert commands("verify", *words, "--images", "0", cwd=run.parent).code == 6
    assert commands("verify", *words, "--images", "0", "--partial", cwd=run.parent).code == 0
    other_seed(run)
    done = commands("verify", *words, cwd=run.parent)
    assert done.code == 4
    assert "files differs first: config.yaml changed after the run wrote it" in done.error_message
    for wrong in (("--images", "few"), ("--steps", "-1")):
        done = commands("verify", *words, *wrong, cwd=run.parent)
        assert done.code == 2
        assert wrong[0] in done.error_message


def test_an_unfinished_run_is_refused(run):
    (run / "report.json").unlink()
    with pytest.raises(UsageError, match=r"has no report.json, so it is not a finished run"):
        checked(run)
