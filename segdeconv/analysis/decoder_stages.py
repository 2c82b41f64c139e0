"""Decoder stages: the maps of one unit per unpooling, before and after the filters that follow it.

After Noh et al. 2015, figure 4, https://arxiv.org/abs/1505.04366: an unpooled map is sparse and has the fine positions
of the image; the filters after it make it dense and keep the parts that support the class.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segdeconv.errors import UsageError
from segdeconv.models.activation_checkpointing import Checkpointable
from segdeconv.switches import Unpool


class Stage(NamedTuple):
    """The maps of one unpooling of a decoder.

    Attributes:
        unit: The index of the map `unpooled`.
        unpooled: (H, W), one unpooled map.
        dense_unit: The index of the map `dense`, which the next stage unpools.
        dense: (H, W), one map after the filters that follow, or the logits of the class if only the classifier follows.
    """

    unit: int
    unpooled: Tensor
    dense_unit: int
    dense: Tensor


class DecoderTrace(NamedTuple):
    """The maps of one class in every stage of a decoder.

    Attributes:
        start: (h, w), the map that the first stage unpools.
        stages: The stages, the deepest first.
        probability: (H, W), the probability of the class.
        prediction: (H, W) int64, class indices.
    """

    start: Tensor
    stages: list[Stage]
    probability: Tensor
    prediction: Tensor


def trace_decoder(network: nn.Module, image: Tensor, label: int) -> DecoderTrace:
    """Trace one class through the decoder, by the unit with the largest contribution to it at every stage.

    The contribution of a map is the sum over positions of activation times gradient, for the class's logits summed over
    the pixels that are predicted as the class (over all pixels if there are none). The units thus belong to the class,
    and are not simply those with the largest activations.

    Args:
        network: The network, in evaluation mode.
        image: (1, C, H, W), normalised.
        label: The index of the class.

    Raises:
        UsageError: The network does not unpool.
    """
    with torch.enable_grad(), _record_stages(network) as stage_maps:
        logits = network(image)
        prediction = logits[0].argmax(dim=0)
        selected = prediction == label
        score = logits[0, label][selected if bool(selected.any()) else torch.ones_like(selected)].sum()
        if not stage_maps.unpooled:
            raise UsageError(f"{type(network).__name__} does not unpool, so it has no decoder stages to show")
        start = stage_maps.inputs[0]
        dense_maps = [stage_maps.dense.get(index, sparse) for index, sparse in enumerate(stage_maps.unpooled)]
        gradients = torch.autograd.grad(score, [start, *dense_maps])
    units = [
        int((maps * gradient).sum(dim=(0, 2, 3)).argmax())
        for maps, gradient in zip([start, *dense_maps], gradients, strict=True)
    ]
    stages = [
        Stage(unit, unpooled[0, unit].detach(), dense_unit, dense[0, dense_unit].detach())
        for unit, dense_unit, unpooled, dense in zip(units, units[1:], stage_maps.unpooled, dense_maps, strict=False)
    ]
    probability = logits.detach().softmax(dim=1)[0, label]
    return DecoderTrace(start[0, units[0]].detach(), stages, probability, prediction)


@dataclass
class _StageMaps:
    """The inputs and outputs of unpooling and, by its index, of the filters after it; the deepest first.

    The filters are the rest of its stage or, without a stage, the first module after it.
    """

    inputs: list[Tensor] = field(default_factory=list)
    unpooled: list[Tensor] = field(default_factory=list)
    dense: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def _record_stages(network: nn.Module) -> Iterator[_StageMaps]:
    stage_maps, filters = _StageMaps(), dict[nn.Module, int]()
    parents = [module for module in network.modules() if isinstance(module, Checkpointable)]
    stages = {child: parent for parent in parents for child in parent.children()}

    def before(module: nn.Module, args: Any) -> None:
        for index, unpooled in enumerate(stage_maps.unpooled):
            # The hook of the outermost module runs first.
            if args and args[0] is unpooled and index not in filters.values():
                filters[module] = index

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, Unpool):
            if module in stages:
                filters[stages[module]] = len(stage_maps.unpooled)
            stage_maps.inputs.append(args[0])
            stage_maps.unpooled.append(output)
        elif module not in filters:
            return
        elif output is stage_maps.unpooled[filters[module]]:
            del filters[module]  # an empty stage, followed by the classifier
        else:
            stage_maps.dense.setdefault(filters[module], output)

    with ExitStack() as hooks:
        for module in network.modules():
            hooks.enter_context(module.register_forward_pre_hook(before))
            hooks.enter_context(module.register_forward_hook(after))
        yield stage_maps
