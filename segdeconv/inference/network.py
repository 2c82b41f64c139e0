"""The trained network prepared for inference: norms folded, on its device, with padding and an out-of-memory fallback.

All code that predicts obtains its network here.
"""

from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.errors import UsageError, warn
from segdeconv.inference.dropout_sampling import sampled
from segdeconv.inference.quantization import INT8, Ranges, quantize
from segdeconv.inference.scorers import ClassScores, with_flip, with_oom_fallback, with_padding
from segdeconv.models import SegmentationModel
from segdeconv.models.layers import fold_norms
from segdeconv.system.devices import autocast, best_device, half_dtype, resolve_precision
from segdeconv.system.memory import keep_freed

Model = TypeVar("Model", bound=nn.Module)


class Network:
    """A network prepared for inference, which maps a batch of normalised images of any size to `ClassScores`.

    Args:
        model: A trained network. It is copied: create a new `Network` after further training.
        device: Where it runs; images may be on any device.
        precision: One of `devices.PRECISIONS`, or `int8`, see `quantization`, on the CPU.
        ranges: The ranges of the maps for `int8`, from `quantization.measure_ranges`.
        flip: Average the probabilities of each image and its mirror image.
        samples: Average this many forward passes with dropout; 0 for one pass without.

    Attributes:
        model: The prepared copy, for hooks.
        source: The model that was copied; if it came from a checkpoint, on torch's meta device, without weights.

    Raises:
        UsageError: `samples` is negative, the network has no dropout to sample, or `int8` is not possible.
    """

    def __init__(
        self,
        model: SegmentationModel,
        device: torch.device,
        precision: str,
        *,
        ranges: Ranges | None = None,
        flip: bool = False,
        samples: int = 0,
    ) -> None:
        keep_freed(device)
        self.source, self.model = model, prepare_for_inference(model, device, precision)
        if precision == INT8:
            self.model = quantize(self.model, ranges or {})
        self.device, self.precision, self.flip, self.samples = device, precision, flip, samples
        self._padded = with_padding(self._forward, model.minimum_size)
        scorer = with_oom_fallback(self._padded)
        self._scorer = with_flip(scorer) if flip else scorer
        self._sampler = sampled(self._probabilities, self.model, samples) if samples else None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        *,
        device: torch.device | None = None,
        precision: str = "auto",
        ranges: Ranges | None = None,
        flip: bool = False,
        samples: int = 0,
    ) -> Self:
        """Build the network of a checkpoint; by default on the best device, in the precision that is fast there.

        Args:
            checkpoint: The checkpoint.
            device: The device; None for the best one, or the CPU for `int8`.
            precision: `auto`, one of `devices.PRECISIONS`, or `int8`.
            ranges: The ranges of the maps for `int8`; None for those in the checkpoint.
            flip: See the class.
            samples: See the class.

        Raises:
            UsageError: The checkpoint does not support the arguments.
        """
        if precision == INT8:
            device, ranges = _cpu(device), ranges or stored_ranges(checkpoint)
            checkpoint = for_int8(checkpoint)
        else:
            precision = resolve_precision(precision, checkpoint.facts["precision"], device)
        device = device or best_device()
        network = cls(checkpoint.model(), device, precision, ranges=ranges, flip=flip, samples=samples)
        network.source.to("meta")
        return network

    def __call__(self, images: Tensor) -> ClassScores:
        if self._sampler is None:
            return ClassScores(self._scorer(images), self.flip)
        drawn = self._sampler(images)
        return ClassScores(drawn.probabilities, True, drawn.uncertainty, drawn.information)

    def logits(self, images: Tensor) -> Tensor:
        """Compute the (N, K, H, W) logits of (N, C, H, W) normalised images in one pass.

        Running out of memory raises the exception of torch, which the caller handles.
        """
        return self._padded(images)

    def _forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(self.precision, self.device):
            return self.model(images.to(self.device).contiguous(memory_format=torch.channels_last))

    def _probabilities(self, images: Tensor) -> Tensor:
        return ClassScores(self._scorer(images), self.flip).probabilities()


def _cpu(device: torch.device | None) -> torch.device:
    if device is not None and device.type != "cpu":
        raise UsageError(f"precision={INT8} is for CPUs, not for {device} - leave out the device or the precision")
    return torch.device("cpu")


def stored_ranges(checkpoint: Checkpoint) -> Ranges:
    """Return the ranges that `export --int8` stored with a network.

    Raises:
        UsageError: There are none.
    """
    stored = checkpoint.facts.get("int8")
    if stored is None:
        raise UsageError(
            f"{checkpoint.path} has no ranges of its maps, which precision={INT8} needs - calibrate it with "
            "segdeconv.evaluation.quantization.calibrate, or load what export --int8 wrote"
        )
    ranges: Ranges = stored["ranges"]
    return ranges


def for_int8(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint without instance statistics, and say what that costs."""
    if recorded := checkpoint.facts.get("instance_statistics"):
        warn(
            f"{INT8} leaves out the instance statistics of {checkpoint.path.name}, since 8-bit maps have fixed ranges: "
            f"mean IoU on {recorded['checked_on']} {100 * recorded['before']:.2f} instead of "
            f"{100 * recorded['after']:.2f} %, before rounding"
        )
    return checkpoint.without_instance_statistics()


def prepare_for_inference(model: Model, device: torch.device, precision: str) -> Model:
    """Copy a network into its fastest form: batch norms folded, on the device, channels last.

    Convolution weights are stored in the dtype of the computation, since `autocast` would convert them in every pass.
    The copy includes the running statistics.

    Raises:
        UsageError: A weight becomes infinite in the dtype of the computation.
    """
    network = fold_norms(model).to(device).to(memory_format=torch.channels_last)
    if precision.endswith("mixed"):
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.to(half_dtype(precision))
                if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
                    raise UsageError(
                        f"precision={precision}: the weights of {name} exceed the range of {half_dtype(precision)} - "
                        "use precision=32-true"
                    )
    return network
