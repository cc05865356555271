"""What every Triton launcher shares: may it run here, where, and over which pieces of the batch.

Triton itself is imported by the kernel modules alone, and those by the launchers on their first call.
"""

import importlib.util
import os
import weakref
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from dualscan.ops._launch import Start, first_launch, started

OLDEST_CAPABILITY = (8, 0)
TMA_CAPABILITY = (9, 0)


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU (TRITON_INTERPRET=1), as the tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`; None means that they can."""
    if device.type != "cuda":
        return "the kernels need an NVIDIA GPU"
    if not _installed():
        return "Triton is not installed (pip install triton)"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    if capability(device) < OLDEST_CAPABILITY:
        return "compute capability {}.{} is below 8.0 (Ampere)".format(*capability(device))
    return None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; (9, 0), which the interpreter imitates, where there is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU; 1 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def has_tma(device: torch.device) -> bool:
    """Whether tiles may be loaded by tensor descriptors; the interpreter knows them too."""
    return interpreted() or capability(device) >= TMA_CAPABILITY


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Launches go to the tensor's GPU, whatever the current one is."""
    index = t.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


_HERE = nullcontext()


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The pieces of a batch, as tables on the device, int32.

    Attributes:
        segments: (batch row, first token, end, first chunk, sequence, edges, first super-chunk) each: what one
            sequential program covers. `edges` is 1 for a sequence's first segment, 2 for its last, 3 for the only one,
            0 for no segment.
        before, after: the segments that have one after, and one before: whose states others start from, forward and
            backward. Packed sequences have all of them in both.
        sequences: (first segment, segments) each.
        chunks: (batch row, first token, end of the sequence) each.
        supers: super-chunks of several chunks: (batch row, first token, end of the sequence, first chunk) each.
        split: whether some sequence may have several segments.
        ragged: whether the tables may hold more chunks than the sequences have; those are empty.
    """

    segments: Tensor
    before: Tensor
    after: Tensor
    sequences: Tensor
    chunks: Tensor
    supers: Tensor
    split: bool
    ragged: bool


# Columns of the table of segments.
SEGMENT = 7


@lru_cache(maxsize=256)
def batch_plan(batch: int, seqlen: int, chunk: int, every: int, segment: int, device: torch.device) -> Plan:
    """Equal sequences: every batch row is one. A super-chunk has `every` chunks."""
    chunks, segments, supers = (-(-seqlen // size) for size in (chunk, segment, chunk * every))
    row, first = torch.arange(batch)[:, None], torch.arange(segments)[None, :] * segment
    start = first.expand(batch, -1)
    edges = (torch.arange(segments) == 0).int() + 2 * (torch.arange(segments) == segments - 1).int()
    first_chunk, first_super = row * chunks + start // chunk, row * supers + start // (chunk * every)
    columns = (row, start, (start + segment).clamp(max=seqlen), first_chunk, row, edges, first_super)
    segment_table = torch.stack([c.expand(batch, segments) for c in columns], -1)

    def pieces(count: int, size: int) -> Tensor:
        place = torch.arange(count)[None, :]
        columns = (row, place * size, torch.tensor(seqlen), row * chunks + place * (size // chunk))
        return torch.stack([c.expand(batch, count) for c in columns], -1).reshape(-1, 4)

    sequences = torch.stack([row[:, 0] * segments, torch.full((batch,), segments)], -1)
    parts = (segment_table, segment_table[:, :-1], segment_table[:, 1:])
    segment_tables = [part.reshape(-1, SEGMENT) for part in parts]
    piece_tables = (pieces(chunks, chunk)[:, :3], pieces(supers, chunk * every))
    tables = [t.to(device, torch.int32).contiguous() for t in (*segment_tables, sequences, *piece_tables)]
    return Plan(*tables, split=segments > 1, ragged=False)


def packed_plan(cu_seqlens: Tensor, seqlen: int, chunk: int, every: int, segment: int) -> Plan:
    """Packed sequences, without looking at the lengths: the tables are as long as they can ever need to be."""
    make = packed_tables
    if cu_seqlens.is_cuda:
        from dualscan.ops import triton_plan

        make = triton_plan.packed_tables
    segments, sequences, chunks, supers = make(cu_seqlens, seqlen, chunk, every, segment)
    split = segments.shape[0] > sequences.shape[0]
    return Plan(segments, segments, segments, sequences, chunks, supers, split=split, ragged=True)


def packed_tables(
    cu_seqlens: Tensor, seqlen: int, chunk: int, every: int, segment: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Segments, sequences, chunks and supers of packed sequences; the specification of `triton_plan`."""
    nseq, device = cu_seqlens.shape[0] - 1, cu_seqlens.device
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    length, long = end - start, chunk * every
    chunk_start, super_start = _starts(-(-length // chunk)), _starts(-(-length // long))
    counts = (-(-length // segment)).clamp(min=1)
    segment_start = _starts(counts)

    def pieces(bound: int, starts: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index = torch.arange(bound, device=device)
        owner = torch.searchsorted(starts[1:].contiguous(), index, right=True)
        inside = owner < nseq
        owner = owner.clamp(max=nseq - 1)
        token = start[owner] + (index - starts[owner]) * size
        limit = end[owner]
        return owner, torch.where(inside, token, limit), limit, inside

    nsegments = nseq + seqlen // segment
    owner, token, limit, inside = pieces(nsegments, segment_start, segment)
    zero = torch.zeros_like(owner)
    first_chunk = chunk_start[owner] + (token - start[owner]) // chunk
    first_super = super_start[owner] + (token - start[owner]) // long
    edges = ((token == start[owner]).long() + 2 * (token + segment >= limit).long()) * inside
    last = torch.minimum(token + segment, limit)
    segments = torch.stack([zero, token, last, first_chunk, owner, edges, first_super], -1)
    _, token, limit, _ = pieces(nseq + seqlen // chunk, chunk_start, chunk)
    chunks = torch.stack([torch.zeros_like(token), token, limit], -1)
    owner, token, limit, _ = pieces(nseq + seqlen // long, super_start, long)
    first_chunk = chunk_start[owner] + (token - start[owner]) // chunk
    supers = torch.stack([torch.zeros_like(token), token, limit, first_chunk], -1)
    sequences = torch.stack([segment_start[:-1], counts], -1)
    segments, sequences, chunks, supers = (t.to(torch.int32) for t in (segments, sequences, chunks, supers))
    return segments, sequences, chunks, supers


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def plan(
    cu_seqlens: Tensor | None, batch: int, seqlen: int, chunk: int, every: int, segment: int, device: torch.device
) -> Plan:
    """The plan of a call; `segment` is a multiple of `chunk * every`.

    A packed plan is kept as long as its boundaries: every layer of a model has the same.
    """
    if cu_seqlens is None:
        return batch_plan(batch, seqlen, chunk, every, segment, device)
    on_gpu = cu_seqlens.is_cuda
    if cu_seqlens.is_inference() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        # Changes of an inference tensor leave no trace. What is captured is computed at the replay only: nothing
        # outside may read it.
        return packed_plan(cu_seqlens, seqlen, chunk, every, segment)
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    key = (cu_seqlens._version, seqlen, chunk, every, segment, stream)
    owner, known, packed = _PACKED.get(id(cu_seqlens), (None, None, None))
    if packed is None or known != key or owner is None or owner() is not cu_seqlens:
        packed = packed_plan(cu_seqlens, seqlen, chunk, every, segment)
        name = id(cu_seqlens)
        _PACKED[name] = (weakref.ref(cu_seqlens, lambda _: _PACKED.pop(name, None)), key, packed)
    return packed


_PACKED: dict[int, tuple[Any, Hashable, Plan]] = {}


def kind(t: Tensor | None) -> Hashable:
    """What decides the kernels that a tensor goes to, besides its values."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16)


class Launcher:
    """Starts one kernel again and again with arguments of one kind, at a fraction of the host's time.

    The first call goes through Triton, which compiles; later ones start the compiled kernel. That is right only where
    all that Triton specialises on stays the same: the GPU, dtypes, absent arguments, the alignment of pointers,
    integers, blocks of descriptors. The owner keeps a launcher under a key of all these.
    """

    __slots__ = ("start",)

    def __init__(self) -> None:
        self.start: Start | None = None

    def __call__(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
        """`constants` are the compile-time parameters, which follow `arguments` in the kernel's signature."""
        if self.start is not None:
            self.start(grid, arguments)
            return
        compiled = first_launch(kernel, grid, arguments, **constants)
        self.start = started(compiled, 0 if compiled is None else len(kernel.params) - len(arguments))


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def rows_last(t: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension: itself for the views that a fused projection gives."""
    return t if t.stride(-1) == 1 or (t.shape[-1] == 1 and t.is_contiguous()) else t.contiguous()


def describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can address (batch, seqlen, heads, width) tensors: 16-byte steps, no broadcasting."""
    for t in tensors:
        if t.data_ptr() % 16:
            return False
        width = t.element_size()
        for size, stride in zip(t.shape[:3], t.stride(), strict=False):
            if size > 1 and (stride <= 0 or stride * width % 16):
                return False
    return True


def descriptor(make: type, t: Tensor, rows: int, columns: int) -> object:
    """A descriptor of (rows, columns) tiles of (batch, seqlen, heads, width), with heads before time."""
    step = 16 // t.element_size()
    order = (0, 2, 1)
    # The stride of a dimension of one element is never used, but must be valid.
    strides = [t.stride(d) if t.shape[d] > 1 else -(-t.shape[-1] // step) * step for d in order]
    return describe(make, t, [*(t.shape[d] for d in order), t.shape[-1]], [*strides, 1], [1, 1, rows, columns])


def describe(make: type, base: Tensor, shape: list[int], strides: list[int], block: list[int], **more: Any) -> object:
    """A tensor descriptor without its constructor's checks, which cost as much as a launch; `describable` made them."""
    made = object.__new__(make)
    made.__dict__.update(base=base, shape=shape, strides=strides, block_shape=block, padding="zero", **more)
    return made
