"""Launching a Triton kernel by few steps of Python: what a small model's time goes to on a fast GPU.

Triton's own launch binds the arguments, looks at every one of them for a specialisation and builds a key of strings;
then it encodes every tensor descriptor anew and goes through four Python functions to the one that it compiled in C for
the kernel's signature. `Launcher` finds a compiled kernel by the constants, the dtypes and the device: its kernels say
all else themselves, because sizes and strides have annotated types and are never specialised. `started` calls what was
compiled in C.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Bytes that pointers are aligned to where a kernel is compiled for the widest loads, and elements of the narrowest
# dtype in them: a stride that is a multiple of so many keeps every row aligned.
ALIGNMENT = 16
ALIGNED_ELEMENTS = 8


# Starts a compiled kernel, given a grid and the arguments before the kernel's constants.
Start = Callable[[tuple[int, ...], Sequence[Any]], None]

# Encoded tensor descriptors, each with the numbers that follow it: by address, so that no tensor is kept, and by all
# else that they are made of. Whichever tensor lies at an address later, the same numbers give the same bytes.
_ENCODED: dict[tuple[Any, ...], list[Any]] = {}
MOST_ENCODED = 4096


def started(compiled: Any, constants: int) -> Start | None:
    """How to start a kernel again that Triton has just launched on the current GPU.

    Hooks on Triton's launches are not called.

    Args:
        compiled: what the launch returned.
        constants: arguments at the signature's end that are compile-time parameters.

    Returns:
        None where that is unknown: in the interpreter, where a kernel needs memory of Triton's, and in versions of
        Triton other than 3.6, whose protocol this is.
    """
    if compiled is None:
        return None
    import triton

    run = compiled.run
    if not triton.__version__.startswith("3.6.") or run.global_scratch_size or run.profile_scratch_size:
        return None
    from triton.backends.nvidia.driver import make_tensordesc_arg
    from triton.runtime import driver

    launch, described = run.launch, []
    if inspect.isfunction(launch):  # in Python, because there are descriptors
        inside = inspect.getclosurevars(launch).nonlocals
        launch, layouts = inside["launcher"], inside["tensordesc_meta"]
        if None in layouts:
            return None
        # From the end, because a descriptor becomes several arguments.
        described = [*zip(sorted(inside["tensordesc_indices"]), layouts, map(repr, layouts), strict=True)][::-1]
    stream, device = driver.active.get_current_stream, driver.active.get_current_device()
    before = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata)
    before, after = (*before, None, None, None), (None,) * constants

    def start(grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        launch(x, y, z, stream(device), *before, *arguments, *after)

    def start_described(grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        expanded = list(arguments)
        for place, layout, name in described:
            t = arguments[place]
            key = (t.base.data_ptr(), name, t.padding, *t.shape, *t.strides)
            known = _ENCODED.get(key)
            if known is None:
                if len(_ENCODED) >= MOST_ENCODED:
                    _ENCODED.clear()
                known = _ENCODED[key] = make_tensordesc_arg(t, layout)
            expanded[place : place + 1] = known
        start(grid, expanded)

    return start_described if described else start


class Launcher:
    """A kernel and its compiled forms.

    Args:
        kernel: the `triton.jit` function. Its parameters are, in this order, tensors, integers of annotated types (and
            in `do_not_specialize`) or floats, and constants.
    """

    __slots__ = ("_compiled", "kernel")

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], Start] = {}

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
        start = None if pointers % ALIGNMENT else self._compiled.get(key)
        if start is not None:
            start(grid, (*tensors, *sizes))
            return
        compiled = self.kernel[grid](*tensors, *sizes, *constants, num_warps=warps, maxnreg=registers)
        if compiled is not None and pointers % ALIGNMENT == 0:  # the interpreter returns nothing
            start = started(compiled, len(constants))
            self._compiled[key] = start or (lambda grid, arguments: compiled[grid](*arguments, *constants))


def row_alignment(*extents: int) -> int:
    """`ALIGNED_ELEMENTS` if it divides all strides and widths, else 1: what a kernel may assume of its addresses."""
    return ALIGNED_ELEMENTS if not any(extent % ALIGNED_ELEMENTS for extent in extents) else 1


def unsupported(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute in `dtype`; None means that they can."""
    return None if dtype in DTYPES else f"the kernels compute float32, bfloat16 and float16, not {dtype}"
