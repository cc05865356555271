"""Global memory as an emulated kernel sees it: pointers and tensor descriptors.

What no program may do raises: touching an element that is not the tensor's, writing one that another program has
written in the same launch, or reading it.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.gluon.values import Hazard, Value, common_layout, expand, gluon_dtype, value


class Launch:
    """What the programs of one launch share: who has written which element of which storage.

    Attributes:
        program: the number of the program that runs.
    """

    def __init__(self, grid: tuple[int, ...], num_warps: int) -> None:
        self.grid = grid
        self.num_warps = num_warps
        self.program = 0
        self._writers: dict[tuple[int, int], Tensor] = {}

    def writers(self, tensor: Tensor) -> Tensor:
        """The number of the last program that wrote each element of the tensor's storage; -1 for none."""
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.itemsize)
        if key not in self._writers:
            self._writers[key] = torch.full((storage.nbytes() // tensor.itemsize,), -1, dtype=torch.int32)
        return self._writers[key]


class Region:
    """Elements of a storage that programs may touch."""

    def __init__(self, tensor: Tensor, shape: list[int], strides: list[int], launch: Launch) -> None:
        self.tensor, self.launch = tensor, launch
        geometry = (shape, strides, tensor.storage_offset())
        self.view = torch.as_strided(tensor, *geometry)
        writers = launch.writers(tensor)
        self.flat = torch.as_strided(tensor, (writers.numel(),), (1,), 0)
        self.writers, self.own = writers, torch.zeros(writers.numel(), dtype=torch.bool)
        torch.as_strided(self.own, *geometry).fill_(True)
        self.places = torch.as_strided(torch.arange(writers.numel()), *geometry)

    def read(self, places: Tensor) -> Tensor:
        self._check(places, "reads")
        return self.flat[places]

    def write(self, places: Tensor, data: Tensor) -> None:
        self._check(places, "writes")
        self.writers[places] = self.launch.program
        self.flat[places] = data

    def _check(self, places: Tensor, what: str) -> None:
        outside = (places < 0) | (places >= self.own.numel())
        if outside.any() or not self.own[places].all():
            first = self.tensor.storage_offset()
            bad = places[outside] if outside.any() else places[~self.own[places]]
            element, shape = int(bad.flatten()[0]) - first, list(self.view.shape)
            raise IndexError(f"a program {what} element {element} of a tensor of {shape}, {self.view.stride()}")
        writers = self.writers[places]
        if ((writers != self.launch.program) & (writers != -1)).any():
            raise Hazard(f"a program {what} what another program of the same launch has written")


class Pointer:
    """Addresses of elements of one tensor."""

    def __init__(self, region: Region, places: Tensor, layout: Any = None) -> None:
        self.region, self.places, self.layout = region, places, layout

    @classmethod
    def to(cls, tensor: Tensor, launch: Launch) -> "Pointer":
        tensor = tensor.detach()
        region = Region(tensor, list(tensor.shape), list(tensor.stride()), launch)
        return cls(region, torch.tensor(tensor.storage_offset()))

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=gluon_dtype(self.region.tensor.dtype))

    @property
    def shape(self) -> list[int]:
        return list(self.places.shape)

    def __add__(self, offset: Any) -> "Pointer":
        offset = value(offset)
        if offset.data.is_floating_point():
            raise TypeError("an offset is an integer")
        places = self.places + offset.data.to(torch.int64)
        return Pointer(self.region, places, common_layout(self, offset))

    __radd__ = __add__

    def __sub__(self, offset: Any) -> "Pointer":
        return self + Value(-value(offset).data, value(offset).layout)

    def __getitem__(self, key: Any) -> "Pointer":
        return Pointer(self.region, *expand(self.places, self.layout, key))


def undefined(shape: Any, dtype: torch.dtype) -> Tensor:
    """What a program may not rely on."""
    bad: Any = float("nan") if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).min
    return torch.full(tuple(shape), bad, dtype=dtype)


def load(pointer: Pointer, mask: Any, other: Any) -> Value:
    """The elements; under a false mask `other`, or nothing that is defined."""
    dtype, places = pointer.region.tensor.dtype, pointer.places
    masks, others = (None if x is None else value(x) for x in (mask, other))
    layout = common_layout(pointer, masks, others)
    if masks is None:
        return Value(pointer.region.read(places), layout)
    places, wanted = torch.broadcast_tensors(places, masks.data)
    data = undefined(places.shape, dtype) if others is None else others.data.to(dtype).expand(places.shape).clone()
    data[wanted] = pointer.region.read(places[wanted])
    return Value(data, layout)


def store(pointer: Pointer, data: Any, mask: Any) -> None:
    """Writes the elements whose mask is true."""
    data, masks = value(data), value(True if mask is None else mask)
    common_layout(pointer, data, masks)
    places, wanted = torch.broadcast_tensors(pointer.places, masks.data)
    new = data.data.to(pointer.region.tensor.dtype).expand(places.shape)
    pointer.region.write(places[wanted], new[wanted])


class Descriptor:
    """A tensor descriptor: tiles of a tensor, zeros outside of it."""

    def __init__(self, described: Any, launch: Launch) -> None:
        # Once more by its constructor, which checks alignment and strides; launchers may have gone around it.
        described = dataclasses.replace(described)
        if described.padding != "zero":
            raise NotImplementedError(f"the emulator pads with zeros, not {described.padding}")
        base = described.base.detach()
        self.region = Region(base, list(described.shape), list(described.strides), launch)
        self.shape, self.strides = list(described.shape), list(described.strides)
        self.block_shape, self.layout = list(described.block_shape), getattr(described, "layout", None)
        self.dtype = gluon_dtype(base.dtype)
        self.nbytes = base.itemsize * torch.Size(self.block_shape).numel()

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(nbytes=self.nbytes, shape=self.block_shape, element_ty=self.dtype)

    @property
    def nbytes_per_cta(self) -> int:
        return self.nbytes

    def load(self, start: Any) -> Value:
        """What plain Triton does with a descriptor, as `store`."""
        return Value(self.read([int(s) for s in start]))

    def store(self, start: Any, tile: Value) -> None:
        self.write([int(s) for s in start], tile.data.to(self.region.tensor.dtype))

    def read(self, start: list[int]) -> Tensor:
        tile = torch.zeros(self.block_shape, dtype=self.region.tensor.dtype)
        inside, window = self._windows(start)
        places = self.region.places[window]
        if (self.region.writers[places] == self.region.launch.program).any():
            raise Hazard("a copy reads what the program itself has written")
        tile[inside] = self.region.read(places)
        return tile

    def write(self, start: list[int], tile: Tensor) -> None:
        inside, window = self._windows(start)
        self.region.write(self.region.places[window], tile[inside])

    def _windows(self, start: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of a tile that is inside of the tensor, in the tile and in the tensor."""
        if len(start) != len(self.shape):
            raise ValueError(f"{len(start)} coordinates for a descriptor of {len(self.shape)} dimensions")
        firsts = [min(max(s, 0), size) for s, size in zip(start, self.shape, strict=True)]
        lasts = [
            min(max(s + b, first), size)
            for s, b, first, size in zip(start, self.block_shape, firsts, self.shape, strict=True)
        ]
        inside = tuple(slice(f - s, e - s) if e > f else slice(0) for f, e, s in zip(firsts, lasts, start, strict=True))
        return inside, tuple(slice(f, e) for f, e in zip(firsts, lasts, strict=True))
