"""Replaying a launcher: what it did for tensors of one kind, done again without its Python.

A launcher makes memory, calls a few operators and starts kernels. Sizes, grids and constants of all that follow from
its signature: shapes, strides, dtypes and alignment of its tensors, and its plain values. From one call to the next
only addresses differ. So `replayed` has a `Recording` watch the second call of a signature, which makes a `Program` of
it: addresses as so many bytes into an argument, or into memory that the call made. From the third call on the program
runs: two or three allocations and the kernels, each a C function called with a tuple. It holds no tensor of a call.

A call is left to its launcher, always, where that cannot be known to be right: with tensors of integers, whose contents
decide what is done (packed sequences); where a kernel is not started by `Started` (the interpreter, other versions of
Triton); where memory is used that is neither an argument, nor made by the call, nor one of the launcher's tables.
"""

from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dualscan.ops._launch import Started, watched_by

# Signatures that are known at most, and addresses of a descriptor.
MOST_PROGRAMS = 1024
MOST_ADDRESSES = 256
# Every piece of scratch memory begins at a multiple of so many bytes, as the allocator's own do.
PIECE = 512

_aten = torch.ops.aten
_EMPTY = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)

Launcher = Callable[..., Any]
# A launcher's tensors by number, and the values that its kernels' arguments are taken from.
Tensors = list[Any]
Values = list[Any]


# By launcher and signature; None after the first call, and False where the launcher is called for good.
_PROGRAMS: dict[Hashable, "Program | bool | None"] = {}


def replayed(launcher: Launcher) -> Launcher:
    """`launcher`, watched at a signature's second call and replayed from the third on.

    Args:
        launcher: takes tensors and plain values, changes no tensor that it is given, and returns new tensors. Its
            kernels are started by `_launch`'s or `_triton`'s launchers.
    """

    def call(*args: Any) -> Any:
        device = _device(args)
        if device is None:
            return launcher(*args)
        # Operators of PyTorch do as autocast says.
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key, addresses = signature(args, launcher, device, autocast)
        program = _PROGRAMS.get(key, _UNKNOWN)
        if type(program) is Program:
            return program(args, addresses)
        if program is None:
            _PROGRAMS[key] = False  # also while it is recorded
            recording = Recording(args)
            with watched_by(recording), recording:
                results = launcher(*args)
            _PROGRAMS[key] = recording.program(results) or False
            return results
        if program is _UNKNOWN:
            if len(_PROGRAMS) >= MOST_PROGRAMS:
                _PROGRAMS.clear()
            _PROGRAMS[key] = None if recordable(args) else False
        return launcher(*args)

    return call


_UNKNOWN: Any = object()


def _device(args: Sequence[Any]) -> int | None:
    """The GPU of the first argument that is a tensor, if it is the current one."""
    for t in args:
        if isinstance(t, Tensor):
            own = t.get_device()
            return own if own >= 0 and t.is_cuda and own == torch.cuda.current_device() else None
    return None


def signature(args: Sequence[Any], *more: Hashable) -> tuple[Hashable, list[int]]:
    """What decides all but the addresses of a call, and those of its tensors in their order."""
    key, addresses = list[Hashable](more), list[int]()
    for t in args:
        if t is not None and isinstance(t, Tensor):  # None is slow to ask about
            address = t.data_ptr()
            addresses.append(address)
            key += (t.shape, t.stride(), t.dtype, address & 15)
        else:
            key.append(t)
    return tuple(key), addresses


def recordable(args: Sequence[Any]) -> bool:
    """Whether the arguments' kinds decide what is done, and every tensor is there once."""
    tensors = [t for t in args if isinstance(t, Tensor)]
    return all(t.is_floating_point() for t in tensors) and len(set(map(id, tensors))) == len(tensors)


class Slot:
    """A tensor of a call: an argument, memory that it made, or what an operator returned."""

    def __init__(self, number: int, t: Tensor, made: bool):
        self.number, self.address, self.made = number, t.data_ptr(), made
        self.size, self.stride, self.dtype = tuple(t.shape), t.stride(), t.dtype
        self.offset, self.nbytes = int(t.storage_offset()), t.untyped_storage().nbytes()
        # Memory that a call has let go of is made use of again: by the slots made from number `died` on.
        self.storage = StorageWeakRef(t.untyped_storage())
        self.died: int | None = None
        # Whether a tensor has to be there, and not only its address.
        self.needed = False


class View(NamedTuple):
    """A slot's tensor, or a view of it: size, stride and how many elements further on it begins."""

    slot: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None

    def __call__(self, tensors: Tensors) -> Tensor:
        t = tensors[self.slot]
        if self.view is None:
            return t
        size, stride, offset = self.view
        return t.as_strided(size, stride, t.storage_offset() + offset)


class Map:
    """An encoded tensor descriptor by its address."""

    def __init__(self, descriptor: Any, encode: Callable[[Any], list[Any]]):
        self.like, self.encode = {name: v for name, v in vars(descriptor).items() if name != "base"}, encode
        self.make, self.known = type(descriptor), dict[int, Any]()

    def at(self, address: int) -> Any:
        known = self.known.get(address)
        if known is None:
            if len(self.known) >= MOST_ADDRESSES:
                self.known.clear()
            descriptor = object.__new__(self.make)
            descriptor.__dict__.update(self.like, base=_Base(address))
            known = self.known[address] = self.encode(descriptor)[0]
        return known


class _Base(NamedTuple):
    """All that the encoding of a descriptor asks of its tensor."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class Launch(NamedTuple):
    """Starts a kernel: `maps` are (where the encoded descriptor goes, where its address is, the descriptor)."""

    function: Callable[..., None]
    arguments: Callable[[Values], tuple[Any, ...]]
    maps: tuple[tuple[int, int, Map], ...]

    def run(self, values: Values, tensors: Tensors) -> None:
        for index, source, known in self.maps:
            values[index] = known.at(values[source])
        self.function(*self.arguments(values))


class Operation(NamedTuple):
    """Calls an operator of PyTorch; `place` are those of its result, unless that is an argument of its own."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    slot: int | None
    places: list[tuple[int, int]]

    def run(self, values: Values, tensors: Tensors) -> None:
        args = [a(tensors) if type(a) is View else a for a in self.arguments]
        result = self.function(*args, **self.options)
        if self.slot is not None:
            tensors[self.slot] = result
            address = result.data_ptr()
            for index, offset in self.places:
                values[index] = address + offset


class Program(NamedTuple):
    """A call's steps. All places are (index of a value, what is added to the address)."""

    values: Values
    stream: Callable[[], int]
    device: torch.device
    # Of every argument that is a tensor: its place in the call, and those of its address.
    given: tuple[tuple[int, int, int], ...]
    tensors: tuple[int | None, ...]
    scratch: int
    pieces: tuple[tuple[int, int], ...]
    made: tuple[tuple[Any, ...], ...]
    steps: tuple[Any, ...]
    results: tuple[View, ...]
    tables: tuple[Tensor, ...]

    def __call__(self, args: Sequence[Any], addresses: Sequence[int]) -> tuple[Tensor, ...]:
        values, device = self.values.copy(), self.device
        values[0] = self.stream()
        for index, number, offset in self.given:
            values[index] = addresses[number] + offset
        if self.scratch:
            scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device)
            start = scratch.data_ptr()
            for index, offset in self.pieces:
                values[index] = start + offset
        tensors = [None if place is None else args[place] for place in self.tensors]
        for slot, size, stride, dtype, places in self.made:
            tensors[slot] = t = torch.empty_strided(size, stride, dtype=dtype, device=device)
            if places:
                address = t.data_ptr()
                for index, offset in places:
                    values[index] = address + offset
        for step in self.steps:
            step.run(values, tensors)
        return tuple([view(tensors) for view in self.results])


class Recording(TorchDispatchMode):
    """Writes down a call, as it sees operators; `started` tells it of kernels, and `spoil` of what cannot be repeated.

    Args:
        args: the call's.
    """

    def __init__(self, args: Sequence[Any]):
        super().__init__()
        self.obstacle: str | None = None
        self.slots: list[Slot] = []
        self._places = [place for place, t in enumerate(args) if isinstance(t, Tensor)]
        self._inputs: dict[int, Slot] = {}
        self._storages: dict[int, Slot] = {}
        # Memory that several arguments lie in: a view of it may belong to any of them.
        self._shared: set[int] = set()
        self._device = args[self._places[0]].device
        for place in self._places:
            t = args[place]
            slot = self._inputs[id(t)] = Slot(len(self.slots), t, False)
            self.slots.append(slot)
            if self._storages.setdefault(slot.storage.cdata, slot) is not slot:
                self._shared.add(slot.storage.cdata)
        self._values: Values = [None]
        self._known: dict[Hashable, int] = {}
        self._used: dict[int, list[tuple[int, int]]] = {}
        self._addresses: dict[tuple[int, int], int] = {}
        self._tables: list[Tensor] = []
        self._steps: list[Any] = []
        self._stream: Callable[[], int] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: that imports `torch._dynamo`, for seconds, and nothing is compiled inside."""
        return False

    def spoil(self, obstacle: str) -> None:
        """The call is left to its launcher from now on."""
        self.obstacle = self.obstacle or obstacle

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.obstacle is None:
            self._operation(func, args, kwargs, result)
        return result

    def _operation(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        results = result if isinstance(result, (tuple, list)) else [result]
        changes = func._schema.is_mutable
        if not all(isinstance(t, Tensor) and t.device == self._device for t in results):
            return self.spoil(f"{func} returns what is no tensor, or is elsewhere")
        known = [self._slot(t) for t in results]
        if not changes and all(known):
            return None  # views
        if len(results) != 1 or any(map(_has_tensor, kwargs.values())):
            return self.spoil(f"{func} is too intricate")
        if func in _EMPTY:
            self._new(result, True)
            return None
        arguments = []
        for a in args:
            if isinstance(a, (tuple, list)) and _has_tensor(a):
                return self.spoil(f"{func} takes a list of tensors")
            arguments.append(self._view(a) if isinstance(a, Tensor) else a)
        slot = None if changes else self._new(result, False)
        number = None if slot is None else slot.number
        places = [] if slot is None else self._used.setdefault(slot.number, [])
        self._steps.append(Operation(func, tuple(arguments), kwargs, number, places))
        return None

    def _new(self, t: Tensor, made: bool) -> Slot:
        number = len(self.slots)
        for slot in self.slots:
            if slot.made and slot.died is None and slot.storage.expired():
                slot.died = number
        slot = Slot(number, t, made)
        if self._storages.setdefault(slot.storage.cdata, slot) is not slot:
            self.spoil("a view of memory that several arguments lie in")
        self.slots.append(slot)
        return slot

    def _slot(self, t: Tensor) -> Slot | None:
        slot = self._inputs.get(id(t))
        if slot is None:
            memory = t.untyped_storage()._cdata
            slot = None if memory in self._shared else self._storages.get(memory)
        return slot

    def _view(self, t: Tensor) -> View | None:
        slot = self._slot(t)
        if slot is None or t.dtype != slot.dtype:
            return self.spoil("a tensor that the call neither got nor made")
        slot.needed = True
        view = tuple(t.shape), t.stride(), int(t.storage_offset()) - slot.offset
        return View(slot.number, None if view == (slot.size, slot.stride, 0) else view)

    def started(self, start: Started, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        """A kernel was started."""
        if self.obstacle is None:
            indices = [*map(self._value, grid), 0, *map(self._value, start.before)]
            encodings, maps = {place: encode for place, _, encode in start.described}, []
            for place, a in enumerate(arguments):
                if place in encodings:
                    index = self._append(None)
                    maps.append((index, self._address(a.base), Map(a, encodings[place])))
                    indices += [index, *map(self._value, a.shape), *map(self._value, a.strides)]
                else:
                    indices.append(self._address(a) if isinstance(a, Tensor) else self._value(a))
            indices += map(self._value, start.after)
            self._steps.append(Launch(start.launch, itemgetter(*indices), tuple(maps)))
            self._stream = start.current_stream

    def _append(self, value: Any) -> int:
        self._values.append(value)
        return len(self._values) - 1

    def _value(self, value: Any) -> int:
        # By identity what need not be hashable, and is kept here.
        key = (type(value), value) if value is None or isinstance(value, (int, float)) else id(value)
        if key not in self._known:
            self._known[key] = self._append(value)
        return self._known[key]

    def _address(self, t: Tensor) -> int:
        slot = self._slot(t)
        if slot is None:
            if t.is_floating_point() or t.untyped_storage()._cdata in self._shared:
                self.spoil("memory that the call neither got nor made")
            self._tables.append(t)
            return self._value(t.data_ptr())
        place = slot.number, t.data_ptr() - slot.address
        if place not in self._addresses:
            self._addresses[place] = index = self._append(None)
            self._used.setdefault(slot.number, []).append((index, place[1]))
        return self._addresses[place]

    def program(self, results: Any) -> Program | None:
        """What repeats the call, which returned `results`; None where there is an obstacle."""
        if self.obstacle is None and not (isinstance(results, tuple) and all(isinstance(t, Tensor) for t in results)):
            self.spoil("results other than tensors")
        count = len(self._places)
        views = [] if self.obstacle else [view for t in results if (view := self._view(t)) is not None]
        if any(view.slot < count for view in views):
            self.spoil("an argument is a result")
        if self._stream is None:
            self.spoil("no kernel was started")
        if self.obstacle is not None or self._stream is None:
            return None
        given = [(index, n, offset) for n in range(count) for index, offset in self._used.get(n, ())]
        made = [slot for slot in self.slots if slot.made]
        scratch, starts = packed([slot for slot in made if not slot.needed])
        pieces = [(i, start + offset) for n, start in starts.items() for i, offset in self._used.get(n, ())]
        return Program(
            values=self._values,
            stream=self._stream,
            device=self._device,
            given=tuple(given),
            tensors=(*self._places, *[None] * (len(self.slots) - count)),
            scratch=scratch,
            pieces=tuple(pieces),
            made=tuple(
                (slot.number, slot.size, slot.stride, slot.dtype, tuple(self._used.get(slot.number, ())))
                for slot in made
                if slot.needed
            ),
            steps=tuple(self._steps),
            results=tuple(views),
            tables=tuple(self._tables),
        )


def packed(slots: Sequence[Slot]) -> tuple[int, dict[int, int]]:
    """The size of one block for pieces of scratch memory, and where each begins: at the lowest place that is free.

    Memory that a call let go of is free for what it made afterwards.
    """
    taken: list[tuple[int, int, Slot]] = []
    for slot in slots:
        start, size = 0, -(-slot.nbytes // PIECE) * PIECE
        for first, last, other in sorted(taken, key=itemgetter(0)):
            if (other.died is None or other.died > slot.number) and first < start + size:
                start = max(start, last)
        taken.append((start, start + size, slot))
    return max((last for _, last, _ in taken), default=0), {slot.number: start for start, _, slot in taken}


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_has_tensor, value)))
