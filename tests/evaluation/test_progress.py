"""Interrupted evaluations, which resume with the counts of the images that were scored."""

import json
import shutil

import fakes
import pytest

from segdeconv.evaluation.progress import COUNTS, FOLDER

BROKEN = 6  # the index of an image that interrupts the evaluation


@pytest.fixture(scope="module")
def place(tmp_path_factory, commands):
    """A folder with a network, its data, the evaluation of all, and one that a damaged image has interrupted."""
    folder = tmp_path_factory.mktemp("place")
    fakes.folder(folder / "own", num=5)
    data = {"_target_": "segdeconv.data.Folder", "size": [32, 32], "batch_size": 1, "val_share": 0.2}
    fakes.untrained(folder / "a.ckpt", {**data, "root": str(folder / "own")})
    evaluate(commands, folder, "whole")
    image = folder / "own/images" / sorted(path.name for path in (folder / "whole-masks").glob("*.png"))[BROKEN]
    content = image.read_bytes()
    image.write_bytes(b"damaged")
    done = evaluate(commands, folder, "out", code=2)
    assert image.name in done.error_message
    image.write_bytes(content)
    return folder


def evaluate(commands, folder, out, *words, code=0):
    words = ("a.ckpt", "dataset.root=own", "--split", "train", "--out", out, "--masks", f"{out}-masks", *words)
    done = commands("evaluate", *words, cwd=folder)
    assert done.code == code, done.err
    return done


def report_of(folder):
    report = json.loads((folder / "report.json").read_text())
    del report["command"], report["checkpoint"]
    return report


@pytest.fixture
def interrupted(place, tmp_path):
    """A copy of the folder, whose images have not changed."""
    return shutil.copytree(place, tmp_path / "place")


def counts(folder):
    return sorted((folder / "out" / FOLDER / COUNTS).glob("*.npz"))


def first_name(folder):
    return min(path.name for path in (folder / "out-masks").glob("*.png"))


def test_an_interrupted_evaluation_resumes_with_the_report_of_one_that_was_not(interrupted, commands):
    done = evaluate(commands, interrupted, "out")
    assert "6 of 8 are already evaluated and skipped" in done.out
    assert report_of(interrupted / "out") == report_of(interrupted / "whole")
    assert {path.name for path in (interrupted / "out").iterdir()} == {"report.json", "report.html"}
    for path in (interrupted / "whole-masks").glob("*.png"):
        assert (interrupted / "out-masks" / path.name).read_bytes() == path.read_bytes()


def _change_image(folder):
    (folder / "own/images" / first_name(folder)).touch()


def _remove_mask(folder):
    (folder / "out-masks" / first_name(folder)).unlink()


def _damage_counts(folder):
    path = counts(folder)[0]
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("change", [_change_image, _remove_mask, _damage_counts])
def test_images_that_changed_or_lost_an_output_are_scored_again(interrupted, commands, change):
    change(interrupted)
    done = evaluate(commands, interrupted, "out")
    assert "4 of 8 are already evaluated and skipped" in done.out
    assert report_of(interrupted / "out") == report_of(interrupted / "whole")
    assert (interrupted / "out-masks" / first_name(interrupted)).is_file()


def test_an_evaluation_with_other_settings_starts_again_and_says_so(interrupted, commands):
    done = evaluate(commands, interrupted, "out", "--flip")
    assert "an evaluation of another checkpoint or data, or with other settings, was interrupted there" in done.err
    assert "skipped" not in done.out
    assert report_of(interrupted / "out") != report_of(interrupted / "whole")


@pytest.mark.parametrize("option", ["--out", "--masks", "--pictures", "--save-regions"])
def test_an_address_that_takes_no_outputs_is_refused(place, commands, option):
    words = ("--regions", "2") if option == "--save-regions" else ()
    done = commands("evaluate", "a.ckpt", "dataset.root=own", option, "https://host/x", *words, cwd=place)
    assert done.code == 2
    assert "https://host/x is " in done.error_message
    assert not (place / "https:").exists()


@pytest.mark.parametrize("option", ["--out", "--masks", "--pictures"])
def test_parts_share_a_folder_that_is_no_address(place, commands, option):
    done = commands("evaluate", "a.ckpt", option, "s3://bucket/x", "--shard", "1/2", cwd=place)
    assert f"--shard: the parts share a folder, and {option}=s3://bucket/x is an address" in done.error_message
