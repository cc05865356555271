"""Rows added to those of a matrix that have the same token: the gradient of an embedding, without atomics.

The tokens are sorted, and a program adds up a block of places, however many runs of equal tokens that is: texts and
worse have single tokens that occur thousands of times, for which one program would take longer than for all the others.
What a run has in a block that it does not begin and end in goes to memory in float32, and a second kernel adds up the
blocks of each such run. All orders are fixed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher, row_alignment

# Sorted places that a program adds up, rows that it has under way at once, and its columns: four a thread.
ROWS, AT_ONCE, COLUMNS, WARPS = 32, 8, 256, 2
# Blocks that a program of `join_kernel` looks for a run's end in at once, those that it adds up at once, its columns
# and warps: it has the longest run to itself, so that many threads fetch little each.
LOOKED, JOINED, JOINED_COLUMNS, JOIN_WARPS = 256, 32, 64, 4


@triton.jit(do_not_specialize=["count", "width"])
def add_rows_kernel(
    total, rows, tokens, order, shares, count: tl.int32, width: tl.int32,
    ROWS: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid `(blocks of ROWS places, tiles of columns)`: the sums of the runs that end in the block they begin in.

    Of a run that crosses blocks, `shares` `(blocks, 2, width)` gets the sums: `[:, 0]` of what came in from the block
    before, `[:, 1]` of what begins here, with the row of `total`. The width counts in ALIGN; `order` says which row a
    sorted token is of.
    """
    tl.static_assert(ROWS % AT_ONCE == 0)
    width = width * ALIGN
    block = tl.program_id(0)
    start = block * ROWS
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    shares += block.to(tl.int64) * 2 * width + column
    sums = tl.zeros([COLUMNS], tl.float32)
    came = True
    for first in range(start, tl.minimum(start + ROWS, count), AT_ONCE):
        # Places outside have the token -1.
        known, places = (), ()
        for r in tl.static_range(AT_ONCE + 2):
            i = first + r - 1
            token = tl.load(tokens + tl.minimum(tl.maximum(i, 0), count - 1))
            known += (tl.where((i >= 0) & (i < count), token, -1),)
        for r in tl.static_range(AT_ONCE):
            places += (tl.load(order + tl.minimum(first + r, count - 1)).to(tl.int32),)
        tiles, bases = (), ()
        for r in tl.static_range(AT_ONCE):
            token, live = known[r + 1], first + r < count
            tile = rows + places[r].to(tl.int64) * width
            tiles += (tl.load(tile + column, mask=inside & live, other=0.0),)
            row = total + token.to(tl.int64) * width
            bases += (tl.load(row + column, mask=inside & (live & (token != known[r])), other=0.0),)
        # All is on its way before the first sum: without this the compiler moves every load to where it is used, and
        # each is waited for before the next.
        tl.debug_barrier()
        for r in tl.static_range(AT_ONCE):
            token, live = known[r + 1], first + r < count
            begins, ends = token != known[r], token != known[r + 2]
            came = came & (token == known[r])
            sums = tl.where(begins, bases[r].to(tl.float32), sums) + tiles[r].to(tl.float32)
            row = total + token.to(tl.int64) * width
            tl.store(row + column, sums.to(total.dtype.element_ty), mask=inside & (live & ends & (came == 0)))
            leaves = (first + r == start + ROWS - 1) & (token == known[r + 2])
            tl.store(shares + tl.where(came, 0, width), sums, mask=inside & (live & ((ends & came) | leaves)))


@triton.jit(do_not_specialize=["count", "width"])
def join_kernel(
    total, tokens, shares, count: tl.int32, width: tl.int32,
    ROWS: tl.constexpr, LOOKED: tl.constexpr, JOINED: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid `(blocks but the last, tiles of columns)`: the sum of the run that begins in the block and goes on."""
    width = width * ALIGN
    block = tl.program_id(0)
    start, after = block * ROWS, (block + 1) * ROWS
    token = tl.load(tokens + after)
    last, first = tl.load(tokens + after - 1), tl.load(tokens + start)
    before = tl.load(tokens + start - 1, mask=start > 0, other=-1)
    if (last == token) & ((first != token) | (before != token)):
        # How many blocks it reaches: the tokens are sorted, so those that begin with it follow one another.
        i = tl.arange(0, LOOKED)
        reached = 0
        more = True
        while more:
            following = block + 1 + reached + i
            on = following < tl.cdiv(count, ROWS)
            own = tl.load(tokens + following.to(tl.int64) * ROWS, mask=on, other=-1) == token
            found = tl.sum(own.to(tl.int32), 0)
            reached += found
            more = found == LOOKED
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        begun = shares + (block.to(tl.int64) * 2 + 1) * width
        base = tl.load(begun + column, mask=inside, other=0.0)
        sums = tl.zeros([JOINED, COLUMNS], tl.float32)
        tile = sums
        # One time more than there are tiles: one is added while the next comes.
        for first in range(0, reached + JOINED, JOINED):
            r = first + tl.arange(0, JOINED)
            at = begun + (r.to(tl.int64) * 2 + 1)[:, None] * width + column[None, :]
            sums += tile
            tile = tl.load(at, mask=(r < reached)[:, None] & inside[None, :], other=0.0)
        row = total + token.to(tl.int64) * width
        tl.store(row + column, (base + tl.sum(sums, 0)).to(total.dtype.element_ty), mask=inside)


_add_rows, _join = Launcher(add_rows_kernel), Launcher(join_kernel)


def add_rows_(total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """As `tied.add_rows_`, for a contiguous `total` and as many tokens as rows."""
    count, width = rows.shape
    if rows.numel() == 0:
        return
    # Half as many digits to sort by as in 64 bits.
    found, order = torch.sort(tokens.to(torch.int32), stable=True)
    align, blocks = row_alignment(width), -(-count // ROWS)
    shares = torch.empty(blocks, 2, width, dtype=torch.float32, device=total.device)
    with _triton.on_device(total):
        _add_rows(
            (blocks, -(-width // COLUMNS), 1), (total, rows.contiguous(), found, order, shares),
            (count, width // align), (ROWS, AT_ONCE, COLUMNS, align), WARPS,
        )  # fmt: skip
        if blocks > 1:
            _join(
                (blocks - 1, -(-width // JOINED_COLUMNS), 1), (total, found, shares),
                (count, width // align), (ROWS, LOOKED, JOINED, JOINED_COLUMNS, align), JOIN_WARPS,
            )  # fmt: skip
