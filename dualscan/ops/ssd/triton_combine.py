# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""The join of a long sequence's segments."""

import triton
import triton.language as tl

SEGMENTS_AT_ONCE = 4


@triton.jit
def combine_kernel(
    ends, decays, initial, starts, sequences, nheads, per_head,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, INNER: tl.constexpr, HAS_INITIAL: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Joins the segments of every sequence: from each segment's own contribution to the state at its entry.

    Grid `(nheads, cdiv(per_head, BLOCK), sequences)`, float32. `sequences` holds (first segment, number of segments);
    `ends` (segment, head, per_head) has the contributions, and `decays` (segment, head) log2 of what a segment leaves
    of the state before it, both with INNER without every sequence's last segment (REVERSE: its first).

    All that AT_ONCE segments need is asked for before any of it is waited for: its places follow from `sequences`.
    """
    h, sequence = tl.program_id(0).to(tl.int64), tl.program_id(2)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < per_head
    first = tl.load(sequences + sequence * 2)
    count = tl.load(sequences + sequence * 2 + 1)
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + (sequence.to(tl.int64) * nheads + h) * per_head + e, mask=inside, other=0.0)
    for i in range(0, count, AT_ONCE):
        states, powers = (), ()
        for k in tl.static_range(AT_ONCE):
            own = first + (count - 1 - i - k if REVERSE else i + k)
            if INNER:
                own -= sequence + (1 if REVERSE else 0)
            lane = own.to(tl.int64) * nheads + h
            more = i + k + 1 < count
            states = states + (tl.load(ends + lane * per_head + e, mask=inside & more, other=0.0),)
            powers = powers + (tl.load(decays + lane, mask=more, other=0.0),)
        tl.debug_barrier()  # without it the loads above sink to where they are used, one after the other
        for k in tl.static_range(AT_ONCE):
            segment = first + (count - 1 - i - k if REVERSE else i + k)
            target = starts + (segment.to(tl.int64) * nheads + h) * per_head + e
            tl.store(target, state, mask=inside & (i + k < count))
            state = state * tl.exp2(powers[k]) + states[k]
