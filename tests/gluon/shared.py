"""Shared memory of an emulated program, and what works on it asynchronously, as late as the program allows.

Each byte knows which view has written it last, when it was written and read, and what is still working on it. Time is
counted in operations. A read of a byte that this view has not written gives NaN; a conflict with something in flight
raises.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.gluon.memory import Descriptor, Launch, Pointer, load, undefined
from tests.gluon.values import Hazard, Value, gluon_dtype, known, sizes, torch_dtype


class Allocation:
    """Bytes, and what is known about each.

    Attributes:
        face: the view that has written it last.
        stored, loaded, multiplied: when it was last written and read by ordinary instructions, and read by a product
            that is waited for.
        arriving: whether a copy is on its way to it.
        readers: products and copies in flight that read it.
    """

    def __init__(self, nbytes: int) -> None:
        self.bytes = torch.zeros(nbytes, dtype=torch.uint8)
        self.face = torch.full((nbytes,), -1, dtype=torch.int16)
        self.stored = torch.zeros(nbytes, dtype=torch.int32)
        self.loaded = torch.zeros(nbytes, dtype=torch.int32)
        self.multiplied = torch.zeros(nbytes, dtype=torch.int32)
        self.arriving = torch.zeros(nbytes, dtype=torch.bool)
        self.readers = torch.zeros(nbytes, dtype=torch.int16)
        self.faces = 0
        self.barriers: dict[int, Barrier] = {}


class Shared:
    """A shared memory descriptor: a view of an allocation, as bytes of shape `(*shape, itemsize)`."""

    def __init__(
        self, program: "Program", allocation: Allocation, view: Tensor, dtype: torch.dtype, layout: Any, face: int
    ) -> None:
        self.program, self.allocation, self.view = program, allocation, view
        self.torch_dtype, self.layout, self.face = dtype, layout, face

    @property
    def dtype(self) -> Any:
        return gluon_dtype(self.torch_dtype)

    @property
    def shape(self) -> list[int]:
        return list(self.view.shape[:-1])

    @property
    def place(self) -> int:
        """Where the view begins in its allocation."""
        return int(self.view.storage_offset())

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes_per_cta(self) -> int:
        return self.view.numel()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotImplementedError(f"the emulator has no shared_memory_descriptor.{name}")

    def _derived(self, view: Tensor, layout: Any) -> "Shared":
        return Shared(self.program, self.allocation, view, self.torch_dtype, layout, self.face)

    def index(self, index: Any) -> "Shared":
        place = int(index)
        if not 0 <= place < self.shape[0]:
            raise IndexError(f"index {place} of shared memory of shape {self.shape}")
        return self._derived(self.view[place], self.layout)

    def slice(self, start: Any, length: Any, dim: int = 0) -> "Shared":
        start, length = int(start), int(length)
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise IndexError(f"slice [{start}, {start + length}) of dimension {dim} of shape {self.shape}")
        return self._derived(self.view.narrow(dim, start, length), self.layout)

    def permute(self, order: Any) -> "Shared":
        order = sizes([order])
        view = self.view.permute(*order, self.view.ndim - 1)
        return self._derived(view, self.layout if order == sorted(order) else transposed(self.layout))

    def reshape(self, shape: Any) -> "Shared":
        return self._derived(self.view.view(*sizes([shape]), self.view.shape[-1]), None)

    def _reinterpret(self, dtype: Any = None, shape: Any = None, layout: Any = None) -> "Shared":
        """Other contents in the same bytes: what the one view has written is NaN to the other."""
        kind = self.torch_dtype if dtype is None else torch_dtype(dtype)
        shape = self.shape if shape is None else sizes([shape])
        nbytes = torch.Size(shape).numel() * kind.itemsize
        if nbytes > self.view.numel():
            raise ValueError(f"{shape} of {kind} takes {nbytes} bytes, more than {self.view.numel()}")
        view = self.view.view(-1)[:nbytes].view(*shape, kind.itemsize)
        self.allocation.faces += 1
        layout = self.layout if layout is None else layout
        return Shared(self.program, self.allocation, view, kind, layout, self.allocation.faces)

    def load(self, layout: Any) -> Value:
        self.program.idle(self, "loads")
        self.of(self.allocation.loaded).fill_(self.program.tick())
        return Value(self.contents(), layout)

    def store(self, value: Value) -> None:
        if not isinstance(value, Value):
            raise TypeError(f"{value!r} is no tensor")
        if value.shape != self.shape or value.data.dtype != self.torch_dtype:
            raise ValueError(f"{value.shape} {value.data.dtype} stored to {self.shape} {self.torch_dtype}")
        self.program.free(self, "stores to")
        self.write(value.data)
        self.of(self.allocation.stored).fill_(self.program.tick())

    def _keep_alive(self) -> None:
        pass

    def of(self, state: Tensor) -> Tensor:
        """What an allocation knows about the bytes of this view."""
        return torch.as_strided(state, self.view.shape, self.view.stride(), self.place)

    def contents(self) -> Tensor:
        data = self.view.view(self.torch_dtype).squeeze(-1).clone()
        valid = (self.of(self.allocation.face) == self.face).all(-1)
        if not (valid.all() or data.is_floating_point()):
            raise Hazard("shared memory is read before it is written")
        return torch.where(valid, data, undefined((), self.torch_dtype))

    def write(self, data: Tensor) -> None:
        self.view.view(self.torch_dtype).squeeze(-1).copy_(data)
        self.of(self.allocation.face).fill_(self.face)


def transposed(layout: Any) -> Any:
    """The layout of a matrix in shared memory with its dimensions exchanged; None where that is not said."""
    if type(layout).__name__ != "NVMMASharedLayout":
        return None
    return replace(layout, transposed=not layout.transposed)


@dataclass(eq=False)
class Load:
    """A copy by the copy engine to shared memory."""

    source: Descriptor
    start: list[int]
    target: Shared


@dataclass(eq=False)
class Copy:
    """A copy to shared memory by the threads themselves, behind their backs."""

    source: Pointer
    mask: Any
    target: Shared


@dataclass(eq=False)
class Product:
    """A product on the tensor cores, and the shared memory that it reads."""

    operands: list[Shared]
    result: Tensor
    layout: Any
    done: bool = False


class Pending(Value):
    """The result of a product in flight: only other products and the wait may take it."""

    def __init__(self, product: Product) -> None:
        self.product, self.layout = product, product.layout

    @property
    def data(self) -> Tensor:  # pyrefly: ignore[bad-override]
        raise Hazard("the result of an asynchronous product is used before warpgroup_mma_wait has returned it")


@dataclass(eq=False)
class Barrier:
    """An mbarrier: a phase is complete after `count` arrivals and the bytes that they expect."""

    count: int
    missing: int = field(init=False)
    phase: int = 0
    expected: int = 0
    waited: int = 0
    loads: list[Load] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.missing = self.count

    def arrive(self, count: int, nbytes: int, program: "Program") -> None:
        if not nbytes:
            self.completed_by("arrives at", program)
        if count > self.missing:
            raise Hazard("arrives once more at an mbarrier whose phase may not be complete: no wait since")
        self.missing -= count
        self.expected += nbytes
        if not (self.missing or self.expected or self.loads):
            self._advance()

    def completed_by(self, what: str, program: "Program") -> None:
        """Raises if other warps may still wait for the phase before: what is expected completes none, its copy does."""
        if self.waited > program.synchronised:
            raise Hazard(f"{what} an mbarrier that other warps may still wait on: no thread_barrier since")

    def wait(self, phase: int, program: "Program") -> None:
        if phase not in (0, 1):
            raise ValueError(f"phase {phase} of an mbarrier: it is 0 or 1")
        if self.phase % 2 == phase:
            coming = sum(load.source.nbytes for load in self.loads)
            if self.missing or coming != self.expected:
                raise Hazard(
                    f"waits forever: {self.missing} arrivals are missing, {self.expected} bytes are expected and "
                    f"{coming} are coming"
                )
            for load in self.loads:
                program.finish_load(load)
            self._advance()
        self.waited = program.tick()

    def _advance(self) -> None:
        self.phase += 1
        self.missing, self.expected = self.count, 0
        self.loads.clear()


class Program:
    """One program: its shared memory, its clock, and what it has in flight."""

    running: "Program"

    def __init__(self, launch: Launch, place: tuple[int, ...]) -> None:
        self.launch, self.place = launch, place
        self.now = self.fenced = self.visible = self.synchronised = 0
        self.allocations: list[Allocation] = []
        self.products: list[Product] = []
        self.copies: list[Copy] = []
        self.groups: list[list[Copy]] = []
        self.stores: list[Shared] = []
        self.commits: list[tuple[Descriptor, list[int], Tensor]] = []

    def tick(self) -> int:
        self.now += 1
        return self.now

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        kind = torch_dtype(dtype)
        allocation = Allocation(torch.Size(shape).numel() * kind.itemsize)
        self.allocations.append(allocation)
        return Shared(self, allocation, allocation.bytes.view(*shape, kind.itemsize), kind, known(layout), 0)

    def fence(self) -> None:
        """What was stored before is for the asynchronous units too, once every warp has passed a barrier."""
        self.fenced = self.tick()

    def synchronise(self) -> None:
        """A barrier of all warps."""
        self.synchronised = self.tick()
        self.visible = self.fenced

    def idle(self, memory: Shared, what: str) -> None:
        """Raises if a copy is on its way to the memory."""
        if memory.of(memory.allocation.arriving).any():
            raise Hazard(f"{what} shared memory that a copy is still on its way to: no wait for it")

    def free(self, memory: Shared, what: str) -> None:
        """Raises if what the memory holds may still be read by something asynchronous, as other warps see it."""
        self.idle(memory, what)
        if memory.of(memory.allocation.readers).any():
            raise Hazard(f"{what} shared memory that a product or a copy still reads: no wait for it")
        if (memory.of(memory.allocation.multiplied) > self.synchronised).any():
            raise Hazard(f"{what} shared memory that other warps' products may still read: no thread_barrier since")

    def open_to_async(self, memory: Shared, what: str) -> None:
        """Raises if an asynchronous unit may miss, or overtake, what ordinary stores have written."""
        if (memory.of(memory.allocation.stored) > self.visible).any():
            raise Hazard(f"{what} what was stored without fence_async_shared and then thread_barrier")

    def start_load(self, load: Load, barrier: Barrier) -> None:
        memory = load.target
        barrier.completed_by("starts a copy to", self)
        self.free(memory, "a copy writes")
        self.open_to_async(memory, "a copy writes over")
        if (memory.of(memory.allocation.loaded) > self.synchronised).any():
            raise Hazard("a copy writes over what other warps may still load: no thread_barrier since")
        memory.of(memory.allocation.arriving).fill_(True)
        barrier.loads.append(load)

    def finish_load(self, load: Load) -> None:
        memory = load.target
        memory.write(load.source.read(load.start))
        memory.of(memory.allocation.arriving).fill_(False)
        memory.of(memory.allocation.stored).fill_(0)

    def start_copy(self, copy: Copy) -> None:
        self.free(copy.target, "a copy writes")
        copy.target.of(copy.target.allocation.arriving).fill_(True)
        self.copies.append(copy)

    def commit_copies(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def wait_copies(self, pending: int) -> None:
        """Then only that many groups of copies are in flight; the others count as ordinary stores."""
        while len(self.groups) > pending:
            for copy in self.groups.pop(0):
                memory = copy.target
                memory.write(load(copy.source, copy.mask, 0).data)
                memory.of(memory.allocation.arriving).fill_(False)
                memory.of(memory.allocation.stored).fill_(self.tick())

    def start_store(self, target: Descriptor, start: list[int], source: Shared) -> None:
        self.read_async(source, "a copy reads")
        self.stores.append(source)
        self.commits.append((target, start, source.contents()))

    def wait_stores(self, pending: int) -> None:
        """Then only that many stores still read shared memory; what they write is seen at the program's end."""
        while len(self.stores) > pending:
            source = self.stores.pop(0)
            source.of(source.allocation.readers).sub_(1)

    def commit_stores(self) -> None:
        """Writes what completed stores have copied."""
        done = len(self.commits) - len(self.stores)
        for target, start, data in self.commits[:done]:
            target.write(start, data)
        del self.commits[:done]

    def read_async(self, memory: Shared, what: str) -> None:
        self.idle(memory, what)
        self.open_to_async(memory, what)
        memory.of(memory.allocation.readers).add_(1)

    def wait_products(self, pending: int) -> None:
        """Then only that many products are in flight."""
        while len(self.products) > pending:
            product = self.products.pop(0)
            product.done = True
            for memory in product.operands:
                memory.of(memory.allocation.readers).sub_(1)
                memory.of(memory.allocation.multiplied).fill_(self.tick())

    def finish(self) -> None:
        """The program's end: nothing may be in flight."""
        if self.products:
            raise Hazard(f"{len(self.products)} products are in flight at the end: no warpgroup_mma_wait")
        if self.stores:
            raise Hazard(f"{len(self.stores)} copies still read shared memory at the end: no store_wait")
        if any(allocation.arriving.any() for allocation in self.allocations):
            raise Hazard("copies are still on their way to shared memory at the end: no wait")
        self.commit_stores()
