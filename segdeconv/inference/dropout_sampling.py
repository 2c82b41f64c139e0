"""Monte Carlo dropout: several forward passes with dropout, their mean and how far they disagree."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from segdeconv.errors import UsageError
from segdeconv.inference.scorers import entropy_of
from segdeconv.system.seeding import key

Input = TypeVar("Input")  # whatever is scored: a batch, or a part of an image


class Samples(NamedTuple):
    """Statistics of several forward passes with dropout; all float32.

    probabilities: (N, C, H, W), the mean softmax over the passes: what is predicted is its largest class.
    variance: (N, C, H, W), of each class's softmax over the passes (divided by their number).
    entropy: (N, H, W), of `probabilities`, in nats: all that is uncertain.
    information: (N, H, W), `entropy` less the mean entropy of the single passes: what they disagree about, which more
        data could tell; the mutual information of prediction and weights. Houlsby et al. 2011, arXiv 1112.5745.
    """

    probabilities: Tensor
    variance: Tensor
    entropy: Tensor
    information: Tensor

    @property
    def uncertainty(self) -> Tensor:
        """(N, H, W), the mean over classes of `variance`: the uncertainty that Bayesian SegNet shows."""
        return self.variance.mean(dim=1)


def sampled(
    scorer: Callable[[Input], Tensor], network: nn.Module, samples: int, *, seed: int = 0
) -> Callable[[Input], Samples]:
    """Monte Carlo dropout: several forward passes, each with its own dropout, batch norm as in any prediction.

    Kendall, Badrinarayanan, Cipolla 2017 (Bayesian SegNet), section 3, https://arxiv.org/abs/1511.02680.

    scorer: gives probabilities, by way of `network`, whose dropouts are on for each pass and off afterwards.
    seed: pass k is made with `torch.manual_seed(key(seed, "sample", k))`, so that a batch has the same result whatever
        came before it; the random numbers of the program are left as they were.

    Takes the memory of one pass and of four results, whatever the number of passes.
    """
    if samples < 1:
        raise UsageError(f"--samples={samples} is no number of passes - give 1 or more, or leave it out")
    dropouts = [module for module in network.modules() if isinstance(module, _DropoutNd) and module.p > 0]
    if not dropouts:
        raise UsageError(
            f"{type(network).__name__} was trained without dropout, so all samples are the same - leave out --samples, "
            "or train model=bayesian_segnet or another with model.dropout_at=central"
        )

    def draw(image: Input) -> Samples:
        devices = {parameter.device for parameter in network.parameters() if parameter.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(list(devices)), _on(dropouts):
            torch.manual_seed(key(seed, "sample", 0))
            first = scorer(image)
            # Welford's sums: squares less squared sums would lose the small variances.
            mean, squares, within = first.clone(), torch.zeros_like(first), entropy_of(first)
            for index in range(1, samples):
                torch.manual_seed(key(seed, "sample", index))
                one = scorer(image)
                before = one - mean
                mean += before / (index + 1)
                squares += before * (one - mean)
                within += entropy_of(one)
        entropy = entropy_of(mean)
        return Samples(mean, squares / samples, entropy, (entropy - within / samples).clamp(min=0))

    return draw


@contextmanager
def _on(modules: list[_DropoutNd]) -> Iterator[None]:
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for module in modules:
            module.eval()
