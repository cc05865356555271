"""Launching a Triton kernel by few steps of Python: what a small model's time goes to on a fast GPU.

Triton's own launch binds the arguments, looks at every one of them for a specialisation and builds a key of strings;
then it encodes every tensor descriptor anew and goes through four Python functions to the one that it compiled in C for
the kernel's signature. `Launcher` finds a compiled kernel by the constants, the dtypes and the device: its kernels say
all else themselves, because sizes and strides have annotated types and are never specialised. `started` calls what was
compiled in C. `rehearsed` compiles the kernels of a first call side by side; `replay` repeats whole calls.
"""

import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Bytes that pointers are aligned to where a kernel is compiled for the widest loads, and elements of the narrowest
# dtype in them: a stride that is a multiple of so many keeps every row aligned.
ALIGNMENT = 16
ALIGNED_ELEMENTS = 8


# Starts a compiled kernel, given a grid and the arguments before the kernel's constants.
Start = Callable[[tuple[int, ...], Sequence[Any]], None]
# Calls what follows a launcher, given its results and its arguments.
Following = Callable[[Sequence[Tensor], Sequence[Any]], None]


class Watcher(Protocol):
    """Is told of a thread's launches."""

    def started(self, start: "Started", grid: tuple[int, ...], arguments: Sequence[Any]) -> None: ...

    def spoil(self, obstacle: str) -> None: ...


class _Thread(threading.local):
    """What a thread's launches depend on: whether they only compile, in a rehearsal, and who is told of them."""

    rehearses = False
    watcher: Watcher | None = None


_THREAD = _Thread()


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Tells `watcher` of this thread's launches."""
    before, _THREAD.watcher = _THREAD.watcher, watcher
    try:
        yield
    finally:
        _THREAD.watcher = before


# Encoded tensor descriptors, each with the numbers that follow it: by address, so that no tensor is kept, and by all
# else that they are made of. Whichever tensor lies at an address later, the same numbers give the same bytes.
_ENCODED: dict[tuple[Any, ...], list[Any]] = {}
MOST_ENCODED = 4096
# Threads that compile.
MOST_THREADS = 8


class Started:
    """How to start a kernel again that Triton has just launched on the current GPU, given a grid and arguments.

    Hooks on Triton's launches are not called.

    Args:
        launch: what Triton compiled in C for the kernel's signature.
        before: its arguments between the stream and the kernel's.
        constants: the kernel's at its signature's end that are compile-time parameters.
        described: (place, name, encoding) of every argument that is a tensor descriptor, the last one first.
        current_stream: the stream that launches on this GPU go to.
    """

    __slots__ = ("after", "before", "current_stream", "described", "launch")

    def __init__(
        self,
        launch: Callable[..., None],
        before: tuple[Any, ...],
        constants: int,
        described: Sequence[tuple[int, str, Callable[[Any], list[Any]]]],
        current_stream: Callable[[], int],
    ):
        self.launch, self.before, self.after = launch, before, (None,) * constants
        self.described, self.current_stream = described, current_stream

    def __call__(self, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        grid = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        if _THREAD.watcher is not None:
            _THREAD.watcher.started(self, grid, arguments)
        if self.described:
            arguments = list(arguments)
            for place, name, encode in self.described:
                t = arguments[place]
                key = (t.base.data_ptr(), name, t.padding, *t.shape, *t.strides)
                known = _ENCODED.get(key)
                if known is None:
                    if len(_ENCODED) >= MOST_ENCODED:
                        _ENCODED.clear()
                    known = _ENCODED[key] = encode(t)
                # From the end, because a descriptor becomes several arguments.
                arguments[place : place + 1] = known
        self.launch(*grid, self.current_stream(), *self.before, *arguments, *self.after)


def started(compiled: Any, constants: int) -> Started | None:
    """How to start a kernel again that Triton has just launched on the current GPU.

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
        encodings = [partial(make_tensordesc_arg, metadata=layout) for layout in layouts]
        described = [*zip(sorted(inside["tensordesc_indices"]), map(repr, layouts), encodings, strict=True)][::-1]
    before = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata)
    stream = partial(driver.active.get_current_stream, driver.active.get_current_device())
    return Started(launch, (*before, None, None, None), constants, described, stream)


def first_launch(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], **options: Any) -> Any:
    """`kernel[grid](*arguments, **options)`, or in a rehearsal no more than its compilation.

    Returns:
        The compiled kernel; None in the interpreter and in a rehearsal.
    """
    if _THREAD.watcher is not None:
        _THREAD.watcher.spoil("a kernel is not started by what was compiled in C")
    if _THREAD.rehearses:
        kernel.run(*arguments, grid=grid, warmup=True, **options)
        return None
    return kernel[grid](*arguments, **options)


def rehearsed(launcher: Callable[..., Any], following: Following | None = None) -> Callable[..., Any]:
    """`launcher`, whose first call on a GPU compiles all of its kernels side by side before it launches one.

    Triton compiles a kernel at its first launch, and the C function that starts it: a second for each, most of it in
    LLVM, ptxas and a C compiler, which do not hold Python's lock. So the first call is made twice, and the first time
    launches nothing; what it returns is thrown away.

    Args:
        launcher: starts kernels by this module's or `_triton`'s launchers, and changes nothing that it is given.
        following: calls the launcher of the backward, given the results and the arguments of a forward: where one of
            these asks for a gradient, its kernels are compiled beside the forward's.
    """
    done: set[bool] = set()

    def call(*args: Any) -> Any:
        trains = following is not None and any(isinstance(t, Tensor) and t.requires_grad for t in args)
        if trains not in done and _may_rehearse(args):
            done.add(trains)
            if not _THREAD.rehearses:  # else this call is part of another's
                _rehearse(launcher, args, following if trains else None)
        return launcher(*args)

    return call


def _may_rehearse(args: Iterable[Any]) -> bool:
    """Whether the call is on a GPU and its sequences are not packed: their plan, which kernels fill, is kept."""
    tensors = [t for t in args if isinstance(t, Tensor)]
    return any(t.is_cuda for t in tensors) and all(t.is_floating_point() for t in tensors)


def _rehearse(launcher: Callable[..., Any], args: Sequence[Any], following: Following | None) -> None:
    import triton
    from triton.runtime import driver

    side_by_side = getattr(triton, "AsyncCompileMode", None)  # since Triton 3.5
    if side_by_side is None:
        return

    class Pool(ThreadPoolExecutor):
        def submit(self, compile: Callable[[], Any], /) -> Future[Any]:  # pyrefly: ignore[bad-override]
            def whole() -> Any:
                kernel = compile()
                driver.active.launcher_cls(kernel.src, kernel.metadata)  # stays on disk
                return kernel

            return super().submit(whole)

    _THREAD.rehearses = True
    try:
        # What does not compile will say so at its launch.
        with Pool(min(MOST_THREADS, os.cpu_count() or 1)) as pool, side_by_side(pool, ignore_errors=True):
            results = launcher(*args)
            if following is not None:
                following(results, args)
    finally:
        _THREAD.rehearses = False


def _start(compiled: Any, constants: tuple[Any, ...], grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
    """Starts a compiled kernel by way of Triton's Python."""
    if _THREAD.watcher is not None:
        _THREAD.watcher.spoil("a kernel is not started by what was compiled in C")
    compiled[grid](*arguments, *constants)


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
        everything = (*tensors, *sizes, *constants)
        compiled = first_launch(self.kernel, grid, everything, num_warps=warps, maxnreg=registers)
        if compiled is not None and pointers % ALIGNMENT == 0:
            start = started(compiled, len(constants))
            self._compiled[key] = start or partial(_start, compiled, constants)


def row_alignment(*extents: int) -> int:
    """`ALIGNED_ELEMENTS` if it divides all strides and widths, else 1: what a kernel may assume of its addresses."""
    return ALIGNED_ELEMENTS if not any(extent % ALIGNED_ELEMENTS for extent in extents) else 1


def unsupported(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute in `dtype`; None means that they can."""
    return None if dtype in DTYPES else f"the kernels compute float32, bfloat16 and float16, not {dtype}"
