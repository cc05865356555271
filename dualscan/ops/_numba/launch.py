"""Launching a compiled kernel on PyTorch's own threads.

A kernel is a C function of one argument, a block of int64: the worker's number and the number of workers, then the
arguments (addresses of tensors, sizes, strides). Every worker gets the same block and does its share of the work.

Workers are threads of the OpenMP runtime that PyTorch brings along, entered through `GOMP_parallel`, the call that
compilers emit for a parallel region. A pool of its own would have to fight PyTorch's threads for the cores, because
they spin for a while after each operation. Where that runtime is not found, a thread pool takes its place.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import torch
from torch import Tensor

# What precedes the arguments in a block; the worker's number is -1 where OpenMP tells it.
HEADER = 2
# Elements that one thread works through in the time that it takes to start the others.
SMALL = 2**14


def _openmp() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    package = Path(torch.__file__).parent
    bundled = [path for folder in (package / "lib", package.parent / "torch.libs") for path in folder.glob("libgomp*")]
    for name in (*map(str, bundled), "libgomp.so.1"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


_OPENMP = _openmp()


@ctypes.CFUNCTYPE(ctypes.c_int)
def _no_thread_number() -> int:
    return 0


# Compiled kernels refer to these functions by name, so that their machine code can be kept on disk.
for _name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
    _function = _no_thread_number if _OPENMP is None else getattr(_OPENMP, _name)
    llvm.add_symbol(_name, ctypes.cast(_function, ctypes.c_void_p).value)


def launch(address: int, arguments: Sequence[Tensor | int | None], workers: int, meet: bool = False) -> None:
    """Runs the kernel at `address` on `workers` threads and waits for it.

    Args:
        address: of the compiled function.
        arguments: tensors are passed as their address, None as 0.
        workers: threads.
        meet: whether the workers wait for one another on the way, which takes OpenMP; without it one worker runs.
    """
    if meet and _OPENMP is None:
        workers = 1
    values = [a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments]
    if _OPENMP is None and workers > 1:
        _run_in_pool(address, values, workers)
    elif workers == 1:
        _function_at(address)(_block(0, 1, values))
    else:
        assert _OPENMP is not None
        _OPENMP.GOMP_parallel(ctypes.c_void_p(address), _block(-1, workers, values), workers, 0)


def workers_for(elements: int) -> int:
    """Threads for a kernel over so many elements: all of PyTorch's, or one where starting them would take longer."""
    return torch.get_num_threads() if elements > SMALL else 1


def adjacent(t: Tensor) -> Tensor:
    """`t` with adjacent columns, as kernels read it; a copy only where they are not."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _block(worker: int, workers: int, values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * (HEADER + len(values)))(worker, workers, *values)


@cache
def _function_at(address: int) -> Callable[[object], None]:
    # A foreign call releases the interpreter lock.
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="dualscan")


def _run_in_pool(address: int, values: Sequence[int], workers: int) -> None:
    function = _function_at(address)
    blocks = [_block(worker, workers, values) for worker in range(workers)]
    others = [_pool(workers - 1).submit(function, block) for block in blocks[1:]]
    function(blocks[0])
    for other in others:
        other.result()
