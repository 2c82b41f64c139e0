"""Hypothesis tests of the parts that accept arbitrary input. Derandomised; SEGDECONV_FUZZ=N runs N examples of each."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from fresh_commands import child_environment
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from segdeconv.classes import Classes, voc_colours
from segdeconv.config import override
from segdeconv.data.augmentation import Augmentation
from segdeconv.data.class_file import class_file, parse_classes, read_class_file
from segdeconv.data.files.reading import read_image, read_labels, read_list, read_mask, turn_back, turn_upright
from segdeconv.data.preprocessing import resize_mask
from segdeconv.data.relabelled import relabel
from segdeconv.data.splits import choose_val
from segdeconv.data.transforms import build_transforms
from segdeconv.errors import SegdeconvError, UsageError
from segdeconv.evaluation.metrics import ConfusionMatrix, scores
from segdeconv.switches.ops import max_pool, unpool

MANY = int(os.environ.get("SEGDECONV_FUZZ", "40"))
settings.register_profile(
    "segdeconv",
    max_examples=MANY,
    derandomize=MANY == 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)
settings.load_profile("segdeconv")
SIDES = st.integers(1, 9)


@contextlib.contextmanager
def refused_by_name(name):
    """Accept success, or a UsageError that names the file."""
    try:
        yield
    except UsageError as error:
        if name not in str(error):
            raise


# Switches


@given(st.integers(0, 2**31), SIDES, SIDES, st.integers(1, 3), st.booleans())
def test_pool_and_unpool_equal_those_of_torch_for_any_size_and_number_of_ties(seed, height, width, channels, ties):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, height, width, generator=generator)
    x = x.round() if ties else x
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    pooled = max_pool(ours)
    expected, indices = F.max_pool2d(theirs, 2, ceil_mode=True, return_indices=True)
    assert torch.equal(pooled.features, expected)
    assert pooled.switches.dtype == torch.uint8
    back = unpool(pooled.features, pooled.switches, pooled.size)
    assert torch.equal(back, F.max_unpool2d(expected, indices, 2, output_size=(height, width)))
    weights = torch.randn(back.shape, generator=generator)
    (back * weights).sum().backward()
    (F.max_unpool2d(expected, indices, 2, output_size=(height, width)) * weights).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


# Scores


@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**31), st.integers(1, 5))
def test_scores_of_any_masks_in_any_batches_equal_direct_counts(num_classes, pixels, seed, pieces):
    random = np.random.default_rng(seed)
    prediction = random.integers(0, num_classes, pixels)
    mask = random.choice([*range(num_classes), 255], pixels)
    matrix = ConfusionMatrix(num_classes, 255)
    for part in np.array_split(np.arange(pixels), pieces):
        matrix.update(torch.from_numpy(prediction[part]), torch.from_numpy(mask[part]))
    result = scores(matrix.compute())
    ious = []
    for index in range(num_classes):
        counted = mask != 255
        both = sum((prediction == index) & (mask == index) & counted)
        either = sum(((prediction == index) | (mask == index)) & counted)
        if either:
            ious.append(both / either)
        assert np.isnan(result.iou[index]) if not either else result.iou[index] == pytest.approx(both / either)
    assert result.miou == pytest.approx(np.mean(ious)) if ious else np.isnan(result.miou)
    right, total = sum((prediction == mask) & (mask != 255)), sum(mask != 255)
    assert result.pixel_accuracy == pytest.approx(right / total) if total else np.isnan(result.pixel_accuracy)


# Classes


@st.composite
def tables(draw):
    count = draw(st.integers(2, 8))
    text = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=8)
    names = draw(st.lists(text, min_size=count, max_size=count, unique=True))
    labels = draw(st.lists(st.integers(0, 254), min_size=count, max_size=count, unique=True))
    return Classes(tuple(names), voc_colours(count), labels=tuple(labels))


@given(tables(), arrays.arrays(np.uint8, (4, 5)))
def test_labels_become_class_indices_or_the_first_unknown_label_is_named(classes, labels):
    indices = {**{label: index for index, label in enumerate(classes.labels)}, 255: 255}
    indices |= {label: index for index, label in enumerate(classes.labels)}
    unknown = sorted({int(value) for value in labels.ravel()} - set(indices))
    if unknown:
        with pytest.raises(UsageError, match=rf"has label {unknown[0]}\b"):
            classes.from_labels(labels)
    else:
        assert classes.from_labels(labels).tolist() == [[indices[int(value)] for value in row] for row in labels]


@given(tables(), st.integers(0, 2**31))
def test_a_mask_is_restored_from_its_colours_and_a_table_from_its_yaml(classes, seed):
    mask = np.random.default_rng(seed).integers(0, len(classes), (3, 4)).astype(np.uint8)
    assert (classes.from_colours(classes.palette[mask]) == mask).all()
    assert Classes.from_dict(yaml.safe_load(yaml.safe_dump(classes.to_dict()))) == classes


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=8,
)


@given(VALUES)
@example({"0\x1f": None})
def test_any_class_table_is_accepted_or_refused_with_an_error_message(value):
    with contextlib.suppress(UsageError):
        assert len(parse_classes(value, "classes.yaml")) >= 2


@given(tables())
def test_a_class_table_that_is_written_is_read_as_the_same(classes):
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "classes.yaml")
        written.write_text(class_file(classes, {}), encoding="utf-8")
        read = read_class_file(written)
    assert (read.names, read.labels) == (classes.names, classes.labels)


@given(tables(), st.data())
def test_relabelling_maps_every_class_by_its_name(classes, data):
    new = st.sampled_from([*classes.names, "ignore", "new"])
    mapping = data.draw(st.dictionaries(st.sampled_from(classes.names), new))
    try:
        after, table = relabel(classes, mapping)
    except UsageError:
        assume(False)
    for index, name in enumerate(classes.names):
        target = mapping.get(name, name)
        assert table[index] == (255 if target == "ignore" else after.names.index(target))


# Lists and splits


@given(st.binary(max_size=200))
def test_a_list_of_arbitrary_bytes_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "list.txt"
    path.write_bytes(data)
    with refused_by_name("list.txt"):
        assert all(text == text.strip() != "" for _, text in read_list(path))


@given(st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=20, unique=True), st.floats(0.01, 0.99))
def test_a_split_is_never_empty_for_any_names_and_fraction(names, share):
    val, _ = choose_val(names, share, None, 0, pattern=None, seed=0)
    assert 0 < len(val) < len(names)
    assert set(val) <= set(names)


# Keys


@given(st.lists(st.text(max_size=20), max_size=3))
def test_any_command_line_is_composed_or_refused_with_an_error_message(words):
    with contextlib.suppress(SegdeconvError):
        assert set(override({"a": {"b": 1}, "c": 2}, words)) == {"a", "c"}


# Masks and images


def in_memory(image, **arguments):
    stream = io.BytesIO()
    image.save(stream, **arguments)
    return bytearray(stream.getvalue())


MASKS = [
    in_memory(Image.fromarray((np.arange(48).reshape(6, 8) % 3).astype(dtype)), format=form)
    for dtype, form in (
        (np.uint8, "PNG"),
        (np.uint16, "PNG"),
        (np.uint8, "TIFF"),
        (np.uint8, "BMP"),
        (np.int32, "TIFF"),
    )
]
THREE = Classes(("a", "b", "c"), voc_colours(3))


@given(st.sampled_from(MASKS), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4), st.data())
def test_a_damaged_mask_is_read_with_known_labels_or_refused_by_name(tmp_path_factory, whole, changes, data):
    content = bytearray(whole)
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "mask.png"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if len(changes) % 2 else content)
    with refused_by_name("mask.png"):
        mask = read_mask(path, THREE, max_pixels=10_000)
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1, 2, 255}


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"II*\0", b"\x93NUMPY\1\0", b"BM", b"RIFF"])
)
def test_arbitrary_bytes_are_read_or_refused_by_name(tmp_path_factory, data, start):
    path = tmp_path_factory.getbasetemp() / "any.png"
    path.write_bytes(start + data)
    for read in (read_labels, lambda path: read_image(path, channels=2, max_pixels=1000), read_image):
        with refused_by_name("any.png"):
            assert read(path).size


@given(arrays.arrays(np.uint8, st.tuples(SIDES, SIDES)), st.integers(1, 8))
def test_turning_upright_and_back_restores_the_mask(mask, orientation):
    assert (turn_back(turn_upright(mask, orientation), orientation) == mask).all()


# Transforms


@given(arrays.arrays(np.uint8, st.tuples(SIDES, SIDES), elements=st.integers(0, 5)), SIDES, SIDES)
def test_a_resized_mask_has_no_new_labels(mask, height, width):
    assert set(np.unique(resize_mask(mask, (height, width)))) <= set(np.unique(mask))


AUGMENTED = {
    "flip": {"_target_": "albumentations.HorizontalFlip", "p": 0.5},
    "turn": {"_target_": "albumentations.Affine", "rotate": [-30, 30], "scale": [0.5, 2.0], "p": 0.9},
}


@given(st.integers(0, 2**31), SIDES, SIDES, st.integers(1, 12), st.integers(0, 3), st.integers(0, 50))
def test_augmentation_of_any_size_depends_only_on_seed_epoch_and_index(seed, height, width, crop, epoch, index):
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
    mask = random.integers(0, 4, (height, width)).astype(np.uint8)
    built = [
        Augmentation(
            build_transforms(AUGMENTED, ignore_index=255, mean=[0, 0, 0]),
            crop=(crop, crop), ignore_index=255, fill=[0, 0, 0], seed=seed,
        )
        for _ in range(2)
    ]  # fmt: skip
    built[1](image, mask, epoch + 1, index)  # earlier draws must not matter
    (image_1, mask_1), (image_2, mask_2) = (augmentation(image, mask, epoch, index) for augmentation in built)
    assert (image_1 == image_2).all()
    assert (mask_1 == mask_2).all()
    assert image_1.shape == (crop, crop, 3)
    assert mask_1.shape == (crop, crop)
    assert set(np.unique(mask_1)) <= {*np.unique(mask).tolist(), 255}


@pytest.mark.slow
def test_many_more_examples_also_pass():
    words = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    root = Path(__file__).parents[2]
    environment = child_environment(root, SEGDECONV_FUZZ="1500")
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
