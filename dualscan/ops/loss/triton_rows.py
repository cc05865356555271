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
ROWS, AT_ONCE, COLUMNS, WARPS = 32, 16, 256, 2
# Blocks of a run and columns that a program of `join_kernel` takes at once. It has the longest run to itself, so it
# fetches much and has few columns.
JOINED, JOINED_COLUMNS, JOIN_WARPS = 64, 64, 4


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
    width = width * ALIGN
    block = tl.program_id(0)
    start = block * ROWS
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    shares += block.to(tl.int64) * 2 * width + column
    sums = tl.zeros([COLUMNS], tl.float32)
    came = True
    for first in range(start, tl.minimum(start + ROWS, count), AT_ONCE):
        # Everything is on its way before the first sum is stored: no load is moved before a store. Places outside have
        # the token -1, with the neighbours of those that are looked at.
        known = (tl.load(tokens + first - 1, mask=first > 0, other=-1),)
        for r in tl.static_range(AT_ONCE + 1):
            known += (tl.load(tokens + first + r, mask=first + r < count, other=-1),)
        tiles, bases = (), ()
        for r in tl.static_range(AT_ONCE):
            live = first + r < count
            place = tl.load(order + first + r, mask=live, other=0)
            tiles += (tl.load(rows + place * width + column, mask=inside & live, other=0.0),)
            begins = live & (known[r + 1] != known[r])
            row = total + known[r + 1].to(tl.int64) * width
            bases += (tl.load(row + column, mask=inside & begins, other=0.0),)
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
    ROWS: tl.constexpr, JOINED: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid `(blocks but the last, tiles of columns)`: the sum of the run that begins in the block and goes on."""
    width = width * ALIGN
    block = tl.program_id(0)
    start, after = block * ROWS, (block + 1) * ROWS
    token = tl.load(tokens + after)
    last, first = tl.load(tokens + after - 1), tl.load(tokens + start)
    before = tl.load(tokens + start - 1, mask=start > 0, other=-1)
    if (last == token) & ((first != token) | (before != token)):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        shares += column
        begun = tl.load(shares + (block.to(tl.int64) * 2 + 1) * width, mask=inside, other=0.0)
        sums = tl.zeros([JOINED, COLUMNS], tl.float32)
        i = block + 1 + tl.arange(0, JOINED)
        own = tl.load(tokens + i.to(tl.int64) * ROWS, mask=i < tl.cdiv(count, ROWS), other=-1) == token
        next = block + 1
        more = True
        while more:
            live = own[:, None] & inside[None, :]
            tile = tl.load(shares + (i.to(tl.int64) * 2 * width)[:, None], mask=live, other=0.0)
            # Whether there are more, while these come: the tokens are sorted, so the first one tells.
            i += JOINED
            next += JOINED
            own = tl.load(tokens + i.to(tl.int64) * ROWS, mask=i < tl.cdiv(count, ROWS), other=-1) == token
            more = tl.load(tokens + next.to(tl.int64) * ROWS, mask=next < tl.cdiv(count, ROWS), other=-1) == token
            sums += tile
        row = total + token.to(tl.int64) * width
        tl.store(row + column, (begun + tl.sum(sums, 0)).to(total.dtype.element_ty), mask=inside)


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
                (count, width // align), (ROWS, JOINED, JOINED_COLUMNS, align), JOIN_WARPS,
            )  # fmt: skip
