"""Folders and files with any name, on terminals of any encoding: from training to every other command."""

import os
import shlex
import shutil

import fakes
import pytest

from segdeconv.classes import Classes, voc_colours
from segdeconv.cli.evaluate import planned_files
from segdeconv.data.dataset import FileDataset, Pair
from segdeconv.errors import UsageError
from segdeconv.inference.output_folder import LocalFolder
from segdeconv.system.own_files import RECORD

SLIM = (
    "dataset=folder", "dataset.size=[16,16]", "model=segnet_basic", "model.width=4", "trainer.max_epochs=1",
    "trainer.precision=32-true", "dataset.batch_size=2", "auto=[]",
)  # fmt: skip
ODD = "it's [a] {x}, 100% #1; café 李明 (final)=\\"


def test_a_run_folder_with_any_name_is_written_resumed_and_named_in_the_command_to_use_it(commands, tmp_path):
    fakes.folder(tmp_path / ODD, num=6)
    words = (*SLIM, "dataset.num_workers=0", "logger=none", f"dataset.root={ODD}")
    run = tmp_path / "runs" / ODD
    done = commands("train", *words, f"hydra.run.dir=runs/{ODD}", cwd=tmp_path)
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("use it:")]
    assert shlex.split(line)[-3:] == [f"runs/{ODD}/best.ckpt", "IMAGE", "..."]
    for resume in ("auto", f"runs/{ODD}"):
        done = commands("train", *words, f"hydra.run.dir=runs/{ODD}", f"resume={resume}", cwd=tmp_path)
        assert f"runs/{ODD} is finished" in done.out
    done = commands("evaluate", run / "best.ckpt", f"dataset.root={tmp_path / ODD}", "--out", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    done = commands("train", *words, f"init_from=runs/{ODD}/best.ckpt", "hydra.run.dir=20", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "20" / "report.json").is_file()


def test_a_run_folder_that_hydra_would_resolve_is_refused(commands, tmp_path):
    done = commands("train", "hydra.run.dir=it's ${x}", cwd=tmp_path)
    assert done.code == 2
    assert "names a folder with the characters ${, which Hydra resolves - use other ones" in done.error_message


@pytest.fixture(scope="module")
def latin(tmp_path_factory, commands):
    """A folder with a data set and a trained network, whose file names are not UTF-8."""
    place = tmp_path_factory.mktemp("latin")
    root = place / os.fsdecode(b"data\xe9")
    fakes.folder(root, num=6)
    (root / "classes.yaml").write_text("[Himmel (grün), Straße, Gehweg]", encoding="utf-8")
    for file in [*(root / "images").iterdir(), *(root / "masks").iterdir()]:
        file.rename(file.with_name(os.fsdecode(b"caf\xe9 ") + file.name))
    words = (f"dataset.root={root.name}", "dataset.num_workers=1", "hydra.run.dir=run")
    done = commands("train", *SLIM, *words, cwd=place, env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 0, done.err
    assert r"Stra\xdfe" in done.out
    assert (place / "run" / "config.yaml").read_text(encoding="ascii").count(r"data\uDCE9") == 1
    return place, root.name


@pytest.mark.parametrize(
    ("command", "words", "files"),
    [
        ("predict", ("run/best.ckpt", "ROOT/images", "--polygons", "--class-masks"), 12 * 6 + 3),
        ("evaluate", ("run/best.ckpt", "dataset.root=ROOT", "--masks", "out/m", "--pictures", "out/p"), 2 * 2 + 2),
        ("inspect_data", ("dataset=folder", "dataset.root=ROOT"), 1),
        ("rank", ("run/best.ckpt", "ROOT/images", "--copy", "out/next"), 2 + 12),
        ("rank", ("run/best.ckpt", "--suspects", "dataset.root=ROOT"), 2),
        ("visualize", ("run/best.ckpt", "ROOT/images", "--images", "1", "--only", "stages,switches"), 3),
        ("export", ("run/best.ckpt",), 2),
    ],
)
def test_file_names_that_are_not_utf8_on_a_terminal_that_is_not(latin, command, words, files, commands):
    place, root = latin
    shutil.rmtree(place / "out", ignore_errors=True)
    out = "out/best.safetensors" if command == "export" else "out"
    words = [word.replace("ROOT", root) for word in words]
    done = commands(command, *words, "--out", out, cwd=place, env={"PYTHONIOENCODING": "cp1252"})
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    written = [path for path in (place / "out").rglob("*") if path.is_file() and path.name != RECORD]
    assert len(written) == files


class Fixed(FileDataset):
    def __init__(self, pairs):
        super().__init__("val", Classes(("a", "b"), voc_colours(2)), pairs)


def test_two_images_of_one_name_are_refused_by_evaluate(tmp_path):
    pairs = [Pair(tmp_path / f"{name}.jpg", tmp_path / "masks" / f"{name}.png", name) for name in ("a", "b", "a")]
    assert planned_files(LocalFolder(tmp_path), Fixed(pairs[:2]), [1], ".png") == {1: tmp_path / "b.png"}
    message = r"--split val: image 2 \(a\) and image 0 \(a\) have the same output file .*out/a\.png"
    with pytest.raises(UsageError, match=message):
        planned_files(LocalFolder(tmp_path / "out"), Fixed(pairs), [0], ".png")


WRITTEN_TO_A_DISK = (
    ("train", "hydra.run.dir="), ("train", "hydra.sweep.dir="), ("convert", "mine", "--shards"),
    ("convert", "mine", "--to", "coco", "--out"), ("inspect_data", "--out"), ("describe", "--json"), ("merge",),
    ("visualize", "a.ckpt", "--out"), ("rank", "a.ckpt", "photos", "--out"), ("rank", "a.ckpt", "photos", "--copy"),
    ("verify", "run", "--out"), ("label", "photos", "--out"), ("export", "a.ckpt", "--out"), ("study", "--out"),
    ("calibrate", "a.ckpt", "--out"), ("recalibrate", "a.ckpt", "--out"), ("results", "table.yaml", "--out"),
    ("benchmark", "parts", "--out"), ("predict", "a.ckpt", "photos", "--regions", "2", "--save-regions"),
)  # fmt: skip


@pytest.mark.parametrize("words", WRITTEN_TO_A_DISK, ids=" ".join)
def test_an_address_does_not_become_a_folder_with_such_a_name(tmp_path, commands, words):
    script, *options = words
    if options and options[-1].endswith("="):
        options[-1] += "s3://bucket/x"
    else:
        options.append("s3://bucket/x")
    done = commands(script, *options, cwd=tmp_path)
    assert done.code == 2, done.err
    assert "s3://bucket/x is an address, not a path of this machine - give a path" in done.error_message
    assert not list(tmp_path.iterdir())
