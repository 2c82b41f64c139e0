"""Monte Carlo dropout: the mean and the disagreement of several forward passes with dropout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from segdeconv.errors import UsageError, for_caller
from segdeconv.inference.scorers import entropy_of
from segdeconv.system.seeding import key

Input = TypeVar("Input")  # the scorer's argument: a batch, or a part of an image


class Samples(NamedTuple):
    """Statistics of several forward passes with dropout; all float32.

    Attributes:
        probabilities: (N, C, H, W), the mean softmax over the passes; its largest class is the prediction.
        variance: (N, C, H, W), the variance of each class's softmax over the passes (divided by their number).
        entropy: (N, H, W), the entropy of `probabilities` in nats: the total uncertainty.
        information: (N, H, W), the mutual information of prediction and weights in nats: `entropy` minus the mean
            entropy of the single passes. It measures their disagreement, which more training data could reduce.
            Houlsby et al. 2011, https://arxiv.org/abs/1112.5745.
    """

    probabilities: Tensor
    variance: Tensor
    entropy: Tensor
    information: Tensor

    @property
    def uncertainty(self) -> Tensor:
        """Mean of `variance` over the classes, (N, H, W): the uncertainty shown in the Bayesian SegNet paper."""
        return self.variance.mean(dim=1)


def sampled(
    scorer: Callable[[Input], Tensor], network: nn.Module, samples: int, *, seed: int = 0
) -> Callable[[Input], Samples]:
    """Return a function that computes statistics over several forward passes with different dropout.

    Kendall, Badrinarayanan, Cipolla 2017 (Bayesian SegNet), section 3, https://arxiv.org/abs/1511.02680.

    Batch norm uses its running statistics, as in any prediction. Memory is that of one pass and four results,
    independent of the number of passes.

    Args:
        scorer: Computes probabilities with `network`.
        network: The network whose dropout layers are enabled during each pass and disabled afterwards.
        samples: Number of passes.
        seed: Pass k runs under `torch.manual_seed(key(seed, "sample", k))`, so that the result of a batch does not
            depend on earlier batches. The global random state is left unchanged.

    Raises:
        UsageError: `samples` is less than 1, or the network has no dropout.
    """
    if samples < 1:
        name = for_caller("samples", "--samples")
        raise UsageError(f"{name}={samples} is not a valid number of passes - give 1 or more, or leave it out")
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
            # Welford's algorithm: the difference of squares and squared mean would lose small variances to rounding.
            mean, squares, within = first.clone(), torch.zeros_like(first), entropy_of(first)
            for index in range(1, samples):
                torch.manual_seed(key(seed, "sample", index))
                probabilities = scorer(image)
                difference = probabilities - mean
                mean += difference / (index + 1)
                squares += difference * (probabilities - mean)
                within += entropy_of(probabilities)
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
