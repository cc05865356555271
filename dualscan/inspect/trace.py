"""A model layer by layer: the residual stream going up, the gradient of one logit coming down, in bounded memory."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualscan.models.lm import MambaLM
from dualscan.nn.hybrid.shared import SharedBlock
from dualscan.ops._pointwise import accumulation_dtype


class Trace(NamedTuple):
    """What the parts of a model read at one text.

    Attributes:
        stream: the residual stream before every layer and after the last, `n_layers + 1` tensors `(batch, seqlen,
            d_model)`.
        inputs: what every layer's mixer reads, `n_layers` tensors of the same shape.
    """

    stream: list[Tensor]
    inputs: list[Tensor]


@torch.no_grad()
def trace(model: MambaLM, tokens: Tensor) -> Trace:
    """Runs a model and keeps what its layers read.

    Args:
        model: the language model.
        tokens: `(batch, seqlen)` int64.

    Returns:
        A `Trace`.
    """
    found = Trace([], [])

    def keep(module: nn.Module, into: list[Tensor]) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_pre_hook(lambda _, read: into.append(read[0]))

    # Every block reads the stream, and so does the last norm.
    hooks = [keep(module, found.stream) for module in (*model.layers, model.norm_f)]
    hooks += [keep(block.get_submodule("mixer"), found.inputs) for block in model.layers]
    try:
        model.hidden_states(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def logit_gradients(model: MambaLM, stream: list[Tensor], *, position: int, target: int) -> Iterator[Tensor]:
    """The gradient of one logit with respect to each entry of a stream, from the last to the first.

    Each layer is computed once more for its own gradient, so that memory does not grow with the number of layers.

    Args:
        model: the language model.
        stream: of `trace`, batch 1.
        position: the token whose prediction is asked about; may be negative.
        target: the predicted token.

    Yields:
        `(1, seqlen, d_model)`, `n_layers + 1` times.
    """
    with torch.enable_grad():
        last = stream[-1].detach().requires_grad_()
        hidden = model._finish(last[:, position])
        dtype = accumulation_dtype(hidden.dtype)
        logit = hidden[0].to(dtype) @ model.output_weight[target].detach().to(dtype)
        (gradient,) = torch.autograd.grad(logit, last)
    yield gradient
    # Shared transformers read the first entry too, past the layers between; what reaches it so is added in the end.
    directly = torch.zeros_like(gradient)
    for i in reversed(range(len(model.layers))):
        block = model.layers[i]
        with torch.enable_grad():
            h, first = stream[i].detach().requires_grad_(), stream[0].detach().requires_grad_()
            if isinstance(block, SharedBlock):
                gradient, more = torch.autograd.grad(block(h, embedding=first)[0], (h, first), gradient)
                directly += more
            else:
                (gradient,) = torch.autograd.grad(block(h)[0], h, gradient)
        yield gradient if i else gradient + directly
