"""A model layer by layer: the residual stream going up, the gradient of one logit coming down, in bounded memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dualscan.models.lm import MambaLM
from dualscan.ops._pointwise import accumulation_dtype


@torch.no_grad()
def residual_stream(model: MambaLM, tokens: Tensor) -> list[Tensor]:
    """The residual stream before every layer and after the last: `n_layers + 1` tensors `(batch, seqlen, d_model)`.

    Args:
        model: the language model.
        tokens: `(batch, seqlen)` int64.

    Returns:
        The list; the logits follow from the last entry.
    """
    stream: list[Tensor] = []
    # Every block reads the stream, and the last norm; a block that stands in several places is called in each.
    modules = dict.fromkeys([*model.layers, model.norm_f])
    hooks = [module.register_forward_pre_hook(lambda _, read: stream.append(read[0])) for module in modules]
    try:
        model.hidden_states(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return stream


def logit_gradients(model: MambaLM, stream: list[Tensor], *, position: int, target: int) -> Iterator[Tensor]:
    """The gradient of one logit with respect to each entry of `residual_stream`, from the last to the first.

    Each layer is computed once more for its own gradient, so that memory does not grow with the number of layers.

    Args:
        model: the language model.
        stream: what `residual_stream` returned, batch 1.
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
    for block, h in zip(reversed(model.layers), reversed(stream[:-1]), strict=True):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(block(h)[0], h, gradient)
        yield gradient
