"""The Oxford-IIIT Pet data set: trimaps, lists, and the download of the archives."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import torchvision
from http_server import Server, serving, status, whole
from PIL import Image

from segdeconv.data import OxfordPets
from segdeconv.data.datasets import oxford_pets
from segdeconv.data.inspection import inspect, inspect_all
from segdeconv.errors import UsageError

ENTRIES = [line.split() for lines in fakes.PETS.values() for line in lines]
TRIMAPS = {entry[0]: fakes.oxford_pets_image_and_trimap(index) for index, entry in enumerate(ENTRIES)}


def raises(message: str) -> Any:
    return pytest.raises(UsageError, match=message)


def all_samples(root: Path, **settings: Any) -> list[Any]:
    splits = [OxfordPets(split, str(root), **settings) for split in ("train", "val", "test")]
    return [data[index] for data in splits for index in range(len(data))]


def test_trimaps_are_1_on_the_pet_2_on_the_background_and_3_is_ignored(tmp_path: Path) -> None:
    samples = all_samples(fakes.oxford_pets(tmp_path))
    assert sorted(sample.name for sample in samples) == sorted(TRIMAPS)
    for image, mask, name in samples:
        true_image, trimap = TRIMAPS[name]
        assert np.abs(image.astype(int) - true_image).mean() < 6  # a JPEG
        for label, index in ((1, 1), (2, 0), (3, 255)):
            assert np.all(mask[trimap == label] == index)
    assert OxfordPets("test", str(tmp_path)).classes.names == ("background", "pet")


def test_torchvision_reads_the_same(tmp_path: Path) -> None:
    fakes.oxford_pets(tmp_path / "oxford-iiit-pet")
    reference = torchvision.datasets.OxfordIIITPet(str(tmp_path), "test", ["category", "segmentation"])
    dataset = OxfordPets("test", str(tmp_path), detail="breed", border="class")
    assert len(dataset) == len(reference) == 2
    categories = [int(entry[1]) for entry in map(str.split, fakes.PETS["test"])]
    for index, (image, (category, trimap)) in enumerate(reference):
        np.testing.assert_array_equal(dataset[index].image, np.array(image))
        # torchvision numbers the breeds from 0, the file from 1.
        assert category == categories[index] - 1
        np.testing.assert_array_equal(dataset[index].mask, np.array([99, category + 1, 0, 38])[np.array(trimap)])


def test_the_border_may_be_a_class(tmp_path: Path) -> None:
    data = OxfordPets("test", str(fakes.oxford_pets(tmp_path)), border="class")
    assert data.classes.names == ("background", "pet", "border")
    for _, mask, name in (data[index] for index in range(len(data))):
        np.testing.assert_array_equal(mask, np.array([9, 1, 0, 2])[TRIMAPS[name][1]])


@pytest.mark.parametrize("border", ["ignore", "class"])
def test_the_class_of_a_pet_may_be_its_species(tmp_path: Path, border: Any) -> None:
    void = 3 if border == "class" else 255
    for _, mask, name in all_samples(fakes.oxford_pets(tmp_path), detail="species", border=border):
        animal = 1 if name[0].isupper() else 2  # names of cat breeds are capitalised
        np.testing.assert_array_equal(mask, np.array([9, animal, 0, void])[TRIMAPS[name][1]])


def test_the_class_of_a_pet_may_be_its_breed(tmp_path: Path) -> None:
    root = fakes.oxford_pets(tmp_path)
    data = OxfordPets("train", str(root), detail="breed")
    assert len(data.classes) == 38
    ids = {entry[0]: int(entry[1]) for entry in ENTRIES}
    for _, mask, name in all_samples(root, detail="breed"):
        np.testing.assert_array_equal(mask, np.array([99, ids[name], 0, 255])[TRIMAPS[name][1]])
        assert data.classes.names[ids[name]] == name.rsplit("_", 1)[0]
    assert len({OxfordPets("test", str(root), detail=kind).fingerprint for kind in ("pet", "species", "breed")}) == 3


def test_the_breeds_are_in_the_order_of_their_ids_which_is_alphabetical() -> None:
    assert len(oxford_pets.BREEDS) == 37
    assert list(oxford_pets.BREEDS) == sorted(oxford_pets.BREEDS, key=str.lower)
    assert sum(breed[0].isupper() for breed in oxford_pets.BREEDS) == 12  # cat breeds; the other 25 are dogs


def test_val_is_a_seeded_fraction_of_trainval(tmp_path: Path) -> None:
    root = str(fakes.oxford_pets(tmp_path))
    train, val = (set(OxfordPets(split, root).names) for split in ("train", "val"))
    assert (len(train), len(val)) == (4, 1)
    assert train | val == {line.split()[0] for line in fakes.PETS["trainval"]}
    assert len({tuple(OxfordPets("val", root, split_seed=seed).names) for seed in range(9)}) > 1
    assert len(OxfordPets("val", root, val_share=0.4)) == 2
    inspect_all([OxfordPets(split, root) for split in ("train", "val", "test")], use_cache=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"test\.txt lists no image"),
        (
            "Abyssinian_1 1 1 1\n../x 1 1 1\n",
            r"test\.txt, line 2: '\.\./x 1 1 1' does not have the form 'Abyssinian_100 1 1 1'",
        ),
        ("Abyssinian_1\n", r"line 1: 'Abyssinian_1' does not have the form"),
        ("Abyssinian_1 38 1 1\n", r"line 1: .* does not have the form"),
        ("Abyssinian_1 1 3 1\n", r"line 1: .* does not have the form"),
        ("Abyssinian_1 2 1 1\n", r"line 1: Abyssinian_1 has class 2, american_bulldog - restore the list"),
        ("Abyssinian_1 1 1 1\nAbyssinian_1 1 1 1\n", r"line 2: 'Abyssinian_1' is listed twice"),
    ],
)
def test_a_bad_list_is_refused_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    (fakes.oxford_pets(tmp_path) / "annotations/test.txt").write_text(content)
    with raises(message):
        OxfordPets("test", str(tmp_path))


def test_missing_and_invalid_files_are_named(tmp_path: Path) -> None:
    root = fakes.oxford_pets(tmp_path)
    path = root / "annotations/trimaps/Abyssinian_201.png"
    Image.fromarray((np.array(fakes.opened(path)) - 1) * np.uint8(127)).save(path)
    (root / "images/yorkshire_terrier_190.jpg").unlink()
    problems = inspect(OxfordPets("test", str(root)), use_cache=False).problems
    assert len(problems) == 2
    assert "yorkshire_terrier_190.jpg is missing" in problems[0]
    assert f"mask {path} has label 0 (and 2 more); the classes have labels 2, 1, 3" in problems[1]
    (root / "annotations/trainval.txt").unlink()
    with raises(r"annotations/trainval\.txt is missing - restore it from annotations\.tar\.gz"):
        OxfordPets("train", str(root))
    with raises(r"dataset\.root=nowhere is not a folder; it should hold images/ and annotations/ with trimaps/"):
        OxfordPets("train", "nowhere")
    with raises("unknown split 'trainval' - the splits are train, val, test"):
        OxfordPets("trainval", str(root))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serve the archives at a second address; the first answers with an error."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = fakes.oxford_pets(tmp_path / "published")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with serving() as server:
        gone = server.serve("/gone", status(404))
        for part, archive in dict(oxford_pets.ARCHIVES).items():
            with tarfile.open(tmp_path / archive.name, "w:gz") as file:
                file.add(source / part, part)
            content = (tmp_path / archive.name).read_bytes()
            urls = (gone, server.serve(f"/{part}", whole(content)))
            served = archive._replace(urls=urls, sha256=hashlib.sha256(content).hexdigest())
            monkeypatch.setitem(oxford_pets.ARCHIVES, part, served)
        yield server


def test_the_archives_are_fetched_into_the_folder_that_torchvision_uses(published: Server) -> None:
    assert len(OxfordPets("train")) == 4
    assert len(OxfordPets("test")) == 2
    assert [path for path, _ in published.requests] == ["/gone", "/images", "/gone", "/annotations"]
    place = Path("data/oxford-iiit-pet")
    assert sorted(path.name for path in place.iterdir()) == ["annotations", "images"]
    unpacked = sorted(path.name for path in (place / "annotations").iterdir())
    assert unpacked == ["README", "test.txt", "trainval.txt", "trimaps"]
    assert OxfordPets("test", "data").names == OxfordPets("test", str(place)).names


def test_only_missing_archives_are_fetched_and_none_into_a_given_root(published: Server, tmp_path: Path) -> None:
    Path("given").mkdir()
    with raises(
        r"^dataset\.root=given does not contain images/ and annotations/ - put images\.tar\.gz \(the images, 0\.8 GB, "
        r"from http\S+\) and annotations\.tar\.gz \(lists and trimaps, 19 MB, from http\S+\) into \S+/given, or leave"
    ):
        OxfordPets("train", "given")
    for name in ("images.tar.gz", "annotations.tar.gz"):
        Path("given", name).write_bytes((tmp_path / name).read_bytes())
    assert len(OxfordPets("train", "given")) == 4
    assert published.requests == []
    Path("data").mkdir()
    Path("given").rename("data/oxford-iiit-pet")
    OxfordPets("train")
    assert published.requests == []


def test_the_hashes_are_those_of_other_libraries() -> None:
    """tensorflow/datasets and pytorch/vision list these hashes."""
    assert {part: archive.sha256 for part, archive in oxford_pets.ARCHIVES.items()} == {
        "images": "67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d",
        "annotations": "52425fb6de5c424942b7626b428656fcbd798db970a937df61750c0f1d358e91",
    }
    for archive in oxford_pets.ARCHIVES.values():
        assert all(url.startswith("https://") and url.endswith(f"/{archive.name}") for url in archive.urls)
