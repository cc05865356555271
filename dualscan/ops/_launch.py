"""Launching a Triton kernel by few steps of Python: what a small model's time goes to on a fast GPU.

Triton's own launch binds the arguments, looks at every one of them for a specialisation and builds a key of strings.
Here the kernels say all that themselves: sizes and strides have annotated types and are never specialised, everything
else is a constant, so a compiled kernel is found by the constants, the dtypes and the device.
"""

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Bytes that pointers are aligned to where a kernel is compiled for the widest loads, and elements of the narrowest
# dtype in them: a stride that is a multiple of so many keeps every row aligned.
ALIGNMENT = 16
ALIGNED_ELEMENTS = 8


class Launcher:
    """A kernel and its compiled forms.

    Args:
        kernel: the `triton.jit` function. Its parameters are, in this order, tensors, integers of annotated types (and
            in `do_not_specialize`) or floats, and constants.
    """

    __slots__ = ("_compiled", "kernel")

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor | None, ...],
        sizes: tuple[int | float, ...],
        constants: tuple[Any, ...],
        warps: int,
        registers: int | None = None,
    ) -> None:
        """Launches on the current device and stream; the first tensor is never None.

        `registers` is the most that a thread may take; None leaves it to the compiler.
        """
        assert tensors[0] is not None
        pointers = 0
        for t in tensors:
            if t is not None:
                pointers |= t.data_ptr()
        key = (tensors[0].get_device(), warps, registers, constants, *[t if t is None else t.dtype for t in tensors])
        compiled = None if pointers % ALIGNMENT else self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *sizes, *constants)
            return
        compiled = self.kernel[grid](*tensors, *sizes, *constants, num_warps=warps, maxnreg=registers)
        if compiled is not None and pointers % ALIGNMENT == 0:  # the interpreter returns nothing
            self._compiled[key] = compiled


def row_alignment(*extents: int) -> int:
    """`ALIGNED_ELEMENTS` if it divides all strides and widths, else 1: what a kernel may assume of its addresses."""
    return ALIGNED_ELEMENTS if not any(extent % ALIGNED_ELEMENTS for extent in extents) else 1


def unsupported(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute in `dtype`; None means that they can."""
    return None if dtype in DTYPES else f"the kernels compute float32, bfloat16 and float16, not {dtype}"
