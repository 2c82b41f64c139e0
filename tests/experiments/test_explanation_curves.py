"""Deletion and insertion curves, and the methods that they compare, against hand-made cases and captum."""

import pytest
import torch
from torch import nn

from segdeconv.experiments.study.explanation_curves import (
    PARTS,
    Target,
    attributions,
    compare,
    curves,
    grad_cam,
    gradient,
    integrated_gradients,
    table,
)
from segdeconv.models import SegNet

TARGET = Target(1, 10, 20)


def network():
    torch.manual_seed(0)
    return SegNet(3, stages=((4,), (6,), (6,))).eval()


def image():
    return torch.randn(1, 3, 32, 40, generator=torch.Generator().manual_seed(1))


def test_integrated_gradients_add_up_to_the_difference_from_the_mean_colour():
    model, x = network(), image()
    with torch.no_grad():
        difference = TARGET.of(model(x)) - TARGET.of(model(torch.zeros_like(x)))
    found = integrated_gradients(model, x, TARGET, steps=100)
    assert float(found.sum()) == pytest.approx(float(difference), abs=0.05 * abs(float(difference)) + 1e-3)


def test_grad_cam_equals_its_equations_on_a_network_written_out():
    model, x = network(), image()
    with torch.no_grad():
        pooled = model.encoder(x).pooled
    features = pooled[2].features.detach().requires_grad_()
    decoded = model.decoder(model.encoder(x)._replace(features=features))
    (slope,) = torch.autograd.grad(TARGET.of(decoded).sum(), features)
    expected = sum(slope[0, map_].mean() * features[0, map_] for map_ in range(6)).clamp(min=0)
    torch.testing.assert_close(grad_cam(model, x, TARGET, 3), expected.detach())


def test_curves_of_a_score_that_counts_pixels():
    """The score is the share of bright pixels, and the first pixel in the order is bright."""
    x = torch.zeros(1, 1, 40, 50)
    x[0, 0, 0, :10] = 1.0
    importance = -torch.arange(2000.0).view(40, 50)
    deletion, insertion = curves(lambda changed: changed.sum() / 10, x, torch.zeros_like(x), importance)
    chosen = [min(10, max(1, round(part * 2000))) / 10 for part in PARTS]
    assert insertion == pytest.approx(chosen)
    assert deletion == pytest.approx([1 - share for share in chosen])


def test_every_method_is_compared_and_the_worst_order_is_worse():
    model, x = network(), image()
    found = compare(model, x, TARGET)
    assert set(found) == set(attributions(model, x, TARGET))
    assert all(len(deletion) == len(insertion) == len(PARTS) for deletion, insertion in found.values())
    lines = table({"good": [(0.2, 0.9), (0.4, 0.7)], "bad": [(0.9, 0.1), (0.9, 0.1)]}).splitlines()
    assert lines[2:] == ["| good | 0.300 | 0.800 |", "| bad | 0.900 | 0.100 |"]


@pytest.mark.extras
def test_methods_equal_those_of_captum():
    captum = pytest.importorskip("captum.attr")
    model, x = network(), image()

    def score(images):
        return TARGET.of(model(images))

    torch.testing.assert_close(
        integrated_gradients(model, x, TARGET, steps=16)[None],
        captum.IntegratedGradients(score).attribute(x, n_steps=16, method="riemann_middle").to(x.dtype),
        rtol=1e-3, atol=1e-5,
    )  # fmt: skip
    saliency = captum.Saliency(score).attribute(x.requires_grad_(), abs=False)
    torch.testing.assert_close(gradient(model, x, TARGET)[None], saliency.detach())

    class Features(nn.Module):
        """The output of the third pool as a tensor, which captum's hooks need."""

        def __init__(self):
            super().__init__()
            self.identity = nn.Identity()

        def forward(self, images):
            encoding = model.encoder(images)
            return TARGET.of(model.decoder(encoding._replace(features=self.identity(encoding.features))))

    wrapped = Features()
    expected = captum.LayerGradCam(wrapped, wrapped.identity).attribute(x, relu_attributions=True)
    torch.testing.assert_close(grad_cam(model, x, TARGET, 3), expected[0, 0].detach(), rtol=1e-3, atol=1e-6)
