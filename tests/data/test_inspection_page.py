"""inspect.html in a real browser: its counts equal those of the files, names are escaped, and problems are shown."""

from __future__ import annotations

from pathlib import Path

import fakes
import numpy as np
import pytest
import yaml
from browser import browser_page, needs_chromium
from page_checks import FILES, IGNORED, NAMES, contrasts, hostile, rows
from PIL import Image
from test_inspection import damage

from segdeconv.data import CamVid, Folder, inspection_page
from segdeconv.data.inspection import inspect


@pytest.fixture(scope="module")
def folder(commands, tmp_path_factory) -> Path:
    """Write the pages of a folder with hostile names (good/) and of a CamVid with damaged train files (bad/)."""
    folder = tmp_path_factory.mktemp("inspected")
    root = hostile(folder / "data")
    classes = {**{name: label for label, name in enumerate(NAMES)}, "ignore": IGNORED}
    (root / "classes.yaml").write_text(yaml.safe_dump(classes, allow_unicode=True))
    for path in sorted((root / "val" / "images").iterdir()):  # files with hostile names move to train
        if path.stem in FILES:
            for sub in ("images", "masks"):
                (root / "val" / sub / path.name).rename(root / "train" / sub / path.name)
    arguments = ("dataset=folder", f"dataset.root={root}", "dataset.size=[32,40]", "augment=flip")
    done = commands("inspect_data", *arguments, "--out", "good", cwd=folder)
    assert done.code == 0, done.err
    assert f"page:    {Path('good') / 'inspect.html'}" in done.out
    damage(fakes.camvid(folder / "camvid"))
    done = commands("inspect_data", "dataset=camvid", f"dataset.root={folder / 'camvid'}", "--out=bad", cwd=folder)
    assert done.code == 2
    assert done.error_message.startswith("camvid has 4 problems")
    return folder


@needs_chromium
def test_the_page_shows_the_contents_of_the_files(folder):
    masks = {
        split: [np.array(fakes.opened(path)) for path in (folder / "data" / split / "masks").iterdir()]
        for split in ("train", "val")
    }
    with browser_page() as browser:
        browser.goto((folder / "good" / "inspect.html").as_uri())
        for label, row in zip((0, 1, 2, IGNORED), rows(browser, "classes"), strict=True):
            expected = [NAMES[label] if label < 3 else "ignored", str(label)]
            for split in masks.values():
                pixels = sum(int((mask == label).sum()) for mask in split)
                expected.append(f"{100 * pixels / sum(mask.size for mask in split):.2f}")
                expected.append(str(sum(bool((mask == label).any()) for mask in split)))
            assert row[:2] + row[3:-1] == expected
        sizes = rows(browser, "sizes")
        assert sum(int(row[-1]) for row in sizes) == 16
        names = set(browser.locator(".gallery h3 b").all_inner_texts())
        assert FILES[0] in names
        assert browser.evaluate("window.hit") is None
        widths = browser.evaluate("[...document.querySelectorAll('main img')].map((image) => image.naturalWidth)")
        assert len(widths) == 6 * browser.locator(".gallery > li").count() + len(rows(browser, "values"))
        assert min(widths) > 0
        browser.locator(".picture").nth(3).press("Enter")
        assert browser.locator("#viewer").is_visible()
        browser.keyboard.press("Escape")
        for scheme in ("light", "dark"):
            browser.emulate_media(color_scheme=scheme)
            assert contrasts(browser) == []

        browser.goto((folder / "bad" / "inspect.html").as_uri())
        suspects = browser.locator("#problems li")
        texts = suspects.all_inner_texts()
        assert len(texts) == 4
        counts = [suspect.locator("img").count() for suspect in suspects.all()]
        assert counts == [1, 2, 2, 1]  # of a truncated and of a missing image, only the mask is shown
        assert "train_001.png has label 77" in texts[1]
        assert browser.locator("#samples").count() == 0


def test_the_images_with_most_pixels_of_a_class_equal_a_brute_force_count(tmp_path):
    root = fakes.folder(tmp_path / "own", layout="subfolders")
    dataset = Folder("train", str(root))
    pixels = [[int((dataset[index].mask == label).sum()) for index in range(len(dataset))] for label in range(3)]
    for label, indices in enumerate(inspect(dataset, use_cache=False).largest):
        assert indices == sorted(range(len(dataset)), key=lambda index: (-pixels[label][index], index))[:3]


def test_the_augmented_images_of_training_are_shown_with_the_rarest_class_first(tmp_path, monkeypatch):
    from segdeconv.data.module import DataPipeline
    from segdeconv.data.transforms import build_transforms

    dataset = CamVid("train", str(fakes.camvid(tmp_path / "camvid")))
    for index, pair in enumerate(dataset.pairs):  # road everywhere, and four pixels of another class in one image
        mask = np.full(fakes.SIZE, 3, dtype=np.uint8)
        mask[:2, :2] = 10 if index == 2 else 3
        Image.fromarray(mask).save(pair.mask)
    inspection = inspect(dataset, use_cache=False)
    transforms = build_transforms(
        {"flip": {"_target_": "albumentations.HorizontalFlip", "p": 1.0}}, ignore_index=11, mean=(0, 0, 0)
    )
    training = DataPipeline(dataset, dataset, transforms, 0, size=(48, 64), cache="none").samples
    drawn = []
    monkeypatch.setattr(
        inspection_page, "_image_and_mask", lambda image, mask, classes, suffix: drawn.append((image, mask)) or []
    )
    first = next(inspection_page._rarest(dataset, inspection, training, None))
    assert first.name == dataset.names[2]
    assert first.note == "many pixels of bicyclist, which occurs in 1 of 4 images"
    image, mask, _ = dataset[2]
    np.testing.assert_array_equal(drawn[0][0], image)
    for index in (1, 2):
        np.testing.assert_array_equal(drawn[index][0], image[:, ::-1])
        np.testing.assert_array_equal(drawn[index][1], mask[:, ::-1])
