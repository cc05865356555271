"""Values that the backward computes again instead of keeping: memory of training, paid in time.

An operator saves its inputs for its backward. Where an input is itself cheap to compute from what is saved anyway, as
the convolution's output is from its input, the graph may keep a recipe in its place. The operators know nothing of it:
PyTorch asks at every saved tensor what to keep, and `recomputed` answers for one of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Recompute = Literal["none", "convolution", "activations", "block"]


def check_recompute(recompute: str) -> Recompute:
    """The value, if it is one.

    Raises:
        ValueError: it is not.
    """
    for known in get_args(Recompute):
        if recompute == known:
            return known
    raise ValueError(
        f"recompute={recompute!r} is unknown; use 'none' (keep everything), 'convolution' (compute its output again in "
        f"the backward), 'activations' (all cheap values) or 'block' (whole blocks)."
    )


def recomputes_activations(recompute: Recompute) -> bool:
    """Whether a layer keeps recipes; under `torch.compile` the partitioner decides what is kept."""
    return recompute == "activations" and not torch.compiler.is_compiling()


def recomputes_convolution(recompute: Recompute) -> bool:
    """Whether a layer keeps a recipe of what comes out of its convolution; under `torch.compile` as above."""
    return recompute in ("convolution", "activations") and not torch.compiler.is_compiling()


@contextmanager
def recomputed(value: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Operations inside that save `value`, or a view of it, for their backward keep a recipe instead of the memory.

    The backward gets the same bits, as long as `again` is deterministic. Nothing changes under `torch.compile`, whose
    partitioner decides what to keep, inside saved-tensor hooks of the caller (such as `torch.utils.checkpoint`), which
    go before, and without gradients.

    Args:
        value: contiguous; what is left of it after the block is up to its other owners.
        again: computes it again, in the same layout; what it holds stays in memory in the value's place.

    Example:
        >>> x = torch.randn(4, requires_grad=True)
        >>> y = x.exp()
        >>> with recomputed(y, lambda: x.exp()):
        ...     z = y.square()  # saves y to be differentiated, or rather how to get it
        >>> torch.allclose(torch.autograd.grad(z.sum(), x)[0], 2 * (2 * x).exp())
        True
    """
    outer = _outer_recipe()
    memory = value.numel() and type(value) is Tensor and value.device.type != "meta"
    if outer is _NOBODY or not torch.is_grad_enabled() or not memory:
        yield
        return
    recipe = _Recipe(value, again, outer)
    with torch.autograd.graph.saved_tensors_hooks(recipe.pack, _unpack):
        yield


class _Saved(NamedTuple):
    """What the graph keeps of a view."""

    recipe: "_Recipe"
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Recipe:
    def __init__(self, value: Tensor, again: Callable[[], Tensor], outer: "_Recipe | None"):
        self._memory, self._dtype, self._stride = value.untyped_storage().data_ptr(), value.dtype, value.stride()
        self._again, self._outer = again, outer
        self._views = self._left = 0
        self._value: Tensor | None = None

    def pack(self, tensor: Tensor) -> Any:
        """What the graph keeps of a tensor."""
        own = type(tensor) is Tensor and tensor.dtype == self._dtype
        if not own or tensor.untyped_storage().data_ptr() != self._memory:
            return tensor if self._outer is None else self._outer.pack(tensor)
        self._views += 1
        return _Saved(self, tensor.shape, tensor.stride(), tensor.storage_offset())

    def view(self, saved: _Saved) -> Tensor:
        """A view of the value, which stays for as many views as were saved of it: a backward unpacks all at once."""
        if self._value is None:
            with torch.no_grad():
                self._value, self._left = self._again(), self._views
            assert self._value.stride() == self._stride
        value, self._left = self._value, self._left - 1
        if self._left == 0:
            self._value = None
        return value.as_strided(saved.size, saved.stride, saved.offset)


def _unpack(kept: Any) -> Tensor:
    return kept.recipe.view(kept) if isinstance(kept, _Saved) else kept


_NOBODY = object()


def _outer_recipe() -> Any:
    """The recipe of an enclosing block, None outside of any, or `_NOBODY` where recipes have no place."""
    if torch.compiler.is_compiling():
        return _NOBODY
    hooks: Any = torch._C._autograd
    if not hooks._saved_tensors_hooks_is_enabled():
        return _NOBODY
    top = hooks._top_saved_tensors_default_hooks(False)
    if top is None:
        return None
    owner = getattr(top[0], "__self__", None)
    return owner if isinstance(owner, _Recipe) else _NOBODY
