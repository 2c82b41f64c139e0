"""Verification of files with a list of hashes that coreutils' sha256sum wrote."""

import io
import subprocess
from pathlib import Path

import fakes
import pytest
from command_results import require_refused, train_on_folder
from PIL import Image

from segdeconv.data import Folder, Shapes
from segdeconv.data.checksums import verify
from segdeconv.errors import UsageError


def listed(folder: Path, *, binary: bool = False) -> Path:
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    done = subprocess.run(
        ["sha256sum", *(["--binary"] if binary else []), *files], cwd=folder, capture_output=True, check=True
    )
    (folder / "list.sha256").write_bytes(done.stdout)
    return folder / "list.sha256"


def flip_accepted_bit(path: Path) -> None:
    """Flip a bit so that the file still decodes, but to another image."""
    content = bytearray(path.read_bytes())
    before = Image.open(path).tobytes()
    for position in range(len(content) // 2, len(content)):
        content[position] ^= 4
        try:
            if Image.open(io.BytesIO(content)).convert("RGB").tobytes() != before:
                path.write_bytes(content)
                return
        except OSError:
            pass
        content[position] ^= 4
    raise AssertionError("the decoder accepts no flipped bit")


def test_a_flipped_bit_that_the_decoder_accepts_is_detected(tmp_path, commands):
    root = fakes.folder(tmp_path / "mine", layout="lists", image_suffix=".jpg")
    listing = listed(root)
    flip_accepted_bit(root / "images" / "val_1.jpg")
    done = train_on_folder(commands, tmp_path, f"dataset.checksums={listing}")
    require_refused(done, tmp_path, f"mine/images/val_1.jpg does not have the hash in {listing}")
    listed(root)
    done = train_on_folder(commands, tmp_path, f"dataset.checksums={listing}")
    assert done.code == 0, done.err


def test_a_damaged_test_split_is_not_treated_as_missing(tmp_path, commands):
    root = fakes.camvid(tmp_path / "camvid", ("train", "val", "test"))
    listing = listed(root)
    min((root / "test").glob("*.png")).unlink()
    arguments = ("dataset=camvid", "dataset.root=camvid", f"dataset.checksums={listing}")
    done = commands("inspect_data", *arguments, cwd=tmp_path)
    assert done.code == 2
    assert "test_000.png cannot be read (No such file or directory), but is listed in" in done.error_message


@pytest.mark.parametrize("binary", [False, True])
def test_every_file_of_the_split_must_be_listed(tmp_path, binary):
    root = fakes.folder(tmp_path / "mine", layout="lists")
    listing = listed(root, binary=binary)
    text = listing.read_text()
    listing.write_text("".join(line for line in text.splitlines(keepends=True) if "masks/val_" not in line))
    verify(Folder("train", str(root)), checksums=str(listing))
    with pytest.raises(UsageError, match=r"masks/val_0.png is not in .*list.sha256 \(and \d+ more\) - restore"):
        verify(Folder("val", str(root)), checksums=str(listing))


def test_an_invalid_list_is_refused_by_file_and_line(tmp_path):
    root = fakes.folder(tmp_path / "mine", layout="lists")
    data = Folder("val", str(root))
    with pytest.raises(UsageError, match=r"no[.]sha256 is not a file - write it with sha256sum"):
        verify(data, checksums=str(tmp_path / "no.sha256"))
    (tmp_path / "md5").write_text("\nd41d8cd98f00b204e9800998ecf8427e  images/val_0.png\n")
    with pytest.raises(UsageError, match=r"md5, line 2: 'd41d8.*' is not 'HASH  PATH' - write the list with sha256sum"):
        verify(data, checksums=str(tmp_path / "md5"))
    with pytest.raises(UsageError, match="Shapes has no files - leave it out"):
        verify(Shapes("val", num_val=2), checksums=str(listed(root)))
