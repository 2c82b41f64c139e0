"""The images of predict and visualize are found as for training, with one line for each kind of file left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest

from segdeconv import errors
from segdeconv.data.files.finding import find_files
from segdeconv.data.files.object_folder import ObjectFile, StoredObject
from segdeconv.errors import UsageError
from segdeconv.inference.inputs import find_image_files, find_images
from segdeconv.system.own_files import RECORD

ENDINGS = (".png", "_overlay.png")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors, "_warned", set())


def create(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    printed, err = capsys.readouterr()
    assert printed == ""
    return err.splitlines()


def test_a_folder_gives_the_files_that_training_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create("photos/a.jfif", "photos/sub/b.PNG", "elsewhere/c.jpg")
    Path("photos/linked").symlink_to(tmp_path / "elsewhere")
    images = find_images(["photos"], Path("out"), ENDINGS)
    assert list(images) == ["a", "linked/c", "sub/b"]
    assert list(images.values()) == find_files(Path("photos")).files
    assert warnings(capsys) == []


def test_files_that_are_left_out_are_reported_once_with_their_number(capsys: pytest.CaptureFixture[str]) -> None:
    create(
        "photos/a.png",
        "photos/.thumbnails/a.png",
        "photos/x.heic",
        "photos/notes.txt",
        "photos/sub/v.mp4",
        "photos/w.AVI",
    )
    Path("photos/loop").symlink_to("..")
    find_images(["photos", "photos"], Path("out"), ENDINGS)
    lines = warnings(capsys)
    assert lines[:2] == [
        "segdeconv: warning: photos: 2 videos are left out (.avi: 1, .mp4: 1) - name each video to predict it",
        "segdeconv: warning: photos: 1 file with hidden names or in hidden or system folders is left out "
        "(.thumbnails: 1) - rename or move them to use them",
    ]
    assert lines[2].startswith(
        "segdeconv: warning: photos: 2 files with other endings are left out (.heic: 1, .txt: 1) - the supported"
    )
    assert lines[3:] == [
        "segdeconv: warning: photos/loop: a link to a folder that contains it is left out - remove the link"
    ]


@pytest.mark.parametrize("out", ["photos/out", "photos/sub/../out", "alias"])
def test_the_output_folder_is_left_out_without_a_warning(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    create("photos/a.png", "photos/out/a.png", "photos/out/sub/b.png", "photos/out/statistics.csv", "photos/out/.x.png")
    Path("photos/link").symlink_to("out")
    Path("alias").symlink_to("photos/out")
    Path("photos/sub").mkdir()
    assert list(find_images(["photos"], Path(out), ENDINGS)) == ["a"]
    assert warnings(capsys) == []


def record(folder: str, *names: str, owner: str = "") -> None:
    """Write the record of output files of an earlier command."""
    Path(folder, f"{RECORD}{owner}").write_text("".join(f"{json.dumps(name)}\n" for name in names))


@pytest.mark.parametrize("command", ["predict", "rank"])
@pytest.mark.parametrize("argument", ["photos", "."])
def test_outputs_of_earlier_commands_are_left_out_with_one_line(
    argument: str, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create(
        "photos/a.png", "photos/sub/b.png", "photos/000001.png",
        "photos/p1/a.png", "photos/p1/a_overlay.png", "photos/p1/sub/b.png", "photos/p1/photo.png",
        "photos/p1/film/000001.png", "photos/p1/film/mine.png", "photos/p1/statistics.csv",
        "photos/p1/predictions.jsonl", "photos/sub/masks/b.png", "photos/out/a.png",
    )  # fmt: skip
    if argument == ".":
        monkeypatch.chdir("photos")
    place = "" if argument == "." else "photos/"
    record(f"{place}p1", "a.png", "a_overlay.png", "sub/b.png", "film/", "statistics.csv")
    record(f"{place}sub/masks", "b.png", owner="-1-of-2")
    find = find_image_files if command == "rank" else lambda paths, out: list(find_images(paths, out, ENDINGS).values())
    names = [path.as_posix().removeprefix(place) for path in find([argument], Path(f"{place}out"))]
    assert sorted(names) == ["000001.png", "a.png", "p1/film/mine.png", "p1/photo.png", "sub/b.png"]
    assert warnings(capsys) == [
        f"segdeconv: warning: {argument}: 7 outputs of segdeconv are left out (p1: 6, sub/masks: 1) - name them or "
        "their folder to use them"
    ]


def test_outputs_of_earlier_commands_are_used_if_they_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    create("p1/a.png", "p1/b.png")
    record("p1", "a.png", "b.png")
    Path("list.txt").write_text("p1/b.png\n")
    assert list(find_images(["p1/a.png", "list.txt"], Path("out"), ENDINGS)) == ["a", "p1/b"]
    assert list(find_images(["p1/*.png"], Path("out"), ENDINGS)) == ["a", "b"]
    assert list(find_images(["p1"], Path("out"), ENDINGS)) == ["a", "b"]
    assert warnings(capsys) == []


class FakeObjectFolder:
    """A folder of an object storage."""

    objects: ClassVar = {
        "a.png": b"", "p1/a.png": b"", "p1/mine.png": b"", "p1/film/000001.png": b"", "p1/statistics.csv": b"",
        f"p1/{RECORD}": b'"a.png"\n"film/"\n"statistics.csv"\n',
    }  # fmt: skip

    def __init__(self, address: str) -> None:
        self.address = address

    def list(self) -> dict[str, StoredObject]:
        return {name: StoredObject(len(content), 0) for name, content in self.objects.items()}

    def read(self, name: str) -> bytes:
        return self.objects[name]

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"

    def file(self, name: str, stored: StoredObject) -> ObjectFile:
        return ObjectFile.of(self, name, stored)  # type: ignore[arg-type]


def test_outputs_in_an_object_storage_are_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segdeconv.inference.inputs.ObjectFolder", FakeObjectFolder)
    assert list(find_images(["s3://bucket/photos"], Path("out"), ENDINGS)) == ["a", "p1/mine"]
    assert warnings(capsys) == [
        "segdeconv: warning: s3://bucket/photos: 3 outputs of segdeconv are left out (p1: 3) - name them or their "
        "folder to use them"
    ]


def test_a_folder_without_images_is_an_error_that_counts_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    create("photos/a.heic", "photos/b.heic")
    with pytest.raises(UsageError, match=r"photos contains no images - supported suffixes: \.apng, \.bmp, "):
        find_images(["photos"], Path("out"), ENDINGS)
    assert "photos: 2 files with other endings are left out (.heic: 2)" in warnings(capsys)[0]


def test_names_patterns_and_lists_are_taken_as_given(capsys: pytest.CaptureFixture[str]) -> None:
    create("photos/a.png", "photos/.hidden.png", "photos/v.mp4", "photos/odd.xyz")
    Path("list.txt").write_text("photos/.hidden.png\n\nphotos/odd.xyz\n", encoding="utf-8")
    assert list(find_images(["photos/v.mp4", "photos/*.png", "list.txt"], Path("out"), ENDINGS)) == [
        "v", "a", "photos/.hidden", "photos/odd",
    ]  # fmt: skip
    assert warnings(capsys) == []


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/a.png", "x/a.jpg", "x/b.png"], ["a.png", "a.jpg", "b"]),
        (["x/a.png", "y/a.jpg", "x/a.png"], ["a.png", "a.jpg"]),
        (["x/film.mp4", "x/film.png"], ["film.mp4", "film.png"]),
        (["x/A.png", "x/a.jpg"], ["A.png", "a.jpg"]),  # A.png and a.png are one file on other systems
        (["x/a.b.png", "x/a.b.tif", "x/a.png"], ["a.b.png", "a.b.tif", "a"]),
    ],
)
def test_images_that_differ_only_in_the_suffix_keep_it(
    paths: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    create(*paths)
    assert list(find_images(paths, Path("out"), ENDINGS)) == names
    kept = [name for name in names if Path(name).suffix in (".png", ".jpg", ".tif", ".mp4")]
    first, second = [next(path for path in paths if path.endswith(name)) for name in kept[:2]]
    assert warnings(capsys) == [
        f"segdeconv: warning: {len(kept)} files differ only in the suffix, such as {first} and {second} - it is kept "
        f"in the names of their outputs: {kept[0]}.png"
    ]


@pytest.mark.parametrize(
    "paths", [["x/a.png", "y/a.png"], ["x/a.png", "y/a.png", "x/a.jpg"], ["x/a.png", "x/a.jpg", "x/a.png.tif"]]
)
def test_other_collisions_are_refused(paths: list[str]) -> None:
    create(*paths)
    with pytest.raises(UsageError, match=r"have the same output file out/a(\.png)?\.png - use two --out folders"):
        find_images(paths, Path("out"), ENDINGS)
