"""The learning rate finder and the search for the largest batch size."""

import math

import pytest
import torch
from fakes import Uneven

from segdeconv.errors import UsageError
from segdeconv.training import tuning
from segdeconv.training.config_check import check_config
from segdeconv.training.memory import estimate
from segdeconv.training.prepare import prepare
from segdeconv.training.tuning import Rate, best_rate, try_batch_sizes, try_rates

CPU = torch.device("cpu")


@pytest.fixture
def prepared():
    return prepare(
        check_config(
            {
                "dataset": {"_target_": "fakes.Uneven", "batch_size": 8, "num_workers": 0},
                "model": {"_target_": "segdeconv.models.SegNet", "stages": [[8], [16]]},
            }
        )
    )


def test_the_best_rate_is_where_the_loss_falls_fastest():
    """The loss of this artificial curve falls from 2 to 1, most steeply at 1e-3, and then rises."""
    rates = [10 ** (place / 20 - 6) for place in range(100)]
    tried = []
    for lr in rates:
        exponent = math.log10(lr)
        loss = 2 - 1 / (1 + math.exp(-4 * (exponent + 3))) + (5 * (exponent + 1.5) ** 2 if exponent > -1.5 else 0)
        tried.append(Rate(lr, loss, loss))
    assert best_rate(tried) == pytest.approx(1e-3, rel=0.3)


def test_the_rate_range_test_lowers_the_loss_and_gives_a_plausible_rate(prepared):
    tried = try_rates(prepared, CPU, "32-true", steps=60)
    assert tried[0].lr == pytest.approx(1e-6)
    assert [rate.lr for rate in tried] == sorted(rate.lr for rate in tried)
    assert min(rate.smoothed for rate in tried) < 0.9 * tried[0].smoothed
    assert 1e-4 < best_rate(tried) < 0.5


def test_a_diverging_loss_ends_the_search(prepared):
    prepared.optimizer.param_groups[0]["base_lr"] *= 1e4
    tried = try_rates(prepared, CPU, "32-true", steps=60, highest=1e6)
    assert len(tried) < 60
    assert all(math.isfinite(rate.loss) for rate in tried)


def test_a_loss_that_is_not_finite_from_the_start_gives_an_error_message(prepared):
    with torch.no_grad():
        prepared.model.decoder.classifier.bias.fill_(math.nan)
    with pytest.raises(UsageError, match=r"the loss diverges after 0 steps, at a learning rate of 1.0e-06 - check"):
        try_rates(prepared, CPU, "32-true")


def test_batch_sizes_double_until_the_data_ends(prepared):
    fits = list(try_batch_sizes(prepared, CPU, "32-true", averaged=False))
    assert [fit.batch_size for fit in fits] == [1, 2, 4, 8, 16]
    assert len(Uneven("train")) == 24
    assert all(fit.seconds > 0 for fit in fits)
    assert all(fit.memory > 1 << 20 for fit in fits)  # of the whole process


def test_batch_sizes_end_before_memory_is_exhausted(prepared, monkeypatch):
    size = tuple(prepared.data.samples[0, 0]["mask"].shape)
    parts = prepared.model, prepared.loss, prepared.optimizer
    memory = estimate(*parts, size, batch_size=4, device=CPU, precision="32-true")
    monkeypatch.setattr(tuning, "available", lambda device: int((memory.total - memory.program) / 0.8) + 1)
    assert [fit.batch_size for fit in try_batch_sizes(prepared, CPU, "32-true", averaged=False)] == [1, 2, 4]
