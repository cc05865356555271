"""What the scans' operators share: their autograd function, and products outside of `torch.autocast`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products of decays and states stay in the compute dtype inside a region of `torch.autocast`, forward and back."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def differentiable(name: str, forward: Any, backward: Any, count: int, instead: str) -> Any:
    """The autograd function of a pair of operators: the inputs are saved, the backward operator recomputes the rest.

    Args:
        name: of the public operator, for the message.
        forward: returns y and the final states.
        backward: takes their gradients, None where there is none, and then what `forward` takes.
        count: so many of the first arguments have gradients; the tensors after them, and the plain values, have none.
        instead: what to use for second derivatives.

    Returns:
        What to register at the Autograd dispatch key of `forward` (docs/decisions/001).
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*(t for t in args if t is None or isinstance(t, Tensor)))
            ctx.values = [t for t in args if t is not None and not isinstance(t, Tensor)]
            with torch._C._AutoDispatchBelowAutograd():
                return forward(*args)

        @staticmethod
        def backward(ctx: Any, *grads_out: Any) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            nothing = [None] * (len(inputs) - count + len(ctx.values))
            if all(g is None for g in grads_out):
                return *([None] * count), *nothing
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name}: create_graph=True asks for a second derivative, which the chunked form and the kernels "
                    f"do not have; use {instead}."
                )
            with without_autocast(inputs[0].device):
                grads = backward(*grads_out, *inputs, *ctx.values)
            return *(None if t is None else g for t, g in zip(inputs, grads, strict=False)), *nothing

    def autograd(*args: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
            return Function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*args)

    return autograd
