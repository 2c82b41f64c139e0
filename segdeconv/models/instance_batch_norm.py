"""Batch norm that looks at each image: in evaluation, its own statistics are mixed into those of training.

The running averages describe the light, the weather and the camera of the training images, which an image from
elsewhere fits less. You et al. 2021 (alpha-BN), https://arxiv.org/abs/2110.04065, mix in the statistics of a batch;
here, they are those of each image. Shallow layers show appearance, deep ones content (Pan et al. 2018, section 3,
https://arxiv.org/abs/1807.09441), so that the first stages of an encoder are the place for it.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.errors import UsageError, did_you_mean

KERNELS = ("cpu", "cuda")  # devices that have `batch_norm_update_stats`


class InstanceBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose mean and variance in evaluation are (1 - w) times the running ones plus w times the image's.

    Each image of a batch is normalised separately. In training it is plain batch norm. The gradient takes the
    statistics for constants, as it does in the evaluation of plain batch norm, so that contributions add up; so does a
    trace on the meta device, which thus finds the receptive field of the convolutions.

    Args:
        num_features: Channels.
        instance_weight: w, 0..1.
        eps: Added to the variance.
        momentum: Of the running averages; see torch.

    Examples:
        >>> norm = InstanceBatchNorm2d(1, instance_weight=0.5).eval()  # running mean 0 and variance 1
        >>> norm(torch.tensor([[[[2.0, 4.0]]]])).round(decimals=4).tolist()  # its own are 3 and 1
        [[[[0.5, 2.5]]]]
    """

    def __init__(
        self, num_features: int, *, instance_weight: float, eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.instance_weight = instance_weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, instance_weight={self.instance_weight}"  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        if self.training or x.is_meta:
            return super().forward(x)
        if torch.compiler.is_compiling() or x.device.type not in KERNELS:  # torch.export does not know N
            values = x.to(self.weight.dtype)
            variance, mean = torch.var_mean(values.detach(), dim=(2, 3), correction=0)
            mean, variance = self._mixed(mean, variance)
            scale = self.weight * (variance + self.eps).rsqrt()
            shift = self.bias - mean * scale
            return (values * scale[..., None, None] + shift[..., None, None]).to(x.dtype)
        return self._of_image(x) if len(x) == 1 else torch.cat([self._of_image(image[None]) for image in x])

    def _of_image(self, x: Tensor) -> Tensor:
        """Normalise one image, (1, C, H, W), with torch's kernels: 3 ms of a core for 32x360x480, the formula 120."""
        # The buffers are not needed afterwards; they make torch return statistics of 16-bit maps in 32 bits.
        unused = torch.empty_like(self.weight), torch.empty_like(self.weight)
        mean, variance = torch.batch_norm_update_stats(x.detach(), *unused, 0.0)
        return F.batch_norm(x, *self._mixed(mean, variance), self.weight, self.bias, eps=self.eps)

    def _mixed(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean.lerp(mean, self.instance_weight), self.running_var.lerp(variance, self.instance_weight)


def set_instance_statistics(network: nn.Module, weights: Mapping[str, float]) -> None:
    """Replace the batch norms of a network in place by ones that mix in the statistics of each image.

    Parameters and buffers are kept. Norms without running statistics are left as they are.

    Args:
        network: The network.
        weights: The instance weight, 0..1, by the name of a part, such as `encoder.stages.0`, or "" for the whole
            network; for nested parts the longest name counts. 0, and no name, give plain batch norm.

    Raises:
        UsageError: The network has no part of a name, or the part has no batch norm.
    """
    norms = {
        name: norm
        for name, norm in network.named_modules(remove_duplicate=False)
        if type(norm) in (nn.BatchNorm2d, InstanceBatchNorm2d) and norm.track_running_stats and norm.affine
    }
    for part in weights:
        if not any(_within(name, part) for name in norms):
            parts = {name.rpartition(".")[0] for name in norms} | {name.partition(".")[0] for name in norms}
            raise UsageError(
                f"{type(network).__name__} has no batch norm with running statistics"
                + (f" in '{part}' - {did_you_mean(part, parts)}" if part and norms else ", so none to mix into")
            )
    for name, norm in norms.items():
        weight = max(((len(part), weights[part]) for part in weights if _within(name, part)), default=(0, 0.0))[1]
        new = (
            InstanceBatchNorm2d(norm.num_features, instance_weight=weight, eps=norm.eps, momentum=norm.momentum)
            if weight
            else nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
        )
        new._parameters, new._buffers = norm._parameters, norm._buffers
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, new.train(norm.training))


def has_instance_statistics(network: nn.Module) -> bool:
    """Return whether a norm of a network mixes in the statistics of each image."""
    return any(isinstance(module, InstanceBatchNorm2d) for module in network.modules())


def _within(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")
