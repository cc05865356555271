"""Kernels for CPUs, written in Python and compiled by Numba on first use: may they run here?

Numba itself is imported by the kernel modules alone, and those by an operator's first call.
"""

import importlib.util
import os
from functools import cache

import torch

DTYPES = (torch.float32, torch.bfloat16)


@cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


@torch.compiler.assume_constant_result
def obstacle(device: torch.device) -> str | None:
    """Why Numba kernels cannot run on `device`; None means that they can."""
    if device.type != "cpu":
        return "the Numba kernels are for CPUs"
    if not _installed():
        return 'Numba is not installed (pip install "dualscan[cpu]")'
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    return None


def unsupported(dtype: torch.dtype) -> str | None:
    """Why the kernels do not compute in `dtype`; None means that they do."""
    return None if dtype in DTYPES else f"the Numba kernels do not compute {dtype}"
