"""How a decoder builds a mask: of every unpooling, what one unit looks like before and after the filters.

After Noh et al. 2015, figure 4, https://arxiv.org/abs/1505.04366: an unpooled map is sparse and has the image's fine
places, the filters after it make it dense and leave what the class needs.
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
    """One unpooling. unpooled, dense: (H, W), of one map each, before and after the filters that follow. Where only the
    classifier follows, dense is the class's logits.

    unit, dense_unit: the numbers of these maps; the next stage unpools the latter.
    """

    unit: int
    unpooled: Tensor
    dense_unit: int
    dense: Tensor


class DecoderTrace(NamedTuple):
    """start: (h, w), the map that the first stage unpools. stages: the deepest first.

    probability: (H, W), of the class. prediction: (H, W) int64.
    """

    start: Tensor
    stages: list[Stage]
    probability: Tensor
    prediction: Tensor


def trace_decoder(network: nn.Module, image: Tensor, label: int) -> DecoderTrace:
    """The way of one class through the decoder, by the unit that says most for it at every stage.

    That is the map with the largest sum over places of activation times gradient, of the class's logits summed over the
    pixels that are predicted as it (over all pixels if none is). So the chain is of one object and not of whatever is
    loudest.

    network: in evaluation mode; image: (1, C, H, W), normalised. Raises UsageError for a network without unpooling.
    """
    with torch.enable_grad(), _seen(network) as seen:
        logits = network(image)
        prediction = logits[0].argmax(dim=0)
        chosen = prediction == label
        score = logits[0, label][chosen if bool(chosen.any()) else torch.ones_like(chosen)].sum()
        if not seen.unpooled:
            raise UsageError(f"{type(network).__name__} does not unpool, so it has no stages that could be shown")
        start, denses = seen.given[0], [seen.dense.get(index, sparse) for index, sparse in enumerate(seen.unpooled)]
        gradients = torch.autograd.grad(score, [start, *denses])
    units = [
        int((maps * gradient).sum(dim=(0, 2, 3)).argmax())
        for maps, gradient in zip([start, *denses], gradients, strict=True)
    ]
    stages = [
        Stage(unit, unpooled[0, unit].detach(), after, dense[0, after].detach())
        for unit, after, unpooled, dense in zip(units, units[1:], seen.unpooled, denses, strict=False)
    ]
    probability = logits.detach().softmax(dim=1)[0, label]
    return DecoderTrace(start[0, units[0]].detach(), stages, probability, prediction)


@dataclass
class _Seen:
    """What went into unpooling, what came out, and what the rest of its stage, or without one the first module behind
    it, made of that, the deepest first."""

    given: list[Tensor] = field(default_factory=list)
    unpooled: list[Tensor] = field(default_factory=list)
    dense: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def _seen(network: nn.Module) -> Iterator[_Seen]:
    seen, filters = _Seen(), dict[nn.Module, int]()
    parents = [module for module in network.modules() if isinstance(module, Checkpointable)]
    stages = {child: parent for parent in parents for child in parent.children()}

    def before(module: nn.Module, given: Any) -> None:
        for index, unpooled in enumerate(seen.unpooled):
            if given and given[0] is unpooled and index not in filters.values():  # the outermost module hears first
                filters[module] = index

    def after(module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(module, Unpool):
            if module in stages:
                filters[stages[module]] = len(seen.unpooled)
            seen.given.append(given[0])
            seen.unpooled.append(output)
        elif module not in filters:
            return
        elif output is seen.unpooled[filters[module]]:
            del filters[module]  # an empty stage: what follows it is the classifier
        else:
            seen.dense.setdefault(filters[module], output)

    with ExitStack() as hooks:
        for module in network.modules():
            hooks.enter_context(module.register_forward_pre_hook(before))
            hooks.enter_context(module.register_forward_hook(after))
        yield seen
