"""report.html as a person meets it, in a real browser: every number against the saved masks, every name as text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import torch
from browser import browser_page, needs_chromium
from page_checks import FILES, IGNORED, NAMES, contrasts, hostile, rows
from test_breakdown import distance_by_hand

from segdeconv.checkpoints import checkpoint
from segdeconv.classes import Classes
from segdeconv.data import VOC, CamVid, Folder, Shapes
from segdeconv.data.dataset import Sample, SegmentationDataset
from segdeconv.data.datasets.camvid import PUBLISHED as CAMVID
from segdeconv.data.datasets.sunrgbd import PUBLISHED as SUNRGBD
from segdeconv.data.relabelled import Relabelled, in_order_of
from segdeconv.drawing import html
from segdeconv.evaluation import report_page
from segdeconv.evaluation.boundary import Boundaries
from segdeconv.evaluation.evaluate import Evaluation
from segdeconv.inference.scorers import ClassScores, entropy
from segdeconv.inference.segmenter import Segmenter


def node(root: Path, *order: int) -> dict[str, object]:
    """The config of that folder, its classes in this order."""
    return {
        "_target_": "segdeconv.data.Folder",
        "root": str(root),
        "classes": {**{NAMES[label]: label for label in order}, "ignore": IGNORED},
    }


@pytest.fixture(scope="module")
def place(commands, tmp_path_factory) -> Path:
    """Two untrained networks, their classes in different orders, evaluated alone (one/, other/) and compared (two/)."""
    place = tmp_path_factory.mktemp("report")
    root = hostile(place / "data")
    run = place / '<b>run</b> & "co"'
    first = fakes.untrained(run / "first.ckpt", node(root, 0, 1, 2))
    second = fakes.untrained(run / "second.ckpt", node(root, 2, 0, 1), seed=1)
    for words in (
        (first, "--out", "one", "--masks", "masks"),
        (second, "--out", "other", "--masks", "other_masks"),
        (first, "--compare", second, "--out", "two"),
    ):
        done = commands("evaluate", *words, cwd=place)
        assert done.code == 0, done.err
    return place


def read(place: Path, masks: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, truth, prediction) of every image, from the files."""
    found = []
    for path in sorted((place / "data" / "val" / "masks").iterdir()):
        prediction = np.array(fakes.opened(place / masks / path.name))
        found.append((path.stem, np.array(fakes.opened(path)), prediction))
    return found


def counted(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    confusion = np.zeros((3, 3), dtype=np.int64)
    for truth, prediction in pairs:
        for true in range(3):
            for found in range(3):
                confusion[true, found] += int(((truth == true) & (prediction == found)).sum())
    return confusion


def ious(confusion: np.ndarray) -> list[float]:
    either = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return [float(both / one) if one else float("nan") for both, one in zip(confusion.diagonal(), either, strict=True)]


def shown(value: float, digits: int = 1) -> str:
    return html.MISSING if np.isnan(value) else f"{100 * value:.{digits}f}"


@needs_chromium
def test_the_page_says_what_the_masks_say_and_can_be_used(place):
    """One session for all that needs a browser, since a session costs a second."""
    images = read(place, "masks")
    confusion = counted([(truth, prediction) for _, truth, prediction in images])
    outlines = Boundaries(3, IGNORED)
    for _, truth, prediction in images:
        outlines.update(prediction, truth)
    with browser_page() as browser:
        browser.goto((place / "one" / "report.html").as_uri())

        # Numbers.
        total, truths, predicted = confusion.sum(), confusion.sum(1), confusion.sum(0)
        headline = dict(
            zip(*[browser.locator(f".scores {tag}").all_inner_texts() for tag in ("dt", "dd")], strict=True)
        )
        assert headline["mean IoU"] == shown(np.nanmean(ious(confusion)))
        assert headline["pixel accuracy"] == shown(confusion.trace() / total)
        assert headline["mean accuracy"] == shown(np.mean(confusion.diagonal() / truths))
        assert headline["frequency-weighted IoU"] == shown(sum(truths * ious(confusion)) / total)
        for label, row in enumerate(rows(browser, "classes")):
            right = confusion[label, label]
            accuracy = right / truths[label]
            precision = right / predicted[label] if predicted[label] else float("nan")
            there = sum(bool((truth == label).any()) for _, truth, _ in images)
            boundary = shown(outlines.compute().f1_by_class[label])
            assert row == [
                NAMES[label], shown(ious(confusion)[label]), shown(accuracy), shown(precision), boundary,
                shown(truths[label] / total, 2), f"{truths[label]:,}", str(there),
            ]  # fmt: skip
        for label, row in enumerate(rows(browser, "confusion")):
            shares = [100 * value / truths[label] for value in confusion[label]]
            assert row == [NAMES[label], *(f"{share:.0f}" if share > 0.5 else "" for share in shares)]
        wrong = sorted(((confusion[a, b], a, b) for a in range(3) for b in range(3) if a != b), reverse=True)
        assert [row[2] for row in rows(browser, "confusion", 1)] == [f"{pixels:,}" for pixels, _, _ in wrong if pixels]
        ends = (0, 2, 4, 8, 16, 32, np.inf)
        distances = [np.minimum(distance_by_hand(truth), 1e6) for _, truth, _ in images]
        for first, end, row in zip(ends[:-1], ends[1:], rows(browser, "boundaries"), strict=True):
            inside = [(distance >= first) & (distance < end) for distance in distances]
            part = counted([(truth[band], found[band]) for (_, truth, found), band in zip(images, inside, strict=True)])
            both = [float("nan")] * 2 if not part.sum() else [part.trace() / part.sum(), np.nanmean(ious(part))]
            assert row[1:] == [*map(shown, both), shown(part.sum() / total), f"{part.sum():,}"]
        assert [row[0] for row in rows(browser, "sizes")] == [
            "1×1 to 17×20", "20×31", "25×25 to 24×33", "32×27 to 30×30",
        ]  # fmt: skip
        assert sum(int(row[-1].replace(",", "")) for row in rows(browser, "sizes")) == total
        by_name = {name: counted([(truth, prediction)]) for name, truth, prediction in images}
        for item in browser.locator("#gallery > li").all():
            name, _, iou, accuracy, *_ = item.locator("h3 > *").all_inner_texts()
            part = by_name[name]
            assert iou == f"mean IoU {shown(np.nanmean(ious(part)) if part.sum() else float('nan'))}"
            assert accuracy == f"accuracy {shown(part.trace() / part.sum() if part.sum() else float('nan'))}"
        assert "nan" not in browser.inner_text("body").lower()

        # Names stay text, and pictures are there.
        assert browser.evaluate("window.hit") is None
        assert {name for name, _, _ in images} == set(browser.locator("#gallery h3 b").all_inner_texts())
        assert set(FILES) <= set(by_name)
        assert '<b>run</b> & "co"/first.ckpt' in browser.inner_text("#made")
        widths = browser.evaluate(
            "[...document.images].filter((one) => one.closest('main')).map((one) => one.naturalWidth)"
        )
        assert len(widths) == 5 * len(images)
        assert min(widths) > 0

        # Order, by mouse and by keys.
        head = browser.locator("#classes th button", has_text="IoU")
        of_classes = [float(shown(iou)) for iou in ious(confusion)]
        for act, order in ((head.click, "descending"), (lambda: head.press("Enter"), "ascending")):
            act()
            assert browser.locator("#classes th[aria-sort]:not([aria-sort=none])").get_attribute("aria-sort") == order
            got = [float(row[1]) for row in rows(browser, "classes")]
            assert got == sorted(of_classes, reverse=order == "descending")
        for key, button in (("name", "name"), ("uncertainty", "uncertainty"), ("accuracy", "accuracy")):
            browser.locator(".controls button", has_text=button).press("Enter")
            values = [item.get_attribute(f"data-{key}") for item in browser.locator("#gallery > li").all()]
            if key != "name":
                numbers = [float(value) for value in values if value]
                assert numbers == sorted(numbers, reverse=key == "uncertainty")
                assert len(numbers) == len(values)
            assert browser.locator(".controls [aria-pressed=true]").inner_text().split()[0] == button

        # A picture, large.
        viewer, large = browser.locator("#viewer"), browser.locator("#viewer img")
        picture = browser.locator("#gallery .picture").nth(1)
        for opens in (picture.click, lambda: picture.press("Enter")):
            opens()
            assert viewer.is_visible()
            assert large.get_attribute("src") == picture.locator("img").get_attribute("src")
            browser.keyboard.press("ArrowRight")
            after = browser.locator("#gallery .picture img").nth(2)
            assert large.get_attribute("src") == after.get_attribute("src")
            browser.keyboard.press("Escape")
            assert not viewer.is_visible()
            assert browser.evaluate("document.activeElement.className") == "picture"

        # Light, dark, paper.
        for scheme in ("light", "dark"):
            browser.emulate_media(color_scheme=scheme)
            assert contrasts(browser) == []
        assert browser.pdf()[:5] == b"%PDF-"

        # Two networks.
        browser.goto((place / "two" / "report.html").as_uri())
        of_first = np.array([2, 0, 1], np.uint8)  # the first's index of each class of the second
        others = ious(counted([(truth, of_first[found]) for _, truth, found in read(place, "other_masks")]))
        for label, row in enumerate(rows(browser, "classes")):
            assert row[:3] == [NAMES[label], shown(ious(confusion)[label]), shown(others[label])]
            assert row[3] == html.points(others[label] - ious(confusion)[label])
        assert browser.locator("#differing li").count() > 0
        assert contrasts(browser) == []


# What needs no browser.


class Few(SegmentationDataset):
    """Any masks, all pictures grey."""

    split = "val"
    classes = Shapes.classes

    def __init__(self, *masks: np.ndarray) -> None:
        self.masks = masks
        self.names = [f"image {place}" for place in range(len(masks))]

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.full((*self.masks[index].shape, 3), 90, np.uint8), self.masks[index], self.names[index])

    @property
    def fingerprint(self) -> str:
        return "few"


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> checkpoint.Checkpoint:
    place = tmp_path_factory.mktemp("network")
    return checkpoint.read(fakes.untrained(place / "a.ckpt", {"_target_": "segdeconv.data.Shapes", "num_train": 2}))


def evaluated(network: checkpoint.Checkpoint, *masks: np.ndarray, **more: object) -> tuple[dict[str, Any], str]:
    """(report, page) of a network of seven classes on these masks; more: what else the report holds."""
    dataset = Few(*masks)
    done = Evaluation.of(Segmenter(network, device=torch.device("cpu")), dataset, outlines=len(masks) < 10)
    report = {**done.report(command="evaluate"), **more}
    return report, report_page.build_page(report_page.Evaluated(report, done.gallery), dataset)


@pytest.mark.parametrize(
    "masks",
    [
        (),
        (np.zeros((1, 1), np.uint8),),
        (np.full((30, 20), IGNORED, np.uint8),),
        (np.zeros((20, 30), np.uint8), np.full((20, 30), IGNORED, np.uint8), np.ones((1, 40), np.uint8)),
    ],
    ids=["no image", "one pixel", "all ignored", "some of each"],
)
def test_a_split_with_little_in_it_has_a_page_without_nan(network, masks):
    report, html = evaluated(network, *masks)
    assert report["num_images"] == len(masks)
    text = re.sub(r"<head>.*?</head>|data:image[^\"]*|<script>.*?</script>|<pre.*?</pre>", "", html, flags=re.DOTALL)
    assert not re.search(r"(>|data-\w+=\")\W*(nan|inf|none)\b", text, re.IGNORECASE)
    json.loads(json.dumps(report, allow_nan=False))


@pytest.mark.parametrize("num", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_page_of_many_images_stays_small_and_says_how_many_it_shows(network, num):
    noise = np.random.default_rng(0).integers(0, 2, (num, 6, 7)).astype(np.uint8)
    _, html = evaluated(network, *noise)
    assert len(html) < 3e5
    assert html.count('class="picture"') == 24 * 5
    assert f"24 of {num:,} images: the worst, the median and the best" in html


def test_entropy_is_that_of_the_class_probabilities():
    logits = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)) * 4
    expected = torch.distributions.Categorical(logits=logits.permute(0, 2, 3, 1)).entropy()
    torch.testing.assert_close(entropy(ClassScores(logits, False)), expected)
    torch.testing.assert_close(entropy(ClassScores(logits.softmax(dim=1), True)), expected)
    sure = torch.tensor([0.0, 800.0, -800.0]).view(1, 3, 1, 1)
    assert entropy(ClassScores(sure, False)).item() == 0


def test_tables_of_other_measurements_are_shown_if_they_are_there(network):
    mask = np.zeros((20, 30), np.uint8)
    _, html = evaluated(network, mask)
    assert 'id="ablation"' not in html
    assert 'id="signals"' not in html
    ablation = [{"upsampling": "corner", "level": 2, "miou": 0.125, "boundary_f1": None}]
    _, html = evaluated(network, mask, ablation=ablation, uncertainty=[{"signal": "entropy", "auroc": 0.875}])
    assert re.search(r"corner</td>.*?12\.5</td>.*?–</td>", html, re.DOTALL)
    assert re.search(r"entropy</td>.*?87\.5</td>", html, re.DOTALL)


def test_networks_of_other_classes_are_not_compared(commands, place, tmp_path):
    other = fakes.untrained(tmp_path / "other.ckpt", {"_target_": "segdeconv.data.Shapes", "num_train": 2})
    done = commands("evaluate", place / '<b>run</b> & "co"' / "first.ckpt", "--compare", other, "--out", "x", cwd=place)
    assert done.code == 2
    assert "the data has 3 classes (" in done.error_message
    assert "other.ckpt has 7 classes (background, disc, ring, ...); '" in done.error_message
    assert "compare networks of the same classes, which are matched by their names" in done.error_message
    assert not (place / "x").exists()


# Published scores.


@pytest.mark.parametrize("published", [CAMVID, SUNRGBD])
def test_published_accuracies_by_class_have_the_published_mean(published):
    found = [one for one in published if one.accuracy]
    assert found
    for one in found:
        assert np.mean(list(one.accuracy.values())) == pytest.approx(one.mean_accuracy, abs=0.03)


def test_published_scores_go_with_the_classes_they_are_of(tmp_path):
    dataset = CamVid("train", str(fakes.camvid(tmp_path / "camvid")))
    assert set(CAMVID[0].accuracy) == set(dataset.classes.names)
    turned = Classes(dataset.classes.names[::-1], dataset.classes.colours[::-1], 255)
    assert in_order_of(dataset, turned).published is dataset.published
    assert Relabelled(dataset, {"sky": "ignore"}).published == ()
    assert Folder("train", str(fakes.folder(tmp_path / "own"))).published == ()
    assert "DeconvNet" in {one.network for one in VOC.published}
