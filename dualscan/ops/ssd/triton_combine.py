# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""The join of a long sequence's segments."""

import triton
import triton.language as tl

SEGMENTS_AT_ONCE = 4


@triton.jit
def combine_kernel(
    ends, initial, starts, sums, segments, sequences, nheads, per_head, padded,
    Q: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, INNER: tl.constexpr,
    HAS_INITIAL: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Joins the segments of every sequence: from each segment's own contribution to the state at its entry.

    Grid `(nheads, cdiv(per_head, BLOCK), sequences)`, float32. `sequences` holds (first segment, number of segments);
    `ends` has a state a segment, with INNER without every sequence's last (REVERSE: its first).

    All that AT_ONCE segments need is asked for before any of it is waited for: states first, whose places follow from
    `sequences` alone.
    """
    h, sequence = tl.program_id(0).to(tl.int64), tl.program_id(2)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < per_head
    first = tl.load(sequences + sequence * 2)
    count = tl.load(sequences + sequence * 2 + 1)
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + (sequence.to(tl.int64) * nheads + h) * per_head + e, mask=inside, other=0.0)
    j, c = tl.arange(0, AT_ONCE), tl.arange(0, CHUNKS)
    for i in range(0, count, AT_ONCE):
        place = segments + (first + (count - 1 - i - j if REVERSE else i + j)) * 7
        live = i + j < count
        start = tl.load(place + 1, mask=live, other=0)
        end = tl.load(place + 2, mask=live, other=0)
        chunk = tl.load(place + 3, mask=live, other=0)
        states = ()
        for k in tl.static_range(AT_ONCE):
            own = first + (count - 1 - i - k if REVERSE else i + k)
            if INNER:
                own -= sequence + (1 if REVERSE else 0)
            own_state = ends + (own.to(tl.int64) * nheads + h) * per_head + e
            states = states + (tl.load(own_state, mask=inside & (i + k + 1 < count), other=0.0),)
        tl.debug_barrier()  # without it the loads above sink below what waits for the tables
        used = c[None, :] < tl.cdiv(end - start, Q)[:, None]
        decays = tl.load(sums + h * padded + (chunk[:, None] + c[None, :]) * Q + Q - 1, mask=used, other=0.0)
        totals = tl.sum(decays, 1).to(tl.float32)
        for k in tl.static_range(AT_ONCE):
            segment = first + (count - 1 - i - k if REVERSE else i + k)
            target = starts + (segment.to(tl.int64) * nheads + h) * per_head + e
            tl.store(target, state, mask=inside & (i + k < count))
            state = state * tl.exp2(tl.sum(tl.where(j == k, totals, 0.0), 0)) + states[k]
