"""From a network to labels: functions of one type, image batch -> class scores, that wrap each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from segdeconv.errors import UsageError
from segdeconv.layers import fold_norms
from segdeconv.seeding import key

Model = TypeVar("Model", bound=nn.Module)
Looked = TypeVar("Looked")  # whatever a scorer looks at: a batch, or a part of an image

# (N, 3, H, W) normalised images -> (N, C, H, W) scores: logits, or anything whose largest channel wins.
Scorer = Callable[[Tensor], Tensor]


def ready(model: Model, device: torch.device, precision: str) -> Model:
    """A copy of a network as it is fastest to use: batch norms folded, on the device, channels last.

    The weights of convolutions are kept in the type that they are computed in (`autocast` would convert them in every
    pass). The running statistics are part of the copy: make a new one after they have changed.
    """
    network = fold_norms(model).to(device).to(memory_format=torch.channels_last)
    if precision.endswith("mixed"):
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.to(_half(precision))
    return network


def scorer_on(network: nn.Module, device: torch.device, precision: str, minimum: int) -> Scorer:
    """A network that was made `ready`, as a function of images of any size, on any device.

    minimum: the smallest side in pixels that it takes.
    """

    def score(image: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(precision, device):
            return network(image.to(device).contiguous(memory_format=torch.channels_last))

    return padded(score, minimum)


def padded(scorer: Scorer, minimum: int) -> Scorer:
    """Images smaller than the network takes are padded below and right, and the scores cut back."""

    def score(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        below, right = max(0, minimum - height), max(0, minimum - width)
        if below or right:
            # Zeros are the mean colour after normalisation.
            image = F.pad(image, (0, right, 0, below))
        return scorer(image)[..., :height, :width]

    return score


def flipped(scorer: Scorer) -> Scorer:
    """Mean softmax over the image and its mirror image, turned back."""

    def score(image: Tensor) -> Tensor:
        straight = scorer(image).float().softmax(dim=1)
        mirrored = scorer(image.flip(-1)).float().softmax(dim=1).flip(-1)
        return (straight + mirrored) / 2

    return score


def softmaxed(scorer: Scorer) -> Scorer:
    """Probabilities for logits."""
    return lambda image: scorer(image).float().softmax(dim=1)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of memory that is not there, of an accelerator or of the machine."""
    of_the_machine = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or of_the_machine


def thrifty(scorer: Scorer) -> Scorer:
    """Where memory runs out a batch is scored in halves."""

    def score(image: Tensor) -> Tensor:
        try:
            return scorer(image)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        # Out here, since the error holds what was computed until then.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(image) > 1:
            return torch.cat([score(half) for half in image.chunk(2)])
        height, width = image.shape[-2:]
        raise UsageError(
            f"memory ran out on one image of {height}x{width} - give a smaller dataset.size=[H,W], or a machine with "
            "more"
        )

    return score


class Samples(NamedTuple):
    """What several passes with dropout say of a batch; all float32.

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
    scorer: Callable[[Looked], Tensor], network: nn.Module, samples: int, *, seed: int = 0
) -> Callable[[Looked], Samples]:
    """Monte Carlo dropout: so many passes, each with dropout of its own, batch norm as in any prediction.

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

    def draw(image: Looked) -> Samples:
        devices = {parameter.device for parameter in network.parameters() if parameter.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(list(devices)), _on(dropouts):
            torch.manual_seed(key(seed, "sample", 0))
            first = scorer(image)
            # Welford's sums: squares less squared sums would lose the small variances.
            mean, squares, within = first.clone(), torch.zeros_like(first), _entropy(first)
            for index in range(1, samples):
                torch.manual_seed(key(seed, "sample", index))
                one = scorer(image)
                before = one - mean
                mean += before / (index + 1)
                squares += before * (one - mean)
                within += _entropy(one)
        entropy = _entropy(mean)
        return Samples(mean, squares / samples, entropy, (entropy - within / samples).clamp(min=0))

    return draw


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(dim=1)


@contextmanager
def _on(modules: list[_DropoutNd]) -> Iterator[None]:
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for module in modules:
            module.eval()


def resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) scores -> (N, C, *size), bilinear; as they are where the size is theirs."""
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)


def labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) scores -> (N, *size) uint8 class indices; scores are resized, labels never."""
    # Not argmax, which takes up to 4 times as long on a CPU; of equal scores both take the first.
    return resized(scores, size).max(dim=1).indices.to(torch.uint8)


def labels_and_confidence(scores: Tensor, *, probabilities: bool = False) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) logits, or probabilities -> (N, H, W) uint8 class indices, and float32 their probabilities."""
    top, index = scores.float().max(dim=1)
    if not probabilities:
        top = 1 / (scores - top[:, None]).exp_().sum(dim=1)
    return index.to(torch.uint8), top


def entropy(scores: Tensor, *, probabilities: bool = False) -> Tensor:
    """(N, C, H, W) logits, or probabilities -> (N, H, W) float32: of the class probabilities of each pixel, in nats."""
    scores = scores.float()
    if probabilities:
        return _entropy(scores)
    # The logarithm of a sum in place of one for every class.
    below = scores - scores.max(dim=1, keepdim=True).values
    weights = below.exp()
    total = weights.sum(dim=1)
    return (total.log() - below.mul_(weights).sum(dim=1) / total).clamp_(min=0)


def best_device() -> torch.device:
    """An accelerator if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def fast_precision() -> str:
    """`bf16-mixed` where this machine multiplies bfloat16 faster than float32, else `32-true`."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    fast = any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16-mixed" if fast else "32-true"


def resolve_precision(wanted: str, trained: str | None = None) -> str:
    """What `precision=auto` means here: the one trained with if it is fast on this machine, else float32."""
    if wanted not in ("auto", *PRECISIONS):
        raise UsageError(f"precision={wanted} is unknown - it is auto, {', '.join(PRECISIONS)}")
    if wanted != "auto":
        return wanted
    fast = fast_precision()
    return fast if trained in (None, fast) else "32-true"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a network of this precision runs."""
    return torch.autocast(device.type, dtype=_half(precision), enabled=precision.endswith("mixed"))


def _half(precision: str) -> torch.dtype:
    return torch.float16 if precision == "16-mixed" else torch.bfloat16
