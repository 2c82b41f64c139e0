"""Bad checkpoints, keys, disks and workers through the real commands: one line, the documented exit code, no damage."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fakes
import pytest
import torch
import yaml
from forked_commands import Outcome
from fresh_commands import child_environment

from segdeconv.checkpoints import checkpoint

ROOT = Path(__file__).parents[2]
SLIM = (
    "model.stages=[[4],[8]]", "dataset.batch_size=2", "dataset.num_workers=0", "trainer.max_epochs=1",
    "trainer.precision=32-true", "logger=none", "dataset.size=[32,32]", "auto=[]",
)  # fmt: skip
DATA = ("dataset=folder", "dataset.root=mine", *SLIM)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, commands):
    place = tmp_path_factory.mktemp("runs")
    fakes.folder(place / "mine", layout="lists")
    done = commands("train", *DATA, "hydra.run.dir=run", cwd=place)
    assert done.code == 0, done.err
    return place


@pytest.fixture
def place(trained, tmp_path):
    """A copy of the data and of a run that was killed after its only epoch, before it was finished."""
    shutil.copytree(trained / "mine", tmp_path / "mine")
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    return tmp_path


def changed(path, **parts):
    """Replace parts of a checkpoint and write it with a matching checksum file."""
    checkpoint.write({**checkpoint.load_plain(path), **parts}, path)


def resume(commands, place, *words, **settings):
    return commands("train", *DATA, "hydra.run.dir=run", "resume=auto", *words, cwd=place, **settings)


# Checkpoints


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def with_nan(path):
    state = dict(checkpoint.load_plain(path)["state_dict"])
    name = next(name for name, value in state.items() if value.is_floating_point())
    changed(path, state_dict={**state, name: torch.full_like(state[name], float("nan"))})


def with_hyper_parameters(**more):
    return lambda path: changed(path, hyper_parameters={**checkpoint.load_plain(path)["hyper_parameters"], **more})


def without_facts(path):
    hyper_parameters = checkpoint.load_plain(path)["hyper_parameters"]
    changed(path, hyper_parameters={**hyper_parameters, "facts": {"classes": 3}})


REFUSED = {
    "110 cut": (cut, "is damaged: its sha256 is not the one in best.ckpt.sha256"),
    "111 empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "112 flipped": (flipped, "is damaged"),
    "113 page": (lambda path: path.write_bytes(b"<html>"), "is damaged"),
    "117 instantiator": (with_hyper_parameters(_instantiator="os.system"), "is not a segdeconv checkpoint"),
    "118 class path": (with_hyper_parameters(_class_path="os.system"), "is not a segdeconv checkpoint"),
    "122 nan": (with_nan, "contains weights that are not finite"),
    "123 newer": (lambda path: changed(path, segdeconv={"format": 999}), "has format 999"),
    "124 without format": (lambda path: changed(path, segdeconv={}), "has format None"),
    "wrong types": (lambda path: changed(path, segdeconv=[1]), "is not a segdeconv checkpoint"),
    "wrong weights": (lambda path: changed(path, state_dict={"a": 1}), "is not a segdeconv checkpoint"),
    "wrong facts": (without_facts, "does not contain its config and metadata"),
    "foreign": (lambda path: checkpoint.write({"model": 3}, path), "is not a segdeconv checkpoint"),
}


@pytest.mark.parametrize("script", ["evaluate", "predict"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_cannot_be_trusted_is_exit_code_4(place, commands, script, name):
    damage, words = REFUSED[name]
    damage(place / "run" / "best.ckpt")
    more = ("mine/images", "--out", "out") if script == "predict" else ()
    done = commands(script, "run/best.ckpt", *more, cwd=place)
    assert done.code == 4, done.err
    assert words in done.error_message
    assert "run/best.ckpt" in done.error_message
    assert not (place / "out").exists()


@pytest.mark.parametrize("damage", [cut, flipped, with_nan, lambda path: path.write_bytes(b"")])
def test_a_damaged_last_checkpoint_is_skipped_and_the_previous_one_used(place, commands, damage):
    for name in ("last.ckpt", "last.ckpt.sha256"):
        shutil.copy(place / "run" / name, place / "run" / name.replace("last", "previous"))
    damage(place / "run" / "last.ckpt")
    done = resume(commands, place)
    assert done.code == 0, done.err
    assert "skipped: run/last.ckpt" in done.out
    assert "resumed from previous.ckpt" in done.out


def test_a_damaged_last_checkpoint_never_replaces_the_intact_previous_one(place, commands):
    """A run resumed from previous.ckpt and interrupted at the next write still has previous.ckpt."""
    for name in ("previous.ckpt", "previous.ckpt.sha256"):
        shutil.copy(place / "run" / name.replace("previous", "last"), place / "run" / name)
    cut(place / "run" / "last.ckpt")
    words = [word for word in DATA if "max_epochs" not in word]
    done = commands(
        "train", *words, "trainer.max_epochs=2", "hydra.run.dir=run", "resume=auto", "resume_force=true",
        cwd=place, limits={"file_size": 15_000},
    )  # fmt: skip
    assert done.code == 5, done.err
    assert "resumed from previous.ckpt" in done.out
    checkpoint.verify(place / "run" / "previous.ckpt")


def test_a_run_without_an_intact_checkpoint_is_not_restarted_over_its_files(place, commands):
    cut(place / "run" / "last.ckpt")
    done = resume(commands, place)
    assert done.code == 4
    assert "run/last.ckpt is damaged" in done.error_message


def test_a_run_cannot_be_resumed_from_weights_alone(place, commands):
    content = checkpoint.load_plain(place / "run" / "last.ckpt")
    checkpoint.write({part: content[part] for part in checkpoint.PARTS}, place / "run" / "last.ckpt")
    done = resume(commands, place)
    assert done.code == 4
    assert "contains only weights, without global_step, loops, optimizer_states - start from it with init_from=" in (
        done.error_message
    )


@pytest.mark.parametrize("script", ["evaluate", "predict", "recalibrate", "init_from", "ensemble", "resume"])
def test_a_url_is_not_accepted_as_a_checkpoint(place, commands, script):
    address = "https://example.org/best.ckpt"
    words = {
        "evaluate": ("evaluate", address),
        "predict": ("predict", address, "mine/images"),
        "recalibrate": ("recalibrate", address),
        "init_from": ("train", *DATA, f"init_from={address}", "hydra.run.dir=new"),
        "ensemble": ("evaluate", "run/best.ckpt", "--regions", "2", "--with-whole", "--ensemble", address),
        "resume": ("train", *DATA, f"resume={address}"),
    }[script]
    done = commands(*words, cwd=place, limits={"no_network": True})
    assert done.code == 2, done.err
    assert address in done.error_message or "example.org" in done.error_message


def test_unsafe_loading_cannot_be_enabled_by_the_environment(place, commands):
    import os as system

    class Payload:
        def __reduce__(self):
            return system.system, ("touch marker",)

    torch.save({"x": Payload()}, place / "evil.ckpt")
    done = commands("evaluate", "evil.ckpt", cwd=place, env={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})
    assert done.code == 4
    assert "cannot be read safely as a checkpoint" in done.error_message
    assert not list(place.rglob("marker"))


def test_a_checkpoint_saved_on_an_accelerator_is_read_without_one(place, commands):
    """The checkpoint's storages have the device cuda:0, as after training on a GPU."""
    import zipfile

    path = place / "run" / "best.ckpt"
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    here = b"X\x03\x00\x00\x00cpu"
    assert here in entries[name]
    entries[name] = entries[name].replace(here, b"X\x06\x00\x00\x00cuda:0")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    path.with_name("best.ckpt.sha256").unlink()
    done = commands("evaluate", "run/best.ckpt", cwd=place)
    assert done.code == 0, done.err
    assert "segdeconv: warning: best.ckpt.sha256 is missing, so run/best.ckpt cannot be verified" in done.err


def test_data_with_other_classes_is_refused_by_name_and_mapped_on_request(place, commands):
    (place / "mine" / "classes.yaml").write_text("thing: 1\nground: 0\nother: 2\n")
    words = ("evaluate", "run/best.ckpt", "dataset.classes=mine/classes.yaml", "--out")
    done = commands(*words, "refused", cwd=place)
    assert done.code == 2
    assert "'thing' is in only one of them" in done.error_message
    assert "dataset.label_map" in done.error_message
    assert not (place / "refused").exists()
    mapping = "dataset.label_map={thing: class_1, ground: class_0, other: class_2}"
    done = commands(*words, "mapped", mapping, cwd=place)
    assert done.code == 0, done.err
    same = commands("evaluate", "run/best.ckpt", "--out", "same", cwd=place)
    assert same.code == 0, same.err
    mapped, expected = (yaml.safe_load((place / name / "report.json").read_text()) for name in ("mapped", "same"))
    assert mapped["confusion"] == expected["confusion"]  # the classes, in another order, are matched by name
    assert [entry["name"] for entry in mapped["classes"]] == ["class_0", "class_1", "class_2"]


def test_more_classes_start_a_new_head_only_on_request(place, commands):
    (place / "mine" / "classes.yaml").write_text("[class_0, class_1, class_2, more]")
    allowed = "dataset.absent_classes=allow"  # no mask has the new class
    done = resume(commands, place, allowed, "resume_force=true")  # no other key of the config reflects the changed data
    assert done.code == 2, done.err
    assert "was trained for 3 classes (class_0, class_1, class_2) and the data now has 4" in done.error_message
    assert "init_from=run/last.ckpt" in done.error_message
    done = commands("train", *DATA, "init_from=run/last.ckpt", allowed, "hydra.run.dir=new", cwd=place)
    assert done.code == 0, done.err
    assert "new classes: more" in done.out


# Keys

KEYS = {
    "130 misspelt group": (("datset=voc",), "unknown key datset - did you mean 'dataset'?"),
    "131 no number": (("optimizer.lr=abc",), "optimizer.lr=abc: input should be a valid number"),
    "131 nan": (("optimizer.lr=nan",), "optimizer.lr=nan: input should be"),
    "131 infinite": (("optimizer.lr=inf",), "optimizer.lr=inf: input should be"),
    "132 negative epochs": (("trainer.max_epochs=-5",), "trainer.max_epochs=-5: input should be greater than"),
    "132 no batch": (("dataset.batch_size=0",), "dataset.batch_size=0: input should be greater than"),
    "132 no size": (("dataset.size=[0,5]",), "dataset.size=[0, 5]: input should be greater than"),
    "132 negative seed": (("seed=-1",), "seed=-1: input should be greater than"),
    "133 no value": (("optimizer.lr=",), "optimizer.lr=: input should be a valid number"),
    "134 twice": (("dataset=shapes", "dataset=camvid"), "dataset is given twice"),
    "136 misspelt argument": (("augment.flip.probability=1",), "unknown key augment.flip.probability"),
    "139 file": (("hydra.run.dir=file",), "file: file exists, so it cannot be written -"),
    "139 below a file": (("hydra.run.dir=file/run",), "file/run"),
    "146 workers": (("dataset.num_workers=1000",), "dataset.num_workers=1000 is too many for the"),
    "148 devices": (
        ("trainer.accelerator=cpu", "trainer.devices=0"),
        "trainer.devices=0 is not a number of CPU processes",
    ),
    "62 secrets": (
        ("dataset=camvid", "dataset.root=${oc.env:TOKEN}"),
        "would write an environment variable into config.yaml",
    ),
    "no key": (("3",), "'3' is not key=value"),
    "quotes": (("optimizer.lr='1",), "optimizer.lr='1: input should be a valid number"),
    "line break": (("dataset.root=a\nb",), r"'dataset.root=a\nb' has a line break"),
    "interpolation": (("seed=${nothing}",), "seed"),
    "nothing to delete": (("~loss.nothing",), "the config cannot be composed: Could not delete"),
}


@pytest.mark.parametrize("name", KEYS)
def test_an_invalid_key_is_named_before_anything_starts(tmp_path, commands, name):
    words, message = KEYS[name]
    (tmp_path / "file").touch()
    run_folder = [] if any(word.startswith("hydra.run.dir") for word in words) else ["hydra.run.dir=run"]
    slim = [word for word in SLIM if not any(word.split("=")[0] == other.split("=")[0] for other in words)]
    env = {"TOKEN": "a-secret-of-the-environment"}
    done = commands("train", *slim, *words, *run_folder, cwd=tmp_path, env=env)
    assert done.code in (2, 5), done.out + done.err
    assert message in done.error_message
    assert " - " in done.error_message
    assert "epoch 1" not in done.out
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"a-secret" not in path.read_bytes()


@pytest.mark.parametrize("accelerator", ["gpu", "mps"])
def test_a_missing_accelerator_is_an_error_message(tmp_path, commands, accelerator):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has an accelerator")
    words = (f"trainer.accelerator={accelerator}", "trainer.devices=2", "hydra.run.dir=run")
    done = commands("train", *SLIM, *words, cwd=tmp_path)
    assert done.code == 2
    assert "trainer" in done.error_message


def test_crops_larger_than_the_images_are_padded_with_ignored_pixels(place, commands):
    words = [word for word in DATA if not word.startswith("dataset.size")]
    done = commands("train", *words, "dataset.size=null", "dataset.crop=[96,96]", "hydra.run.dir=new", cwd=place)
    assert done.code == 0, done.err
    header, row = ((place / "new" / "metrics.csv").read_text().splitlines()[line].split(",") for line in (0, 1))
    assert float(row[header.index("train/loss")]) > 0


# A changed config, and several runs in one folder


@pytest.mark.parametrize(
    "word",
    [
        "optimizer.lr=0.5", "dataset.batch_size=1", "dataset.size=[16,16]", "augment=none", "model.stages=[[4],[4]]",
        "loss=dice", "schedule=cosine", "seed=7",
    ],
)  # fmt: skip
def test_resuming_with_another_config_is_refused_with_its_key(place, commands, word):
    words = [other for other in DATA if other.split("=")[0] != word.split("=")[0]]
    done = commands("train", *words, word, "hydra.run.dir=run", "resume=auto", cwd=place)
    assert done.code == 2, done.out + done.err
    assert f"other values of {word.split('=')[0]}" in done.error_message
    assert "resume_force=true" in done.error_message


@pytest.mark.parametrize("word", ["dataset.num_workers=1", "dataset.timeout=60", "logger=tensorboard", "max_time=1h"])
def test_resuming_with_changed_harmless_keys_is_allowed(place, commands, word):
    words = [other for other in DATA if other.split("=")[0] != word.split("=")[0]]
    done = commands("train", *words, word, "hydra.run.dir=run", "resume=auto", cwd=place)
    assert done.code == 0, done.out + done.err


def test_a_finished_run_is_reported_and_left_unchanged(trained, tmp_path, commands):
    for name in ("mine", "run"):
        shutil.copytree(trained / name, tmp_path / name)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.suffix == ".ckpt"}
    done = resume(commands, tmp_path)
    assert done.code == 0
    assert "run is finished; its scores are in run/report.json" in done.out
    assert {path: path.read_bytes() for path in before} == before


HOSTILE_CONFIGS = {
    "python": "!!python/object/apply:os.system ['touch marker']",
    "python in a key": "dataset: {root: !!python/object/apply:os.system ['touch marker']}",
    "bad yaml": "a: [1",
    "a list": "[1, 2]",
    "empty": "",
    "binary": "\x00",
    "itself": "a: &a {a: *a}\ndataset: *a",
}


@pytest.mark.parametrize("name", HOSTILE_CONFIGS)
def test_a_config_in_a_run_folder_never_runs_code(place, commands, name):
    (place / "run" / "config.yaml").write_text(HOSTILE_CONFIGS[name])
    done = resume(commands, place)
    assert done.code == 2, done.err
    assert "run" in done.error_message
    assert not list(place.rglob("marker"))


def test_a_run_with_a_truncated_report_is_not_finished(place, commands):
    (place / "run" / "report.json").write_text('{"miou": 0.')
    (place / "run" / "metrics.csv").write_text("no,numbers\nat,all\n")
    assert resume(commands, place).code == 0
    assert "miou" in yaml.safe_load((place / "run" / "report.json").read_text())


HOLD = """
import sys, time
from pathlib import Path
from segdeconv.training.run_folder import lock_run
lock_run(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_never_share_a_folder_and_the_lock_of_a_killed_run_is_released(place, commands):
    shutil.rmtree(place / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, "run"],
        cwd=place,
        stdout=subprocess.PIPE,
        env=child_environment(ROOT),
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        done = commands("train", *DATA, "hydra.run.dir=run", cwd=place)
        holder.send_signal(signal.SIGKILL)
    assert done.code == 2
    assert f"run is in use by process {holder.pid} on " in done.error_message
    assert sorted(path.name for path in (place / "run").iterdir()) == [".lock"]
    assert commands("train", *DATA, "hydra.run.dir=run", cwd=place).code == 0


# Disks


def test_a_folder_that_cannot_be_written_is_exit_code_5_at_once(place, commands):
    (place / "there").mkdir()
    for limits in ({"read_only": [str(place / "there")]}, {"plain_user": True}):
        (place / "there").chmod(0o555)
        done = commands("train", *DATA, "hydra.run.dir=there/run", cwd=place, limits=limits)
        assert done.code == 5, done.err
        assert "there" in done.error_message
        assert "train:" not in done.out


@pytest.mark.parametrize("script", ["evaluate", "predict", "predict to a file"])
def test_results_that_cannot_be_written_are_exit_code_5(place, commands, script):
    (place / "there").mkdir(mode=0o555)
    words = {
        "evaluate": ("evaluate", "run/best.ckpt", "--out", "there/out"),
        "predict": ("predict", "run/best.ckpt", "mine/images", "--out", "there/out"),
        "predict to a file": ("predict", "run/best.ckpt", "mine/images", "--out", "mine/train.txt"),
    }[script]
    done = commands(*words, cwd=place, limits={"plain_user": True})
    assert done.code == (2 if "file" in script else 5), done.err
    assert ("mine/train.txt" if "file" in script else "there") in done.error_message


@pytest.mark.parametrize(
    ("option", "folder", "problem"),
    [
        ("--masks", "mine/masks", "is an input, which would be overwritten"),
        ("--pictures", "mine/images", "is an input, which would be overwritten"),
        ("--masks", "theirs", "exists and was not written by segdeconv"),
    ],
)
def test_evaluate_writes_over_no_file_of_someone_else(place, commands, option, folder, problem):
    (place / "theirs").mkdir()
    done = commands("evaluate", "run/best.ckpt", "--masks", "ours", "--no-boundary", cwd=place)
    assert done.code == 0, done.err
    for path in (place / "ours").glob("*.png"):
        (place / "theirs" / path.name).write_text("mine")
    before = {path: path.read_bytes() for path in place.rglob("*.*") if path.is_file()}
    done = commands("evaluate", "run/best.ckpt", option, folder, cwd=place)
    assert done.code == 2
    assert problem in done.error_message
    assert f"choose another {option}" in done.error_message
    assert {path: path.read_bytes() for path in place.rglob("*.*") if path.is_file()} == before
    assert commands("evaluate", "run/best.ckpt", "--masks", "ours", "--no-boundary", cwd=place).code == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [("report.html", "MINE"), ("report.json", "MINE"), ("report.json", '{"miou": 1}'), ("report.json", "[]")],
)
def test_evaluate_writes_over_no_report_of_someone_else(place, commands, name, content):
    (place / "ow").mkdir()
    (place / "ow" / name).write_text(content)
    done = commands("evaluate", "run/best.ckpt", "--no-boundary", "--out", "ow", cwd=place)
    assert done.code == 2
    assert f"ow/{name} exists and was not written by segdeconv; it would be overwritten - choose another --out" in (
        done.error_message
    )
    assert [(path.name, path.read_text()) for path in (place / "ow").iterdir()] == [(name, content)]


def test_evaluate_replaces_the_report_of_a_run(place, trained, commands):
    shutil.copy(trained / "run" / "report.json", place / "run")
    done = commands("evaluate", "run/best.ckpt", "--no-boundary", "--out", "run", cwd=place)
    assert done.code == 0, done.err
    assert "evaluate" in json.loads((place / "run" / "report.json").read_text())["command"]


def test_evaluate_replaces_its_report_and_names_that_of_another_split(place, commands):
    words = ("evaluate", "run/best.ckpt", "--no-boundary", "--out", "ow")
    for split, line in [("val", ""), ("val", ""), ("train", "replaced: the report of run/best.ckpt, split val")]:
        done = commands(*words, "--split", split, cwd=place)
        assert done.code == 0, done.err
        assert [text for text in done.out.splitlines() if text.startswith("replaced")] == [line] * bool(line)
    (place / "ow" / "report.html").unlink()
    assert commands(*words, cwd=place).code == 0


@pytest.mark.parametrize("option", ["--out", "--masks", "--pictures"])
@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null/x", "mine/train.txt"])
def test_a_folder_that_evaluate_cannot_create_is_one_line(place, commands, option, folder):
    done = commands("evaluate", "run/best.ckpt", "--no-boundary", option, folder, cwd=place)
    assert done.code in (2, 5), done.err
    assert folder in done.error_message


def test_a_disk_too_small_for_the_checkpoints_is_an_error_before_the_first_step(place, commands):
    (place / "small").mkdir()
    words = [word for word in DATA if not word.startswith("model.stages")]
    words += ["model.stages=[[64],[256,256]]", "hydra.run.dir=small/run"]
    done = commands("train", *words, cwd=place, limits={"tmpfs": {str(place / "small"): "4m"}})
    assert done.code == 5, done.err
    assert "the checkpoints in small/run need at least" in done.error_message
    assert "epoch 1" not in done.out


@pytest.mark.parametrize("limits", ["full", "file size"])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint_intact(place, commands, limits):
    """The last checkpoint is stored outside the small disk, so that it can be checked afterwards."""
    run = place / "run"
    before = {path.name: path.read_bytes() for path in run.glob("*.ckpt")}
    size = sum(map(len, before.values()))
    words = [word for word in DATA if "max_epochs" not in word]
    settings = {"file_size": 20_000} if limits == "file size" else {"tmpfs": {str(place / "tiny"): str(size // 8)}}
    (place / "tiny").mkdir()
    target = "run" if limits == "file size" else "tiny/run"
    done = commands(
        "train", *words, "trainer.max_epochs=9", f"hydra.run.dir={target}", "resume=auto", "resume_force=true",
        cwd=place, limits=settings,
    )  # fmt: skip
    assert done.code == 5, done.out + done.err
    assert target in done.error_message or "a file" in done.error_message
    assert not list(run.glob(".tmp-*"))
    for name in before:
        checkpoint.verify(run / name)
        assert (run / name).read_bytes() == before[name]


# Workers and memory

MISBEHAVING = '''
import os, signal, time
from segdeconv.data.datasets.folder import Folder
class Bad(Folder):
    """A data set whose worker fails in a chosen way."""
    def __init__(self, split, root, *, failure: str = "") -> None:
        super().__init__(split, root)
        self.failure = failure
    def __getitem__(self, index):
        import torch
        if torch.utils.data.get_worker_info() is not None:
            if self.failure == "hang":
                time.sleep(1000)
            if self.failure == "exit":
                os._exit(3)
            if self.failure == "shm":
                import numpy as np
                image, mask, name = super().__getitem__(index)
                return type(super().__getitem__(index))(np.tile(image, (60, 60, 1)), np.tile(mask, (60, 60)), name)
            os.kill(os.getpid(), getattr(signal, self.failure))
        return super().__getitem__(index)
'''
FAILURES = {
    "143 killed": ("SIGKILL", (), "a worker was killed, probably by the system because memory ran out", 5),
    "56 segmentation fault": ("SIGSEGV", (), "a worker died", 5),
    "56 exit": ("exit", (), "a worker died", 8),
    "144 hang": ("hang", ("dataset.timeout=2",), "a worker delivered no batch in time", 15),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_worker_ends_the_run_with_one_line(place, commands, name):
    failure, more, words, seconds = FAILURES[name]
    (place / "bad.py").write_text(MISBEHAVING)
    base = [word for word in DATA[2:] if "num_workers" not in word]
    done = commands(
        "train", "dataset=folder", "dataset._target_=bad.Bad", "dataset.root=mine", f"dataset.failure={failure}", *base,
        "dataset.num_workers=1", *more, "hydra.run.dir=new", cwd=place, timeout=60,
    )  # fmt: skip
    assert done.code == 2, done.err
    assert words in done.error_message
    assert "dataset.num_workers" in done.error_message
    assert done.seconds < seconds + 5


def test_too_little_shared_memory_is_reported(place, commands):
    (place / "bad.py").write_text(MISBEHAVING)
    base = [word for word in DATA[2:] if "num_workers" not in word and "size=[" not in word]
    done = commands(
        "train", "dataset=folder", "dataset._target_=bad.Bad", "dataset.root=mine", "dataset.failure=shm", *base,
        "dataset.size=[512,512]", "dataset.num_workers=1", "hydra.run.dir=new", cwd=place, timeout=60,
        limits={"tmpfs": {"/dev/shm": "1m"}},
    )  # fmt: skip
    assert done.code == 2, done.err
    assert "shared memory" in done.error_message


def test_no_environment_variable_is_written_to_a_run(place, commands):
    words = [word for word in DATA if not word.startswith("logger")]
    secrets = {"TOKEN": "a-planted-secret", "HOME": "/home/a-planted-name"}
    done = commands("train", *words, "hydra.run.dir=new", cwd=place, env=secrets)
    assert done.code == 0, done.err
    written = [path for path in (place / "new").rglob("*") if path.is_file()]
    assert any(path.name.startswith("events.out") for path in written)
    assert not [path for path in written if b"a-planted" in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")))
def test_every_network_trains_under_deterministic_algorithms(tmp_path, commands, model):
    """Two runs of a small form of the network have the same weights, bit by bit."""
    small = ("model.fc_width=16",) if model in ("deconvnet", "fcn", "deeplab_largefov") else ()
    small += () if "basic" in model or model == "bilinear_interpolation" else ("model.width=0.05",)
    weights = []
    for name in ("one", "two"):
        done = commands(
            "train", f"model={model}", *small,
            "dataset.num_train=2", "dataset.num_val=1", "dataset.batch_size=2", "dataset.num_workers=0",
            f"dataset.size={[224, 224] if model == 'deconvnet' else [64, 64]}", "trainer.max_epochs=1",
            "trainer.deterministic=true", "trainer.precision=32-true",
            "logger=none", f"hydra.run.dir={name}", cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.err
        weights.append(checkpoint.read(tmp_path / name / "last.ckpt").weights)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# The same, in fresh processes

COMMANDS = (
    (("train", "datset=voc"), 2, "unknown key datset"),
    (("train", "optimizer.lr=abc"), 2, "optimizer.lr=abc"),
    (("train", "dataset=folder", "dataset.root=nope"), 2, "nope is not a folder"),
    (("train", *DATA, "hydra.run.dir=run"), 2, "run already contains a run"),
    (("train", *DATA, "hydra.run.dir=train.txt/run"), 2, "train.txt/run"),
    (("evaluate", "run/cut.ckpt"), 4, "run/cut.ckpt cannot be read safely as a checkpoint"),
    (("evaluate", "nothing.ckpt"), 2, "checkpoint nothing.ckpt not found"),
    (("predict", "run/best.ckpt", "run/config.yaml"), 2, "1 of 1 files could not be read"),
    (("predict", "run/best.ckpt", "train.txt"), 2, "train_0 not found"),
    (("inspect_data", "dataset=folder", "dataset.root=train.txt"), 2, "train.txt is not a folder"),
    (("evaluate", "run/best.ckpt", "--nonsense"), 2, "unrecognized arguments: --nonsense"),
)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_typed_command_also_ends_with_one_line(place, number):
    (script, *words), code, message = COMMANDS[number]
    shutil.copy(place / "mine" / "train.txt", place)
    (place / "run" / "cut.ckpt").write_bytes((place / "run" / "best.ckpt").read_bytes()[:5000])
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words]
    environment = child_environment(ROOT)
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stderr
    assert message in Outcome(done.returncode, done.stdout, done.stderr, 0).error_message


# Diverging


def test_a_gradient_that_is_not_finite_never_becomes_a_checkpoint(place, commands):
    """The loss is finite but its gradient is not, so the weights must be checked."""
    (place / "bad.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Loss(nn.Module):\n"
        "    def __init__(self, *, class_weights=None, ignore_index: int = 255) -> None:\n"
        "        super().__init__()\n"
        "    def forward(self, logits, mask):\n"
        "        return (logits - logits.detach()).abs().sqrt().sum()\n"
    )
    words = ("loss._target_=bad.Loss", "hydra.run.dir=new", "trainer.max_epochs=2")
    done = commands("train", *[word for word in DATA if "max_epochs" not in word], *words, cwd=place)
    assert done.code == 3, done.out + done.err
    assert "step 1 with learning rate" in done.error_message or "step 2 with learning rate" in done.error_message
    assert "train_" in done.error_message
    assert not list((place / "new").glob("*.ckpt"))


# Changes between two runs


def test_files_changed_since_a_run_was_stopped_are_reported(place, commands):
    base = [word for word in DATA if "max_epochs" not in word]

    def changed_splits(epochs):
        words = (f"trainer.max_epochs={epochs}", "resume_force=true", "hydra.run.dir=run", "resume=auto")
        (place / "run" / "report.json").unlink(missing_ok=True)
        done = commands("train", *base, *words, cwd=place)
        assert done.code == 0, done.err
        return [line.split()[4] for line in done.out.splitlines() if line.startswith("warning: files of the ")]

    assert changed_splits(2) == ["train", "val"]  # a copy, so all files are in another place
    assert changed_splits(3) == []
    name = (place / "mine" / "train.txt").read_text().split()[0]
    next((place / "mine" / "masks").glob(f"{Path(name).stem}.*")).touch()
    assert changed_splits(4) == ["train"]


def test_another_number_of_threads_is_reported_when_a_run_resumes(place, commands):
    content = checkpoint.load_plain(place / "run" / "last.ckpt")
    machine = content["segdeconv"]["machine"]
    assert set(machine) == {"torch", "threads", "device"}
    assert "the resumed run will not be bit-identical" not in resume(commands, place).out
    (place / "run" / "report.json").unlink()
    other = {**content["segdeconv"], "machine": {**machine, "threads": "64", "torch": "1.0"}}
    changed(place / "run" / "last.ckpt", segdeconv=other)
    done = resume(commands, place)
    assert done.code == 0, done.err
    assert f"the resumed run will not be bit-identical: torch 1.0 -> {torch.__version__}, threads 64 -> 1" in done.out


def test_a_deleted_run_folder_hides_no_error(tmp_path, commands):
    (tmp_path / "mine.py").write_text(
        "import shutil\nfrom segdeconv.data import Shapes\nfrom segdeconv.errors import UsageError\n\n"
        "class Gone(Shapes):\n    def __init__(self, split: str) -> None:\n        shutil.rmtree('runs')\n"
        "        raise UsageError('the reason')\n"
    )
    done = commands("train", "dataset=shapes", "dataset._target_=mine.Gone", cwd=tmp_path)
    assert (done.code, done.error_message) == (2, "the reason")


def test_scores_that_are_not_finite_are_exit_code_3(place, commands):
    state = dict(checkpoint.load_plain(place / "run" / "best.ckpt")["state_dict"])
    huge = {name: torch.full_like(value, 3e38) for name, value in state.items() if name.endswith("classifier.weight")}
    assert huge
    changed(place / "run" / "best.ckpt", state_dict={**state, **huge})
    done = commands("evaluate", "run/best.ckpt", "--precision", "32-true", cwd=place)
    assert done.code == 3, done.err
    assert "are not finite, since its weights are too large - use an earlier checkpoint" in done.error_message


def test_every_job_of_a_multirun_is_checked_before_the_first_trains(tmp_path, commands):
    words = ("train", "-m", "model=segnet,unet,deconvnet", "model.stages=[[4],[8]]", "hydra.sweep.dir=sweep")
    done = commands(*words, cwd=tmp_path)
    assert done.code == 2
    assert done.error_message.startswith("job 3 of 3 (model=deconvnet): unknown key model.stages - ")
    assert not (tmp_path / "sweep").exists()
