"""The tables of a packed batch by one launch: `_triton.packed_plan` on a GPU."""

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops._launch import Launcher
from dualscan.ops._triton import cdiv

# Rows of a program, and boundaries that it reads at once: up to FEW sequences, and beyond.
FEW, TILE, WIDE_TILE = 64, (32, 64), (16, 512)
WARPS = 4
# Every table begins at a multiple of so many elements, as a tensor of its own would: kernels count on aligned pointers.
ALIGNED = 32


@triton.jit(do_not_specialize=["nseq", "nsegments", "nchunks", "nsupers", "segment", "chunk", "long"])
def plan_kernel(
    bounds, segments, sequences, chunks, supers, nseq: tl.int32, nsegments: tl.int32, nchunks: tl.int32,
    nsupers: tl.int32, segment: tl.int32, chunk: tl.int32, long: tl.int32,
    ROWS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the table of segments and of `sequences`, of that of chunks, or of that of super-chunks of `long`
    tokens. Grid `(cdiv(nchunks, ROWS), 3)`: no other table is longer.

    The sequence of a row is the first whose last piece lies beyond it: nothing is searched, and pieces of earlier
    sequences are counted on the way.
    """
    table, first = tl.program_id(1), tl.program_id(0) * ROWS
    size = tl.where(table == 0, segment, tl.where(table == 1, chunk, long))
    count = tl.where(table == 0, nsegments, tl.where(table == 1, nchunks, nsupers))
    # An empty sequence has a segment, for its state.
    least = tl.where(table == 0, 1, 0)
    if first < count:
        row, k = first + tl.arange(0, ROWS), tl.arange(0, SEQUENCES)
        # Of every row: its sequence, and the pieces, chunks and super-chunks of those before.
        owner, pieces_before = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
        chunks_before, supers_before = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
        total, chunks_total, supers_total = 0, 0, 0
        for i in range(0, nseq, SEQUENCES):
            inside = i + k < nseq
            begin = tl.load(bounds + i + k, mask=inside, other=0)
            length = tl.load(bounds + i + k + 1, mask=inside, other=0) - begin
            pieces = tl.where(inside, tl.maximum((length + size - 1) // size, least), 0)
            own_chunks, own_supers = (length + chunk - 1) // chunk, (length + long - 1) // long
            ends = total + tl.cumsum(pieces, 0)
            after = total + tl.sum(pieces, 0)
            # Rows from `total` on belong to these sequences or to later ones, which overwrite them; rows past the
            # table's last piece stay with the last sequence.
            if (first + ROWS > total) & ((first < after) | (i + SEQUENCES >= nseq)):
                passed = (ends[None, :] <= row[:, None]) & (i + k < nseq - 1)[None, :]
                here = row >= total
                owner = tl.where(here, i + tl.sum(passed.to(tl.int32), 1), owner)
                counted = tl.sum(tl.where(passed, pieces[None, :], 0), 1)
                pieces_before = tl.where(here, total + counted, pieces_before)
                counted = tl.sum(tl.where(passed, own_chunks[None, :], 0), 1)
                chunks_before = tl.where(here, chunks_total + counted, chunks_before)
                counted = tl.sum(tl.where(passed, own_supers[None, :], 0), 1)
                supers_before = tl.where(here, supers_total + counted, supers_before)
            total = after
            chunks_total += tl.sum(own_chunks, 0)
            supers_total += tl.sum(own_supers, 0)
        live, real = row < count, row < total
        begin = tl.load(bounds + owner, mask=live, other=0)
        limit = tl.load(bounds + owner + 1, mask=live, other=0)
        token = tl.where(real, begin + (row - pieces_before) * size, limit)
        zero, first_chunk = tl.zeros([ROWS], tl.int32), chunks_before + (token - begin) // chunk
        if table == 0:
            ends_here = limit - token <= size
            edges = tl.where(real, (token == begin).to(tl.int32) + 2 * ends_here.to(tl.int32), 0)
            target = segments + row * 7
            tl.store(target, zero, mask=live)
            tl.store(target + 1, token, mask=live)
            tl.store(target + 2, tl.where(ends_here, limit, token + size), mask=live)
            tl.store(target + 3, first_chunk, mask=live)
            tl.store(target + 4, owner, mask=live)
            tl.store(target + 5, edges, mask=live)
            tl.store(target + 6, supers_before + (token - begin) // long, mask=live)
            opens = live & real & (row == pieces_before)
            tl.store(sequences + owner * 2, row, mask=opens)
            tl.store(sequences + owner * 2 + 1, tl.maximum((limit - begin + size - 1) // size, 1), mask=opens)
        elif table == 1:
            target = chunks + row * 3
            tl.store(target, zero, mask=live)
            tl.store(target + 1, token, mask=live)
            tl.store(target + 2, limit, mask=live)
        else:
            target = supers + row * 4
            tl.store(target, zero, mask=live)
            tl.store(target + 1, token, mask=live)
            tl.store(target + 2, limit, mask=live)
            tl.store(target + 3, first_chunk, mask=live)


_plan = Launcher(plan_kernel)


def packed_tables(
    cu_seqlens: Tensor, seqlen: int, chunk: int, every: int, segment: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_triton.packed_tables` computes, in one block of memory."""
    nseq, long = cu_seqlens.shape[0] - 1, chunk * every
    nsegments, nchunks, nsupers = (nseq + seqlen // size for size in (segment, chunk, long))
    shapes = ((nsegments, 7), (nseq, 2), (nchunks, 3), (nsupers, 4))
    places = [0, *accumulate(cdiv(rows * columns, ALIGNED) * ALIGNED for rows, columns in shapes)]
    memory = torch.empty(places[-1], dtype=torch.int32, device=cu_seqlens.device)
    tables = [memory.as_strided(shape, (shape[1], 1), place) for shape, place in zip(shapes, places, strict=False)]
    rows, sequences = TILE if nseq <= FEW else WIDE_TILE
    _plan(
        (cdiv(nchunks, rows), 3, 1), (cu_seqlens.contiguous(), *tables),
        (nseq, nsegments, nchunks, nsupers, segment, chunk, long), (rows, sequences), WARPS,
    )  # fmt: skip
    return tuple(tables)
