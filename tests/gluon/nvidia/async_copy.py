"""`gluon.language.nvidia.ampere.async_copy`: copies by the threads, in groups."""

from typing import Any

from tests.gluon.memory import Pointer
from tests.gluon.shared import Copy, Program, Shared


def async_load(
    smem: Shared, pointer: Pointer, mask: Any = None, cache_modifier: Any = "", eviction_policy: Any = "",
    volatile: Any = False,
) -> None:  # fmt: skip
    """Zeros where the mask is false."""
    if smem.shape != pointer.shape or smem.dtype != pointer.dtype.element_ty:
        raise ValueError(f"a copy from pointers {pointer.shape} to shared memory {smem.shape}")
    Program.running.start_copy(Copy(pointer, mask, smem))


def commit_group() -> None:
    Program.running.commit_copies()


def wait_group(num_outstanding: Any = 0) -> None:
    Program.running.wait_copies(int(num_outstanding))


async_copy_global_to_shared = async_load
