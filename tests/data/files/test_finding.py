"""Image files are found through links and in sub-folders, and every file that is passed over is accounted for."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

import pytest

from segdeconv.data.files.finding import describe_skipped, find_files
from segdeconv.data.files.reading import SUFFIXES, read_image
from segdeconv.errors import UsageError


def create(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_files_are_in_the_order_of_their_paths(tmp_path: Path) -> None:
    create(
        tmp_path, "b.png", "a/z.png", "a.png", "a b/x.png", "a-b.png", "a/b/c.png", "B.png", "ü.png", "10.png", "9.png"
    )
    assert find_files(tmp_path).files == sorted(path for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_supported_ending_is_found_in_upper_and_lower_case(tmp_path: Path, suffix: str) -> None:
    create(tmp_path, f"lower{suffix}", f"upper{suffix.upper()}")
    found = find_files(tmp_path)
    assert (len(found.files), found[1:]) == (2, ([], [], []))
    assert describe_skipped(found, tmp_path) == []


@pytest.mark.parametrize(
    ("hidden", "reason"),
    [
        (".ipynb_checkpoints/x-checkpoint.png", ".ipynb_checkpoints"),
        (".thumbnails/a/x.png", ".thumbnails"),
        ("sub/@eaDir/x.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir"),
        ("__MACOSX/sub/x.png", "__MACOSX"),
        ("#recycle/x.png", "#recycle"),
        ("$RECYCLE.BIN/S-1-5/x.png", "$RECYCLE.BIN"),
        ("System Volume Information/x.png", "System Volume Information"),
        ("lost+found/x.png", "lost+found"),
        ("sub/._x.png", "._*"),
        (".x.png", ".*"),
    ],
)  # fmt: skip
def test_hidden_and_system_files_are_passed_over_with_their_number(tmp_path: Path, hidden: str, reason: str) -> None:
    found = find_files(create(tmp_path, "x.png", hidden, ".hidden.txt", ".git/config"))
    assert names(found.files, tmp_path) == ["x.png"]
    assert names(found.hidden, tmp_path) == [hidden]
    assert describe_skipped(found, tmp_path) == [
        f"{tmp_path}: 1 file with hidden names or in hidden or system folders is left out ({reason}: 1) - rename or "
        "move them to use them"
    ]


def test_a_hidden_folder_that_is_given_is_searched(tmp_path: Path) -> None:
    folder = create(tmp_path / ".cache" / "@eaDir", "x.png")
    assert names(find_files(folder).files, folder) == ["x.png"]


def test_other_endings_are_counted_but_not_files_of_the_system(tmp_path: Path) -> None:
    create(tmp_path, "x.png", "a.heic", "b.HEIC", "notes.txt", "README", "Thumbs.db", "sub/desktop.ini", ".DS_Store")
    found = find_files(tmp_path)
    assert names(found.others, tmp_path) == ["README", "a.heic", "b.HEIC", "notes.txt"]
    (line,) = describe_skipped(found, tmp_path)
    assert line.startswith(
        f"{tmp_path}: 4 files with other endings are left out (.heic: 2, .txt: 1, without ending: 1) - the supported "
        "endings are .apng, .bmp,"
    )


def test_medical_formats_are_named_with_a_way_out(tmp_path: Path) -> None:
    found = find_files(create(tmp_path, "x.png", "a.dcm", "b.NII.GZ", "c.nii.gz", "d.nii", "e.gz"))
    medical, other = describe_skipped(found, tmp_path)
    assert medical.startswith(
        f"{tmp_path}: 4 files of medical formats are left out (.nii.gz: 2, .dcm: 1, .nii: 1) - DICOM and NIfTI are not "
        "supported; convert slices to 16-bit PNG or TIFF and set dataset.channels=1, or use MONAI"
    )
    assert other.startswith(f"{tmp_path}: 1 file with other endings is left out (.gz: 1) - the supported endings")


@pytest.mark.parametrize("channels", [None, 1])
@pytest.mark.parametrize(
    ("name", "content"), [("a.dcm", bytes(128) + b"DICM"), ("a", bytes(128) + b"DICM"), ("a.nii.gz", b"\x1f\x8b\x08")]
)
def test_a_medical_image_that_is_given_gets_the_same_line(
    name: str, content: bytes, channels: int | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"is a medical image - DICOM and NIfTI are not supported; convert"):
        read_image(tmp_path / name, channels=channels)


def test_a_message_names_a_limited_number_of_endings(tmp_path: Path) -> None:
    found = find_files(create(tmp_path, *(f"x.e{number}" for number in range(20))))
    assert ", .e14: 1, .e15: 1, 12 more) -" in describe_skipped(found, tmp_path)[0]


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    other = create(tmp_path / "other", "x.png", "sub/y.png")
    folder = create(tmp_path / "images", "a.png")
    (folder / "linked").symlink_to(other)
    (folder / "again").symlink_to("linked")
    (folder / "file.png").symlink_to(other / "x.png")
    found = find_files(folder)
    expected = ["a.png", "again/sub/y.png", "again/x.png", "file.png", "linked/sub/y.png", "linked/x.png"]
    assert names(found.files, folder) == expected
    assert found[1:] == ([], [], [])


@pytest.mark.parametrize("target", [".", "..", "../..", "../sub", "../../images/sub", "../../alias"])
def test_a_link_to_a_folder_that_contains_it_is_left_out_with_a_line(tmp_path: Path, target: str) -> None:
    folder = create(tmp_path / "images", "a.png", "sub/b.png")
    (tmp_path / "alias").symlink_to(folder)
    (folder / "sub" / "link").symlink_to(target)
    for start in (folder, tmp_path / "alias"):
        found = find_files(start)
        assert names(found.files, start) == ["a.png", "sub/b.png"]
        assert describe_skipped(found, start) == [
            f"{start}/sub/link: a link to a folder that contains it is left out - remove the link"
        ]


def test_two_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    create(tmp_path, "a/x.png", "b/y.png")
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    found = find_files(tmp_path)
    assert names(found.files, tmp_path) == ["a/to_b/y.png", "a/x.png", "b/to_a/x.png", "b/y.png"]
    assert names(found.loops, tmp_path) == ["a/to_b/to_a", "b/to_a/to_b"]


def test_files_that_cannot_be_read_are_found_so_that_reading_gives_the_error(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "empty.png").mkdir()
    (tmp_path / "video.png").mkdir()
    create(tmp_path, "video.png/1.png")
    os.mkfifo(tmp_path / "pipe.png")
    found = find_files(tmp_path)
    expected = ["dangling.png", "empty.png", "pipe.png", "self.png", "video.png/1.png"]
    assert names(found.files, tmp_path) == expected
    assert names(found.others, tmp_path) == ["self"]


def test_folders_may_be_nested_more_deeply_than_calls(tmp_path: Path) -> None:
    create(tmp_path, "/".join(["d"] * 120) + "/x.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        found = find_files(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert len(found.files) == 1


@pytest.mark.parametrize("name", ["nothing", "x.png"])
def test_a_path_that_is_not_a_folder_is_an_error(tmp_path: Path, name: str) -> None:
    create(tmp_path, "x.png")
    with pytest.raises(UsageError, match=rf"{name} cannot be read: (no such file or directory|not a directory) - "):
        find_files(tmp_path / name)


def test_an_unreadable_folder_inside_is_an_error_and_a_hidden_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(tmp_path, "a.png", "secret/b.png", ".hidden/c.png")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if path.endswith(("secret", "hidden")):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UsageError, match=r"secret cannot be read: permission denied - make the folder readable"):
        find_files(tmp_path)
    (tmp_path / "secret" / "b.png").unlink()
    (tmp_path / "secret").rmdir()
    assert names(find_files(tmp_path).files, tmp_path) == ["a.png"]
