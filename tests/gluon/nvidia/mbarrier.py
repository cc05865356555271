"""`gluon.language.nvidia.hopper.mbarrier`: barriers in shared memory that copies and threads arrive at."""

from typing import Any

from tests.gluon.shared import Barrier, Program, Shared
from tests.gluon.values import Hazard, gluon


def barrier_of(memory: Shared) -> Barrier:
    """The barrier in a piece of shared memory; it must have been initialised."""
    found = memory.allocation.barriers.get(memory.place)
    if found is None:
        raise Hazard("an mbarrier is used before mbarrier.init")
    return found


def allocate_mbarrier(batch: Any = None, two_ctas: Any = False) -> Shared:
    if two_ctas:
        raise NotImplementedError("the emulator has no clusters")
    layout = gluon().nvidia.hopper.mbarrier.MBarrierLayout()
    return Program.running.allocate(gluon().int64, [1] if batch is None else [int(batch), 1], layout)


def init(mbarrier: Shared, count: Any) -> None:
    if mbarrier.numel != 1:
        raise ValueError(f"an mbarrier is one element, not {mbarrier.shape}")
    if mbarrier.place in mbarrier.allocation.barriers:
        raise Hazard("an mbarrier is initialised again before mbarrier.invalidate")
    mbarrier.allocation.barriers[mbarrier.place] = Barrier(int(count))


def invalidate(mbarrier: Shared) -> None:
    if barrier_of(mbarrier).loads:
        raise Hazard("an mbarrier is invalidated with copies on their way")
    del mbarrier.allocation.barriers[mbarrier.place]


def expect(mbarrier: Shared, bytes_per_cta: Any, pred: Any = True) -> None:
    if pred:
        barrier_of(mbarrier).arrive(1, int(bytes_per_cta), Program.running)


def arrive(mbarrier: Shared, *, count: Any = 1, pred: Any = True) -> None:
    if pred:
        barrier_of(mbarrier).arrive(int(count), 0, Program.running)


def wait(mbarrier: Shared, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if pred:
        barrier_of(mbarrier).wait(int(phase), Program.running)
