"""What an algorithm costs, counted while it runs: operations, the longest chain of them, and memory.

Algorithms for one matrix differ in nothing else, so claims about them are checked by running them (sections 6 and 7 and
appendix B of arXiv 2405.21060).
"""

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


class Cost(NamedTuple):
    """What a call cost.

    Attributes:
        flops: additions and multiplications (a multiply-add is 2), divisions, exponentials.
        matmul_flops: how many of them were inside matrix products.
        depth: length of the longest chain of operations that wait for one another; a multiply-add is one of them, a sum
            of n terms is log2 n.
        memory: largest number of elements that were alive at once, the arguments not counted.
    """

    flops: int
    matmul_flops: int
    depth: int
    memory: int


def count(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Cost:
    """Runs a function of tensors without gradients and counts what it costs.

    Args:
        function: what to run.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The `Cost` of this call.

    Example:
        >>> count(torch.matmul, torch.ones(4, 8), torch.ones(8, 2))
        Cost(flops=128, matmul_flops=128, depth=4, memory=8)

    Note:
        A tensor is ready when all of its elements are: where an algorithm goes on with a part of a tensor, its depth is
        an upper bound.
    """
    with torch.no_grad(), _Counter() as counter:
        function(*args, **kwargs)
    return Cost(counter.flops, counter.matmul_flops, counter.depth, counter.peak)


# Elementwise to PyTorch, and no arithmetic.
_MOVES = {"clone", "_to_copy", "copy_", "fill_", "zero_", "where", "masked_fill", "conj_physical", "real", "imag"}
_COMPARES = {"eq", "ne", "lt", "le", "gt", "ge", "bitwise_not", "logical_not", "bitwise_and", "logical_and"}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = self.matmul_flops = self.depth = self.peak = self.alive = 0
        self.ready_after = WeakTensorKeyDictionary()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            if tensor not in self.ready_after:
                self._remember(tensor, 0, count_memory=False)
        flops, steps = _arithmetic(func, args, outputs)
        self.flops += flops
        self.matmul_flops += flops if _name(func) in _PRODUCTS else 0
        depth = max([self.ready_after[tensor] for tensor in inputs], default=0) + steps
        self.depth = max(self.depth, depth)
        for tensor in outputs:
            self._remember(tensor, depth, count_memory=True)
        return result

    def _remember(self, tensor: Tensor, depth: int, *, count_memory: bool) -> None:
        self.ready_after[tensor] = depth
        storage = tensor.untyped_storage()
        if storage._cdata in self.storages:  # a view, or written in place
            return
        size = storage.nbytes() // tensor.element_size() if count_memory else 0
        self.storages.add(storage._cdata)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, storage: int, size: int) -> None:
        self.storages.discard(storage)
        self.alive -= size


# Which argument is the left matrix of a product; its last dimension is the inner one.
_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
_SCANS = {"cumsum", "cumprod"}
_REDUCTIONS = {"sum", "mean", "prod"}


def _name(func: Any) -> str:
    return func.overloadpacket.__name__


def _arithmetic(func: Any, args: Any, outputs: list[Tensor]) -> tuple[int, int]:
    """Operations, and the steps they take when each is done as soon as it can be."""
    name = _name(func)
    if name in _PRODUCTS:
        inner = args[_PRODUCTS[name]].shape[-1]
        return 2 * outputs[0].numel() * inner, _levels(inner) + 1
    if name in _SCANS:
        return args[0].numel(), _levels(args[0].shape[args[1]])
    if name in _REDUCTIONS:
        return args[0].numel(), _levels(args[0].numel() // max(1, outputs[0].numel()))
    if torch.Tag.pointwise not in func.tags or name in _MOVES | _COMPARES:
        return 0, 0
    return outputs[0].numel() * (2 if name.startswith("addcmul") else 1), 1


def _levels(length: int) -> int:
    return math.ceil(math.log2(max(1, length)))
