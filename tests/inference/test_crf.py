"""The dense CRF, compared with a mean field in plain loops and with pydensecrf, and its effect on images."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from real_data import SHARED

from segdeconv.config import check
from segdeconv.errors import UsageError
from segdeconv.inference.crf import CRF, refine
from segdeconv.inference.permutohedral import Lattice

REAL = SHARED / "VOCdevkit" / "VOC2012"
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")))


def random_probabilities(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).softmax(dim=0)


def random_image(height, width, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def scene(noise):
    """A 40x50 image of a disc above a floor, with a gradient and noise, and its three classes."""
    rows, columns = np.mgrid[:40, :50]
    mask = np.zeros((40, 50), dtype=np.int64)
    mask[(rows - 20) ** 2 + (columns - 28) ** 2 < 150], mask[30:] = 1, 2
    image = np.array([(90, 120, 60), (180, 70, 40), (60, 60, 70)])[mask] + columns[:, :, None] / 2
    image += np.random.default_rng(0).normal(0, noise, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask


def blocky(mask, num_classes, block, confidence):
    """Probabilities in which each block of pixels has its most frequent class with the given confidence."""
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(mask).long(), num_classes + 1)[:, :, :num_classes]
    counts = torch.nn.functional.avg_pool2d(one_hot.permute(2, 0, 1).float(), block, ceil_mode=True)
    one_hot_blocks = torch.nn.functional.one_hot(counts.argmax(dim=0), num_classes).permute(2, 0, 1).float()
    one_hot_blocks = one_hot_blocks.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)[
        :, : mask.shape[0], : mask.shape[1]
    ]
    return one_hot_blocks * confidence + (1 - confidence) / num_classes


def looped_mean_field(probabilities, image, settings):
    """The paper's algorithm 1, symmetrically normalised, pixel by pixel in double precision."""
    num_classes, height, width = probabilities.shape
    pixels = [(row, column) for row in range(height) for column in range(width)]

    def spatial(i, j):
        return math.exp(-(math.dist(i, j) ** 2) / (2 * settings.spatial_std**2))

    def bilateral(i, j):
        colours = math.dist(image[i].astype(float), image[j].astype(float))
        distance = math.dist(i, j) ** 2 / (2 * settings.bilateral_std**2)
        return math.exp(-distance - colours**2 / (2 * settings.colour_std**2))

    kernels = []
    for weight, kernel in ((settings.spatial_weight, spatial), (settings.bilateral_weight, bilateral)):
        sums = {i: sum(kernel(i, j) for j in pixels) for i in pixels}
        kernels.append({(i, j): weight * kernel(i, j) / math.sqrt(sums[i] * sums[j]) for i in pixels for j in pixels})
    unary = {i: [-math.log(float(probabilities[(c, *i)])) for c in range(num_classes)] for i in pixels}
    q = {i: [math.exp(-energy) for energy in unary[i]] for i in pixels}
    for _ in range(settings.iterations):
        following = {}
        for i in pixels:
            scores = [
                math.exp(-unary[i][c] + sum(kernel[i, j] * q[j][c] for kernel in kernels for j in pixels))
                for c in range(num_classes)
            ]
            following[i] = [score / sum(scores) for score in scores]
        q = following
    return torch.tensor([[[q[row, column][c] for column in range(width)] for row in range(height)]
                         for c in range(num_classes)])  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_the_exact_mean_field_equals_one_in_plain_loops(device):
    image = (random_image(6, 7) // 8).astype(np.uint8)  # similar enough for the colours to matter
    probabilities = random_probabilities(3, 6, 7)
    settings = CRF(spatial_std=1.5, bilateral_std=4, colour_std=9, iterations=4)
    expected = looped_mean_field(probabilities, image, settings)
    assert (expected - probabilities).abs().max() > 0.1
    result = refine(probabilities.to(device), image, settings=settings, exact=True)
    assert result.dtype == torch.float32
    assert result.device.type == device
    assert torch.allclose(result.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_the_bilateral_kernel_gives_the_results_of_pydensecrf(device):
    generator = np.random.default_rng(7)
    image = generator.integers(90, 130, (4, 5, 3), dtype=np.uint8)
    probabilities = generator.random((2, 4, 5))
    probabilities /= probabilities.sum(axis=0)
    # pydensecrf2 1.1: addPairwiseBilateral(sxy=20, srgb=13, rgbim=image, compat=1.5), inference(5), class 0.
    expected = [[0.570192, 0.560144, 0.437376, 0.611102, 0.97459], [0.72838, 0.469255, 0.774936, 0.80584, 0.996509],
                [0.488507, 0.897058, 0.502823, 0.141404, 0.617493], [0.06669, 0.056795, 0.394802, 0.894603, 0.705845],
                ]  # fmt: skip
    settings = CRF(spatial_weight=0, bilateral_weight=1.5, colour_std=13, iterations=5)
    result = refine(torch.from_numpy(probabilities).to(device), image, settings=settings)
    assert np.allclose(result[0].cpu(), expected, rtol=0, atol=2e-5)


def looped_lattice(features, values):
    """Splat, blur and slice with a dictionary of corners, point by point in double precision (Adams et al. 2010)."""
    dimensions = features.shape[1]
    corners = dimensions + 1
    corners_of = []
    for feature in features.astype(float):
        scaled = [
            value * corners * math.sqrt(2 / 3) / math.sqrt((axis + 1) * (axis + 2))
            for axis, value in enumerate(feature)
        ]
        point = [sum(scaled[axis:]) - (axis * scaled[axis - 1] if axis else 0) for axis in range(corners)]
        nearest = [corners * round(value / corners) for value in point]
        while sum(nearest):  # off the plane: correct the coordinate with the largest rounding error
            sign = 1 if sum(nearest) > 0 else -1
            axis = min(range(corners), key=lambda axis: sign * (point[axis] - nearest[axis]))
            nearest[axis] -= sign * corners
        rest = [value - near for value, near in zip(point, nearest, strict=True)]
        descending = sorted(range(corners), key=lambda axis: -rest[axis])
        weights = {}
        for step in range(corners):
            last = set(descending[corners - step :])
            name = tuple(nearest[axis] + step - corners * (axis in last) for axis in range(corners))
            if step:
                weight = (rest[descending[dimensions - step]] - rest[descending[dimensions - step + 1]]) / corners
            else:
                weight = 1 - (rest[descending[0]] - rest[descending[dimensions]]) / corners
            weights[name] = weight
        assert min(weights.values()) >= 0
        assert math.isclose(sum(weights.values()), 1)
        reached = sum(weight * np.array(name) for name, weight in weights.items())
        assert np.allclose(reached, point)  # the weights are the point's barycentric coordinates
        corners_of.append(weights)

    at_corners = defaultdict(lambda: np.zeros(values.shape[1]))
    for weights, value in zip(corners_of, values, strict=True):
        for name, weight in weights.items():
            at_corners[name] = at_corners[name] + weight * value
    for direction in range(corners):
        step = np.ones(corners, dtype=int)
        step[direction] -= corners
        zero = np.zeros(values.shape[1])
        at_corners = {
            name: value
            + sum(at_corners.get(tuple(int(part) for part in np.array(name) + sign * step), zero) for sign in (-1, 1))
            / 2
            for name, value in at_corners.items()
        }
    return np.array([sum(weight * at_corners[name] for name, weight in weights.items()) for weights in corners_of])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dimensions", [1, 2, 3, 4, 5, 6])
def test_the_lattice_equals_one_in_a_dictionary(dimensions, device):
    generator = np.random.default_rng(dimensions)
    features = generator.normal(0, 1.5, (150, dimensions)).astype(np.float32)
    values = generator.random((150, 4)).astype(np.float32)
    result = Lattice(torch.from_numpy(features).to(device))(torch.from_numpy(values).to(device))
    assert np.allclose(result.cpu(), looped_lattice(features, values), rtol=1e-4, atol=1e-5)


def features_of(image):
    """Position and colour of every pixel in the published standard deviations, (H * W, 5)."""
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    return torch.tensor(np.dstack([columns / 20, rows / 20, image / 3]), dtype=torch.float32).flatten(0, 1)


def relative_error(features):
    """The lattice's error in weighted means of random values, relative to their mean and to their spread."""
    values = torch.rand(len(features), 4, generator=torch.Generator().manual_seed(0))
    lattice = Lattice(features)
    weights = (torch.cdist(features, features).square() / -2).exp()
    exact = (weights @ values) / weights.sum(dim=1, keepdim=True)
    result = lattice(values) / lattice(torch.ones_like(values))
    return float((result - exact).square().mean().sqrt() / exact.mean()), float((result - exact).std() / exact.std())


@pytest.mark.parametrize("noise", [None, 0, 2, 4, 8])
def test_filtering_a_40x50_image_is_within_a_tenth_of_exact(noise):
    image = random_image(40, 50) if noise is None else scene(noise)[0]
    of_mean, of_spread = relative_error(features_of(image))
    assert of_mean < 0.1
    assert of_spread < 0.4


@pytest.mark.parametrize(("noise", "labels"), [(0, 0), (4, 0.01), (8, 0.02)])
def test_on_a_scene_the_lattice_gives_the_classes_of_exact_filtering(noise, labels):
    image, mask = scene(noise)
    probabilities, settings = blocky(mask, 3, 8, 0.6), CRF(iterations=3)
    fast, exact = (refine(probabilities, image, settings=settings, exact=exact) for exact in (False, True))
    assert (fast.argmax(dim=0) != exact.argmax(dim=0)).float().mean() <= labels
    assert (fast - exact).abs().mean() < 0.015


def test_the_spatial_kernel_is_exact_across_its_blocks():
    # Longer and wider than a block of rows and its reach; colours have no influence.
    settings = CRF(spatial_std=2, bilateral_weight=0, iterations=1)
    probabilities = random_probabilities(2, 75, 83)
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in (75, 83))
    kernel = torch.kron(*((-(line[:, None] - line).square() / 8).exp() for line in (rows, columns)))
    scale = kernel.sum(dim=1, keepdim=True).rsqrt()
    values = probabilities.double().flatten(1).T
    expected = (values.log() + 3 * scale * (kernel @ (scale * values))).softmax(dim=1).T.reshape(2, 75, 83)
    result = refine(probabilities, random_image(75, 83), settings=settings)
    assert torch.allclose(result.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_probabilities_sum_to_one(exact):
    refined = refine(random_probabilities(5, 20, 31), random_image(20, 31), exact=exact)
    assert refined.shape == (5, 20, 31)
    assert torch.allclose(refined.sum(dim=0), torch.ones(20, 31))


def test_without_weights_or_iterations_the_probabilities_are_unchanged():
    probabilities, image = random_probabilities(3, 9, 8), random_image(9, 8)
    for settings in (CRF(spatial_weight=0, bilateral_weight=0), CRF(iterations=0)):
        assert torch.allclose(refine(probabilities, image, settings=settings), probabilities, atol=1e-6)


def test_probabilities_of_0_stay_finite_and_can_win():
    probabilities = torch.zeros(2, 12, 12)
    probabilities[0] = 1
    probabilities[:, 6, 6] = torch.tensor([0.0, 1.0])
    refined = refine(probabilities, np.full((12, 12, 3), 128, dtype=np.uint8), settings=CRF(spatial_weight=20))
    assert refined.isfinite().all()
    assert (refined.argmax(dim=0) == 0).all()


def test_a_single_wrong_pixel_of_a_uniform_image_is_corrected():
    probabilities = torch.full((2, 20, 20), 0.3)
    probabilities[0] = 0.7
    probabilities[:, 9, 11] = torch.tensor([0.2, 0.8])
    refined = refine(probabilities, np.full((20, 20, 3), 77, dtype=np.uint8))
    assert (refined.argmax(dim=0) == 0).all()
    assert refined[0, 9, 11] > 0.9


def test_an_edge_in_colour_stops_the_smoothing():
    """Two columns right of the edge change from the left class to the right; a uniform image becomes one class."""
    probabilities = torch.full((2, 30, 30), 0.3)
    probabilities[0, :, :17], probabilities[1, :, 17:] = 0.7, 0.7
    edge = np.full((30, 30, 3), 60, dtype=np.uint8)
    edge[:, 15:] = 160
    expected = torch.zeros(30, 30, dtype=torch.long)
    expected[:, 15:] = 1
    assert torch.equal(refine(probabilities, edge).argmax(dim=0), expected)
    plain = refine(probabilities, np.full_like(edge, 60))
    assert (plain.argmax(dim=0) == 0).all()


@pytest.mark.parametrize("exact", [False, True])
def test_the_probabilities_of_a_single_pixel_are_sharpened(exact):
    """The pixel is its only neighbour, so each normalised kernel is 1: q = softmax(log p + 8 q)."""
    probabilities = torch.tensor([0.6, 0.4]).view(2, 1, 1)
    expected = probabilities.flatten()
    for _ in range(10):
        expected = (probabilities.flatten().log() + 8 * expected).softmax(dim=0)
    assert torch.allclose(refine(probabilities, random_image(1, 1), exact=exact).flatten(), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_images_have_any_number_of_channels(channels):
    image, probabilities = scene(0)[0].repeat(2, axis=2)[:, :, :channels], blocky(scene(0)[1], 3, 8, 0.6)
    difference = refine(probabilities, image) - refine(probabilities, image, exact=True)
    assert difference.abs().mean() < 0.005


@pytest.mark.parametrize("device", DEVICES)
def test_the_result_is_bitwise_reproducible_and_the_input_unchanged(device):
    image, probabilities = random_image(33, 47), random_probabilities(6, 33, 47).to(device)
    copies = image.copy(), probabilities.clone()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = refine(probabilities, image), refine(probabilities, image)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    assert np.array_equal(image, copies[0])
    assert torch.equal(probabilities, copies[1])


def test_mixed_precision_changes_nothing_and_half_probabilities_are_accepted():
    image, probabilities = random_image(12, 14), random_probabilities(3, 12, 14)
    plain = refine(probabilities, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(refine(probabilities, image), plain)
    assert refine(probabilities.bfloat16(), image).dtype == torch.float32


def test_an_image_may_be_a_tensor_or_read_only():
    image, probabilities = random_image(12, 14), random_probabilities(3, 12, 14)
    plain = refine(probabilities, image)
    assert torch.equal(refine(probabilities, torch.from_numpy(image)), plain)
    assert torch.equal(refine(probabilities, np.asarray(Image.fromarray(image))), plain)


def test_invalid_input_is_an_error_message():
    probabilities = random_probabilities(3, 12, 14)
    with pytest.raises(
        UsageError, match=r"\(3, 12, 14\) and an image of shape \(14, 12, 3\) - .* with the same H and W"
    ):
        refine(probabilities, random_image(14, 12))
    with pytest.raises(UsageError, match=r"\(1, 3, 12, 14\)"):
        refine(probabilities[None], random_image(12, 14))
    with pytest.raises(UsageError, match="uint16 - give uint8 colours"):
        refine(probabilities, random_image(12, 14).astype(np.uint16))
    with pytest.raises(
        UsageError, match="standard deviations are too small for an image of 3 channels - increase them"
    ):
        refine(probabilities, random_image(12, 14), settings=CRF(colour_std=0.001))


def test_the_default_settings_are_the_published_ones_and_are_validated():
    published = {"spatial_weight": 3.0, "spatial_std": 3.0, "bilateral_weight": 5.0, "bilateral_std": 20.0}
    assert check({}, "crf", [CRF]) == published | {"colour_std": 3.0, "iterations": 10}
    with pytest.raises(UsageError, match=r"crf\.colour_std=0: input should be greater than 0"):
        check({"colour_std": 0}, "crf", [CRF])
    with pytest.raises(UsageError, match=r"unknown key crf\.color_std - did you mean 'colour_std'"):
        check({"color_std": 3}, "crf", [CRF])


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real VOC images in {REAL}")
def test_boundaries_of_a_real_image_are_recovered_from_blocks():
    image = np.asarray(Image.open(REAL / "JPEGImages/2011_000025.jpg"))
    mask = np.array(Image.open(REAL / "SegmentationClass/2011_000025.png"))
    counted = mask != 255
    probabilities = blocky(np.where(counted, mask, 21), 21, 16, 0.6)
    refined = refine(probabilities, image, settings=CRF(iterations=5))
    before, after = ((result.argmax(dim=0).numpy() != mask)[counted].mean() for result in (probabilities, refined))
    assert after < 0.95 * before
    assert relative_error(features_of(image[100:140, 200:250]))[0] < 0.1
