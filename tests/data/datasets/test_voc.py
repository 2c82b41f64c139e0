"""VOC and SBD: their splits and files, and their download when some or all mirrors fail."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fakes
import numpy as np
import pytest
from http_server import Handler, Server, in_pieces, serving, status, whole
from PIL import Image
from real_data import SHARED

from segdeconv.data import VOC
from segdeconv.data.datasets import voc
from segdeconv.data.inspection import inspect, inspect_all
from segdeconv.drawing import draw
from segdeconv.errors import UsageError

REAL = SHARED / "VOCdevkit" / "VOC2012"
needs_voc = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real VOC images in {REAL}")

TRAIN, VAL = ("2007_000001", "2007_000002"), ("2008_000001",)
# SBD has masks of an image of VOC's train, of one of its val, and of two without a mask in VOC.
SBD_TRAIN, SBD_VAL = ("2007_000002", "2009_000001"), ("2008_000001", "2010_000001")


def raises(message: str) -> Any:
    return pytest.raises(UsageError, match=message)


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def augmented(folder: Path) -> Path:
    """Write a VOC2012 that contains the converted masks of SBD."""
    fakes.voc(folder, TRAIN, VAL)
    (folder / "SegmentationClassAug").mkdir()
    for index, name in enumerate((*SBD_TRAIN, *SBD_VAL)):
        image, mask = fakes.voc_image_and_mask(50 + index, border=False)
        draw.save_mask(mask, voc.CLASSES, folder / "SegmentationClassAug" / f"{name}.png")
        if not (folder / "JPEGImages" / f"{name}.jpg").exists():
            Image.fromarray(image).save(folder / "JPEGImages" / f"{name}.jpg")
    return folder


# Reading


def test_voc_reads_images_masks_and_names_in_the_order_of_its_lists(tmp_path: Path) -> None:
    root = fakes.voc(tmp_path / "VOC2012", TRAIN, VAL)
    for split, names in (("train", TRAIN), ("val", VAL), ("trainval", TRAIN + VAL)):
        data = VOC(split, str(root))
        assert data.names == list(names)
        for index, sample in enumerate(data[i] for i in range(len(data))):
            image, mask = fakes.voc_image_and_mask((TRAIN + VAL).index(names[index]))
            np.testing.assert_array_equal(sample.mask, mask)
            assert 255 in mask
            np.testing.assert_allclose(sample.image, image, atol=60)  # a JPEG
            assert abs(sample.image.astype(float) - image).mean() < 6


def test_voc_has_the_devkits_classes_and_palette() -> None:
    names = (
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
        "pottedplant sheep sofa train tvmonitor"
    )
    palette = (
        "0,0,0 128,0,0 0,128,0 128,128,0 0,0,128 128,0,128 0,128,128 128,128,128 64,0,0 192,0,0 64,128,0 192,128,0 "
        "64,0,128 192,0,128 64,128,128 192,128,128 0,64,0 128,64,0 0,192,0 128,192,0 0,64,128"
    )
    assert " ".join(voc.CLASSES.names) == names
    assert voc.CLASSES.colours == tuple(tuple(map(int, colour.split(","))) for colour in palette.split())
    assert (voc.CLASSES.ignore_index, voc.CLASSES.ignore_colour) == (255, (224, 224, 192))


@pytest.mark.parametrize("above", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_the_root_may_be_the_folder_or_one_above_it(tmp_path: Path, above: str) -> None:
    fakes.voc(tmp_path / "root" / above, TRAIN, VAL)
    assert VOC("train", str(tmp_path / "root")).names == list(TRAIN)


def test_the_train_list_changes_train_alone(tmp_path: Path) -> None:
    root = str(augmented(tmp_path / "VOC2012"))
    trains = {name: VOC("train", root, train_list=name) for name in ("train", "trainval", "trainaug")}
    assert {name: data.names for name, data in trains.items()} == {
        name: VOC(name, root).names for name in ("train", "trainval", "trainaug")
    }
    assert {data.split for data in trains.values()} == {"train"}
    assert VOC("val", root, train_list="trainaug").names == list(VAL)
    fingerprints = {data.fingerprint for data in trains.values()}
    assert len(fingerprints) == 3  # otherwise one would reuse the cached inspection of another


def test_trainaug_is_sbd_and_vocs_train_without_vocs_val(tmp_path: Path) -> None:
    data = VOC("trainaug", str(augmented(tmp_path)))
    own, sbd = tmp_path / "SegmentationClass", tmp_path / "SegmentationClassAug"
    assert {pair.name: pair.mask.parent for pair in data.pairs} == {
        "2007_000001": own,
        "2007_000002": own,  # SBD has one too
        "2009_000001": sbd,
        "2010_000001": sbd,
    }
    np.testing.assert_array_equal(data[2].mask, fakes.voc_image_and_mask(51, border=False)[1])
    assert inspect_all([data, VOC("val", str(tmp_path))], use_cache=False)[0].num_images == 4


def test_an_existing_list_of_trainaug_is_used(tmp_path: Path) -> None:
    listed = augmented(tmp_path) / "ImageSets/Segmentation/trainaug.txt"
    listed.write_text("2010_000001\n2007_000001\n")
    assert VOC("trainaug", str(tmp_path)).names == ["2010_000001", "2007_000001"]
    listed.write_text("2010_000001\n2008_000001\n")
    with raises(
        r"trainaug\.txt lists 2008_000001, which is also in val\.txt \(1 such names\).* - remove them from the list"
    ):
        VOC("trainaug", str(tmp_path))


def test_training_on_trainval_is_refused_with_the_key_to_change(tmp_path: Path) -> None:
    root = str(fakes.voc(tmp_path, TRAIN, VAL))
    with raises(r"2008_000001\.jpg is in train and in val, .* - set dataset\.train_list to train or trainaug, since"):
        inspect_all([VOC(split, root, train_list="trainval") for split in ("train", "val")], use_cache=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"train\.txt lists no image"),
        ("2007_000001\n../x\n", r"train\.txt, line 2: '\.\./x' is not a name such as 2007_000032"),
        ("/JPEGImages/a.jpg /SegmentationClass/a.png\n", r"train\.txt, line 1: .* is not a name"),
        ("2007_000001\n2007_000001\n", r"train\.txt, line 2: '2007_000001' is listed twice"),
    ],
)
def test_a_bad_list_of_voc_is_refused_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    (fakes.voc(tmp_path, TRAIN, VAL) / "ImageSets/Segmentation/train.txt").write_text(content)
    with raises(message):
        VOC("train", str(tmp_path))


def test_a_missing_list_or_file_is_named(tmp_path: Path) -> None:
    root = fakes.voc(tmp_path, TRAIN, VAL)
    (root / "SegmentationClass" / "2007_000002.png").unlink()
    (root / "ImageSets/Segmentation/trainval.txt").unlink()
    with raises(r"Segmentation/trainval\.txt is missing - restore"):
        VOC("trainval", str(root))
    assert re.search(
        r"Class/2007_000002\.png is missing", inspect(VOC("train", str(root)), use_cache=False).problems[0]
    )
    with raises("unknown split 'test' - the splits are train, val, trainval, trainaug"):
        VOC("test", str(root))


@needs_voc
def test_real_masks_are_read_as_stored() -> None:
    """The images show two people with a bottle, four people on a sofa behind a chair, and two buses with a car."""
    expected = {
        "2011_000003": ((338, 500), {"background", "bottle", "person"}, True),
        "2011_000006": ((375, 500), {"background", "chair", "person", "sofa"}, True),
        "2011_000025": ((375, 500), {"background", "bus", "car"}, False),
    }
    data = VOC("trainval", str(REAL.parents[1]))
    assert data.names == list(expected)
    for image, mask, name in (data[index] for index in range(3)):
        size, names, ignored = expected[name]
        assert (image.shape, mask.shape, mask.dtype) == ((*size, 3), size, np.uint8)
        labels = set(np.unique(mask).tolist())
        assert {data.classes.names[label] for label in labels - {255}} == names
        assert (255 in labels) == ignored
        stored = fakes.opened(REAL / "SegmentationClass" / f"{name}.png")
        np.testing.assert_array_equal(mask, np.array(stored))
        assert np.array_equal(draw.colourise(mask, data.classes), np.array(stored.convert("RGB")))  # VOC's palette
        np.testing.assert_array_equal(image, np.array(fakes.opened(REAL / "JPEGImages" / f"{name}.jpg")))


# Fetching


class Published(NamedTuple):
    """Small archives with the published layout, and the server that serves them at /voc and /sbd."""

    server: Server
    voc: bytes
    sbd: bytes

    @property
    def requests(self) -> list[str]:
        return [path for path, _ in self.server.requests]


def packed(folder: Path, top: str, archive: Path) -> bytes:
    with tarfile.open(archive, "w:gz" if archive.suffix == ".tgz" else "w") as file:
        file.add(folder / top, top)
    return archive.read_bytes()


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Published]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = tmp_path / "published"
    root = fakes.voc(source / "VOCdevkit" / "VOC2012", TRAIN, VAL)
    fakes.sbd(source, SBD_TRAIN, SBD_VAL, images=root / "JPEGImages")
    archives = {
        "VOC_ARCHIVE": packed(source, "VOCdevkit", tmp_path / "voc.tar"),
        "SBD_ARCHIVE": packed(source, "benchmark_RELEASE", tmp_path / "sbd.tgz"),
    }
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with serving() as server:
        for name, content in archives.items():
            monkeypatch.setattr(
                voc,
                name,
                getattr(voc, name)._replace(
                    urls=(server.serve(f"/{name[:3].lower()}", whole(content)),),
                    sha256=hashlib.sha256(content).hexdigest(),
                    lists={"train": 2, "val": 1, "trainval": 3} if name[0] == "V" else {"train": 2, "val": 2},
                ),
            )
        yield Published(server, *archives.values())


WANTED = [
    *(f"ImageSets/Segmentation/{split}.txt" for split in ("train", "trainval", "val")),
    *(f"JPEGImages/{name}.jpg" for name in sorted({*TRAIN, *VAL, *SBD_TRAIN, *SBD_VAL})),
    *(f"{part}/{name}.png" for part in ("SegmentationClass", "SegmentationObject") for name in (*TRAIN, *VAL)),
]


def test_voc_is_fetched_where_no_root_is_given_and_only_once(published: Published) -> None:
    assert VOC("train").names == list(TRAIN)
    assert VOC("val").names == list(VAL)
    assert published.requests == ["/voc"]
    # Only the needed files are unpacked, and neither the archive nor a temporary folder remains.
    assert listing(Path("data")) == [f"VOCdevkit/VOC2012/{path}" for path in WANTED]
    assert not [path for path in Path("data").rglob("*") if "unpacking" in path.name]
    np.testing.assert_array_equal(VOC("val")[0].mask, fakes.voc_image_and_mask(2)[1])


def test_sbd_is_fetched_and_converted_for_trainaug_alone(published: Published) -> None:
    VOC("val", train_list="trainaug")
    assert published.requests == ["/voc"]
    data = VOC("train", train_list="trainaug")
    assert published.requests == ["/voc", "/sbd"]
    assert data.names == ["2007_000001", "2007_000002", "2009_000001", "2010_000001"]
    masks = sorted({*SBD_TRAIN, *SBD_VAL})
    converted = [f"{part}Aug/{name}.png" for part in ("SegmentationClass", "SegmentationObject") for name in masks]
    assert listing(Path("data")) == sorted(f"VOCdevkit/VOC2012/{path}" for path in [*WANTED, *converted])
    for index, name in enumerate((*SBD_TRAIN, *SBD_VAL)):
        stored = fakes.opened(Path("data/VOCdevkit/VOC2012/SegmentationClassAug", f"{name}.png"))
        mask = fakes.voc_image_and_mask(50 + index, border=False)[1]
        assert stored.mode == "P"
        np.testing.assert_array_equal(np.array(stored), mask)
        np.testing.assert_array_equal(np.array(stored.convert("RGB")), np.array(voc.CLASSES.colours)[mask])
        objects = fakes.opened(Path("data/VOCdevkit/VOC2012/SegmentationObjectAug", f"{name}.png"))
        np.testing.assert_array_equal(np.array(objects), fakes.voc_objects(mask))
    VOC("train", train_list="trainaug")
    assert published.requests == ["/voc", "/sbd"]
    assert not [path for path in Path("data").rglob("*") if "unpacking" in path.name or path.suffix == ".mat"]


def redirect_to_http(handler: Handler) -> None:
    handler.head(302, Content_Length=0, Location="http://example.org/voc.tar")


def corrupt(content: bytes) -> bytes:
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


@pytest.mark.parametrize("trouble", ["absent", "cut", "cut for good", "corrupt", "redirecting away", "short"])
def test_the_second_mirror_serves_when_the_first_does_not(
    published: Published, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    content = published.voc
    first = {
        "absent": status(404),
        "cut": in_pieces(content),  # the first mirror continues it
        "cut for good": in_pieces(content, 1000),
        "corrupt": whole(corrupt(content)),
        "redirecting away": redirect_to_http,
        "short": whole(content[:-512]),
    }[trouble]
    urls = (published.server.serve("/first", first), published.server.serve("/second", in_pieces(content)))
    monkeypatch.setattr(voc, "VOC_ARCHIVE", voc.VOC_ARCHIVE._replace(urls=urls))
    assert VOC("trainval").names == [*TRAIN, *VAL]
    assert published.requests[-1] == ("/first" if trouble == "cut" else "/second")
    assert listing(Path("data")) == [f"VOCdevkit/VOC2012/{path}" for path in WANTED]


def test_without_a_network_the_error_names_the_files_and_their_folder(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VOC_ARCHIVE", "SBD_ARCHIVE"):
        monkeypatch.setattr(
            voc, name, getattr(voc, name)._replace(urls=("http://127.0.0.1:9/a", "http://127.0.0.1:9/b"))
        )
    folder = re.escape(str(Path("data").resolve()))
    voc_file = r"VOCtrainval_11-May-2012\.tar \(VOC's images and masks, 2\.0 GB, from http\S+\)"
    sbd_file = r"benchmark\.tgz \(SBD's masks, 1\.4 GB, from http\S+\)"
    way_out = f"into {folder}, or give an unpacked VOC2012 as dataset.root=DIR$"
    with raises(rf"^could not download VOCtrainval_11-May-2012\.tar \(.*refused\) - put {voc_file} {way_out}"):
        VOC("train")
    with raises(rf"^could not download VOC\S+ \(.*\) - put {voc_file} and {sbd_file} {way_out}"):
        VOC("train", train_list="trainaug")
    Path("data", "VOCtrainval_11-May-2012.tar").write_bytes(published.voc)
    with raises(rf"^could not download benchmark\.tgz \(.*\) - put {sbd_file} {way_out}"):
        VOC("train", train_list="trainaug")
    assert VOC("train").names == list(TRAIN)  # the archive that existed is unpacked by now


@pytest.mark.parametrize("root", [None, "given"])
def test_existing_archives_are_used_without_a_connection_and_stay(published: Published, root: str | None) -> None:
    folder = Path(root or "data")
    folder.mkdir()
    (folder / "VOCtrainval_11-May-2012.tar").write_bytes(published.voc)
    (folder / "benchmark.tgz").write_bytes(published.sbd)
    assert len(VOC("train", root, train_list="trainaug")) == 4
    assert published.requests == []
    assert sorted(path.name for path in folder.iterdir()) == [
        "VOCdevkit",
        "VOCtrainval_11-May-2012.tar",
        "benchmark.tgz",
    ]


def test_an_archive_with_the_wrong_hash_is_not_opened(published: Published) -> None:
    Path("given").mkdir()
    Path("given", "VOCtrainval_11-May-2012.tar").write_bytes(corrupt(published.voc))
    with raises(
        r"given/VOCtrainval_11-May-2012\.tar: it is not the published file, its sha256 is [0-9a-f]{64}\) - put"
    ):
        VOC("train", "given")
    assert [path.name for path in Path("given").iterdir()] == ["VOCtrainval_11-May-2012.tar"]


def test_nothing_is_fetched_into_a_given_root(published: Published) -> None:
    Path("given").mkdir()
    with raises(
        r"dataset\.root=given does not contain a VOC2012 with JPEGImages, .* - put VOC\S+ \(.*\) into \S*/given, or"
    ):
        VOC("train", "given")
    fakes.voc(Path("given"), TRAIN, VAL)
    with raises(
        r"root=given does not contain SegmentationClassAug, which trainaug needs - put benchmark\.tgz \(.*\) into"
    ):
        VOC("trainaug", "given")
    with raises(r"dataset\.root=nowhere is not a folder; it should hold JPEGImages"):
        VOC("train", "nowhere")
    assert published.requests == []


def test_an_interrupted_unpacking_or_conversion_starts_over(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = Path("data/VOC2012.unpacking/VOCdevkit/VOC2012/JPEGImages")
    leftover.mkdir(parents=True)
    (leftover / "half.jpg").write_text("")
    real, saved = draw.save_mask, []

    def stopped(*arguments: Any) -> None:
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(draw, "save_mask", stopped)
        with pytest.raises(KeyboardInterrupt):
            VOC("trainaug")
    assert not Path("data/VOCdevkit/VOC2012/SegmentationClassAug").exists()  # only one of four masks was converted
    assert VOC("train").names == list(TRAIN)
    assert len(VOC("trainaug")) == 4
    assert published.requests == ["/voc", "/sbd"]
    assert [path.name for path in Path("data").iterdir()] == ["VOCdevkit"]  # the downloaded archives are deleted
    assert not [path for path in Path("data").rglob("*") if "half" in path.name or "unpacking" in path.name]


@pytest.mark.parametrize("fault", ["image", "mask", "count"])
def test_an_archive_without_a_file_that_it_lists_is_refused(
    published: Published, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    source = tmp_path / "published" / "VOCdevkit" / "VOC2012"
    if fault == "count":
        (source / "ImageSets/Segmentation/val.txt").write_text("2008_000001\n2008_000002\n")
        message = r"VOC\S+ lists 2 images of val, not 1 - download it again"
    else:
        path = "JPEGImages/2007_000002.jpg" if fault == "image" else "SegmentationClass/2007_000002.png"
        (source / path).unlink()
        message = rf"VOC\S+ lists 2007_000002, but does not contain {Path(path).name} - download it again"
    content = packed(tmp_path / "published", "VOCdevkit", tmp_path / "faulty.tar")
    urls = (published.server.serve("/faulty", whole(content)),)
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(voc, "VOC_ARCHIVE", voc.VOC_ARCHIVE._replace(urls=urls, sha256=digest))
    with raises(message):
        VOC("train")
    assert not Path("data/VOCdevkit").exists()


def test_an_incomplete_unpacked_folder_is_named_before_anything_is_fetched(published: Published) -> None:
    Path("data/VOCdevkit/VOC2012/JPEGImages").mkdir(parents=True)
    with raises(r"data/VOCdevkit/VOC2012 has no ImageSets/Segmentation - complete it, or move it away"):
        VOC("train")
    assert published.requests == []


def test_the_hashes_are_those_of_other_libraries() -> None:
    """tensorflow/datasets and pytorch/vision list these hashes."""
    assert voc.VOC_ARCHIVE.sha256 == "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb"
    assert voc.SBD_ARCHIVE.sha256 == "6a5a2918d5c73ce032fdeba876574d150d9d04113ab87540a1304cbcc715be53"
    for archive in (voc.VOC_ARCHIVE, voc.SBD_ARCHIVE):
        assert all(url.startswith("https://") and url.endswith(f"/{archive.name}") for url in archive.urls)
    assert voc.VOC_ARCHIVE.lists["train"] + voc.VOC_ARCHIVE.lists["val"] == voc.VOC_ARCHIVE.lists["trainval"] == 2913
    assert sum(voc.SBD_ARCHIVE.lists.values()) == 11_355
