"""What an algorithm costs, counted while it runs: operations, the longest chain of them, and memory.

Algorithms for one matrix differ in nothing else, so claims about them are checked by running them (section 6 and
appendix B of arXiv 2405.21060).
"""

import math
import re
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

    Raises:
        NotImplementedError: when the function calls an operation of PyTorch whose cost is not known here.

    Example:
        >>> count(torch.matmul, torch.ones(4, 8), torch.ones(8, 2))
        Cost(flops=128, matmul_flops=128, depth=4, memory=8)

    Note:
        A tensor is ready when all of its elements are: where an algorithm goes on with a part of a tensor, its depth is
        an upper bound. Operations on complex numbers count once. A Fourier transform of n numbers counts 5 n log2 n
        operations, half of them when its input or output is real (the convention of its benchmarks).
    """
    with torch.no_grad(), _Counter() as counter:
        function(*args, **kwargs)
    return Cost(counter.flops, counter.matmul_flops, counter.depth, counter.peak)


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
_SOFTMAX = {"_softmax", "_log_softmax"}
# Operations a number and level: complex, real to complex, complex to real.
_TRANSFORMS = {"_fft_c2c": 5.0, "_fft_r2c": 2.5, "_fft_c2r": 2.5}
# What moves or orders numbers; some of it is elementwise to PyTorch.
_MOVES = re.compile(
    "_to_copy|_unsafe_view|alias|amax|amin|cat|clone|complex|conj_physical|constant_pad_nd|copy_|diag_embed|fill_|flip|"
    "gather|imag|index|index_put|index_select|lift_fresh|masked_fill|max|maximum|min|minimum|new_.*|.*_like|polar|real|"
    "repeat|resolve_conj|roll|scatter|slice_scatter|sort|stack|tril|triu|where|zero_"
)


def _name(func: Any) -> str:
    return func.overloadpacket.__name__


def _arithmetic(func: Any, args: Any, outputs: list[Tensor]) -> tuple[int, int]:
    """Operations, and the steps they take when each is done as soon as it can be."""
    name = _name(func)
    takes_numbers = any(isinstance(leaf, Tensor) for leaf in tree_leaves(args))
    compares = bool(outputs) and all(out.dtype == torch.bool for out in outputs)
    if func.is_view or compares or not takes_numbers or _MOVES.fullmatch(name):
        return 0, 0
    if name in _PRODUCTS:
        inner = args[_PRODUCTS[name]].shape[-1]
        return 2 * outputs[0].numel() * inner, _levels(inner) + 1
    if name in _SCANS:
        return args[0].numel(), _levels(args[0].shape[args[1]])
    if name in _REDUCTIONS:
        return args[0].numel(), _levels(args[0].numel() // max(1, outputs[0].numel()))
    if name in _SOFTMAX:  # a difference, an exponential, a sum, a quotient
        return 4 * args[0].numel(), _levels(args[0].shape[args[1]]) + 3
    if name in _TRANSFORMS:
        longer = max(args[0], outputs[0], key=Tensor.numel)
        levels = _levels(math.prod(longer.shape[dim] for dim in args[1]))
        return round(_TRANSFORMS[name] * longer.numel() * levels), levels
    if torch.Tag.pointwise not in func.tags:
        raise NotImplementedError(
            f"count knows no cost of {func}; compose it from products, sums and elementwise steps"
        )
    return outputs[0].numel() * (2 if name.startswith("addcmul") else 1), 1


def _levels(length: int) -> int:
    return math.ceil(math.log2(max(1, length)))
