"""report.html in a real browser: numbers are checked against the saved masks, names appear as plain text."""

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
    """Return the config of a folder data set with its classes in this order."""
    return {
        "_target_": "segdeconv.data.Folder",
        "root": str(root),
        "classes": {**{NAMES[label]: label for label in order}, "ignore": IGNORED},
    }


@pytest.fixture(scope="module")
def folder(commands, tmp_path_factory) -> Path:
    """Evaluate two untrained networks with different class orders, alone (one/, other/) and compared (two/)."""
    folder = tmp_path_factory.mktemp("report")
    root = hostile(folder / "data")
    run = folder / '<b>run</b> & "co"'
    first = fakes.untrained(run / "first.ckpt", node(root, 0, 1, 2))
    second = fakes.untrained(run / "second.ckpt", node(root, 2, 0, 1), seed=1)
    epochs = "4,0,2,1,0.2", "8,1,1,0.9,0.6", "12,2,0.5,1.2,0.4"
    (run / "metrics.csv").write_text("\n".join(["step,epoch,train/loss,val/loss,val/miou", *epochs, ""]))
    for words in (
        (first, "--out", "one", "--masks", "masks"),
        (second, "--out", "other", "--masks", "other_masks"),
        (first, "--compare", second, "--out", "two"),
    ):
        done = commands("evaluate", *words, cwd=folder)
        assert done.code == 0, done.err
    return folder


def read(folder: Path, masks: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return (name, truth, prediction) of every image, from the files."""
    images = []
    for path in sorted((folder / "data" / "val" / "masks").iterdir()):
        prediction = np.array(fakes.opened(folder / masks / path.name))
        images.append((path.stem, np.array(fakes.opened(path)), prediction))
    return images


def counted(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    confusion = np.zeros((3, 3), dtype=np.int64)
    for truth, prediction in pairs:
        for true in range(3):
            for predicted in range(3):
                confusion[true, predicted] += int(((truth == true) & (prediction == predicted)).sum())
    return confusion


def ious(confusion: np.ndarray) -> list[float]:
    unions = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return [
        float(correct / union) if union else float("nan")
        for correct, union in zip(confusion.diagonal(), unions, strict=True)
    ]


def shown(value: float, digits: int = 1) -> str:
    return html.MISSING if np.isnan(value) else f"{100 * value:.{digits}f}"


@needs_chromium
def test_the_page_agrees_with_the_masks_and_is_usable(folder):
    """All checks share one browser session, since starting one takes a second."""
    images = read(folder, "masks")
    confusion = counted([(truth, prediction) for _, truth, prediction in images])
    outlines = Boundaries(3, IGNORED)
    for _, truth, prediction in images:
        outlines.update(prediction, truth)
    with browser_page() as browser:
        browser.goto((folder / "one" / "report.html").as_uri())

        # Numbers.
        total, truths, predicted = confusion.sum(), confusion.sum(1), confusion.sum(0)
        headline = dict(
            zip(*[browser.locator(f".scores {tag}").all_inner_texts() for tag in ("dt", "dd")], strict=True)
        )
        baseline = {name: text.split()[-1] for name, text in headline.items() if "baseline" in text}
        assert baseline == {
            "mean IoU": shown(truths.max() / total / 3),  # the IoU of the most frequent class, and zero twice
            "mean Dice": shown(2 * truths.max() / (total + truths.max()) / 3),
            "pixel accuracy": shown(truths.max() / total),
            "mean accuracy": shown(1 / 3),
            "frequency-weighted IoU": shown((truths.max() / total) ** 2),
        }
        headline = {name: text.split()[0] for name, text in headline.items()}
        assert headline["mean IoU"] == shown(np.nanmean(ious(confusion)))
        dices = 2 * confusion.diagonal() / (truths + predicted)
        assert headline["mean Dice"] == shown(np.mean(dices))
        assert headline["pixel accuracy"] == shown(confusion.trace() / total)
        assert headline["mean accuracy"] == shown(np.mean(confusion.diagonal() / truths))
        assert headline["frequency-weighted IoU"] == shown(sum(truths * ious(confusion)) / total)
        for label, row in enumerate(rows(browser, "classes")):
            correct = confusion[label, label]
            accuracy = correct / truths[label]
            dice = 2 * correct / (truths[label] + predicted[label])
            precision = correct / predicted[label] if predicted[label] else float("nan")
            num_images = sum(bool((truth == label).any()) for _, truth, _ in images)
            boundary = shown(outlines.compute().f1_by_class[label])
            assert row == [
                NAMES[label], shown(ious(confusion)[label]), shown(dice), shown(accuracy), shown(precision), boundary,
                shown(truths[label] / total, 2), f"{truths[label]:,}", str(num_images),
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
            part = counted(
                [(truth[band], prediction[band]) for (_, truth, prediction), band in zip(images, inside, strict=True)]
            )
            expected = [float("nan")] * 2 if not part.sum() else [part.trace() / part.sum(), np.nanmean(ious(part))]
            assert row[1:] == [*map(shown, expected), shown(part.sum() / total), f"{part.sum():,}"]
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

        # Names are plain text, and all pictures are loaded.
        assert browser.evaluate("window.hit") is None
        assert {name for name, _, _ in images} == set(browser.locator("#gallery h3 b").all_inner_texts())
        assert set(FILES) <= set(by_name)
        assert '<b>run</b> & "co"/first.ckpt' in browser.inner_text("#made")
        widths = browser.evaluate(
            "[...document.images].filter((image) => image.closest('main')).map((image) => image.naturalWidth)"
        )
        assert len(widths) == 5 * len(images)
        assert min(widths) > 0

        # The learning curve: the second of three epochs is the best, in the middle of both charts.
        marks = browser.locator("#curve .ideal")
        assert [mark.get_attribute("x1") for mark in marks.all()] == ["200.00", "200.00"]
        lines = browser.locator("#curve polyline").all()
        assert [len(line.get_attribute("points").split()) for line in lines] == [3, 3, 3]
        assert "Best epoch: 2 of 3 (step 8), mean IoU of val 60.0" in browser.inner_text("#curve")

        # Sorting with mouse and keyboard.
        head = browser.locator("#classes th button", has_text="IoU")
        of_classes = [float(shown(iou)) for iou in ious(confusion)]
        for act, order in ((head.click, "descending"), (lambda: head.press("Enter"), "ascending")):
            act()
            assert browser.locator("#classes th[aria-sort]:not([aria-sort=none])").get_attribute("aria-sort") == order
            values = [float(row[1]) for row in rows(browser, "classes")]
            assert values == sorted(of_classes, reverse=order == "descending")
        for key, button in (("name", "name"), ("uncertainty", "uncertainty"), ("accuracy", "accuracy")):
            browser.locator(".controls button", has_text=button).press("Enter")
            values = [item.get_attribute(f"data-{key}") for item in browser.locator("#gallery > li").all()]
            if key != "name":
                numbers = [float(value) for value in values if value]
                assert numbers == sorted(numbers, reverse=key == "uncertainty")
                assert len(numbers) == len(values)
            assert browser.locator(".controls [aria-pressed=true]").inner_text().split()[0] == button

        # Enlarged pictures.
        viewer, large = browser.locator("#viewer"), browser.locator("#viewer img")
        picture = browser.locator("#gallery .picture").nth(1)
        for open_picture in (picture.click, lambda: picture.press("Enter")):
            open_picture()
            assert viewer.is_visible()
            assert large.get_attribute("src") == picture.locator("img").get_attribute("src")
            browser.keyboard.press("ArrowRight")
            after = browser.locator("#gallery .picture img").nth(2)
            assert large.get_attribute("src") == after.get_attribute("src")
            browser.keyboard.press("Escape")
            assert not viewer.is_visible()
            assert browser.evaluate("document.activeElement.className") == "picture"

        # Light and dark mode, print.
        for scheme in ("light", "dark"):
            browser.emulate_media(color_scheme=scheme)
            assert contrasts(browser) == []
        assert browser.pdf()[:5] == b"%PDF-"

        # Two networks.
        browser.goto((folder / "two" / "report.html").as_uri())
        of_first = np.array([2, 0, 1], np.uint8)  # the index in the first network of each class of the second
        others = ious(counted([(truth, of_first[prediction]) for _, truth, prediction in read(folder, "other_masks")]))
        for label, row in enumerate(rows(browser, "classes")):
            assert row[:3] == [NAMES[label], shown(ious(confusion)[label]), shown(others[label])]
            assert row[3] == html.points(others[label] - ious(confusion)[label])
        assert browser.locator("#differing li").count() > 0
        assert contrasts(browser) == []


# Tests that need no browser.


class MaskDataset(SegmentationDataset):
    """A data set of the given masks, with grey images."""

    split = "val"
    classes = Shapes.classes

    def __init__(self, *masks: np.ndarray) -> None:
        self.masks = masks
        self.names = [f"image {index}" for index in range(len(masks))]

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.full((*self.masks[index].shape, 3), 90, np.uint8), self.masks[index], self.names[index])

    @property
    def fingerprint(self) -> str:
        return "few"


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> checkpoint.Checkpoint:
    folder = tmp_path_factory.mktemp("network")
    return checkpoint.read(fakes.untrained(folder / "a.ckpt", {"_target_": "segdeconv.data.Shapes", "num_train": 2}))


def evaluated(network: checkpoint.Checkpoint, *masks: np.ndarray, **entries: object) -> tuple[dict[str, Any], str]:
    """Return (report, page) of a network of seven classes on these masks, with further entries for the report."""
    dataset = MaskDataset(*masks)
    done = Evaluation.of(Segmenter(network, device=torch.device("cpu")), dataset, outlines=len(masks) < 10)
    report = {**done.report(command="evaluate"), **entries}
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
def test_a_nearly_empty_split_has_a_page_without_nan(network, masks):
    report, html = evaluated(network, *masks)
    assert report["num_images"] == len(masks)
    text = re.sub(r"<head>.*?</head>|data:image[^\"]*|<script>.*?</script>|<pre.*?</pre>", "", html, flags=re.DOTALL)
    assert not re.search(r"(>|data-\w+=\")\W*(nan|inf|none)\b", text, re.IGNORECASE)
    json.loads(json.dumps(report, allow_nan=False))


@pytest.mark.parametrize("num", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_page_of_many_images_stays_small_and_states_how_many_it_shows(network, num):
    noise = np.random.default_rng(0).integers(0, 2, (num, 6, 7)).astype(np.uint8)
    _, html = evaluated(network, *noise)
    assert len(html) < 3e5
    assert html.count('class="picture"') == 24 * 5
    assert f"24 of {num:,} images: the worst, the median and the best" in html


def test_entropy_equals_that_of_the_class_probabilities():
    logits = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)) * 4
    expected = torch.distributions.Categorical(logits=logits.permute(0, 2, 3, 1)).entropy()
    torch.testing.assert_close(entropy(ClassScores(logits, False)), expected)
    torch.testing.assert_close(entropy(ClassScores(logits.softmax(dim=1), True)), expected)
    certain = torch.tensor([0.0, 800.0, -800.0]).view(1, 3, 1, 1)
    assert entropy(ClassScores(certain, False)).item() == 0


def test_optional_tables_are_shown_if_the_report_has_them(network):
    mask = np.zeros((20, 30), np.uint8)
    _, html = evaluated(network, mask)
    assert 'id="ablation"' not in html
    assert 'id="signals"' not in html
    ablation = [{"upsampling": "corner", "level": 2, "miou": 0.125, "boundary_f1": None}]
    _, html = evaluated(network, mask, ablation=ablation, uncertainty=[{"signal": "entropy", "auroc": 0.875}])
    assert re.search(r"corner</td>.*?12\.5</td>.*?–</td>", html, re.DOTALL)
    assert re.search(r"entropy</td>.*?87\.5</td>", html, re.DOTALL)


def test_networks_with_different_classes_are_not_compared(commands, folder, tmp_path):
    other = fakes.untrained(tmp_path / "other.ckpt", {"_target_": "segdeconv.data.Shapes", "num_train": 2})
    done = commands(
        "evaluate", folder / '<b>run</b> & "co"' / "first.ckpt", "--compare", other, "--out", "x", cwd=folder
    )
    assert done.code == 2
    assert "the data set has 3 classes (" in done.error_message
    assert "other.ckpt has 7 classes (background, disc, ring, ...); '" in done.error_message
    assert "compare networks with the same classes, which are matched by name" in done.error_message
    assert not (folder / "x").exists()


# Published scores.


@pytest.mark.parametrize("published", [CAMVID, SUNRGBD])
def test_published_accuracies_by_class_have_the_published_mean(published):
    by_class = [scores for scores in published if scores.accuracy]
    assert by_class
    for scores in by_class:
        assert np.mean(list(scores.accuracy.values())) == pytest.approx(scores.mean_accuracy, abs=0.03)


def test_published_scores_belong_to_the_original_classes(tmp_path):
    dataset = CamVid("train", str(fakes.camvid(tmp_path / "camvid")))
    assert set(CAMVID[0].accuracy) == set(dataset.classes.names)
    reversed_classes = Classes(dataset.classes.names[::-1], dataset.classes.colours[::-1], 255)
    assert in_order_of(dataset, reversed_classes).published is dataset.published
    assert Relabelled(dataset, {"sky": "ignore"}).published == ()
    assert Folder("train", str(fakes.folder(tmp_path / "own"))).published == ()
    assert "DeconvNet" in {scores.network for scores in VOC.published}
