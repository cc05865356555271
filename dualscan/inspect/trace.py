"""A model layer by layer: the residual stream going up, the gradient of one logit coming down, in bounded memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dualscan.models.lm import MambaLM
from dualscan.nn.precision import LOW_PRECISION
from dualscan.ops._pointwise import accumulation_dtype


@torch.no_grad()
def residual_stream(model: MambaLM, tokens: Tensor) -> list[Tensor]:
    """The residual stream before every layer and after the last: `n_layers + 1` tensors `(batch, seqlen, d_model)`.

    Args:
        model: the language model.
        tokens: `(batch, seqlen)` int64.

    Returns:
        The list; `model.norm_f` of its last entry gives the logits.
    """
    h = model.embedding(tokens)
    stream = [h.float() if h.dtype in LOW_PRECISION else h]
    for block in model.layers:
        stream.append(block(stream[-1])[0])
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
        hidden = model.norm_f(last[:, position]).to(model.output_weight.dtype)
        dtype = accumulation_dtype(hidden.dtype)
        logit = hidden[0].to(dtype) @ model.output_weight[target].detach().to(dtype)
        (gradient,) = torch.autograd.grad(logit, last)
    yield gradient
    for block, h in zip(reversed(model.layers), reversed(stream[:-1]), strict=True):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(block(h)[0], h, gradient)
        yield gradient
