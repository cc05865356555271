"""What operators share: the autograd function of a pair of them, the short way to a kernel's launcher, and products
outside of `torch.autocast`."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dualscan.ops._launch import Following, rehearsed
from dualscan.ops._launch.replay import replayed

Routine = Callable[..., Any]


def shortcut(operator: Routine, launcher: Routine, following: Following | None = None) -> Routine:
    """`operator`, called below autograd, as a plain call of its `launcher` where only its result matters.

    PyTorch's dispatcher converts every argument and result between Python and C++, which takes as long as a launch, and
    records views and changes of tensors that nobody differentiates.

    Args:
        operator: of `torch.ops.dualscan`.
        launcher: what is registered for it on CPU and CUDA.
        following: as `rehearsed` takes it.
    """
    launcher = replayed(rehearsed(launcher, following))

    def call(*args: Any) -> Any:
        if unwatched(args):
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return launcher(*args)
        return operator(*args)

    return call


def entry(operator: Routine, function: Routine) -> Routine:
    """`operator`, as a plain call of the `function` at its Autograd key where only its result matters."""

    def call(*args: Any) -> Any:
        return function(*args) if unwatched(args) else operator(*args)

    return call


def unwatched(args: Iterable[Any]) -> bool:
    """Whether no one looks at which operators are called: plain tensors on a device, nothing that traces, transforms,
    profiles or takes calls over."""
    if torch.compiler.is_compiling() or torch.autograd.profiler._is_profiler_enabled:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state():
        return False
    for t in args:
        kind = type(t)
        if kind is Tensor or kind is Parameter:
            if not (t.is_cuda or t.is_cpu):
                return False
        elif kind not in _PLAIN and isinstance(t, Tensor):
            return False
    return True


# Types of what is no tensor: asking `isinstance` takes three times as long where the answer is no.
_PLAIN = frozenset({type(None), bool, int, float})


def asks_for_gradient(args: Iterable[Any]) -> bool:
    """Whether autograd has to know of a call."""
    if torch.is_grad_enabled():
        for t in args:
            if t is not None and isinstance(t, Tensor) and t.requires_grad:
                return True
    return False


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products of decays and states stay in the compute dtype inside a region of `torch.autocast`, forward and back."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def differentiable(
    name: str, forward: Routine, backward: Routine, count: int, instead: str,
    launchers: tuple[Routine, Routine] | None = None
) -> Routine:  # fmt: skip
    """The autograd function of a pair of operators: the inputs are saved, the backward operator recomputes the rest.

    Args:
        name: of the public operator, for the message.
        forward: returns y and the final states, and maybe more for the backward.
        backward: takes their gradients, None where there is none, then what else there was, and what `forward` takes.
        count: so many of the first arguments have gradients; the tensors after them, and the plain values, have none.
        instead: what to use for second derivatives.
        launchers: what is registered for both operators on CPU and CUDA, for the short way.

    Returns:
        What to register at the Autograd dispatch key of `forward` (docs/decisions/001).
    """
    pair = forward, backward
    run, run_back = pair
    if launchers is not None:
        launch, launch_back = launchers

        def following(results: Sequence[Tensor], args: Sequence[Any]) -> None:
            launch_back(torch.empty_like(results[0]), None, *results[2:], *args)

        run, run_back = shortcut(forward, launch, following), shortcut(backward, launch_back)

    def below(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            ctx.set_materialize_grads(False)
            results = below(*args)
            ctx.save_for_backward(*results[2:], *[t for t in args if t is None or isinstance(t, Tensor)])
            ctx.values = [t for t in args if t is not None and not isinstance(t, Tensor)]
            ctx.more = len(results) - 2
            if ctx.more:
                ctx.mark_non_differentiable(*results[2:])
            return results

        @staticmethod
        def backward(ctx: Any, *grads_out: Any) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # once: unpacking may compute them again
            grads_out, more, inputs = grads_out[:2], saved[: ctx.more], saved[ctx.more :]
            nothing = [None] * (len(inputs) - count + len(ctx.values))
            if all(g is None for g in grads_out):
                return *([None] * count), *nothing
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name}: create_graph=True asks for a second derivative, which the chunked form and the kernels "
                    f"do not have; use {instead}."
                )
            with without_autocast(inputs[0].device):
                grads = run_back(*grads_out, *more, *inputs, *ctx.values)
            return *(None if t is None else g for t, g in zip(inputs, grads, strict=False)), *nothing

    def autograd(*args: Any) -> tuple[Tensor, ...]:
        return Function.apply(*args) if asks_for_gradient(args) else below(*args)

    return autograd
