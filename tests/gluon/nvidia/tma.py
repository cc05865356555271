"""`gluon.language.nvidia.hopper.tma`: copies by descriptors."""

from typing import Any

from tests.gluon.memory import Descriptor
from tests.gluon.nvidia.mbarrier import barrier_of
from tests.gluon.shared import Load, Program, Shared


def _check(descriptor: Descriptor, memory: Shared) -> None:
    if not isinstance(descriptor, Descriptor):
        raise TypeError(f"{descriptor!r} is no tensor descriptor")
    ours, theirs = (memory.shape, memory.dtype, memory.layout), (descriptor.block_shape, descriptor.dtype)
    if ours != (*theirs, descriptor.layout):
        raise ValueError(f"a copy between shared memory {ours} and a descriptor {(*theirs, descriptor.layout)}")


def async_load(
    tensor_desc: Descriptor, coord: Any, barrier: Shared, result: Shared, pred: Any = True, multicast: Any = False
) -> None:
    if multicast:
        raise NotImplementedError("the emulator has no multicast")
    _check(tensor_desc, result)
    if pred:
        Program.running.start_load(Load(tensor_desc, [int(c) for c in coord], result), barrier_of(barrier))


def async_store(tensor_desc: Descriptor, coord: Any, src: Shared) -> None:
    _check(tensor_desc, src)
    Program.running.start_store(tensor_desc, [int(c) for c in coord], src)


def store_wait(pendings: Any, read_only: bool = True) -> None:
    Program.running.wait_stores(int(pendings))
    if not read_only:
        Program.running.commit_stores()


async_copy_global_to_shared = async_load
async_copy_shared_to_global = async_store
